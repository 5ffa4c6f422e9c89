"""Few rows against a vocabulary on a CPU: matmuls that do little else than move its weights."""

import pytest
import torch
from fastvlp_tests.soft_cross_entropy_cases import draw
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

from fastvlp.ops.soft_cross_entropy import matmuls

ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 3, 7), (1, 1, 1), (2, 63, 5), (5, 64, 301), (32, 130, 515)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient(monkeypatch, isa, low, dtype):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    for rows, width, vocabulary in SIZES:
        # Rows of logits are longer than the vocabulary.
        gradient = torch.randn(rows, vocabulary + 3).to(low)[:, :vocabulary]
        hidden = torch.randn(rows, width).to(low)
        found = torch.ops.fastvlp.soft_cross_entropy_weight_gradient(
            gradient, hidden, torch.empty(0, dtype=dtype), -0.3
        )
        exact = -0.3 * gradient.double().T @ hidden.double()
        eager = (-0.3 * (gradient.float().T @ hidden.float())).to(dtype)
        assert found.dtype == dtype and found.shape == exact.shape
        assert_as_accurate("weight", found, eager, exact, epsilon(dtype) * exact.norm().item())


def test_a_large_weight_gradient_is_written_past_the_caches():
    # In both parts of the output, which threads share, and up to its end.
    gradient, hidden = torch.randn(3, 4099), torch.randn(3, 272)
    found = torch.ops.fastvlp.soft_cross_entropy_weight_gradient(
        gradient, hidden, torch.empty(0), 1.0
    )
    assert found.numel() * found.element_size() > 4 << 20
    torch.testing.assert_close(found, gradient.T @ hidden, rtol=1e-5, atol=1e-5)


def test_too_many_rows_and_rows_that_do_not_match_are_refused():
    call = torch.ops.fastvlp.soft_cross_entropy_weight_gradient
    with pytest.raises(RuntimeError, match="same number of rows, at most 32"):
        call(torch.zeros(33, 4), torch.zeros(33, 2), torch.empty(0), 1.0)
    with pytest.raises(RuntimeError, match="same number of rows, at most 32"):
        call(torch.zeros(3, 4), torch.zeros(2, 2), torch.empty(0), 1.0)


def test_opcheck():
    arguments = torch.randn(3, 4), torch.randn(3, 2), torch.empty(0, dtype=torch.bfloat16), 0.5
    torch.library.opcheck(torch.ops.fastvlp.soft_cross_entropy_weight_gradient, arguments)


@pytest.mark.parametrize("rows", [matmuls.FEW_ROWS, matmuls.FEW_ROWS + 1])
def test_few_rows_are_as_wide_as_their_weights(rows):
    case = draw(rows, 8, 60, torch.bfloat16, "cpu", master=True)
    wide = matmuls.in_few_rows(case.hidden, case.weight)
    is_few = rows == matmuls.FEW_ROWS
    assert wide.dtype == (torch.float32 if is_few else torch.bfloat16)
    assert matmuls.in_few_rows(case.hidden, case.weight.bfloat16()) is case.hidden
