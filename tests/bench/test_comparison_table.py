"""bench/_harness/table.py: whatever the width, every number is whole and names fold."""

import re

import pytest
from _harness import table
from hypothesis import given
from hypothesis import strategies as st


def row(impl, ms, **more):
    return {
        "op": "contrastive", "impl": impl, "dtype": "bf16", "shape": {"n": 8192, "d": 512},
        "phase": "fwd+bwd", "ms": ms, "ms_q1": 0.9 * ms, "ms_q3": 1.1 * ms, "rounds": 3,
        "peak_mb": ms / 3, "error": 1e-7 * ms, "logits": "bf16", "softmax": "fp32",
    } | more  # fmt: skip


ROWS = [
    row("fastvlp", 1446.7),
    row("open_clip autocast compiled", 12078.9),
    row("floor3", 615.6, peak_mb=None, error=None, note="torch.mm for 3 matmuls alone"),
]


def numbers(each):
    ours = ROWS[0]["ms"]
    found = [f"{each['ms']:.1f}", f"{each['ms_q1']:.1f}–{each['ms_q3']:.1f}"]
    found += [f"{8192 / each['ms'] * 1e3:,.0f}", f"{each['ms'] / ours:.2f}"]
    if each["error"] is not None:
        found += [f"{each['peak_mb']:.1f}", f"{each['error']:.1e}"]
    return found


@pytest.mark.parametrize("width", [60, 80, 110, 140])
def test_no_number_is_cut(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    table.table(ROWS, rate=("pairs/s", "n"), extra_columns=("logits", "softmax"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    words = printed.split()
    for each in ROWS:
        for number in numbers(each):
            assert number in words, number
    parts = printed.count("implementation")
    assert (parts == 1) == (width >= 110)
    for name in ("fastvlp", "floor3"):
        assert len(re.findall(rf"^{name} ", printed, re.M)) == parts
    assert "floor3: torch.mm for 3 matmuls alone." in printed


@given(
    st.integers(20, 200),
    st.integers(1, 60),
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
)
def test_every_column_is_in_one_block_that_fits(width, name, cells):
    names = table.Column("", ["n" * name])
    columns = [table.Column("", ["1" * size]) for size in cells]
    found = table.blocks(names, columns, width)
    assert [column for block in found for column in block] == columns and all(found)
    least = min(name, table.LEAST_NAME)
    for block in found:
        used = least + sum(column.width + table.GAP for column in block)
        assert used <= width or len(block) == 1


def test_a_pipe_is_as_wide_as_the_names_need(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    table.table(ROWS, rate=("pairs/s", "n"), extra_columns=("logits", "softmax"))
    assert "open_clip autocast compiled  " in capsys.readouterr().out
