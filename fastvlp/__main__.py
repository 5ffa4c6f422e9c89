"""`python -m fastvlp`: the console command."""

from fastvlp.cli import main

if __name__ == "__main__":
    main()
