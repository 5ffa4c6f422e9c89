"""`python -m fastvlp.data.openmoji` builds the demonstration data and prints its counts."""

from fastvlp.data.openmoji.dataset import main

if __name__ == "__main__":
    main()
