"""The stages that a pipe connects: `checksum`, `retrieve`, `save`, and `receive` for a push.

Has no command line and no ssh. `cli`, `transport` and `replica` may import it. Travels to source hosts.
"""
