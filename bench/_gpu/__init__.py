"""The GPU check and the model of GPU times."""
