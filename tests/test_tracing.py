"""What torch.compile takes for a constant, and what marking it so must not cost."""

import torch

from fastvlp._tracing import constant_result


def test_the_mark_is_the_one_that_torch_sets():
    def ours():
        pass

    def theirs():
        pass

    assert constant_result(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_a_constant_result_is_not_traced():
    looks = []

    @constant_result
    def look():
        looks.append(print)  # nothing that could be traced
        return len(looks)

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + look(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(looks) == 1
