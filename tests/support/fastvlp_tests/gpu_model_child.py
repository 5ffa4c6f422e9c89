"""Calls of test_gpu_model.py in a process of their own, in which Triton compiles."""

import math
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path


def _benchmarks_on_path():
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))


def scaled_and_executed():
    """A matmul [64, K] [K, 64] at K = 256: its profile scaled from 64 and 128, and executed."""
    _benchmarks_on_path()
    import torch
    from _gpu import sanity_kernels as kernels
    from _gpu.bound import Executed, profile
    from _gpu.chips import H100
    from _gpu.launches import record

    def events(k):
        a, b = torch.randn(64, k).half(), torch.randn(k, 64).half()
        return record(partial(kernels.matmul, a, b, (64, 64, 32, 4, 2)), 90, execute=True)

    small, large, true = (events(k) for k in (64, 128, 256))
    (launch,) = true
    scaled = Executed((64, 128), (small, large)).profile(H100, launch, 0, 256)
    return asdict(scaled), asdict(profile(H100, launch)), asdict(launch.binary)


def of_one_size():
    """A softmax of 1,024 columns by a block for each row: the profile at eight rows from that at
    two, and executed; and what kernels raise that did not run at two rows: another one, and the
    same with tiles of 2,048 columns."""
    _benchmarks_on_path()
    import torch
    from _gpu import sanity_kernels as kernels
    from _gpu.bound import Executed, profile
    from _gpu.chips import H100
    from _gpu.launches import record

    (small,), (true,) = (
        record(partial(kernels.softmax, torch.randn(rows, 1024), rows), 90, execute=True)
        for rows in (2, 8)
    )
    (wide,) = record(partial(kernels.softmax, torch.randn(8, 2048), 8), 90, execute=False)
    executed = Executed((2,), ([small],))
    scaled = executed.profile(H100, true, 0, 8)
    errors = []
    for launch in (replace(true, kernel="other"), replace(wide, binary=small.binary)):
        try:
            executed.profile(H100, launch, 0, 8)
        except ValueError as error:
            errors.append(str(error))
    return asdict(scaled), asdict(profile(H100, true)), errors


def differences(tiles, sizes):
    _benchmarks_on_path()
    from _gpu import bound

    return bound.differences(tiles, sizes)


def attention_launches():
    """(kernel, blocks, warps) of cross-attention of 32 images, and of one on a small GPU."""
    _benchmarks_on_path()
    from _gpu import model_cases as cases
    from _gpu.launches import record

    ours = cases.cross_attention(32, queries=120).implementations[0]
    (size,) = ours.sizes
    found = (
        record(ours.run(32), 90, execute=False),
        record(ours.run(size), 90, execute=False, multiprocessors=ours.multiprocessors(size)),
    )
    return [[(e.kernel, e.blocks, e.binary.warps) for e in events] for events in found]


def bound_of(**changes):
    """(milliseconds, their parts, blocks on a multiprocessor, waves) of a made-up launch."""
    _benchmarks_on_path()
    from _gpu.bound import Profile, kernel_bound
    from _gpu.chips import H100
    from _gpu.launches import Binary, KernelLaunch

    given = {"blocks": 132, "bytes": 1 << 20, "fma": 1830.0, "latency": 183.0, "sectors": 3200.0}
    given |= changes
    launch = KernelLaunch("kernel", given["blocks"], Binary(4, 64, 0, 0), given["bytes"])
    block = Profile({"fma": given["fma"]}, given["latency"], given["sectors"], 1.0)
    found = kernel_bound(H100, launch, block)
    return found.ms, found.parts, found.blocks_per_sm, found.waves


def memory_bytes(*args):
    _benchmarks_on_path()
    from _gpu.bound import memory_bytes
    from _gpu.chips import H100

    return memory_bytes(H100, *args)


def recorded():
    """What eager forms and a dry run record: (name, bytes, flops) of torch's operations."""
    _benchmarks_on_path()
    import torch
    from _gpu.launches import record, record_eager

    def make():
        a = torch.zeros(64, 128, dtype=torch.bfloat16)
        b = torch.zeros(128, 32, dtype=torch.bfloat16)
        return lambda: (a @ b).T.relu()

    def wider():
        a, b = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, 2, dtype=torch.bfloat16)
        total = torch.mm(a, b, out_dtype=torch.float32)
        results.append(torch.addmm(total, a.float(), b.float()))

    results = []
    fake = record_eager(make)
    dry = record(make(), 90, execute=False)
    wide = [op for op in record(wider, 90, execute=True) if op.flops]
    return (
        *([(op.name, op.bytes, op.flops) for op in ops] for ops in (fake, wide)),
        len(dry),
        *results,
    )


