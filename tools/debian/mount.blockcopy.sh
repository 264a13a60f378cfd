#!/bin/sh
exec /usr/lib/blockcopy/bin/python -I -m blockcopy_fuse.mount_helper "$@"
