"""What the Triton kernels share: launches, tiles, support checks, ahead-of-time compilation."""
