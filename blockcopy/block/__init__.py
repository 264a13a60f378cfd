"""Files and block devices as bytes: byte ranges, reading, claiming and writing a destination, identities.

This room knows no messages and no network. Every later room may import it. It travels to source hosts.
"""
