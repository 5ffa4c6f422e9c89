"""What torch.compile is told of functions that it cannot, or need not, look into."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_result(function: Function) -> Function:
    """Lets torch.compile call `function` while it traces, and take the result for a constant.

    The same as `torch.compiler.assume_constant_result`, which imports the whole compiler, seconds
    at every start, in order to set this mark.
    """
    function._dynamo_marked_constant = True
    return function
