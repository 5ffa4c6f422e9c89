"""`python -m fastvlp.kernels`: compile every Triton kernel, no GPU needed, and print a table."""

import sys

from ._core.aot import main

if __name__ == "__main__":
    sys.exit(main())
