#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_mount`: mounts a remote device while it is copied, and ends mounts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_mount
short_description: Mount a remote device or file while it is being copied
version_added: "1.0.0"
description:
  - Runs C(blockcopy mount), which goes on in the background after the module has ended.
  - A mount of the same source and destination stays as it is. Only its limit is set, if O(limit) is given.
  - A mount of another source or destination at O(mountpoint) is an error.
  - The mount of a killed blockcopy is cleared, and made again. It resumes.
author: the authors of blockcopy (@blockcopy)
extends_documentation_fragment:
  - blockcopy.move.program
  - blockcopy.move.program.connection
  - blockcopy.move.program.copy
attributes:
  check_mode:
    support: full
    description: Tells whether a mount would be made or ended.
  diff_mode:
    support: none
    description: There is nothing to show.
options:
  mountpoint:
    description: A folder or file to mount on. A missing folder is created.
    type: path
    required: true
  source:
    description: The source, such as V(root@host:/dev/vg/snap). Needed for V(state=mounted).
    type: str
  destination:
    description: The device or file that becomes the copy. Needed for V(state=mounted).
    type: path
  state:
    description:
      - V(mounted) mounts. V(unmounted) ends the mount, and the destination is synced then.
      - V(absent) ends the mount and removes O(mountpoint), if that is an empty folder.
      - A mount whose file is in use is not ended. The module fails.
    type: str
    choices: [mounted, unmounted, absent]
    default: mounted
  discard_writes:
    description:
      - For V(state=unmounted) and V(state=absent), throw away what was written to the mount or to earlier ones.
      - O(destination) is needed. It can become a copy again.
    type: bool
    default: false
  writable:
    description: Whether the mount accepts writes. The source is still only read.
    type: bool
    default: false
  name:
    description: The name of the file in the mount. The default is that of the destination.
    type: str
  background:
    description: Whether all blocks are copied, or only what is read.
    type: bool
    default: true
  fuse_options:
    description: Options of C(-o), such as V(allow_other).
    type: list
    elements: str
    default: []
seealso:
  - module: blockcopy.move.blockcopy_status
"""

EXAMPLES = r"""
- name: Use a disk at once, while it is copied
  blockcopy.move.blockcopy_mount:
    source: root@old:/dev/vg/snap
    destination: /dev/vg/copy
    mountpoint: /mnt/disk
    writable: true
    limit: 50M

- name: End the mount
  blockcopy.move.blockcopy_mount:
    mountpoint: /mnt/disk
    state: unmounted
  register: ended

- name: See whether the destination is the copy
  ansible.builtin.assert:
    that: ended.complete
"""

RETURN = r"""
status:
  description: The status of the mount, see blockcopy-json(5). After an unmount, that of before.
  returned: success, but for check mode
  type: dict
  sample: {state: hydrating, source_needed: true, writable: true}
file:
  description: The file that shows the disk.
  returned: if V(state=mounted)
  type: str
  sample: /mnt/disk/copy
complete:
  description: Whether the destination is the copy. Null if there was no mount.
  returned: if V(state=unmounted) or V(state=absent)
  type: bool
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.blockcopy.move.plugins.module_utils.program import (
    CONNECTION,
    COPY,
    INCOMPLETE,
    PROGRAM,
    Program,
    answers,
    options,
)


def shown_file(params):
    """Return the path that shows the disk, for the module parameters `params`."""
    if os.path.isfile(params["mountpoint"]):
        return params["mountpoint"]
    return os.path.join(params["mountpoint"], params["name"] or os.path.basename(params["destination"]))


def differences(status, params):
    """Return in words how the mount of `status` differs from what the module parameters `params` want."""
    wanted = {
        "source": params["source"],
        "destination": os.path.abspath(params["destination"]),
        "writable": params["writable"],
    }
    return [f"its {name} is {status.get(name)}" for name, value in wanted.items() if status.get(name) != value]


def mount(module, program, found):
    """Make the mount with `program` and the parameters of `module`, unless it is there.

    `found`: the status of what is mounted at the mountpoint, or None.
    """
    params = module.params
    point = params["mountpoint"]
    if answers(found):
        if wrong := differences(found, params):
            module.fail_json(msg=f"{point} is another mount: {', '.join(wrong)}", status=found)
        changed = False
        if params["limit"] is not None and not module.check_mode:
            program.run("limit", "--", point, params["limit"])
            now = program.mount_at(point) or {}
            changed = now.get("limit_bytes_per_s") != found.get("limit_bytes_per_s")
            found = now
        module.exit_json(changed=changed, status=found, file=shown_file(params))
    if module.check_mode:
        module.exit_json(changed=True, file=shown_file(params))
    if found is None and not os.path.lexists(point):
        os.makedirs(point)
    own = ["--writable"] * params["writable"] + ["--no-background"] * (not params["background"])
    own += [f"--name={params['name']}"] * (params["name"] is not None) + ["--replace"]
    own += [word for each in params["fuse_options"] for word in ("-o", each)]
    ends = ["--", params["source"], params["destination"], point]
    _status, _out, words = program.run("mount", "--quiet", *own, *options(params), *ends)
    status = program.mount_at(point)
    if not answers(status):
        module.fail_json(msg=f"{point} was mounted, and does not answer", status=status, stderr=words)
    module.exit_json(changed=True, status=status, file=shown_file(params), stderr=words)


def unmount(module, program, found):
    """End the mount with `program` as the parameters of `module` say, if there is one. `found`: as for `mount`."""
    point, complete, words = module.params["mountpoint"], None, ""
    changed = found is not None
    if changed and not module.check_mode:
        status, _out, words = program.run("umount", "--", point, accept=(0, INCOMPLETE))
        complete = status == 0
    if module.params["discard_writes"] and not (module.check_mode and found):
        changed |= program.has_writes(module.params["destination"], discard=not module.check_mode)
    if module.params["state"] == "absent" and os.path.isdir(point) and not os.path.islink(point):
        if module.check_mode:
            changed = True
        elif not os.listdir(point):
            os.rmdir(point)
            changed = True
    module.exit_json(changed=changed, status=found or {}, complete=complete, stderr=words)


def main():
    """Run the module."""
    own = {
        "mountpoint": {"type": "path", "required": True},
        "source": {"type": "str"},
        "destination": {"type": "path"},
        "state": {"type": "str", "choices": ["mounted", "unmounted", "absent"], "default": "mounted"},
        "discard_writes": {"type": "bool", "default": False},
        "writable": {"type": "bool", "default": False},
        "name": {"type": "str"},
        "background": {"type": "bool", "default": True},
        "fuse_options": {"type": "list", "elements": "str", "default": []},
    }
    module = AnsibleModule(
        {**PROGRAM, **CONNECTION, **COPY, **own},
        supports_check_mode=True,
        required_if=[("state", "mounted", ("source", "destination")), ("discard_writes", True, ("destination",))],
    )
    program = Program(module)
    point = module.params["mountpoint"] = os.path.abspath(module.params["mountpoint"])
    found = program.mount_at(point)
    if module.params["state"] == "mounted":
        mount(module, program, found)
    else:
        unmount(module, program, found)


if __name__ == "__main__":
    main()
