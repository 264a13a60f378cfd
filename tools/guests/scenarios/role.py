"""The Ansible role moves a disk with LVM snapshots, from one volume group of the guest to another."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkout import CHECKOUT
from debian import ToolError
from guests.lab import Lab
from guests.machine import SSH_OPTIONS, Disk, Machine, WrongError
from guests.play import INSIDE, play, stage
from guests.steps import FILES, empty_file
from moving.environment import installed, variables
from moving.story import ALONE, PLAY

SIZE = 512 << 20
"""Bytes of the disk that a volume is on. ZFS keeps much room for itself."""

SECONDS = 2400
"""Time limit. On an idle machine it takes two minutes."""

RECAP = re.compile(r"^shop +: ok=(\d+) +changed=(\d+) ", re.MULTILINE)


class Volumes(NamedTuple):
    """A kind of volumes to move. `script`: the file of `inside` that makes them. `folder`: of their devices.

    `snapshot`: the role's `move_snapshot`. `memory`: MiB of the guest.
    """

    script: str
    folder: str
    snapshot: Mapping[str, str]
    memory: int = 1024


LVM = Volumes("role_lvm", "/dev", {"method": "lvm", "size": "64M"})


def run(lab: Lab) -> dict[str, object]:
    """Move, and run the playbook again. Returns its times, and the rows of the database."""
    return move(lab, LVM)


def move(lab: Lab, volumes: Volumes, files: Mapping[str, Path] | None = None) -> dict[str, object]:
    """Move a volume of the kind `volumes`, and run the playbook again. `files`: more files for the guest.

    Returns the times of the playbook, and the rows of the database.
    """
    programs = installed()
    if programs is None:
        raise ToolError("Ansible is not installed here: tools/fleet --set-up")
    disks = [Disk(name, empty_file(lab, name, SIZE)) for name in ("old", "new")]
    ours = {"machine.py": CHECKOUT / "tools/demo.d/machine.py", "service": INSIDE / "service"}
    ours["volumes"] = INSIDE / volumes.script
    guest = stage(lab, "role", disks=disks, files={**ours, **(files or {})}, memory=volumes.memory)
    figures: dict[str, object] = {}

    def run_twice(line: str) -> None:
        if line != "@ready":
            return
        for name in ("move", "second run"):
            began = time.monotonic()
            tasks, changed = _run(lab, guest, volumes, programs)
            figures[f"seconds of the {name}"] = round(time.monotonic() - began)
            figures[f"tasks of the {name}"] = tasks
        if changed:
            raise WrongError(f"the second run has changed something, in {changed} tasks")
        (guest.share / "moved").touch()

    return play(lab, guest, SECONDS, run_twice) | figures


def _run(lab: Lab, guest: Machine, volumes: Volumes, programs: Path) -> tuple[int, int]:
    """Run the playbook. Returns how many tasks were run, and how many changed something."""
    play_file, hosts = lab.folder / "move.yml", lab.folder / "inventory.json"
    play_file.write_text(PLAY)
    hosts.write_text(json.dumps(inventory(lab, guest, volumes)))
    environment = {**variables(lab.folder / "ansible"), "ANSIBLE_TIMEOUT": "120"}
    words = [*ALONE, programs / "ansible-playbook", "-i", hosts, play_file]
    with (lab.folder / "ansible.log").open("a+") as log:
        start = log.tell()
        where = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": lab.folder}
        status = subprocess.run(words, check=False, env=environment, timeout=SECONDS, **where).returncode
        log.seek(start)
        text = log.read()
    lab.say(text[-2000:])
    found = RECAP.search(text)
    if status or found is None:
        raise WrongError(f"the playbook ended with {status}: {text[-2000:]}")
    return int(found[1]), int(found[2])


def inventory(lab: Lab, guest: Machine, volumes: Volumes) -> dict[str, Any]:
    """Return the inventory. The host `shop` is the move. Both hosts are the guest."""
    ssh = ["-F", "none", *(f"-o{each}" for each in SSH_OPTIONS)]
    service = f"{FILES}/service"
    old, new = (f"{volumes.folder}/{each}/shop" for each in ("old", "new"))
    common = {
        "ansible_host": "127.0.0.1",
        "ansible_port": guest.port,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(lab.image.key),
        "ansible_ssh_args": shlex.join([*ssh, "-oControlMaster=auto", "-oControlPersist=30"]),
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    shop = {
        "move_source_host": "old",
        "move_source_address": "root@source",
        "move_disks": [
            {
                "name": "data",
                "source": old,
                "destination": new,
                "mountpoint": "/mnt/shop",
            }
        ],
        "move_snapshot": dict(volumes.snapshot),
        "move_stop": f"{service} stop /share/stopped",
        "move_source_start": f"{service} start {old}",
        "move_start": f"{service} start /mnt/shop/shop",
        "move_release": f"{service} stop",
        "move_restart": f"{service} start {new}",
        "move_small_bytes": 1 << 20,
        "move_rounds_max": 2,
        "move_timeout": 300,
        "move_complete_delay": 1,
    }
    hosts = {"sources": {"hosts": {"old": {}}}, "moves": {"hosts": {"shop": shop}}}
    return {"all": {"vars": common, "children": hosts}}
