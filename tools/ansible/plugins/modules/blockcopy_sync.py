#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_sync`: makes a destination a copy of a source."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_sync
short_description: Make a device or file a copy of a remote one
version_added: "1.0.0"
description:
  - Runs C(blockcopy sync). Only blocks that differ cross the network.
  - An interrupted copy resumes. Run it again with the same parameters.
  - The destination is overwritten. The source is only read, and must not change meanwhile.
author: the authors of blockcopy (@blockcopy)
extends_documentation_fragment:
  - blockcopy.move.program
  - blockcopy.move.program.connection
  - blockcopy.move.program.copy
attributes:
  check_mode:
    support: full
    description: Compares both ends with C(sync --dry-run), and writes nothing.
  diff_mode:
    support: none
    description: Blocks are not shown.
options:
  source:
    description: The source, such as V(root@host:/dev/vg/snap) or a local path.
    type: str
    required: true
  destination:
    description:
      - The device or file that becomes the copy.
      - Another host's destination is compared first, because a push does not tell what it wrote.
    type: str
    required: true
  ranges:
    description: Copy only the blocks of these ranges, such as V(1G:64M).
    type: list
    elements: str
    default: []
seealso:
  - module: blockcopy.move.blockcopy_mount
  - module: blockcopy.move.blockcopy_verify
"""

EXAMPLES = r"""
- name: Copy a snapshot of another host
  blockcopy.move.blockcopy_sync:
    source: root@old:/dev/vg/snap
    destination: /dev/vg/copy
    limit: 50M
  register: copied

- name: Tell how much differed
  ansible.builtin.debug:
    msg: "{{ copied.result.fetched_bytes }} bytes fetched"

- name: Renew a copy each night over another port, with metrics for node_exporter
  blockcopy.move.blockcopy_sync:
    source: backup@shop:/dev/vg/snap
    destination: /backup/shop.raw
    rsh: ssh -p 2222
    python: sudo -n python3
    metrics: /var/lib/prometheus/node-exporter/shop.prom
"""

RETURN = r"""
result:
  description: The fields of C(sync --json), see blockcopy-json(5).
  returned: always, but for a command that died before it could print them
  type: dict
  contains:
    complete:
      description: Whether the destination is now known to be a copy. In check mode, whether nothing differs.
      type: bool
      returned: always
    size:
      description: The size of the source in bytes; null if unknown.
      type: int
      returned: always
    same_bytes:
      description: Bytes that were equal at both ends; null after a push.
      type: int
      returned: always
    fetched_bytes:
      description: Bytes that the source sent; null after a push.
      type: int
      returned: always
    zero_bytes:
      description: Bytes that are zeros, and were not sent; null after a push.
      type: int
      returned: always
    hole_bytes:
      description: Zero bytes that were holes at both ends; null after a push.
      type: int
      returned: always
    resumed_bytes:
      description: Bytes that a state file recorded as present.
      type: int
      returned: always
    received_bytes:
      description: Bytes received from the other end; null if unknown.
      type: int
      returned: always
    elapsed_seconds:
      description: Seconds that the command took.
      type: float
      returned: always
    error:
      description: Why the copy failed, or null.
      type: str
      returned: always
  sample: {complete: true, size: 1073741824, fetched_bytes: 131072, same_bytes: 1073610752}
changed_bytes:
  description: Bytes that were written, or would be in check mode. Null after a push that was needed.
  returned: success
  type: int
  sample: 131072
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.blockcopy.move.plugins.module_utils.program import (
    CONNECTION,
    COPY,
    PROGRAM,
    Program,
    options,
    remote,
)


def wrote(result):
    """Return how many bytes a sync with `result` wrote, or would write. Returns None if that is unknown."""
    if result["fetched_bytes"] is None:
        return None
    return result["fetched_bytes"] + (result["zero_bytes"] or 0) - (result["hole_bytes"] or 0)


def size_of(path):
    """Return the size of the file `path` in bytes. Returns None if there is no such file; 0 for a device."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def main():
    """Run the module."""
    own = {
        "source": {"type": "str", "required": True},
        "destination": {"type": "str", "required": True},
        "ranges": {"type": "list", "elements": "str", "default": []},
    }
    module = AnsibleModule({**PROGRAM, **CONNECTION, **COPY, **own}, supports_check_mode=True)
    params, program = module.params, Program(module)
    destination = params["destination"]
    pushes = remote(destination)
    ends = [*(f"--range={each}" for each in params["ranges"]), "--", params["source"], destination]
    if module.check_mode or pushes:
        without = ("verify", "metrics", "log_file")
        forecast = program.json("sync", "--quiet", "--json", "--dry-run", *options(params, without=without), *ends)[
            1
        ]
        grows = not pushes and size_of(destination) is None
        changed = grows or not forecast["complete"]
        if module.check_mode or not changed:
            module.exit_json(changed=changed, result=forecast, changed_bytes=wrote(forecast))
    before = None if pushes else size_of(destination)
    _status, result, words = program.json("sync", "--quiet", "--json", *options(params), *ends)
    count = wrote(result)
    changed = count is None or count > 0 or (not pushes and before != size_of(destination))
    module.exit_json(changed=changed, result=result, changed_bytes=count, stderr=words)


if __name__ == "__main__":
    main()
