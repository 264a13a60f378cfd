"""The file system of `blockcopy mount`. Only `operations` and `mounting` import pyfuse3.

The folder fuse/ is a source root, and the package in it is `blockcopy_fuse`. The name `fuse` belongs to fusepy
and fuse-python, which can be installed in the same environment.
"""

STATUS_NAME = "status.json"
"""Name of the status file beside the replica."""
