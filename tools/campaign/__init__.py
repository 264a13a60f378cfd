"""The parts of tools/chaos: what a round stands on, what is done to it, and who reads meanwhile."""
