"""Every kernel compiles as the runtime specialises it: integer arguments that are 1, multiples of
16 or neither."""

import pytest
from fastvlp_tests import specialised_launches, triton_process

pytestmark = pytest.mark.thorough
KERNELS = {
    "contrastive": {"statistics_kernel", "merge_kernel", "gradient_kernel"},
    "contrastive_in_chunks": {"statistics_kernel", "merge_kernel"},
    "sigmoid": {"sigmoid_kernel"},
    "momentum": {"keys_kernel", "merge_kernel"},
    "attention": {"attention_kernel", "query_gradient_kernel", "key_gradient_kernel"},
    "packed_attention": {"attention_kernel", "fused_gradient_kernel"},
    "soft_cross_entropy": {"rows_kernel"},
    "word_patch_alignment": {"cosine_kernel", "transport_kernel", "gradients_kernel"},
}
# The attention kernels leave all their integers ordinary arguments.
CASES = [
    (call, sizes)
    for call in KERNELS
    for sizes in specialised_launches.SIZES
    if sizes in ("ones", "others") or "attention" not in call
]


def test_every_kernel_is_launched(compiler):
    kernels = compiler.submit(triton_process.kernel_names).result()
    assert kernels == set().union(*KERNELS.values())


@pytest.fixture(scope="module")
def compiling():
    with triton_process.start(interpret=False, workers=triton_process.compilers()) as pool:
        found = {case: pool.submit(triton_process.compile_launches, *case) for case in CASES}
        yield lambda *case: found[case].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("call, sizes", CASES)
def test_every_specialisation_compiles(compiling, call, sizes):
    launches = compiling(call, sizes)
    assert {kernel for kernel, _ in launches} == KERNELS[call]


def test_one_becomes_a_constant_where_it_can(compiling):
    # What these launches are for: else they would compile the usual kernels once more.
    ones = {kernel: fixed for kernel, fixed in compiling("momentum", "ones")}
    assert {"D", "stride_image", "stride_text_queue"} <= ones["keys_kernel"]
    for kernel, fixed in compiling("soft_cross_entropy", "ones"):
        assert kernel == "rows_kernel" and {"V", "stride_z"} <= fixed
