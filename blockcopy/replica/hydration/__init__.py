"""Hydration: blocks of the destination are compared, fetched, written, synced and recorded.

Knows no users and no mount. The replica itself may import it.
"""
