"""Kernels that write where they read: a barrier lies between, in what the compiler made of them.

The interpreter runs the elements of a block in step, so a warp that is ahead of another one shows
in the compiled code only.
"""

import pytest
from fastvlp_tests import ptx_text, triton_process

# Kernel, and (parameter that is read, parameter that may be the same memory and is written).
IN_PLACE = [
    ("soft_cross_entropy-teacher fp32", 0, 7),
    ("merge carry 32x64", 0, 3),
    ("merge carry 32x64", 1, 4),
    ("alignment transport 64x256", 3, 3),
    ("alignment transport 64x256", 4, 4),
    ("alignment transport 64x256", 5, 5),
]


@pytest.fixture
def compiled(compiler):
    return lambda *case: compiler.submit(triton_process.ptx_of, *case).result()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel, read, written", IN_PLACE)
def test_a_barrier_separates_reads_from_the_writes_that_replace_them(
    compiled, kernel, read, written, capability
):
    ptx = compiled(kernel, capability)
    assert ptx_text.registers_from(ptx_text.blocks_of(ptx)[0], read)
    assert ptx_text.stores_without_barrier(ptx, read, written) == []


RACE = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	add.s64 	%rd2, %rd1, 4;
	ld.global.b32 	{ %r1 }, [ %rd1 + 0 ];
	{BARRIER}
	@%p1 bra 	$L__BB0_2;
$L__BB0_1:
	@%p2 st.global.b32 [ %rd2 + 0 ], { %r1 };
	@%p1 bra 	$L__BB0_1;
$L__BB0_2:
	ret;
}
"""  # fmt: skip


def test_a_missing_barrier_is_found():
    missing = ptx_text.stores_without_barrier(RACE.replace("{BARRIER}", ""), 0, 0)
    assert [(load.split()[0], store.split()[1]) for load, store in missing] == [
        ("ld.global.b32", "st.global.b32")
    ]
    assert ptx_text.stores_without_barrier(RACE.replace("{BARRIER}", "bar.sync 0;"), 0, 0) == []
