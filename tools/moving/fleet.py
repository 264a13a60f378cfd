"""A fleet: sources and destinations, services with their disks, and the inventory that Ansible reads."""

from __future__ import annotations

import json
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkout import CHECKOUT
from moving.disks import MIB, Disk
from moving.machine import Machine, Switch, machines, run

SERVICE = f"{sys.executable} {CHECKOUT}/tools/moving/service.py"
BLOCKCOPY = f"env PYTHONPATH={CHECKOUT}:{CHECKOUT}/fuse {sys.executable} -P -m blockcopy"
SNAPSHOTS = {
    "btrfs": {"method": "btrfs", "subvolume": "/srv/data/{name}"},
    "command": {
        "method": "command",
        "path": "{{{{ move_disk.source }}}}.{{{{ move_snapshot_name }}}}",
        "create": 'cp --reflink=auto "$BLOCKCOPY_DISK" "$BLOCKCOPY_PATH.new" && '
        'mv "$BLOCKCOPY_PATH.new" "$BLOCKCOPY_PATH"',
        "remove": 'rm -f "$BLOCKCOPY_PATH" "$BLOCKCOPY_PATH.new"',
    },
}


@dataclass
class Move:
    """A service that moves with its disks."""

    name: str
    source: Machine
    destination: Machine
    disks: list[Disk]
    method: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def state_file(self) -> Path:
        """The state that the role keeps, as the campaign sees it."""
        return self.destination.folder / "lib" / "blockcopy-move" / f"{self.name}.json"

    def state(self) -> dict[str, Any]:
        """Return the state that the role keeps. Empty if there is none yet."""
        if not self.state_file.exists():
            return {}
        found: dict[str, Any] = json.loads(self.state_file.read_text())
        return found

    @property
    def stage(self) -> str:
        """The stage that the move has reached."""
        return str(self.state().get("stage", "none"))

    def command(self, action: str, where: str = "", files: list[str] | None = None) -> str:
        """Return the command line that makes the service do `action`, on `files`, as started at `where`."""
        return f"{SERVICE} {action} {self.name} /srv/service {where} {shlex.join(files or [])}".strip()

    def variables(self, rsh: str) -> dict[str, Any]:
        """Return the variables of the role for this move. `rsh`: the ssh that reaches sources."""
        mounted = [f"{each.mountpoint}/{Path(each.destination).name}" for each in self.disks]
        fill = {"name": self.name}
        return {
            "ansible_host": self.destination.address,
            "move_source_host": self.source.name,
            "move_source_address": f"root@{self.source.address}",
            "move_rsh": rsh,
            "move_python": sys.executable,
            "move_executable": BLOCKCOPY,
            "move_disks": [
                {key: getattr(each, key) for key in ("name", "source", "destination", "mountpoint")}
                for each in self.disks
            ],
            "move_snapshot": {key: value.format(**fill) for key, value in SNAPSHOTS[self.method].items()},
            "move_stop": self.command("stop"),
            "move_source_start": self.command("start", "old", [each.source for each in self.disks]),
            "move_start": self.command("start", "new", mounted),
            "move_release": self.command("stop"),
            "move_restart": self.command("start", "direct", [each.destination for each in self.disks]),
            "move_metrics_folder": "/var/lib/metrics",
            **self.extra,
        }


@dataclass
class Fleet:
    """All machines and moves, with all files in `folder`. `sockets`: a folder with a short path, for ssh's."""

    folder: Path
    sockets: Path
    switch: Switch
    machines: dict[str, Machine]
    moves: list[Move]

    @property
    def ssh(self) -> list[str]:
        """The options of ssh that reach any machine."""
        return [
            *("-F", "none", "-i", str(self.folder / "keys" / "user"), "-o", "BatchMode=yes"),
            *("-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"),
            *("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
        ]

    def write_inventory(self) -> Path:
        """Write the inventory: a host for each move, so that forks, serial and limits are about moves."""
        common = {
            "ansible_user": "root",
            "ansible_port": 22,
            "ansible_python_interpreter": sys.executable,
            "ansible_ssh_args": shlex.join([*self.ssh, "-o", "ControlMaster=auto", "-o", "ControlPersist=30"]),
            "ansible_control_path_dir": str(self.sockets),
            "ansible_remote_tmp": "/srv/ansible",  # not in the home of this machine's root
        }
        rsh = shlex.join(["ssh", *self.ssh])
        sources = {each.source.name: {"ansible_host": each.source.address} for each in self.moves}
        inventory = {
            "all": {
                "vars": common,
                "children": {
                    "sources": {"hosts": sources},
                    "moves": {"hosts": {each.name: each.variables(rsh) for each in self.moves}},
                },
            }
        }
        path = self.folder / "inventory.json"
        path.write_text(json.dumps(inventory, indent=1))
        return path

    def start_services(self) -> None:
        """Start each service where its disks are."""
        for each in self.moves:
            words = each.command("start", "old", [disk.source for disk in each.disks])
            each.source.run(*shlex.split(words))


def boot_script(machine: Machine, device: str | None) -> None:
    """Write what `machine` runs at each start: its file system of sources, if `device` is one, and its services."""
    lines = ["#!/bin/bash", "set -e", "mkdir -p /srv/service /var/lib/metrics"]
    if device is not None:
        lines += ["mkdir -p /srv/data", f"mount {device} /srv/data"]
    lines += [f"{SERVICE} boot /srv/service"]
    path = machine.folder / "boot"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)


