#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_status`: tells the status of mounts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_status
short_description: Tell the status of blockcopy's mounts
version_added: "1.0.0"
description:
  - Runs C(blockcopy list --json). A mount that does not answer is told as such, and delays nothing.
author: the authors of blockcopy (@blockcopy)
extends_documentation_fragment:
  - blockcopy.move.program
attributes:
  check_mode:
    support: full
    description: Nothing is changed in any mode.
  diff_mode:
    support: none
    description: Nothing is changed in any mode.
options:
  mountpoint:
    description: The mount to tell about. Without it, all mounts are told.
    type: path
  destination:
    description:
      - The destination of the mount at O(mountpoint). With it, the module tells RV(has_writes).
    type: path
seealso:
  - module: blockcopy.move.blockcopy_mount
"""

EXAMPLES = r"""
- name: Wait until the source is not needed any more
  blockcopy.move.blockcopy_status:
    mountpoint: /mnt/disk
  register: found
  until: found.mounted and found.status.state == "complete"
  retries: 360
  delay: 10

- name: Tell all mounts of a host
  blockcopy.move.blockcopy_status:
  register: all_of_them
"""

RETURN = r"""
mounted:
  description: Whether a blockcopy is mounted at O(mountpoint).
  returned: if O(mountpoint) is given
  type: bool
answers:
  description: Whether the mount at O(mountpoint) answers. That of a killed blockcopy does not.
  returned: if O(mountpoint) is given
  type: bool
status:
  description: The status of the mount at O(mountpoint), see blockcopy-json(5). Empty if there is none.
  returned: if O(mountpoint) is given
  type: dict
  sample: {state: complete, source_needed: false, hydrated_percent: 100.0, written_bytes: 0}
has_writes:
  description:
    - Whether the destination holds writes of a user. Null if a mount that does not answer may know.
    - While it is mounted, writes of an earlier mount that was killed before it recorded them are not told.
  returned: if O(mountpoint) and O(destination) are given
  type: bool
mounts:
  description: The status of each mount, see blockcopy-json(5).
  returned: if O(mountpoint) is not given
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.blockcopy.move.plugins.module_utils.program import PROGRAM, Program, answers


def main():
    """Run the module."""
    own = {"mountpoint": {"type": "path"}, "destination": {"type": "path"}}
    module = AnsibleModule(
        {**PROGRAM, **own}, supports_check_mode=True, required_by={"destination": ["mountpoint"]}
    )
    program, mountpoint, destination = Program(module), module.params["mountpoint"], module.params["destination"]
    if mountpoint is None:
        module.exit_json(changed=False, mounts=program.mounts())
    status = program.mount_at(mountpoint)
    found = {"mounted": status is not None, "answers": answers(status), "status": status or {}}
    if destination is not None and status is None:
        found["has_writes"] = program.has_writes(destination)
    elif destination is not None:
        found["has_writes"] = status["written_bytes"] > 0 if answers(status) else None
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
