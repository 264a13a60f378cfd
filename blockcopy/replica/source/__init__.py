"""The source: connections to `retrieve` processes, their dialects, and reconnection.

Never touches the destination. The later rooms of the replica may import it.
"""
