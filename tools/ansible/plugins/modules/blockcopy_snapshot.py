#!/usr/bin/python
# Copyright: the authors of blockcopy. MIT License (see LICENSE of blockcopy)
"""The module `blockcopy_snapshot`: makes and removes snapshots to copy from."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcopy_snapshot
short_description: Make or remove a snapshot to copy from
version_added: "1.0.0"
description:
  - Makes a read-only snapshot of a disk, by LVM, btrfs, ZFS or commands of yours, or removes it.
  - A snapshot of O(name) that exists stays as it is.
  - With LVM and ZFS, something else of the name O(name), which is no snapshot of O(disk), is an error.
author: the authors of blockcopy (@blockcopy)
attributes:
  check_mode:
    support: full
    description: Tells whether a snapshot would be made or removed.
  diff_mode:
    support: none
    description: There is nothing to show.
options:
  disk:
    description:
      - The disk. A logical volume (V(/dev/vg/disk)), a zvol (V(/dev/zvol/pool/disk)), a file in a subvolume of
        btrfs, or whatever your commands understand.
    type: str
    required: true
  name:
    description: The name of the snapshot, such as V(blockcopy-shop-data).
    type: str
    required: true
  method:
    description:
      - V(lvm) is C(lvcreate --snapshot). V(zfs) is C(zfs snapshot) and a clone of it, which has a device.
      - With V(zfs), a zvol that was not made sparse needs as much free room in its pool as it has data.
      - V(btrfs) snapshots O(subvolume), which has the file O(disk).
      - V(command) runs O(create) and O(remove).
      - V(none) makes none. O(disk) itself is the path, and must not change meanwhile.
    type: str
    choices: [lvm, btrfs, zfs, command, none]
    required: true
  state:
    description: Whether the snapshot is made or removed.
    type: str
    choices: [present, absent]
    default: present
  size:
    description: For V(method=lvm), the room for changes, such as V(5G) or V(20%ORIGIN). None for thin volumes.
    type: str
  subvolume:
    description: For V(method=btrfs), the subvolume. The snapshot is made beside it, as V(.NAME).
    type: path
  path:
    description:
      - For V(method=command), the path of the snapshot.
      - It must appear only when the snapshot is complete.
    type: path
  create:
    description:
      - For V(method=command), a shell command that makes the snapshot.
      - It has the variables C(BLOCKCOPY_DISK), C(BLOCKCOPY_SNAPSHOT) (the name) and C(BLOCKCOPY_PATH).
      - It runs only if O(path) does not exist. It may find what an interrupted run of it has left.
    type: str
  remove:
    description:
      - For V(method=command), a shell command that removes the snapshot.
      - It also removes what an interrupted O(create) has left, and succeeds if there is nothing.
      - It has the same variables.
    type: str
"""

EXAMPLES = r"""
- name: Snapshot a logical volume
  blockcopy.move.blockcopy_snapshot:
    disk: /dev/vg/data
    name: blockcopy-data
    method: lvm
    size: 5G
  register: snapshot

- name: Snapshot an image file by a copy that shares its blocks
  blockcopy.move.blockcopy_snapshot:
    disk: /srv/images/data.raw
    name: blockcopy-data
    method: command
    path: /srv/images/.blockcopy-data
    create: >-
      cp --reflink=always "$BLOCKCOPY_DISK" "$BLOCKCOPY_PATH.new" && mv "$BLOCKCOPY_PATH.new" "$BLOCKCOPY_PATH"
    remove: rm -f "$BLOCKCOPY_PATH" "$BLOCKCOPY_PATH.new"

- name: Remove a snapshot
  blockcopy.move.blockcopy_snapshot:
    disk: /dev/vg/data
    name: blockcopy-data
    method: lvm
    state: absent
"""

RETURN = r"""
path:
  description: The path to copy from.
  returned: success
  type: str
  sample: /dev/vg/blockcopy-data
"""

import json
import os
import re
import time

from ansible.module_utils.basic import AnsibleModule

ZVOLS = "/dev/zvol"
DEVICE_SECONDS = 60
"""How long the device of a clone may take to appear."""


