"""blockcopy: copy a disk over any pipe, and use it before the copy is complete.

The modules of this package itself are the copy stages. They travel to source hosts: standard
library only, Python 3.9 or newer. `blockcopy.replica` is the lazy replica (trio, Python 3.11).
"""

__version__ = "0.0.2"
