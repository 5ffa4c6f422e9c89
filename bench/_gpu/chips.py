"""Constants of the GPUs that the performance model knows, each with its source or as assumed.

Sources by name:
  [A100]   NVIDIA A100 Tensor Core GPU datasheet (SXM) and architecture whitepaper.
  [H100]   NVIDIA H100 Tensor Core GPU datasheet (SXM5) and architecture whitepaper.
  [H200]   NVIDIA H200 Tensor Core GPU datasheet (SXM).
  [HGX]    NVIDIA HGX B200 datasheet, one of eight GPUs at 1,000 W.
  [CUDA]   CUDA C++ Programming Guide: technical specifications by compute capability, and
           arithmetic throughput in results a clock for each multiprocessor.
  [Luo]    Luo et al., Dissecting the NVIDIA Hopper Architecture, arXiv 2501.12084 (A100, H100,
           H800): latencies, cache throughput, mma.sync against wgmma.
  [C&C]    Chips and Cheese: "Nvidia's H100: Funny L2, and Tons of Bandwidth" (2023) and "Nvidia's
           B200: Keeping the CUDA Juggernaut Rolling" (2025).
  [triton] Tables printed by Triton's tutorials, as in `gpu_published`.
An entry marked "assumed" has no published source that was found; it is there to be replaced.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates are of one multiprocessor (SM) in a clock, unless they say otherwise.

    tensor: floating point operations, a matmul and a sum being two, by the type of the operands.
    mma_share: what mma.sync reaches of that where the chip has an asynchronous form.
    lanes: results by pipe. Latencies are in clocks.
    """

    name: str
    capability: int
    sms: int
    boost_ghz: float
    # What the model computes with: the clock that matmuls keep up at the power limit.
    sustained_ghz: float
    tensor: dict[str, int]
    mma_share: float
    lanes: dict[str, int]
    hbm_tb_s: float
    # Of that: the best copy or triad that was published, or assumed.
    hbm_share: float
    l2_bytes: int
    l2_tb_s: float
    # Between a multiprocessor and L2, and from shared memory, in bytes a clock.
    l2_port: int
    shared_port: int
    shared_bytes: int
    block_shared_bytes: int
    # Of L1, which shared memory is taken from.
    l1_bytes: int
    l2_latency: int
    hbm_latency: int
    # Of peak: the best matmul of the vendor's library that was published, or assumed.
    vendor_share: float
    registers: int = 65_536
    warps: int = 64
    blocks: int = 32
    schedulers: int = 4
    # Between two launches of a stream, in microseconds: assumed.
    launch_us: float = 2.5

    @property
    def executes(self) -> int:
        """The compute capability whose PTX is executed for it: that of Blackwell is not."""
        return min(self.capability, 90)


def _hopper(name: str, hbm_tb_s: float, hbm_share: float) -> Chip:
    return Chip(
        name=name,
        capability=90,
        sms=132,  # [H100]
        boost_ghz=1.83,  # [H100]: 989.4 TFLOP/s = 132 x 4,096 x 1.83 GHz
        # Assumed: that torch.mm reaches 780 TFLOP/s in bf16 on an H100 SXM, for which no address is
        # known; at full occupation of the units that is this clock.
        sustained_ghz=1.44,
        tensor={"f16": 4096, "bf16": 4096, "tf32": 2048, "e4m3": 8192, "s8": 8192},  # [H100]
        mma_share=0.63,  # [Luo]: mma.sync reaches 62.9% of peak on Hopper on average
        # [CUDA] 9.0
        lanes={"fma": 128, "alu": 64, "imad": 64, "mufu": 16, "convert": 64, "shuffle": 32,
               "half2": 128},
        hbm_tb_s=hbm_tb_s,
        hbm_share=hbm_share,
        l2_bytes=50 << 20,  # [H100]
        l2_tb_s=5.5,  # [C&C]: 5.5 to 5.7 TB/s on the PCIe card of 114 multiprocessors
        l2_port=64,  # [Luo]
        shared_port=128,  # [CUDA]: 32 banks of 4 bytes
        shared_bytes=228 << 10,  # [CUDA]
        block_shared_bytes=227 << 10,  # [CUDA]
        l1_bytes=256 << 10,  # [H100]
        l2_latency=260,  # [Luo]
        hbm_latency=480,  # [Luo]
        vendor_share=0.79,  # assumed: 780 of 989 TFLOP/s, as above
    )  # fmt: skip