def soft_cross_entropy_launches():
    """Blocks of the launches, and bytes and operations of the matmuls, of 300 rows of a head
    [1,000, 64] with a teacher on a GPU."""
    _benchmarks_on_path()
    from _gpu import model_heads
    from _gpu.launches import KernelLaunch, record

    ours = model_heads.our_soft_cross_entropy(64, 1000, True, 300)
    events = record(ours, 90, execute=False)
    launches = [e.blocks for e in events if isinstance(e, KernelLaunch)]
    return launches, [(e.bytes, e.flops) for e in events if getattr(e, "flops", 0)]


def ema_launch(adamw, execute, elements):
    """The only launch of the update of so many elements: (kernel, blocks, warps, arguments' bytes),
    (registers, stack), and where it is executed the distinct bytes and the share touched."""
    _benchmarks_on_path()
    from _gpu import model_cases
    from _gpu.bound import profile
    from _gpu.chips import H100
    from _gpu.launches import record

    run = model_cases.our_ema(adamw, elements)
    (found,) = record(run, 90, execute=execute, native=True)
    names = found.kernel, found.blocks, found.binary.warps, found.argument_bytes
    binary = found.binary.registers, found.binary.stack_bytes
    if not execute:
        return names, binary
    return names, binary, dict(found.counts.distinct_bytes), profile(H100, found).touched


def resources(report, mangled):
    _benchmarks_on_path()
    from _gpu import cuda

    return cuda.parse_resources(report), [cuda.readable(name) for name in mangled]


def comparison():
    """The kernels with known times at three sizes on an A100, against what was published."""
    _benchmarks_on_path()
    from _gpu import published, sanity
    from _gpu import sanity_kernels as kernels
    from _gpu.chips import A100_40GB

    tiles = kernels.MATMUL_TILES[1:3], kernels.ATTENTION_TILES[:1]
    lengths = [(True, 1024), (True, 8192), (False, 8192)]

    found = [
        sanity.matmul(A100_40GB, published.MATMUL_A100, [512, 1536, 4096], tiles[0]),
        sanity.softmax(A100_40GB, published.SOFTMAX_A100, [256, 768, 2048]),
        sanity.attention(A100_40GB, published.ATTENTION_A100, lengths, tiles[1]),
    ]
    return [(each.kernel, each.rank_of_times, each.rank_of_rates, each.ratio) for each in found]


def floor_matmuls():
    """Matmuls in the floors of the model and of gpu_check.py, forward and backward, by op."""
    _benchmarks_on_path()
    from _gpu import check_ops
    from _gpu import model_cases as cases
    from baselines.cross_attention import inputs as attention_inputs

    models = {
        "contrastive": cases.contrastive(8192),
        "sigmoid": cases.sigmoid(8192),
        "cross_attention": cases.cross_attention(32),
    }
    ours = {}
    for op, case in models.items():
        n, d = (case.shape.get(name) for name in ("n", "d"))
        one = 2 * n * n * d if n else 2 * math.prod(case.shape.values())
        ours[op] = case.floor.flops / one
    attention = attention_inputs.Case(images=2, heads=2, keys=40, dtype="bf16", device="cuda")
    work = check_ops._attention_work(attention)
    small = 2 * 128**2 * check_ops.WIDTH
    checked = {
        "contrastive": next(check_ops.contrastive("bf16", True)).flops / small,
        "sigmoid": next(check_ops.sigmoid("bf16", True)).flops / small,
        "cross_attention": next(check_ops.cross_attention("bf16", True)).flops
        / (1e9 * work["gflop_per_matmul"]),
    }
    return ours, checked


def floor(moved, flops):
    """(name, milliseconds, limit) of the floor of that many bytes and operations on an H100."""
    _benchmarks_on_path()
    from _gpu.bound import floor_bound
    from _gpu.chips import H100
    from _gpu.launches import TorchOp

    found = floor_bound(H100, TorchOp("floor", moved, flops, "bf16"))
    return found.name, found.ms, found.limited_by


def compare_raising(name):
    """(implementations with a row, what is missing) where ours raises the error of that name."""
    _benchmarks_on_path()
    import builtins

    import gpu_model
    from _gpu import model_case
    from _gpu.chips import H100

    def fail(size):
        error = getattr(gpu_model, name, None) or getattr(builtins, name)
        raise error(1, 2, "shared memory") if name == "OutOfResources" else error("a reason")

    ours = model_case.ModelledImplementation("fastvlp", partial(fail), (1, 2))
    least = model_case.matmuls(1, 8, 8, 8, 8)
    case = model_case.Case("op", {"n": 8}, 8, [ours], least, "one matmul")
    rows, missing = gpu_model.compare(gpu_model.Machine(), H100, case)
    return [row["impl"] for row in rows], [(each.name, each.reason) for each in missing]
