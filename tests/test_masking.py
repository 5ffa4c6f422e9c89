"""Masking against a plain loop over words, its statistics, and what its result may depend on."""

import math
import random
from collections import Counter
from collections.abc import Iterable
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.masking import IGNORED, MaskingVocabulary, mask_tokens, sample_keys

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 50
# Ids from 30 on continue a word.
VOCABULARY = MaskingVocabulary(SIZE, MASK, PAD, CLS, SEP, torch.arange(SIZE) >= 30)


def rows(n: int, length: int, seed: int = 0, full: bool = False) -> torch.Tensor:
    draw = random.Random(seed)
    out = torch.zeros(n, length, dtype=torch.int64)
    for row in out:
        real = length if full else draw.randint(min(2, length), length)
        tokens = [draw.randrange(5, SIZE) for _ in range(real)]
        row[:real] = torch.tensor([CLS, *tokens[2:], SEP] if real > 1 else tokens)
    return out


def words_of(row: list[int], padded: bool) -> list[list[int]]:
    """Positions of each word: the rule in its plainest form."""
    words: list[list[int]] = []
    for position, token in enumerate(row):
        if token in (CLS, SEP) or (token == PAD and not padded):
            continue
        if words and bool(VOCABULARY.continuation[token]):
            words[-1].append(position)
        else:
            words.append([position])
    return words


KEYS = [-6411193824288604561, -5511663747979980962]
MASKED = {
    False: [CLS, MASK, MASK, 31, 7, 32, 33, 8, 9, 10, SEP, PAD],
    True: [CLS, MASK, MASK, 46, 7, 32, 33, 8, 9, 10, SEP, PAD],
}


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, torch.arange(n))


_batches = st.builds(
    rows, st.integers(0, 6), st.integers(0, 24), st.integers(0, 10**6), st.booleans()
)


@given(ids=_batches, seed=st.integers(-(2**70), 2**70), rate=st.sampled_from([0.0, 0.15, 0.6, 1.0]))
def test_subwords_are_chosen_among_all_but_pad_and_cls(ids, seed, rate):
    masked, labels = mask_tokens(ids, VOCABULARY, keys(len(ids), seed), rate=rate)
    chosen = labels != IGNORED
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()
    allowed = (ids != PAD) & (ids != CLS)
    assert not (chosen & ~allowed).any()
    if rate in (0.0, 1.0):
        assert torch.equal(chosen, allowed & bool(rate))


@given(
    ids=_batches,
    seed=st.integers(0, 2**40),
    rate=st.sampled_from([0.15, 0.3, 1.0]),
    budget=st.sampled_from(["real", "padded"]),
)
def test_whole_words_fill_the_budget(ids, seed, rate, budget):
    padded = budget == "padded"
    masked, labels = mask_tokens(
        ids, VOCABULARY, keys(len(ids), seed), rate=rate, whole_word=True, budget=budget
    )
    for row, label, out in zip(ids.tolist(), labels.tolist(), masked.tolist(), strict=True):
        chosen = {i for i, value in enumerate(label) if value != IGNORED}
        assert all(label[i] == row[i] != PAD for i in chosen)
        assert all(out[i] == row[i] for i in range(len(row)) if i not in chosen)
        words = words_of(row, padded=False)
        whole = [word for word in words if set(word) <= chosen]
        assert chosen == {i for word in whole for i in word}
        length = len(row) if padded else sum(token != PAD for token in row)
        allowance = max(1, round(rate * length))
        assert len(chosen) <= allowance
        if not padded:
            # Nothing that would still fit was left out.
            left = allowance - len(chosen)
            assert all(len(word) > left for word in words if word not in whole)


def p_value(observed, expected) -> float:
    """Of Pearson's chi-square test, all probabilities known."""
    observed, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def greedy_choice(words: Iterable[list[int]], allowance: int) -> list[int]:
    chosen: list[int] = []
    for word in words:
        if len(chosen) + len(word) <= allowance:
            chosen += word
    return chosen


@pytest.mark.parametrize("budget", ["real", "padded"])
def test_whole_words_are_chosen_as_often_as_by_the_greedy_rule(budget):
    """All outcomes of one row, counted over many keys, against every order of its words."""
    row = [CLS, 5, 6, 31, 7, 32, 33, 8, SEP, PAD, PAD, PAD]
    n, rate, real = 20_000, 0.4, 9
    ids = torch.tensor([row]).expand(n, -1)
    _, labels = mask_tokens(ids, VOCABULARY, keys(n), rate=rate, whole_word=True, budget=budget)
    seen = Counter(((labels != IGNORED) * 2 ** torch.arange(len(row))).sum(1).tolist())
    allowance = round(rate * (real if budget == "real" else len(row)))
    expected = Counter()
    for words in permutations(words_of(row, budget == "padded")):
        choice = greedy_choice(words, allowance)
        expected[sum(1 << i for i in choice if i < real)] += 1
    assert set(seen) <= set(expected)
    scale = n / expected.total()
    outcomes = sorted(expected)
    assert p_value([seen[o] for o in outcomes], [expected[o] * scale for o in outcomes]) > 1e-3


