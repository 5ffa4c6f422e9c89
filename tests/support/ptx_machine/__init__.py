"""Executes compiled PTX with NumPy, all threads of many blocks at once.

`parser` reads the text, `program` decodes it by the table of instruction forms in `forms`,
`machine` runs it on `memory` under a `schedule`, `observer` is how others watch, `hazards` and
`counts` are such observers, and `virtual_gpu` lets the launchers of fastvlp.kernels run on it.
"""
