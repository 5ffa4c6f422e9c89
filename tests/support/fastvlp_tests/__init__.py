"""What the tests share: tolerances, cases, small models and data, processes."""
