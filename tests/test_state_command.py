"""`state list` and `state forget`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import support
from support import BLOCK_SIZE, failed, noise, run, succeeded, written

DATA = noise(8 * BLOCK_SIZE)
OLD = support.with_changes(DATA, [3])


def listed() -> list[dict[str, Any]]:
    done = run("state", "list", "--json")
    succeeded(done)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_no_state_files_are_an_empty_list() -> None:
    assert listed() == []
    succeeded(run("state", "list"))


def test_a_copy_is_listed_with_its_names_and_what_is_present(source: Path, destination: Path) -> None:
    succeeded(run("sync", "--range", f"0:{2 * BLOCK_SIZE}", source, destination))
    [found] = listed()
    assert (found["source"], found["destination"], found["size"]) == (str(source), str(destination), len(DATA))
    assert (found["hydrated_bytes"], found["written_bytes"], found["error"]) == (2 * BLOCK_SIZE, 0, None)
    assert Path(found["state_file"]).parent == Path(os.environ["STATE_DIRECTORY"])
    line = run("state", "list").stdout.decode().splitlines()[1]
    assert line.startswith(f"{destination}  {source}  1.0 MiB  25.00 %")


def test_what_is_forgotten_is_checked_again(source: Path, destination: Path) -> None:
    succeeded(run("sync", source, destination))
    done = run("state", "forget", destination)
    succeeded(done)
    assert "checks every block" in done.stdout.decode()
    assert listed() == []
    assert json.loads(run("sync", "--json", source, destination).stdout)["resumed_bytes"] == 0
    assert destination.read_bytes() == DATA


def test_the_state_file_of_a_destination_that_is_gone_is_removed_by_its_name(source: Path, tmp_path: Path) -> None:
    succeeded(run("sync", source, tmp_path / "copy"))
    (tmp_path / "copy").unlink()
    [found] = listed()
    succeeded(run("state", "forget", found["state_file"]))
    assert os.listdir(os.environ["STATE_DIRECTORY"]) == []
    written(Path(found["state_file"]), b"damaged")
    assert listed()[0]["error"] is not None
    succeeded(run("state", "forget", found["state_file"]))
    assert listed() == []


def test_a_mount_that_runs_keeps_its_state_file(
    source: Path, destination: Path, mount: Callable[..., support.Mount]
) -> None:
    mount(source, destination, "--no-background")
    [found] = listed()
    assert found["error"] == "in use"
    failed(run("state", "forget", destination), 1, "is locked by another program")
    failed(run("state", "forget", found["state_file"]), 1, "in use")


def test_writes_of_a_user_are_not_forgotten(
    source: Path, destination: Path, mount: Callable[..., support.Mount]
) -> None:
    mounted = mount(source, destination, "--writable", "--no-background")
    with mounted.file.open("r+b") as file:
        file.write(b"mine")
        file.flush()
        os.fsync(file.fileno())
    mounted.umount()
    [found] = listed()
    assert found["written_bytes"] == BLOCK_SIZE
    for path in (destination, found["state_file"]):
        failed(run("state", "forget", path), 1, "discard-writes")
    assert listed() == [found]
    assert "128.0 KiB" in run("state", "list").stdout.decode()
    failed(run("discard-writes", found["state_file"]), 1, f"is the state file of {destination}")


def test_writes_to_a_destination_that_is_gone_are_discarded_by_the_state_file(
    source: Path, destination: Path, mount: Callable[..., support.Mount]
) -> None:
    mounted = mount(source, destination, "--writable", "--no-background")
    with mounted.file.open("r+b") as file:
        file.write(DATA[:4096])
    mounted.umount()
    destination.unlink()
    [found] = listed()
    assert f"{destination} (missing)" in run("state", "list").stdout.decode()
    failed(run("state", "forget", found["state_file"]), 1, f"discard-writes {found['state_file']}")
    failed(run("discard-writes", destination), 1, "name its state file")
    done = run("discard-writes", "-n", found["state_file"])
    succeeded(done)
    assert f"{BLOCK_SIZE} bytes of blocks that a user wrote to in {destination}, which" in done.stdout.decode()
    assert listed() == [found]
    succeeded(run("discard-writes", found["state_file"]))
    assert os.listdir(os.environ["STATE_DIRECTORY"]) == []


def test_a_look_at_a_killed_copy_changes_no_time(tmp_path: Path, mount: Callable[..., support.Mount]) -> None:
    """Kill a mount whose last commits are in the log only."""
    source = written(tmp_path / "large", noise(32 * BLOCK_SIZE))
    mounted = mount(source, tmp_path / "copy", "--no-background")
    with mounted.file.open("rb", buffering=0) as file:
        file.read(4096)
        os.fsync(file.fileno())
    support.killed(mounted)
    [state] = Path(os.environ["STATE_DIRECTORY"]).glob("*.state")
    latest = state.with_name(f"{state.name}-wal").stat().st_mtime
    os.utime(state, (1, 1))
    first = listed()
    assert datetime.fromisoformat(first[0]["written_at"]).timestamp() == int(latest)
    assert listed() == first


@pytest.mark.parametrize("arguments", [["list", "copy"], ["forget"], ["remove", "copy"]])
def test_what_is_no_action_is_refused(arguments: list[str]) -> None:
    failed(run("state", *arguments), 2, b"forget")


def test_a_destination_without_a_state_file_is_an_error(destination: Path) -> None:
    failed(run("state", "forget", destination), 1, f"there is no state file of {destination}")
