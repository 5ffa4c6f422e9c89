"""Image–text data: demonstration pairs, WebDataset shards, the loader, tokenizers.

Every part imports its optional dependencies where they are used, so that a plain install of fastvlp
can import those whose own are present: ``from fastvlp.data import Loader, openmoji``.
"""

from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.loader import Loader

__all__ = ["Loader", "RgbConversion"]
