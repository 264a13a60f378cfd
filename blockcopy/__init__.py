"""blockcopy: copies a disk through any pipe, and serves the copy before it is complete.

The copy stages travel to source hosts: standard library only, Python 3.9 or newer. `blockcopy.replica` is the
lazy replica and needs trio and Python 3.11.
"""

__version__ = "1.0.0"
