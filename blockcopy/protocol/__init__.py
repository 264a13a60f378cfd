"""The messages that both ends exchange: their bytes, digests, compression formats and the handshake.

Does no I/O and knows no device. Every later room may import it. Travels to source hosts.
"""
