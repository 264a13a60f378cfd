"""The Ansible role moves a disk with ZFS snapshots, from one pool of the guest to another."""

from __future__ import annotations

from guests.lab import Lab
from guests.modules import zfs
from guests.scenarios.role import Volumes, move

ZFS = Volumes("role_zfs", "/dev/zvol", {"method": "zfs"}, memory=2048)


def run(lab: Lab) -> dict[str, object]:
    """Move, and run the playbook again. Returns its times, and the rows of the database."""
    with zfs(lab.image, lab.say) as archive:
        return move(lab, ZFS, {"zfs.tar": archive})
