"""bench/matmul.py: its implementations compute the same, and a quick run writes every row."""

import matmul
import pytest
from _harness import measure
from fastvlp_tests.bench_runs import missing_names, quick_rows

LAYERS = ["--rows", "40", "--layers", "32x48,48x32"]


@pytest.mark.parametrize("phase", ["fwd", "fwd+bwd"])
def test_implementations_agree(phase):
    given = matmul.inputs(matmul.parse(LAYERS), 32, 48, 40)
    truth = matmul.reference(phase, given)
    names = []
    for implementation in matmul.implementations(phase):
        names.append(implementation.name)
        found = implementation.make(given)()
        if implementation.bound:
            assert found is None
            continue
        assert set(found) == set(truth)
        low = implementation.name.endswith("bf16")
        for name, value in truth.items():
            error = measure.relative_error(found[name], value)
            assert error < (2e-2 if low else 1e-6), (implementation.name, name)
    assert names[0] == measure.OURS and "torch" in names


def test_widths_are_checked(capsys):
    for wrong in ("384", "384x0", "axb", ""):
        with pytest.raises(SystemExit):
            matmul.parse(["--layers", wrong])
        assert "expected widths as in" in capsys.readouterr().err


def test_quick_run(tmp_path, capsys):
    meta, rows = quick_rows(matmul.main, tmp_path / "found.json", *LAYERS)
    assert not missing_names(meta)
    assert len(rows) == 2 * 2 * len(matmul.implementations("fwd"))
    assert "of its error" in capsys.readouterr().out