class Lvm:
    """A snapshot of a logical volume. `module`: the AnsibleModule."""

    def __init__(self, module):
        self._module, self._disk = module, module.params["disk"]
        self._group, self._volume = self._names()
        self._name = f"{self._group}/{module.params['name']}"
        self.path = f"/dev/{self._group}/{module.params['name']}"

    def _report(self, volume, accept=(0,)):
        fields = "vg_name,lv_name,origin,pool_lv"
        words = ["lvs", "--reportformat", "json", "-o", fields, "--", volume]
        status, out, err = self._module.run_command(words)
        if status not in accept:
            self._module.fail_json(msg=f"lvs {volume}: {err.strip()}", rc=status)
        found = json.loads(out)["report"][0]["lv"] if status == 0 else []
        return found[0] if found else None

    def _names(self):
        found = self._report(self._disk)
        if found is None:
            self._module.fail_json(msg=f"{self._disk} is not a logical volume")
        self._thin = bool(found["pool_lv"])
        return found["vg_name"], found["lv_name"]

    def exists(self):
        """Return whether the snapshot exists. Fails the module if the name is something else."""
        found = self._report(self._name, accept=(0, 5))
        if found is not None and found["origin"] != self._volume:
            self._module.fail_json(msg=f"{self._name} exists, and is not a snapshot of {self._disk}")
        return found is not None

    def make(self):
        """Make the snapshot. A thin one is active at once, and stays so."""
        size = self._module.params["size"]
        if not self._thin and size is None:
            self._module.fail_json(msg=f"{self._disk} is not a thin volume: its snapshot needs `size`")
        room = ["--setactivationskip", "n"]
        if not self._thin:
            room = ["--extents" if "%" in size else "--size", size]
        words = ["lvcreate", "--yes", "--snapshot", "--permission", "r", *room]
        self._module.run_command([*words, "--name", self._module.params["name"], self._disk], check_rc=True)

    def remove(self):
        """Remove the snapshot."""
        self._module.run_command(["lvremove", "--yes", "--", self._name], check_rc=True)


class Zfs:
    """A snapshot of a zvol, and a read-only clone of it, which has a device. `module`: the AnsibleModule."""

    def __init__(self, module):
        self._module = module
        disk = module.params["disk"]
        found = re.fullmatch(r"(?:/dev/zvol/)?([^/@]+(?:/[^/@]+)+)", disk)
        if found is None:
            module.fail_json(msg=f"{disk} is not a zvol such as /dev/zvol/pool/disk")
        # Below, a failure of `zfs list` means that a name is not there. So the disk must be there.
        words = ["zfs", "list", "-H", "-o", "type", "--", found[1]]
        status, out, err = module.run_command(words)
        if status != 0 or out.strip() != "volume":
            module.fail_json(msg=f"{disk} is not a zvol: {err.strip() or out.strip()}", rc=status)
        self._snapshot = f"{found[1]}@{module.params['name']}"
        self._clone = f"{found[1]}-{module.params['name']}"
        self.path = f"{ZVOLS}/{self._clone}"

    def _origin(self, name, field):
        status, out, _err = self._module.run_command(["zfs", "list", "-H", "-p", "-o", field, "--", name])
        return out.strip() if status == 0 else None

    def exists(self):
        """Return whether the snapshot exists with its clone. Fails the module if the clone is another's."""
        origin = self._origin(self._clone, "origin")
        if origin not in (None, self._snapshot):
            self._module.fail_json(msg=f"{self._clone} exists, and is not a clone of {self._snapshot}")
        if self._module.params["state"] == "absent":
            return origin is not None or self._origin(self._snapshot, "name") is not None
        return origin is not None and os.path.exists(self.path)

    def make(self):
        """Make what is missing of the snapshot, the clone and its device.

        Memory is written back first: a file system on the disk may be mounted. LVM does so by itself, ZFS does not.
        """
        if self._origin(self._snapshot, "name") is None:
            os.sync()
            self._module.run_command(["zfs", "snapshot", self._snapshot], check_rc=True)
        if self._origin(self._clone, "name") is None:
            words = ["zfs", "clone", "-o", "readonly=on", self._snapshot, self._clone]
            self._module.run_command(words, check_rc=True)
        # The device may appear later than the clone. With volmode=none there is none.
        end = time.monotonic() + DEVICE_SECONDS
        while not os.path.exists(self.path):
            if time.monotonic() > end:
                self._module.fail_json(msg=f"{self._clone} has no device {self.path} after {DEVICE_SECONDS} s")
            time.sleep(0.05)
        self._settle()

    def remove(self):
        """Remove the clone and the snapshot. A snapshot of the clone by others goes with it."""
        self._settle()
        for name, also in ((self._clone, ["-r"]), (self._snapshot, [])):
            if self._origin(name, "name") is not None:
                self._module.run_command(["zfs", "destroy", *also, name], check_rc=True)

    def _settle(self):
        """Wait until udev has closed new devices, which it looks at."""
        self._module.run_command(["udevadm", "settle"], check_rc=True)


