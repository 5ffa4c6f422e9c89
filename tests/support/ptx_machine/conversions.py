"""cvt: between integers, floats and the packed halves, with rounding and saturation."""

import numpy as np

from .floats import CANONICAL_NAN, flush, saturate
from .forms import Decoder, dtype_of, form
from .rounding import to_float32
from .syntax import BITS

INTEGERS = tuple(f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us")
FLOATS = ("f16", "bf16", "f32", "f64")
PACKED = ("f16x2", "bf16x2")
TO_INTEGER = ("rni", "rzi", "rmi", "rpi")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 patterns (uint16) as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 as bfloat16 patterns; NaN becomes the canonical 0x7FFF."""
    bits = x.view(np.uint32)
    if mode == "rn":
        bits = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    top = (bits >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), top) if nan.any() else top


def to_f16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 or float64 as half precision; NaN becomes the canonical 0x7FFF."""
    near = x.astype(np.float16)
    if mode == "rz":
        away = np.abs(near.astype(x.dtype)) > np.abs(x)
        near = np.where(away, np.nextafter(near, np.float16(0)), near)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF).view(np.float16), near) if nan.any() else near


@form("cvt", pipe="convert")
def _convert(d: Decoder):
    mode = d.take("rn", "rz", "rm", "rp", *TO_INTEGER)
    satfinite = bool(d.take("satfinite"))
    relu = bool(d.take("relu"))
    ftz, sat = bool(d.take("ftz")), bool(d.take("sat"))
    target = d.need(*INTEGERS, *FLOATS, *PACKED)
    source = d.need(*INTEGERS, *FLOATS)
    if target in PACKED:
        return _pack(d, target, source, mode, relu, satfinite or ftz or sat)
    if satfinite or relu:
        raise d.error("cvt with .satfinite or .relu")
    function = _function(d, target, source, mode, ftz, sat)
    # A register may be wider than the type: its low bits are read, results are extended.
    read = _truncating_reader(d, source)
    write = d.extending_writer(d.operand(0), target)
    return lambda lanes: write(lanes, function(read(lanes)))


def _truncating_reader(d: Decoder, kind: str):
    value = d.operand(1)
    held = getattr(value, "type", kind)
    if BITS[held] <= BITS[kind]:
        return d.reader(value, kind)
    if kind in FLOATS:
        raise d.error(f"{value.name} is {held}, read as {kind}")
    read = d.reader(value, f"b{BITS[held]}")
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}")
    return lambda lanes: read(lanes).astype(dtype)


