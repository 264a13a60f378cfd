"""The lazy replica: a destination that is right wherever it is read, and complete in the end.

trio, no FUSE: `sync` is this package alone, `mount` is this package behind a file system. See
`engine` for how the parts are put together.
"""
