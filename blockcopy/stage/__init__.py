"""The stages that pipes connect: `checksum`, `retrieve`, `save`, and `receive` for a push.

Has no command line and no ssh. The rooms `cli`, `transport` and `replica` may import this room. Travels to source
hosts.
"""
