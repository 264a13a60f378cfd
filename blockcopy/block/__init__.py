"""Files and block devices as bytes: geometry, reading, claiming and writing a destination, identities.

Has no messages and no network. Every later room may import it. Travels to source hosts.
"""
