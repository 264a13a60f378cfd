"""The source: connections to retrieve processes, their dialects, and how a lost one is made again.

Never touches the destination. The later rooms of the replica may import it.
"""
