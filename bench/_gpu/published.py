"""Published measurements of Triton's tutorial kernels, with which the model is compared.

A100: tables of Triton's documentation, built on an A100 (its kernels' rates are under its peak, and
copies under the 1.56 TB/s of the 40 GB card, so that is the candidate):
triton-lang.org/main/getting-started/tutorials, pages 02, 03 and 06. HOPPER: assumed. They are
outputs of the same tutorials that only a chip of the H100 class reaches, but neither an address nor
the card is known.
"""

# Matmul of fp16 [N, N]: TFLOP/s of Triton's kernel by N.
MATMUL_A100 = {256: 4.096, 512: 26.21, 768: 68.06, 1024: 99.86, 1536: 157.3, 2048: 190.7,
               2560: 221.4, 3072: 213.7, 3584: 225.4, 4096: 220.0}  # fmt: skip
MATMUL_HOPPER = {256: 4.60, 512: 30.2, 768: 88.5, 1024: 156.4, 1536: 288.5, 2048: 315.6,
                 2560: 393.5, 3072: 376.9, 3584: 383.9, 4096: 393.3}  # fmt: skip

# Softmax of fp32 [4096, N]: GB/s read and written, by N.
SOFTMAX_A100 = {256: 467.3, 512: 750.6, 768: 884.4, 1024: 998.9, 1280: 1146.6, 1536: 1181.3,
                1792: 1233.0, 2048: 1275.1}  # fmt: skip
SOFTMAX_HOPPER = {256: 517.8, 512: 1028.4, 1024: 1793.9, 1536: 2058.9, 2048: 2291.9, 4096: 2577.1,
                  6144: 2852.4, 8192: 2853.2, 12288: 2339.8}  # fmt: skip

# Attention forward, fp16, batch 4, 32 heads of 64: TFLOP/s by (causal, length).
ATTENTION_A100 = {
    (True, 1024): 111.7, (True, 2048): 136.5, (True, 4096): 150.0, (True, 8192): 160.4,
    (True, 16384): 164.3, (False, 1024): 141.4, (False, 2048): 159.7, (False, 4096): 160.6,
    (False, 8192): 163.4, (False, 16384): 166.6,
}  # fmt: skip
