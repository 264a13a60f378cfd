"""The command line: the parser, the values of options, the console, the log, and the stages as commands.

Has no replica and no mount: those have commands of their own. Every later room may import it. Travels to source
hosts.
"""
