"""The file system of `blockcopy mount`. `operations` and `mounting` are all that imports pyfuse3.

The folder fuse/ is a source root; what is imported and installed is `blockcopy_fuse`, because the
name `fuse` belongs to fusepy and fuse-python, which can then live in the same environment.
"""

STATUS_NAME = "status.json"
"""The file beside the replica that tells how it is doing."""
