"""The scenarios of tools/vm, a module each. The module's first line says what it shows.

Its function `run(lab)` runs it. It returns its figures (name → value), or raises WrongError if a promise is broken.
"""
