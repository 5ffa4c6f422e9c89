"""What every benchmark uses: timing, memory, tables, plots, ranks."""
