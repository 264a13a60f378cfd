#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_verify`: compares a destination with a source."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_verify
short_description: Compare a device or file with a remote one
version_added: "1.0.0"
description:
  - Runs C(blockcopy verify), which hashes both ends and writes nothing.
author: the authors of blockcopy (@blockcopy)
extends_documentation_fragment:
  - blockcopy.move.program
  - blockcopy.move.program.connection
attributes:
  check_mode:
    support: full
    description: Nothing is written in any mode.
  diff_mode:
    support: none
    description: Blocks are not shown.
options:
  source:
    description: The source, such as V(root@host:/dev/vg/snap) or a local path.
    type: str
    required: true
  destination:
    description: The device or file to compare.
    type: str
    required: true
  fail_on_difference:
    description: Whether the module fails if the ends differ.
    type: bool
    default: true
  max_ranges:
    description: How many of the ranges that differ the result has at most.
    type: int
    default: 100
seealso:
  - module: blockcopy.move.blockcopy_sync
"""

EXAMPLES = r"""
- name: Fail if the copy is not equal to the snapshot
  blockcopy.move.blockcopy_verify:
    source: root@old:/dev/vg/snap
    destination: /dev/vg/copy

- name: Only look how much differs
  blockcopy.move.blockcopy_verify:
    source: root@old:/dev/vg/snap
    destination: /dev/vg/copy
    fail_on_difference: false
  register: compared
"""

RETURN = r"""
equal:
  description: Whether the destination is a copy of the source.
  returned: success, or if the ends differ
  type: bool
result:
  description: The fields of C(verify --json) without C(ranges), see blockcopy-json(5).
  returned: success, or if the ends differ
  type: dict
  sample: {complete: false, size: 1073741824, differing_bytes: 131072, same_bytes: 1073610752}
ranges:
  description: The first ranges that differ, in bytes.
  returned: success, or if the ends differ
  type: list
  elements: dict
  sample: [{offset: 0, length: 131072}]
ranges_count:
  description: How many ranges differ.
  returned: success, or if the ends differ
  type: int
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.blockcopy.move.plugins.module_utils.program import (
    CONNECTION,
    MISMATCH,
    PROGRAM,
    Program,
    options,
)


def main():
    """Run the module."""
    own = {
        "source": {"type": "str", "required": True},
        "destination": {"type": "str", "required": True},
        "fail_on_difference": {"type": "bool", "default": True},
        "max_ranges": {"type": "int", "default": 100},
    }
    module = AnsibleModule({**PROGRAM, **CONNECTION, **own}, supports_check_mode=True)
    params, program = module.params, Program(module)
    arguments = ["verify", "--quiet", "--json", *options(params), "--", params["source"], params["destination"]]
    status, found, words = program.json(*arguments, accept=(0, MISMATCH))
    if found is None:
        program.fail("verify", status, words)
    ranges = found.pop("ranges")
    told = {
        "changed": False,
        "equal": status == 0,
        "result": found,
        "ranges": ranges[: params["max_ranges"]],
        "ranges_count": len(ranges),
        "stderr": words,
    }
    if status and params["fail_on_difference"]:
        module.fail_json(msg=f"{params['destination']} is not a copy of {params['source']}", **told)
    module.exit_json(**told)


if __name__ == "__main__":
    main()
