"""Vocabulary files of a few entries, in the formats of the published ones."""

import gzip

MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "s a", "sa t</w>"]


def bpe_file(folder):
    """CLIP's merges file with six merges."""
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *MERGES, ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def bert_vocabulary(folder, words=("a", "cat", "##s")):
    """BERT's vocab.txt with its special entries and a few words."""
    path = folder / "vocab.txt"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    path.write_text("".join(f"{entry}\n" for entry in entries))
    return path