def _pack(d: Decoder, target: str, source: str, mode: str | None, relu: bool, other: bool):
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half."""
    if source != "f32" or mode not in ("rn", "rz") or other:
        raise d.error(f"cvt to {target}")
    high, low = d.source(1, "f32"), d.source(2, "f32")
    write = d.destination(0, "b32")

    def half(x):
        if relu:
            x = np.where(x < 0, np.float32(0), x)
        x = np.atleast_1d(x)
        return to_bf16(x, mode) if target == "bf16x2" else to_f16(x, mode).view(np.uint16)

    def operation(lanes):
        upper = half(high(lanes)).astype(np.uint32) << np.uint32(16)
        write(lanes, upper | half(low(lanes)).astype(np.uint32))

    return operation


def _function(d: Decoder, target: str, source: str, mode: str | None, ftz: bool, sat: bool):
    from_float, to_float = source in FLOATS, target in FLOATS
    if ftz and "f32" not in (source, target):
        raise d.error("cvt with .ftz")
    if not from_float and not to_float:
        if mode:
            raise d.error(f"cvt with .{mode} between integers")
        return _between_integers(target, source, sat)
    if from_float and not to_float:
        if mode not in TO_INTEGER:
            raise d.error("cvt to an integer without its rounding")
        return _to_integer(target, source, mode, ftz)
    if not from_float:
        if mode not in ("rn", "rz", "rm", "rp"):
            raise d.error("cvt from an integer without its rounding")
        return _from_integer(d, target, mode, sat)
    return _between_floats(d, target, source, mode, ftz, sat)


def _between_integers(target: str, source: str, sat: bool):
    dtype = dtype_of(target)
    if not sat:
        return lambda x: x.astype(dtype)
    limits = np.iinfo(dtype)
    own = np.iinfo(dtype_of(source))
    low, high = max(limits.min, own.min), min(limits.max, own.max)
    return lambda x: np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)


def _widened(source: str):
    return from_bf16 if source == "bf16" else lambda x: x


def _to_integer(target: str, source: str, mode: str, ftz: bool):
    """Values outside the range become its ends.

    NaN becomes the top bit alone where either type has 64 bits, as the ISA has it, otherwise 0.
    """
    dtype, widen = dtype_of(target), _widened(source)
    nearest = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(dtype)
    top_bit = limits.min if target[0] == "s" else limits.max // 2 + 1
    nan_value = dtype.type(top_bit if BITS[source] == 64 or BITS[target] == 64 else 0)

    def function(x):
        x = widen(np.atleast_1d(x))
        x = nearest((flush(x) if ftz else x).astype(np.float64))
        # The upper end of 64-bit types is no float64: what reaches it is above all that are.
        above, below = x >= float(limits.max), x <= float(limits.min)
        inside = np.where(above | below | np.isnan(x), 0.0, x).astype(dtype)
        result = np.where(above, limits.max, np.where(below, limits.min, inside)).astype(dtype)
        return np.where(np.isnan(x), nan_value, result)

    return function


def _from_integer(d: Decoder, target: str, mode: str, sat: bool):
    if target == "bf16" or (mode != "rn" and target != "f32"):
        raise d.error(f"cvt.{mode} to {target} from an integer")

    def function(x):
        x = np.atleast_1d(x)
        if mode == "rn":
            result = x.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[target])
        else:
            # In two parts, for 64 bits do not fit a float64.
            near = x.astype(np.float64)
            rest = np.array([float(int(a) - int(b)) for a, b in zip(x, near, strict=True)])
            result = to_float32(near, rest, mode)
        return saturate(result) if sat else result

    return function


def _between_floats(d: Decoder, target: str, source: str, mode: str | None, ftz: bool, sat: bool):
    widen = _widened(source)
    if target == source:
        if mode is not None and mode not in TO_INTEGER:
            raise d.error(f"cvt.{mode} of a type to itself")
        if target == "bf16" or (mode and sat):
            raise d.error(f"cvt of {target} to itself")
        nearest = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(mode)

        def same(x):
            x = flush(x) if ftz else x
            x = nearest(x) if nearest else x
            return saturate(x) if sat else x

        return same
    narrowing = BITS[target] < BITS[source]
    if narrowing != (mode is not None):
        raise d.error("cvt to a narrower float takes a rounding, to a wider one none")
    if sat and target == "bf16":
        raise d.error("cvt.sat to bf16")

    def function(x):
        x = widen(np.atleast_1d(x))
        x = flush(x) if ftz and x.dtype == np.float32 else x
        result = _narrow(d, x, target, mode)
        result = flush(result) if ftz and target == "f32" else result
        return saturate(result) if sat else result

    if narrowing:
        function_for = {("f16", "rn"), ("f16", "rz"), ("bf16", "rn"), ("bf16", "rz")}
        if target != "f32" and (target, mode) not in function_for:
            raise d.error(f"cvt.{mode} to {target}")
        if source == "f64" and target == "bf16":
            raise d.error("cvt to bf16 from f64")
    return function


def _narrow(d: Decoder, x: np.ndarray, target: str, mode: str | None) -> np.ndarray:
    if target == "bf16":
        return to_bf16(x, mode or "rn")
    if target == "f16":
        return to_f16(x, mode or "rn")
    if target == "f64":
        return x.astype(np.float64)
    if x.dtype != np.float64:
        wide = x.astype(np.float32)
    elif mode == "rn":
        wide = x.astype(np.float32)
    else:
        wide = to_float32(x, np.float64(0), mode)
    nan = np.isnan(wide)
    return np.where(nan, CANONICAL_NAN, wide) if nan.any() else wide


@form("cvt.rna.tf32.f32", pipe="convert")
def _convert_to_tf32(d: Decoder):
    """A float32 with the 10 bits of mantissa that tf32 has, the nearest, ties away from zero."""
    read, write = d.source(1, "b32"), d.destination(0, "b32")

    def operation(lanes):
        bits = np.atleast_1d(read(lanes))
        near = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        nan = np.isnan(bits.view(np.float32))
        write(lanes, np.where(nan, np.uint32(0x7FFFFFFF), near))

    return operation
