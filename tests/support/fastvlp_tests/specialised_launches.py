"""The host code of every kernel on inputs whose sizes and strides the runtime specialises; for
child processes."""

import torch

# The lengths of every axis that a caller chooses: 1 becomes a constant of the kernel, a multiple of
# 16 a promise to the compiler, and anything else an ordinary argument.
SIZES = {
    "ones": {"rows": 1, "cols": 1, "width": 1, "heads": 1},
    "ones wide": {"rows": 1, "cols": 1, "width": 16, "heads": 1},
    "multiples": {"rows": 32, "cols": 48, "width": 64, "heads": 16},
    "others": {"rows": 3, "cols": 5, "width": 7, "heads": 3},
}


def features(rows, width):
    """[rows, width] where stride and shape are equal to 1 as often as they can be: one row is that
    of a transposed column."""
    return torch.zeros(width, rows, dtype=torch.bfloat16).T if rows == 1 else _zeros(rows, width)


def _zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def _floats(*shape):
    return _zeros(*shape, dtype=torch.float32)


def contrastive(rows, cols, width, heads):
    from fastvlp.kernels.contrastive import contrastive_gradients, contrastive_statistics

    x, y = features(rows, width), features(cols, width)
    contrastive_statistics(x, y, torch.ones(()))
    contrastive_gradients(
        x, y, torch.ones(()), *(_zeros(size, dtype=torch.float64) for size in (rows, cols)),
        _floats(rows), torch.ones(2),
        workspace_bytes=1 << 20,
    )  # fmt: skip


def contrastive_in_chunks(rows, cols, width, heads):
    from fastvlp.kernels import contrastive as kernels

    kernels.PAIR_BYTES = 1
    kernels.contrastive_statistics(features(300, width), features(cols, width), torch.ones(()))


def sigmoid(rows, cols, width, heads):
    from fastvlp.kernels.contrastive.sigmoid import sigmoid_contrastive

    x, y, one = features(rows, width), features(cols, width), torch.ones(())
    for gradients in (True, False):
        sigmoid_contrastive(x, y, one, one, need_gradients=gradients, workspace_bytes=1 << 20)


def momentum(rows, cols, width, heads):
    from fastvlp.kernels.momentum_contrastive import momentum_contrastive

    batch, queue = [features(rows, width)] * 4, [features(cols, width)] * 2
    integer, one = torch.zeros((), dtype=torch.int64), torch.ones(())
    ids = _zeros(rows, dtype=torch.int64), _zeros(cols, dtype=torch.int64)
    momentum_contrastive(*batch, *queue, *ids, integer, one, one, integer, True, True, True)


def _attention(q, k, cu_k, mask, length, rows):
    from fastvlp.kernels.cross_attention import cross_attention_backward, cross_attention_forward

    cu_q = torch.arange(len(k) + 1 if cu_k is None else len(cu_k), dtype=torch.int32) * rows
    shared = q, k, k, cu_q, cu_k, mask, torch.zeros((), dtype=torch.int64)
    options = {"scale": 1.0, "dropout_p": 0.1, "causal": False}
    options |= {"max_seqlen_q": rows, "max_seqlen_k": length}
    out, statistics = cross_attention_forward(*shared[:7], **options)
    cross_attention_backward(out, q, k, k, out, statistics, *shared[3:], **options)


def attention(rows, cols, width, heads):
    """Too few programs for a GPU: the gradients take the general path."""
    q, k = _zeros(rows, heads, width), _zeros(1, cols, heads, width)
    _attention(q, k, None, _zeros(1, cols, dtype=torch.bool), cols, rows)


def packed_attention(rows, cols, width, heads):
    """Programs in plenty: all gradients come from one kernel."""
    segments = 256
    q, k = (_zeros(segments * n, heads, width) for n in (rows, cols))
    cu_k = torch.arange(segments + 1, dtype=torch.int32) * cols
    _attention(q, k, cu_k, None, cols, rows)


def soft_cross_entropy(rows, cols, width, heads):
    from fastvlp.kernels.soft_cross_entropy import soft_cross_entropy_rows

    logits, none = _floats(rows, cols), _floats(0, 0)
    labels, one = _zeros(rows, dtype=torch.int64), torch.ones(1)
    for teacher, ignored, gradient in ((logits, -100, logits), (none, 1, none)):
        soft_cross_entropy_rows(
            logits,
            _floats(cols),
            teacher,
            _floats(0),
            labels,
            one,
            ignored,
            _floats(rows),
            gradient,
        )


def word_patch_alignment(rows, cols, width, heads):
    from fastvlp.kernels import word_patch_alignment as kernels

    x, y = _zeros(heads, rows, width), _zeros(heads, cols, width)
    masks = (_zeros(heads, n, dtype=torch.bool) for n in (rows, cols))
    _, *kept = kernels.word_patch_alignment(x, y, *masks, iterations=1, inner=1)
    kernels.word_patch_alignment_gradients(_floats(heads), x, y, *kept)


CALLS = {
    call.__name__: call
    for call in (
        contrastive, contrastive_in_chunks, sigmoid, momentum, attention, packed_attention,
        soft_cross_entropy, word_patch_alignment,
    )
}  # fmt: skip


def compile_launches(call: str, sizes: str) -> list[tuple[str, set]]:
    """(kernel, arguments that became constants, being 1) of every launch, once compiled."""
    from ptx_machine.virtual_gpu import VirtualGPU

    with VirtualGPU(90, execute=False, hazards=False) as gpu:
        CALLS[call](**SIZES[sizes])
    found = []
    for compiled in {id(launch.compiled): launch.compiled for launch in gpu.launches}.values():
        assert compiled.asm["cubin"]
        kernel = compiled.src.fn
        specialised = {at for (at,) in compiled.src.constants} - set(kernel.constexprs)
        found.append((kernel.__name__, {kernel.arg_names[at] for at in specialised}))
    return found
