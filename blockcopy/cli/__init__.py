"""The command line: parsers, option types, the console, the log, and the copy stages as commands.

Later layers have commands of their own. Every later room may import this one. What a stage needs of it travels to
source hosts.
"""