def attach(stack: ExitStack, file: Path) -> str:
    """Attach `file` to a loop device until `stack` ends. Returns the device."""
    device = run(["losetup", "--find", "--show", file]).strip()
    stack.callback(run, ["losetup", "--detach", device])
    return device


def make_sources(stack: ExitStack, machine: Machine, *, with_btrfs: bool) -> Path:
    """Make the folder of the sources of `machine`. Returns its path as the campaign sees it.

    `with_btrfs`: on a btrfs of its own, which the campaign mounts as well until `stack` ends.
    """
    folder = machine.folder / "srv" / "data"
    folder.mkdir()
    if not with_btrfs:
        boot_script(machine, None)
        return folder
    image, view = machine.folder / "btrfs", machine.folder / "view"
    with image.open("wb") as file:
        file.truncate(4096 * MIB)
    view.mkdir()
    device = attach(stack, image)
    run(["mkfs.btrfs", "--quiet", device])
    run(["mount", device, view])
    stack.callback(run, ["umount", view])
    boot_script(machine, device)
    return view


@contextmanager
def fleet(
    folder: Path, *, sources: int, disks: Sequence[int], size: int, seed: int, btrfs: bool
) -> Iterator[Fleet]:
    """Make a fleet in `folder`: as many `sources` as destinations, and a service for each of `disks`, its disks.

    `size`: MiB of the largest disk. `seed`: of all choices. `btrfs`: whether sources are on btrfs. The machines
    run, and the services write. All is removed when the context ends.
    """
    choose = random.Random(seed)
    names = [f"old{at}" for at in range(sources)] + [f"new{at}" for at in range(sources)]
    with ExitStack() as stack:
        switch, made = stack.enter_context(machines(folder, names))
        stack.callback(lambda: [each.kill() for each in made.values()])  # before their disks go
        data = {name: make_sources(stack, made[name], with_btrfs=btrfs) for name in names[:sources]}
        for name in names[sources:]:
            boot_script(made[name], None)
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        found = Fleet(folder, sockets, switch, made, [])
        for number, count in enumerate(disks):
            old, new = made[f"old{number % sources}"], made[f"new{(number + number // sources) % sources}"]
            name = f"shop{number:02}"
            place = data[old.name] / name
            run(["btrfs", "subvolume", "create", place] if btrfs else ["mkdir", place])
            method = ["btrfs", "command"][number % 2] if btrfs else "command"
            own = []
            for at in range(count):
                disk = Disk(
                    name=f"disk{at}",
                    number=at,
                    size=choose.randrange(size // 4, size + 1) * MIB,
                    source=f"/srv/data/{name}/disk{at}",
                    destination=f"/srv/{name}-disk{at}",
                    mountpoint=f"/srv/mnt/{name}-disk{at}",
                    source_file=place / f"disk{at}",
                    destination_file=new.folder / "srv" / f"{name}-disk{at}",
                )
                disk.source_file.write_bytes(disk.first_bytes())
                if choose.random() < 0.5:
                    disk.destination_file.write_bytes(bytes(disk.size))
                    disk.destination = attach(stack, disk.destination_file)
                own.append(disk)
            # After the first round the hot pages are left: 3 MiB at most.
            small = {"move_small_bytes": 4 * MIB} if len(disks) > 2 else {}
            found.moves.append(Move(name, old, new, own, method, small))
        for each in made.values():
            each.start()
        found.start_services()
        try:
            yield found
        finally:
            for each in made.values():
                each.kill()


def left_behind(found: Fleet) -> list[str]:
    """Return what moves that are done have left: snapshots at sources, mounts at destinations."""
    left = []
    for each in found.moves:
        place = each.disks[0].source_file.parent
        snapshots = [*place.parent.glob(f".blockcopy-{each.name}-*"), *place.glob("*.blockcopy-*")]
        left += [f"snapshot {path}" for path in snapshots]
    for machine in {each.destination.name: each.destination for each in found.moves}.values():
        for words in machine.run("cat", "/proc/self/mountinfo").splitlines():
            if " /srv/" in words and "fuse" in words:
                left.append(f"mount on {machine.name}: {words}")
    return left
