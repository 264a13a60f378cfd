#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_status`: tells the status of mounts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_status
short_description: Tell the status of blockcopy's mounts
version_added: "0.0.2"
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
  state_file:
    description: A state file, to tell what C(state list) has of it.
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
record:
  description: What C(state list --json) tells of O(state_file). Empty if there is no such record.
  returned: if O(state_file) is given
  type: dict
  sample: {hydrated_bytes: 1073741824, written_bytes: 0}
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
    own = {"mountpoint": {"type": "path"}, "state_file": {"type": "path"}}
    module = AnsibleModule({**PROGRAM, **own}, supports_check_mode=True)
    program, mountpoint, state_file = Program(module), module.params["mountpoint"], module.params["state_file"]
    found = {"changed": False}
    if state_file is not None:
        records = program.json("state", "list", "--json")[1]
        found["record"] = next((each for each in records if each.get("state_file") == state_file), {})
    if mountpoint is None:
        module.exit_json(mounts=program.mounts(), **found)
    status = program.mount_at(mountpoint)
    module.exit_json(mounted=status is not None, answers=answers(status), status=status or {}, **found)


if __name__ == "__main__":
    main()
