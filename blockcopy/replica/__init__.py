"""The lazy replica: a destination whose reads are right at once, and that becomes a complete copy.

It needs trio but no FUSE: `sync` runs a replica alone, and `mount` runs it behind a file system.
`engine` shows how the parts are put together.
"""
