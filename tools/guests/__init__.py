"""The guests of tools/vm: how they are built, booted and cut off, and the scenarios that run in them."""