A100 = Chip(
    name="A100 80GB SXM",
    capability=80,
    sms=108,  # [A100]
    boost_ghz=1.41,  # [A100]: 312 TFLOP/s = 108 x 2,048 x 1.41 GHz
    sustained_ghz=1.41,  # [C&C]: stays at 1,410 MHz under load
    tensor={"f16": 2048, "bf16": 2048, "tf32": 1024, "s8": 4096},  # [A100]
    mma_share=1.0,  # [Luo]: mma.sync reaches the peak on Ampere
    # [CUDA] 8.0.
    lanes={"fma": 64, "alu": 64, "imad": 64, "mufu": 16, "convert": 16, "shuffle": 32,
           "half2": 128},
    hbm_tb_s=2.039,  # [A100]
    # Assumed, as the best of [triton] on the 40 GB card, 1.32 of 1.555 TB/s: tables with which the
    # model is compared in their turn.
    hbm_share=0.85,
    l2_bytes=40 << 20,  # [A100]
    l2_tb_s=4.8,  # [A100]: 5,120 bytes a clock are 7.2 TB/s; measured two thirds of it [Luo]
    l2_port=64,  # [A100]
    shared_port=128,  # [CUDA]
    shared_bytes=164 << 10,  # [CUDA]
    block_shared_bytes=163 << 10,  # [CUDA]
    l1_bytes=192 << 10,  # [A100]
    l2_latency=261,  # [Luo]
    hbm_latency=466,  # [Luo]
    vendor_share=0.73,  # [triton]: cuBLAS at its best, 228.6 of 312 TFLOP/s
)  # fmt: skip

# The machine on which Triton's documentation is built: its copies pass 1.28 TB/s and its matmuls
# are those of an A100, which fits the card of 40 GB, whose memory is slower.
A100_40GB = Chip(**{**vars(A100), "name": "A100 40GB SXM", "hbm_tb_s": 1.555})

# Assumed: that a copy and a triad on an H100 SXM sustain 3.02 and 3.09 TB/s; no address is known.
H100 = _hopper("H100 SXM", 3.35, 0.92)
H200 = _hopper("H200 SXM", 4.8, 0.90)  # [H200]; the share assumed, as H100's

B200 = Chip(
    name="B200",
    capability=100,
    sms=148,  # [C&C]
    boost_ghz=1.86,  # [HGX]: 2,250 TFLOP/s = 148 x 8,192 x 1.86 GHz
    sustained_ghz=1.5,  # assumed, in H100's ratio
    tensor={"f16": 8192, "bf16": 8192, "tf32": 4096, "e4m3": 16384, "s8": 16384},  # [HGX]
    mma_share=0.25,  # assumed: mma.sync keeps the rate of Ampere, 2,048 of 8,192
    lanes={"fma": 128, "alu": 64, "imad": 64, "mufu": 16, "convert": 64, "shuffle": 32,
           "half2": 128},  # [CUDA] 10.0
    hbm_tb_s=8.0,  # [HGX]
    hbm_share=0.90,  # assumed, as H100's
    l2_bytes=126 << 20,  # [C&C]
    l2_tb_s=10.0,  # assumed, about 21 B a clock for each of 296 slices as H100's
    l2_port=64,  # assumed, as H100's
    shared_port=128,  # [CUDA]
    shared_bytes=228 << 10,  # [CUDA]
    block_shared_bytes=227 << 10,  # [CUDA]
    l1_bytes=256 << 10,  # [CUDA] 10.0
    l2_latency=300,  # assumed: the dies double the way, [C&C] sees more than H100's
    hbm_latency=600,  # assumed
    vendor_share=0.75,  # assumed
)  # fmt: skip

CHIPS = {"h100": H100, "h200": H200, "a100": A100, "a100-40gb": A100_40GB, "b200": B200}
