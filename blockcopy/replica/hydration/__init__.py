"""Hydration: read, digest, fetch, write, sync and record the blocks of a destination.

These modules know neither users nor mounts. Only `blockcopy.replica` itself imports them.
"""
