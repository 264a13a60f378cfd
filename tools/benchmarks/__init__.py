"""The parts of tools/bench: what is measured, how, and how it is told."""
