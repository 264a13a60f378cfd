"""tools/vm, without a guest: its command line, what it says is missing, and its disk that forgets."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
from support import PYTHON, failed, output

from guests.disks import SECTOR, ForgetfulDisk
from guests.machine import WrongError
from guests.play import INSIDE, play
from guests.scenarios import role, role_zfs

VM = Path(__file__).resolve().parent.parent / "tools" / "vm"
SIZE = 1 << 20
NOT_ROOT = "tools/vm: only root can do this: sudo tools/vm …\n"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ForgetfulDisk]:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    made = ForgetfulDisk(image, tmp_path / "socket", random.Random(1))
    yield made
    made.close()


def write(disk: ForgetfulDisk, *commands: str) -> None:
    """Run `commands` of qemu-io, and kill it, as a guest that is cut."""
    support.require(shutil.which("qemu-io") is not None, "qemu-io is not installed")
    words = ["qemu-io", "-f", "raw", "-t", "writeback", disk.url]
    done = subprocess.run(
        [*words, *(word for each in (*commands, "sigraise 9") for word in ("-c", each))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stdout + done.stderr


def test_a_cut_loses_a_part_of_what_was_not_flushed(disk: ForgetfulDisk) -> None:
    write(disk, f"write -P 1 0 {SIZE}", "flush", f"write -P 2 0 {SIZE // 2}", f"write -f -P 3 {SIZE // 2} {SECTOR}")
    loss = disk.cut()
    assert loss.unflushed == SIZE // 2 // SECTOR
    data = disk.image.read_bytes()
    sectors = [data[start] for start in range(0, SIZE, SECTOR)]
    half = len(sectors) // 2
    assert sectors[:half].count(1) == loss.lost > 0
    assert sectors[half:] == [3, *[1] * (half - 1)]
    assert all(len(set(data[start : start + SECTOR])) == 1 for start in range(0, SIZE, SECTOR))
    write(disk, "read -P 3 512k 4k", "write -z 0 4k", "flush")  # it is served again
    assert disk.cut() == (0, 0)
    assert disk.image.read_bytes()[:SECTOR] == bytes(SECTOR)


def test_a_cut_may_leave_the_first_of_two_versions(disk: ForgetfulDisk) -> None:
    write(disk, f"write -P 1 0 {SIZE}", f"write -P 2 0 {SIZE}")
    disk.cut()
    assert set(disk.image.read_bytes()) == {0, 1, 2}


def test_a_disk_that_halts_in_a_flush_answers_again_after_the_cut(disk: ForgetfulDisk) -> None:
    """Half of the cuts come before the flush is done, half after it."""
    support.require(shutil.which("qemu-io") is not None, "qemu-io is not installed")
    unflushed = set()
    for _ in range(8):
        disk.halt_at(2)
        words = ["qemu-io", "-f", "raw", "-t", "writeback", "-c", "flush", "-c", "write 0 64k", "-c", "flush"]
        with subprocess.Popen([*words, disk.url], stdout=subprocess.DEVNULL) as guest:
            assert disk.halted.wait(20)
            guest.kill()
        unflushed.add(disk.cut().unflushed)
    assert unflushed == {0, 65536 // SECTOR}
    write(disk, "flush")


class Script:
    """A lab and a guest, whose script prints `lines`."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.done: list[str] = []

    def next_event(self, _: float) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.done.append(name)

    def figures(self) -> dict[str, object]:
        return play(self, self, 60)  # type: ignore[arg-type]


def test_a_script_reports_figures_and_broken_promises() -> None:
    script = Script("hello", "@figure 1.5 seconds of it", "@figure 253:4 number", "@end 0", "later")
    assert script.figures() == {"seconds of it": 1.5, "number": "253:4"}
    assert script.done == ["boot", "say", "say", "say", "say", "wait_until_off"]
    with pytest.raises(WrongError, match=r"lost; it printed\n +hello"):
        Script("hello", "@wrong a write is lost", "@end 1").figures()
    with pytest.raises(WrongError, match="ended with 2"):
        Script("@end 2").figures()
    with pytest.raises(WrongError, match="did not end in time"):
        Script("hello").figures()
    cut = Script("@figure 1 step", "@cut", "@figure 2 after")
    assert cut.figures() == {"step": 1, "after": 2}
    assert "cut" in cut.done


def test_the_scripts_are_sound() -> None:
    scripts = [each for each in INSIDE.iterdir() if each.is_file() and not each.suffix]
    assert scripts
    for each in scripts:
        assert output("bash", "-n", str(each)) == ""


@pytest.mark.parametrize("volumes", [role.LVM, role_zfs.ZFS])
def test_the_role_knows_the_variables_of_its_scenarios(volumes: role.Volumes) -> None:
    lab: Any = SimpleNamespace(image=SimpleNamespace(key="key"))
    guest: Any = SimpleNamespace(port=1)
    shop = role.inventory(lab, guest, volumes)["all"]["children"]["moves"]["hosts"]["shop"]
    known = (VM.parent / "ansible/roles/move/meta/argument_specs.yml").read_text()
    assert [name for name in shop if name not in known] == []
    made = (INSIDE / volumes.script).read_text()
    assert f"old={shop['move_disks'][0]['source']} new={shop['move_disks'][0]['destination']}" in made


def test_the_recap_of_a_playbook_is_read() -> None:
    recap = "PLAY RECAP ***\nshop                       : ok=47   changed=19   unreachable=0    failed=0\n"
    assert role.RECAP.findall(recap) == [("47", "19")]


def test_the_command_line_is_told(tmp_path: Path) -> None:
    scenarios = output(PYTHON, str(VM), "list")
    assert "hello  " in scenarios
    done = subprocess.run([PYTHON, VM, "run", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'nothing'" in done.stderr
    support.require_root()
    command = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search"]
    command += ["--ambient-caps=+dac_read_search", PYTHON, str(VM), "build"]
    failed(subprocess.run(command, capture_output=True, text=True, check=False), 125, NOT_ROOT)
