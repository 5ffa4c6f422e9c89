"""Of what compiled kernels store in global memory, whether whole vectors are."""

import pytest
import torch
from fastvlp_tests import contrastive_formulas as contrastive


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["gradient_kernel", "sigmoid_kernel"])
def test_logit_gradients(count_on_ptx, capability, kernel):
    # As many columns as end within a vector, the last of which is stored past them as well.
    problem = contrastive.draw(140, 203, 32, torch.bfloat16, torch.device("cpu"))
    weights = torch.tensor([0.5, 0.5])
    arguments = {
        "gradient_kernel": (
            "contrastive.backward", "contrastive_gradients", problem.x, problem.y, problem.scale,
            *contrastive.gradient_inputs(problem, weights), weights,
        ),
        "sigmoid_kernel": (
            "contrastive.sigmoid", "sigmoid_contrastive", problem.x, problem.y, problem.scale,
            problem.bias,
        ),
    }[kernel]  # fmt: skip
    _, launches = count_on_ptx(capability)(*arguments, workspace_bytes=1 << 20)
    (counts,) = [counts for name, _, counts in launches if name == kernel]
    stores = [opcode for opcode in counts.instructions if opcode.startswith("st.global")]
    assert any(".v4." in opcode for opcode in stores)
    assert not any(opcode.endswith(("b16", "b8")) for opcode in stores), stores
