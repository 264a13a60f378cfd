"""Helpers to run trio programs: signals, and threads and processes that can be abandoned.

This room knows nothing of copies. Every room of the replica, and the mount, may import it.
"""
