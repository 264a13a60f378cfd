"""The targets of tools/fuzz: what they feed to the program, and what must hold."""


class BrokenPromise(Exception):
    """A promise that does not hold for an input."""