class Btrfs:
    """A read-only snapshot of a subvolume, which has the disk as a file. `module`: the AnsibleModule."""

    def __init__(self, module):
        self._module = module
        self._subvolume = os.path.realpath(module.params["subvolume"])
        disk = os.path.realpath(module.params["disk"])
        inner = os.path.relpath(disk, self._subvolume)
        if inner == os.curdir or inner.split(os.sep)[0] == os.pardir:
            module.fail_json(msg=f"{disk} is not a file in {self._subvolume}")
        self._made = os.path.join(os.path.dirname(self._subvolume), f".{module.params['name']}")
        self.path = os.path.join(self._made, inner)

    def exists(self):
        """Return whether the snapshot exists."""
        return os.path.lexists(self._made)

    def make(self):
        """Write back what is in memory, and make the snapshot."""
        for words in (["filesystem", "sync", self._subvolume], ["subvolume", "snapshot", "-r", self._subvolume]):
            last = [self._made] if "snapshot" in words else []
            self._module.run_command(["btrfs", *words, *last], check_rc=True)

    def remove(self):
        """Remove the snapshot. What is no subvolume is refused by btrfs."""
        self._module.run_command(["btrfs", "subvolume", "delete", "--commit-after", self._made], check_rc=True)


class Commands:
    """A snapshot by commands of the user. `module`: the AnsibleModule."""

    def __init__(self, module):
        self._module, self.path = module, module.params["path"]

    def exists(self):
        """Return whether the snapshot exists. Before a removal this is assumed: a part may be left."""
        return os.path.lexists(self.path)

    def make(self):
        """Run the command that makes the snapshot. Fails the module if the path is missing afterwards."""
        self._run(self._module.params["create"])
        if not os.path.exists(self.path):
            self._module.fail_json(msg=f"`create` succeeded, and {self.path} does not exist")

    def remove(self):
        """Run the command that removes the snapshot. Fails the module if the path is still there."""
        self._run(self._module.params["remove"])
        if os.path.lexists(self.path):
            self._module.fail_json(msg=f"`remove` succeeded, and {self.path} still exists")

    def _run(self, command):
        params = self._module.params
        known = {"DISK": params["disk"], "SNAPSHOT": params["name"], "PATH": self.path}
        environment = {f"BLOCKCOPY_{name}": value for name, value in known.items()}
        self._module.run_command(
            ["/bin/sh", "-c", command], environ_update=environment, check_rc=True, handle_exceptions=True
        )


class Nothing:
    """No snapshot: the disk itself. `module`: the AnsibleModule."""

    def __init__(self, module):
        self.path, self._state = module.params["disk"], module.params["state"]

    def exists(self):
        """Return what leaves nothing to do."""
        return self._state == "present"

    def make(self):
        """Do nothing."""

    def remove(self):
        """Do nothing."""


METHODS = {"lvm": Lvm, "zfs": Zfs, "btrfs": Btrfs, "command": Commands, "none": Nothing}


def main():
    """Run the module."""
    module = AnsibleModule(
        {
            "disk": {"type": "str", "required": True},
            "name": {"type": "str", "required": True},
            "method": {"type": "str", "choices": ["lvm", "btrfs", "zfs", "command", "none"], "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "size": {"type": "str"},
            "subvolume": {"type": "path"},
            "path": {"type": "path"},
            "create": {"type": "str"},
            "remove": {"type": "str"},
        },
        supports_check_mode=True,
        required_if=[("method", "command", ("path", "create", "remove")), ("method", "btrfs", ("subvolume",))],
    )
    params = module.params
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", params["name"]):
        module.fail_json(msg=f"{params['name']!r} cannot be the name of a snapshot")
    snapshot = METHODS[params["method"]](module)
    is_wanted, exists = params["state"] == "present", snapshot.exists()
    changed = is_wanted != exists
    if not module.check_mode:
        if is_wanted and not exists:
            snapshot.make()
        elif not is_wanted and (exists or params["method"] == "command"):
            snapshot.remove()
    module.exit_json(changed=changed, path=snapshot.path)


if __name__ == "__main__":
    main()
