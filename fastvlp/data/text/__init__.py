"""Captions to token ids.

    ClipTokenizer      CLIP's byte-level BPE, from its merges file
    BertTokenizer      BERT's WordPiece, from a vocab.txt; ``vilt_tokenizer`` and
                       ``albef_tokenizer`` are its settings in those systems
    CaptionTokenizer   a small vocabulary of words or pieces learned from the captions at hand, by
                       ``train_tokenizer``; ``train_wordpiece`` learns a BertTokenizer's

All are called with a list of captions and give padded ids; the first two give ids with their mask
(``tokenizer.padded``) or packed ids with their layout (``tokenizer.packed``) as well.
"""

from fastvlp.data.text.base import PackedText, PaddedText
from fastvlp.data.text.bert import BertTokenizer, albef_tokenizer, train_wordpiece, vilt_tokenizer
from fastvlp.data.text.clip import ClipTokenizer
from fastvlp.data.text.export import save_for_transformers
from fastvlp.data.text.learned import CaptionTokenizer, train_tokenizer

__all__ = [
    "BertTokenizer",
    "CaptionTokenizer",
    "ClipTokenizer",
    "PackedText",
    "PaddedText",
    "albef_tokenizer",
    "save_for_transformers",
    "train_tokenizer",
    "train_wordpiece",
    "vilt_tokenizer",
]
