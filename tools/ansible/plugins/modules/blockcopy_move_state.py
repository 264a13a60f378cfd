#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_move_state`: reads and advances the state of a move."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_move_state
short_description: Read and advance the state of a move
version_added: "1.0.0"
description:
  - The role P(blockcopy.move.move#role) keeps the stage of a move on the destination's host, by this module.
  - The state is one JSON file, which is replaced as a whole and durably.
  - A stage that may not follow the present one is refused.
author: the authors of blockcopy (@blockcopy)
attributes:
  check_mode:
    support: full
    description: Nothing is written. The state is returned as it would be.
  diff_mode:
    support: none
    description: There is nothing to show.
options:
  name:
    description: The name of the move.
    type: str
    required: true
  folder:
    description: The folder of the state files. Only this user may write to it.
    type: path
    default: /var/lib/blockcopy-move
  source_host:
    description: The name of the source's host in the inventory.
    type: str
    required: true
  disks:
    description: What the move carries. For each name of a disk, C(source) and C(destination).
    type: dict
    required: true
  revision:
    description: The revision that the change is based on. Another one is refused.
    type: int
  stage:
    description: The stage to set, or several that follow each other.
    type: list
    elements: str
    default: []
    choices: [new, copying, stopping, stopped, snapshotted, mounted, starting, started, complete, releasing,
              released, restarting, done, aborting, undoing, aborted]
  without_writes:
    description:
      - For V(stage=aborting), whether the source may start again although the destination was started.
      - It may if nothing was written to the destination, or if its writes are to be thrown away.
    type: bool
    default: false
  disk_fields:
    description: Fields of disks to set. For each field, the value by name of disk.
    type: dict
    default: {}
  added_rounds:
    description: The figures of a round of copying, to be kept, by name of disk.
    type: dict
    default: {}
  window:
    description: The time of day when new work may begin, such as V(22:00-05:00), by the clock of the managed host.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Read the state of a move
  blockcopy.move.blockcopy_move_state:
    name: shop
    source_host: old
    disks:
      data: {source: /dev/vg/data, destination: /dev/vg/copy}
  register: move_state

- name: Look at its stage
  ansible.builtin.debug:
    var: move_state.state.stage
"""

RETURN = r"""
state:
  description: The state, as in the file.
  returned: success
  type: dict
  contains:
    stage:
      description: The stage of the move.
      type: str
      returned: success
    revision:
      description: The number of changes of the file.
      type: int
      returned: success
    id:
      description: An identifier of this try, which the names of snapshots have.
      type: str
      returned: success
    disks:
      description: For each name of a disk, its ends, its rounds, and whether its rest is small.
      type: dict
      returned: success
    events:
      description: What happened when, the last ones.
      type: list
      elements: dict
      returned: success
window_open:
  description: Whether new work may begin now.
  returned: success
  type: bool
"""

import datetime
import os
import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.blockcopy.move.plugins.module_utils.move_state import (
    STAGES,
    MoveState,
    StateRefusedError,
    is_open,
)


def change(state, params):
    """Change `state` as the module parameters `params` say. Returns whether anything changed."""
    state.load(params["source_host"], params["disks"])
    state.check(params["revision"])
    changed = state.is_new
    for field, values in params["disk_fields"].items():
        for name, value in values.items():
            changed |= state.set_field(name, field, value)
    for name, figures in params["added_rounds"].items():
        state.add_round(name, figures)
        changed = True
    for stage in params["stage"]:
        changed |= state.advance(stage, without_writes=params["without_writes"])
    return changed


def main():
    """Run the module."""
    module = AnsibleModule(
        {
            "name": {"type": "str", "required": True},
            "folder": {"type": "path", "default": "/var/lib/blockcopy-move"},
            "source_host": {"type": "str", "required": True},
            "disks": {"type": "dict", "required": True},
            "revision": {"type": "int"},
            "stage": {"type": "list", "elements": "str", "default": [], "choices": STAGES},
            "without_writes": {"type": "bool", "default": False},
            "disk_fields": {"type": "dict", "default": {}},
            "added_rounds": {"type": "dict", "default": {}},
            "window": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", params["name"]):
        module.fail_json(msg=f"{params['name']!r} cannot be the name of a move: letters, digits, _ and - only")
    try:
        is_window_open = is_open(params["window"], datetime.datetime.now())
        path = os.path.join(params["folder"], params["name"] + ".json")
        with MoveState(path, params["name"], read_only=module.check_mode) as state:
            changed = change(state, params)
            if changed and not module.check_mode:
                state.save()
    except StateRefusedError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"cannot keep the state of the move {params['name']}: {error}")
    module.exit_json(changed=changed, state=state.fields, window_open=is_window_open)


if __name__ == "__main__":
    main()
