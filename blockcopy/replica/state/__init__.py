"""The state of a copy: the map of present blocks, and the file that keeps it.

Asks no source. The later rooms of the replica may import it.
"""
