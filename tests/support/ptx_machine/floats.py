"""Floating point arithmetic.

add, sub, mul and fma are rounded once. The approximate instructions (ex2, lg2, rcp, rsqrt, tanh,
sin, cos, and div and sqrt with .approx or .full) give the true value rounded to nearest, which is
within the error that the ISA allows a device; a device's own last bits differ. div.approx alone
loses divisors above 2**126, as the ISA says. NaNs that arithmetic makes carry the payload of the
machine at hand.
"""

import numpy as np

from . import rounding
from .forms import Decoder, form

CANONICAL_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
_SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x):
    """Subnormal float32 values as zeros of the same sign; anything else as it is."""
    tiny = np.abs(x) < _SMALLEST_NORMAL
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def saturate(x):
    """To [0, 1]; NaN becomes +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _finished(function, kind: str, ftz: bool, sat: bool):
    """`function` with subnormals flushed before and after, and results saturated."""
    if not (ftz or sat):
        return function

    def wrapped(*values):
        result = function(*(flush(v) for v in values)) if ftz else function(*values)
        result = flush(result) if ftz else result
        return saturate(result) if sat else result

    return wrapped


def _apply(d: Decoder, kind: str, arity: int, function):
    sources = [d.source(i + 1, kind) for i in range(arity)]
    write = d.destination(0, kind)
    if arity == 1:
        (a,) = sources
        return lambda lanes: write(lanes, function(a(lanes)))
    if arity == 2:
        a, b = sources
        return lambda lanes: write(lanes, function(a(lanes), b(lanes)))
    a, b, c = sources
    return lambda lanes: write(lanes, function(a(lanes), b(lanes), c(lanes)))


def arithmetic(d: Decoder, name: str):
    """add, sub, mul, min and max, which share their mnemonic with integers."""
    if name in ("min", "max"):
        return _extreme(d, name)
    if name == "mad":
        raise d.error("mad of floats")
    mode = d.take("rn", "rz", "rm", "rp") or "rn"
    ftz, sat = bool(d.take("ftz")), bool(d.take("sat"))
    kind = d.need("f32", "f64")
    if kind == "f64":
        if mode != "rn" or ftz or sat:
            raise d.error("f64 with .rn only")
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
        return _apply(d, kind, 2, function)
    function = {
        "add": lambda a, b: rounding.add32(a, b, mode),
        "sub": lambda a, b: rounding.add32(a, -b, mode),
        "mul": lambda a, b: rounding.multiply32(a, b, mode),
    }[name]
    if mode == "rn":
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    return _apply(d, kind, 2, _finished(function, kind, ftz, sat))


def _extreme(d: Decoder, name: str):
    """NaN loses to a number, or wins with .NaN; -0 is less than +0."""
    ftz, propagate = bool(d.take("ftz")), bool(d.take("NaN"))
    kind = d.need("f32", "f64")
    pick = np.fmin if name == "min" else np.fmax
    join = np.bitwise_or if name == "min" else np.bitwise_and
    bits = np.uint32 if kind == "f32" else np.uint64

    def function(a, b):
        result = pick(a, b)
        # Equal values differ in the sign of a zero at most.
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            result = np.where(zeros, join(a.view(bits), b.view(bits)).view(a.dtype), result)
        lost = np.isnan(a) | np.isnan(b) if propagate else np.isnan(result)
        if lost.any():
            nan = CANONICAL_NAN if kind == "f32" else np.float64(np.nan)
            result = np.where(lost, nan, result)
        return result

    return _apply(d, kind, 2, _finished(function, kind, ftz, False))


def sign(d: Decoder, name: str):
    ftz = bool(d.take("ftz"))
    kind = d.need("f32", "f64")
    function = np.abs if name == "abs" else np.negative
    return _apply(d, kind, 1, _finished(function, kind, ftz, False))


@form("fma", pipe="fma")
def _fused(d: Decoder):
    mode = d.need("rn", "rz", "rm", "rp")
    ftz, sat = bool(d.take("ftz")), bool(d.take("sat"))
    kind = d.need("f32", "f64")
    if kind == "f64":
        if mode != "rn" or ftz or sat:
            raise d.error("f64 with .rn only")
        return _apply(d, kind, 3, rounding.fma64)
    function = _finished(lambda a, b, c: rounding.fma32(a, b, c, mode), kind, ftz, sat)
    return _apply(d, kind, 3, function)


def quotient(d: Decoder):
    """div of floats: .rn is exact, .approx and .full are approximations."""
    mode = d.need("rn", "approx", "full")
    ftz = bool(d.take("ftz"))
    kind = d.need("f32", "f64") if mode == "rn" else d.need("f32")
    if kind == "f64" and ftz:
        raise d.error("f64 without .ftz only")
    divide = _divide_by_reciprocal if mode == "approx" else np.divide
    return _apply(d, kind, 2, _finished(divide, kind, ftz, False))


def _divide_by_reciprocal(a, b):
    """a * (1 / b), whose reciprocal is flushed to zero where |b| is above 2**126."""
    lost = np.abs(b) > np.float32(2.0**126)
    return np.where(lost, a * np.copysign(np.float32(0), b), a / b)


def _through_float64(function):
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


APPROXIMATE = {
    "ex2": _through_float64(np.exp2),
    "lg2": _through_float64(np.log2),
    "sin": _through_float64(np.sin),
    "cos": _through_float64(np.cos),
    "tanh": _through_float64(np.tanh),
    "rcp": _through_float64(np.reciprocal),
    "rsqrt": _through_float64(lambda x: 1 / np.sqrt(x)),
    "sqrt": np.sqrt,
}


@form(*APPROXIMATE, pipe="mufu")
def _function(d: Decoder):
    name = d.instruction.mnemonic
    exact = {"sqrt": ("approx", "rn"), "rcp": ("approx", "rn")}
    mode = d.need(*exact.get(name, ("approx",)))
    ftz = bool(d.take("ftz"))
    if name == "tanh" and ftz:
        raise d.error("tanh takes no .ftz")
    if mode == "rn" or name == "rcp":
        kind = d.need("f32", "f64")
    else:
        kind = d.need("f32")
    if kind == "f64":
        return _double_function(d, name, mode, ftz)
    function = APPROXIMATE[name]
    if (name, mode) == ("rcp", "rn"):
        function = np.reciprocal
    return _apply(d, kind, 1, _finished(function, kind, ftz, False))


def _double_function(d: Decoder, name: str, mode: str, ftz: bool):
    if mode == "rn" and not ftz:
        return _apply(d, "f64", 1, np.sqrt if name == "sqrt" else np.reciprocal)
    if (name, mode, ftz) != ("rcp", "approx", True):
        raise d.error("f64 with .rn, or rcp.approx.ftz")

    def upper_half(x):
        """The gross approximation: the upper words alone of x and of 1 / x."""
        upper = np.uint64(0xFFFFFFFF00000000)
        cut = (x.view(np.uint64) & upper).view(np.float64)
        tiny = np.abs(cut) < 2.0**-1022
        result = 1 / np.where(tiny, np.copysign(0.0, cut), cut)
        result = np.where(np.abs(result) < 2.0**-1022, np.copysign(0.0, result), result)
        return (result.view(np.uint64) & upper).view(np.float64)

    return _apply(d, "f64", 1, upper_half)
