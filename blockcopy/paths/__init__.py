"""Paths, names and folders: what a path means, who may change it, and names that survive a power loss.

Has no block devices and no protocol. Every other room may import it. Travels to source hosts.
"""
