"""The training steps that bench/train_step.py times."""
