"""Progress of a command: its counts, and the bar, lines and JSON that show them.

This room opens no terminal and handles no signals. Every later room may import it. It travels to source hosts.
"""
