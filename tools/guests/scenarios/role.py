"""The Ansible role moves a disk with LVM snapshots, from one volume group of the guest to another."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from checkout import CHECKOUT
from debian import ToolError
from guests.lab import Lab
from guests.machine import SSH_OPTIONS, Disk, Machine, WrongError
from guests.play import INSIDE, play, stage
from guests.steps import FILES, empty_file
from moving.environment import installed, variables
from moving.story import ALONE, PLAY

SIZE = 160 << 20
SECONDS = 2400
"""Time limit. On an idle machine it takes six minutes."""

RECAP = re.compile(r"^shop +: ok=(\d+) +changed=(\d+) ", re.MULTILINE)


def run(lab: Lab) -> dict[str, object]:
    """Move, and run the playbook again. Returns its times, and the rows of the database."""
    programs = installed()
    if programs is None:
        raise ToolError("Ansible is not installed here: tools/fleet --set-up")
    disks = [Disk(name, empty_file(lab, name, SIZE)) for name in ("old", "new")]
    files = {"machine.py": CHECKOUT / "tools/demo.d/machine.py", "service": INSIDE / "service"}
    guest = stage(lab, "role", disks=disks, files=files)
    figures: dict[str, object] = {}

    def move(line: str) -> None:
        if line != "@ready":
            return
        for name in ("move", "second run"):
            began = time.monotonic()
            tasks, changed = _run(lab, guest, programs)
            figures[f"seconds of the {name}"] = round(time.monotonic() - began)
            figures[f"tasks of the {name}"] = tasks
        if changed:
            raise WrongError(f"the second run has changed something, in {changed} tasks")
        (guest.share / "moved").touch()

    return play(lab, guest, SECONDS, move) | figures


def _run(lab: Lab, guest: Machine, programs: Path) -> tuple[int, int]:
    """Run the playbook. Returns how many tasks were run, and how many changed something."""
    play_file, hosts = lab.folder / "move.yml", lab.folder / "inventory.json"
    play_file.write_text(PLAY)
    hosts.write_text(json.dumps(inventory(lab, guest)))
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


def inventory(lab: Lab, guest: Machine) -> dict[str, Any]:
    """Return the inventory. The host `shop` is the move. Both hosts are the guest."""
    ssh = ["-F", "none", *(f"-o{each}" for each in SSH_OPTIONS)]
    service = f"{FILES}/service"
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
                "source": "/dev/old/shop",
                "destination": "/dev/new/shop",
                "mountpoint": "/mnt/shop",
            }
        ],
        "move_snapshot": {"method": "lvm", "size": "64M"},
        "move_stop": f"{service} stop /share/stopped",
        "move_source_start": f"{service} start /dev/old/shop",
        "move_start": f"{service} start /mnt/shop/shop",
        "move_release": f"{service} stop",
        "move_restart": f"{service} start /dev/new/shop",
        "move_small_bytes": 1 << 20,
        "move_rounds_max": 2,
        "move_timeout": 300,
        "move_complete_delay": 1,
    }
    hosts = {"sources": {"hosts": {"old": {}}}, "moves": {"hosts": {"shop": shop}}}
    return {"all": {"vars": common, "children": hosts}}
