"""Progress of a command: figures, and the bar, lines and JSON that show them.

Has no terminal and no signals of its own. Every later room may import it. Travels to source hosts.
"""
