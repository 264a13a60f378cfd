"""Messages, digests, compression formats and the handshake of both ends.

Does no I/O. Later rooms may import this room. Travels to source hosts.
"""
