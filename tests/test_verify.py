from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import support
from support import BLOCKCOPY, FAULTY, QUEUEING, failed, noise, run, with_changes, written

from blockcopy.block.geometry import BLOCK_SIZE

BLOCKS = 130  # more than one window of batches
DATA = noise(BLOCKS * BLOCK_SIZE + 77)


@pytest.mark.parametrize("program", [[], ["--blockcopy-path", QUEUEING]], ids=["ours", "stand-in"])
@pytest.mark.parametrize("tail", [b"", b"a longer destination has a tail, which is its own"])
def test_a_copy_is_equal_and_only_a_tail_is_told(
    program: list[str], tail: bytes, source: Path, tmp_path: Path
) -> None:
    destination = written(tmp_path / "destination", DATA + tail)
    told = f"{destination} is {len(tail)} bytes longer than {source}: its tail was not compared\n" if tail else ""
    done = run("verify", *program, source, destination)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", told)
    as_json = json.loads(run("verify", "--json", *program, source, destination).stdout)
    assert (as_json["tail_bytes"], as_json["differing_bytes"]) == (len(tail), 0)


def test_a_destination_that_is_replaced_meanwhile_is_no_copy(source: Path, tmp_path: Path) -> None:
    """It is compared by its descriptor, and promised by its name."""
    destination = written(tmp_path / "destination", DATA)
    go = tmp_path / "go"
    os.mkfifo(go)
    waits = written(tmp_path / "waits", f'#!/bin/sh\ncat {go}\nexec {" ".join(BLOCKCOPY)} "$@"\n'.encode())
    waits.chmod(0o755)
    command = [*BLOCKCOPY, "verify", "--blockcopy-path", str(waits), str(source), str(destination)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with go.open("w"):  # its retrieve process is there, and the destination is open
            support.until(lambda: str(destination) in os.fsdecode(_open_files(process.pid)), "the destination")
            destination.unlink()
        said = process.communicate(timeout=60)[1].decode()
    assert (process.returncode, f"{destination} was removed" in said) == (1, True), said


def _open_files(pid: int) -> bytes:
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.fsencode(os.readlink(entry.path)))
    return b"\n".join(found)


@pytest.mark.parametrize("program", [[], ["--blockcopy-path", QUEUEING]], ids=["ours", "stand-in"])
def test_what_differs_is_told_in_ranges(program: list[str], source: Path, tmp_path: Path) -> None:
    destination = written(tmp_path / "destination", with_changes(DATA, [0, 3, 4, 95, 96, 97, BLOCKS]))
    before = destination.read_bytes()
    done = run("verify", *program, source, destination)
    failed(done, 5)
    ranges = [(0, BLOCK_SIZE), (3 * BLOCK_SIZE, 2 * BLOCK_SIZE), (95 * BLOCK_SIZE, 3 * BLOCK_SIZE)]
    ranges.append((BLOCKS * BLOCK_SIZE, 77))
    assert done.stdout.decode().splitlines() == [f"{offset}:{length}" for offset, length in ranges]
    assert f"{6 * BLOCK_SIZE + 77} of {len(DATA)} bytes" in done.stderr.decode()
    assert destination.read_bytes() == before

    as_json = json.loads(run("verify", "--json", *program, source, destination).stdout)
    assert as_json["size"] == len(DATA)
    assert as_json["differing_bytes"] == 6 * BLOCK_SIZE + 77
    assert [(each["offset"], each["length"]) for each in as_json["ranges"]] == ranges


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE, 5 * BLOCK_SIZE + 9])
def test_what_a_short_destination_lacks_differs(size: int, source: Path, tmp_path: Path) -> None:
    done = run("verify", source, written(tmp_path / "destination", DATA[:size]))
    failed(done, 5)
    assert done.stdout.decode() == f"{size}:{len(DATA) - size}\n"


def test_an_empty_source_has_a_copy_in_anything(tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    assert run("verify", tmp_path / "source", written(tmp_path / "destination", b"abc")).returncode == 0


def test_a_destination_in_use_can_be_verified(source: Path, tmp_path: Path) -> None:
    destination = written(tmp_path / "destination", DATA)
    with support.held_by_another_process(destination):
        assert run("verify", source, destination).returncode == 0


def test_a_missing_destination_is_an_error(source: Path, tmp_path: Path) -> None:
    done = run("verify", source, tmp_path / "missing")
    failed(done, 1, "missing")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("fault", ["die", "misplace"])
def test_a_source_that_fails_is_an_error_and_no_verdict(fault: str, source: Path, tmp_path: Path) -> None:
    destination = written(tmp_path / "destination", with_changes(DATA, list(range(BLOCKS))))
    program = f"{FAULTY} --{fault}-at 5"
    done = run("verify", "--reconnect-timeout", 0, "--blockcopy-path", program, source, destination)
    failed(done, 3)
    assert done.stdout == b""


def test_a_source_that_dies_is_started_again(source: Path, tmp_path: Path) -> None:
    destination = written(tmp_path / "destination", with_changes(DATA, [0, 3, BLOCKS]))
    program = f"{FAULTY} --die-at 2 --once {tmp_path}/it-happened"
    done = run("verify", "--blockcopy-path", program, source, destination)
    failed(done, 5)
    ranges = [(0, BLOCK_SIZE), (3 * BLOCK_SIZE, BLOCK_SIZE), (BLOCKS * BLOCK_SIZE, 77)]
    assert done.stdout.decode().splitlines() == [f"{offset}:{length}" for offset, length in ranges]
    assert "reconnected to" in done.stderr.decode()


def test_a_signal_ends_it(source: Path, tmp_path: Path) -> None:
    command = [*BLOCKCOPY, "verify", "--blockcopy-path", f"{QUEUEING} --stall-at 5", str(source)]
    command.append(str(written(tmp_path / "destination", DATA)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        support.until(lambda: support.children(process.pid), "its retrieve process")
        os.kill(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=10) == (b"", b"")
        assert process.returncode == -signal.SIGTERM
