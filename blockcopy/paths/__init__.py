"""Paths, names and folders: their meaning, their protection, and changes that survive a power loss.

This room knows no devices and no protocol. Every other room may import it. It travels to source hosts.
"""
