"""torch.compile(fullgraph=True) of every operator on CUDA tensors, traced without a GPU."""

import pytest
import torch
from fastvlp_tests import fake_cuda

OPERATORS = {
    "contrastive": ["contrastive_statistics", "contrastive_gradients"],
    "sigmoid": ["contrastive_sigmoid"],
    "momentum": ["momentum_contrastive"],
    "cross_attention": ["cross_attention_forward", "cross_attention_backward"],
    "word_patch_alignment": ["word_patch_alignment", "word_patch_alignment_gradients"],
    "soft_cross_entropy": ["soft_cross_entropy_losses", "soft_cross_entropy_gradients"],
    "soft_cross_entropy_in_groups": ["soft_cross_entropy_losses_and_gradients"],
    "ema": ["last_exceeding", "ema_update"],
    "adamw_ema": ["last_exceeding", "adamw_ema"],
}


def called(graph: torch.fx.GraphModule) -> set[str]:
    """Names of the operators in a graph and in the graphs of its autograd functions."""
    return {
        str(node.target).removeprefix("fastvlp.").removesuffix(".default")
        for module in graph.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", fake_cuda.CALLS)
def test_no_operator_breaks_the_graph(monkeypatch, name, dynamic):
    monkeypatch.delenv("FASTVLP_BACKEND", raising=False)
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with fake_cuda.gpu():
        function, tensors = fake_cuda.CALLS[name](40, torch.bfloat16)
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
        compiled(*tensors)
    assert len(graphs) == 1
    assert set(OPERATORS.get(name, [])) <= called(graphs[0])
