"""fastvlp inside of other libraries' training scripts, one module for each library."""
