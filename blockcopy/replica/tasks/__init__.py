"""How trio programs are run: signals, and threads and processes that may be left behind.

Knows nothing of copies. Every room of the replica, and the mount, may import it.
"""
