"""Training: settings, schedules, the loop, checkpoints, logs, and one task for each system.

    from fastvlp.train.config import TrainClip
    from fastvlp.train.run import train

    train(TrainClip(folder=Path("runs/clip")))      # what `fastvlp train clip` does

``fastvlp.train.loop`` is the place to begin reading.
"""
