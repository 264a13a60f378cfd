"""The way to another host: locations, the ssh command line, the payload that is sent, and why one fails.

Has no trio. `push` and `replica` may import it. Stays on this host, except for what `payload` sends.
"""
