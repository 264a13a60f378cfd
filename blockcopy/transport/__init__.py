"""The way to another host: locations, the remote shell's command line, the payload, time limits and hints.

Has no trio. `push` and `replica` may import this room. Its modules stay on this host; `bootstrap` alone is sent.
"""
