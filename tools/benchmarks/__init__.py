"""The parts of tools/bench: measurements, contestants, test data, and reports."""
