"""Image–text data: demonstration pairs, WebDataset shards, tokenizers.

Nothing is imported here, so that a plain install of fastvlp can import every part whose own
dependencies are present. Import the part you need: ``from fastvlp.data import openmoji``.
"""
