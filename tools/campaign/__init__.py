"""The parts of tools/chaos: the ends of a round, its events, and its readers."""