def test_fates_are_80_10_10_and_random_tokens_cover_the_vocabulary():
    ids = rows(4000, 30, full=True)
    masked, labels = mask_tokens(ids, VOCABULARY, keys(len(ids)))
    chosen = labels != IGNORED
    candidates = int((ids != CLS).sum())
    total = int(chosen.sum())
    hoped = [0.15 * candidates, 0.85 * candidates]
    assert p_value([total, candidates - total], hoped) > 1e-3
    became, was = masked[chosen], labels[chosen]
    # A random token may be the mask token or the old one by chance.
    as_mask = int((became == MASK).sum())
    kept = int((became == was).sum())
    other = total - as_mask - kept
    hoped = [0.8 + 0.1 / SIZE, 0.1 + 0.1 / SIZE, 0.1 - 0.2 / SIZE]
    assert p_value([as_mask, kept, other], [total * p for p in hoped]) > 1e-3
    random_ids = became[(became != MASK) & (became != was)]
    counts = torch.bincount(random_ids, minlength=SIZE).double()
    # Every token but [MASK] is equally likely, less the chance of being the one that was there.
    share = 1 - torch.bincount(was, minlength=SIZE).double() / total
    share[MASK] = 0
    wanted = share / share.sum() * counts.sum()
    keep = torch.arange(SIZE) != MASK
    assert p_value(counts[keep], wanted[keep]) > 1e-3


def test_positions_and_neighbouring_rows_are_independent():
    n, length, rate = 20_000, 12, 0.5
    ids = torch.full((n, length), 7)
    chosen = mask_tokens(ids, VOCABULARY, keys(n), rate=rate)[1] != IGNORED
    for pair in (chosen[:, ::2] * 2 + chosen[:, 1::2], chosen[::2] * 2 + chosen[1::2]):
        counts = torch.bincount(pair.flatten().long(), minlength=4).double()
        assert p_value(counts, counts.sum().expand(4) / 4) > 1e-3


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_row_depends_on_its_own_key_and_ids_only(whole_word):
    ids, k = rows(64, 20), keys(64)
    masked, labels = mask_tokens(ids, VOCABULARY, k, whole_word=whole_word)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    again = mask_tokens(ids[order], VOCABULARY, k[order], whole_word=whole_word)
    assert torch.equal(again[0], masked[order]) and torch.equal(again[1], labels[order])
    # More padding changes nothing where the budget is that of the text.
    wider = torch.nn.functional.pad(ids, (0, 9))
    wide = mask_tokens(wider, VOCABULARY, k, whole_word=whole_word)
    assert torch.equal(wide[0][:, :20], masked) and torch.equal(wide[1][:, :20], labels)
    other = mask_tokens(ids, VOCABULARY, keys(64, seed=1), whole_word=whole_word)
    assert not torch.equal(other[1], labels)


def test_draws_are_fixed_for_good():
    """Resuming a run with a later version must go on with the same tokens."""
    assert sample_keys(0, torch.arange(2)).tolist() == KEYS
    ids = torch.tensor([[CLS, 5, 6, 31, 7, 32, 33, 8, 9, 10, SEP, PAD]])
    for whole_word, masked in MASKED.items():
        out = mask_tokens(ids, VOCABULARY, keys(1), rate=0.4, whole_word=whole_word)[0]
        assert out.tolist() == [masked]


@pytest.mark.parametrize("whole_word", [False, True])
def test_int32_ids_the_device_and_the_compiler_change_nothing(whole_word, device):
    ids, k = rows(16, 20), keys(16)
    expected = mask_tokens(ids, VOCABULARY, k, whole_word=whole_word)
    there = VOCABULARY.to(device)

    def run(x, key):
        return mask_tokens(x, there, key, whole_word=whole_word)

    for function in (run, torch.compile(run, fullgraph=True, backend="eager")):
        masked, labels = function(ids.int().to(device), k.to(device))
        assert masked.dtype == torch.int32 and labels.dtype == torch.int64
        assert torch.equal(masked.long().cpu(), expected[0])
        assert torch.equal(labels.cpu(), expected[1])


def test_keys_differ_by_seed_and_index():
    every = torch.cat([keys(1000, seed) for seed in (0, 1, 2, -1, 2**63)])
    assert len(every.unique()) == len(every)
    assert torch.equal(keys(5, 2**64 + 3), keys(5, 3))
    ones = sum(bin(k % 2**64).count("1") for k in every.tolist())
    assert abs(ones / (64 * len(every)) - 0.5) < 4 * math.sqrt(0.25 / (64 * len(every)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, TypeError, "ids: expected int32 or int64"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, r"ids: expected \[n, length\]"),
        ({"keys": torch.zeros(2)}, TypeError, "keys: expected int64"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, ValueError, "each of the 2 rows"),
        ({"rate": 1.5}, ValueError, "rate: expected 0 to 1"),
        ({"budget": "all"}, ValueError, "budget: expected 'real' or 'padded'"),
        ({"vocabulary": VOCABULARY.to("meta")}, ValueError, "expected it on the device of ids"),
        (
            {"vocabulary": MaskingVocabulary(9, 4, 0, 2, 3, torch.zeros(8).bool())},
            ValueError,
            r"expected shape \(9,\)",
        ),
    ],
)
def test_refuses_other_arguments(change, error, message):
    arguments = {"ids": rows(2, 5), "vocabulary": VOCABULARY, "keys": keys(2), **change}
    with pytest.raises(error, match=message):
        mask_tokens(**arguments)
