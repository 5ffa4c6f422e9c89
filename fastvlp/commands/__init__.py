"""The commands of ``fastvlp``, one module each: a dataclass of options with ``run()``."""
