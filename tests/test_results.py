"""What `sync` and `verify` report at their end: the line for people, and the JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import BLOCK_SIZE, FAULTY, PYTHON, STANDINS, failed, noise, run, succeeded, with_changes, written

from blockcopy.replica.monitor.result import SyncResult, VerifyResult

BLOCKS = 24
DATA = noise(20 * BLOCK_SIZE) + bytes(4 * BLOCK_SIZE)
OLD = with_changes(DATA, [3, 17, 22])
LINK = ["-e", f"{PYTHON} {STANDINS / 'link'}", "--python", PYTHON]


def result(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    """Return the JSON object that is the whole standard output of `done`."""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_result_of_a_sync_as_json(source: Path, destination: Path) -> None:
    done = run("sync", "--json", source, destination)
    succeeded(done)
    found = result(done)
    assert list(found) == [each.name for each in dataclasses.fields(SyncResult)]
    assert (found["command"], found["source"], found["destination"]) == ("sync", str(source), str(destination))
    assert (found["complete"], found["error"], found["size"]) == (True, None, len(DATA))
    counts = [found[f"{each}_bytes"] for each in ("same", "fetched", "zero", "resumed", "unreadable")]
    assert counts == [21 * BLOCK_SIZE, 2 * BLOCK_SIZE, BLOCK_SIZE, 0, 0]
    assert 2 * BLOCK_SIZE < found["received_bytes"] < 3 * BLOCK_SIZE
    assert 0 < found["sent_bytes"] < BLOCK_SIZE
    assert found["rate_bytes_per_s"] == pytest.approx(len(DATA) / found["elapsed_seconds"], rel=0.1)
    again = result(run("sync", "--json", source, destination))
    assert (again["resumed_bytes"], again["same_bytes"], again["rate_bytes_per_s"]) == (len(DATA), 0, 0)


def test_the_result_of_a_failed_sync_says_why_and_what_was_done(source: Path, destination: Path) -> None:
    faulty = f"{FAULTY} --die-at 2"
    done = run("sync", "--json", "--reconnect-timeout", 0, "--blockcopy-path", faulty, source, destination)
    failed(done, 3)
    found = result(done)
    assert found["complete"] is False
    assert found["error"] in done.stderr.decode()
    assert found["size"] == len(DATA)
    missing = run("sync", "--json", source.with_name("missing"), destination)
    failed(missing, 3)
    assert (result(missing)["complete"], result(missing)["size"]) == (False, None)


def test_the_result_of_a_push_has_what_this_end_knows(source: Path, destination: Path) -> None:
    done = run("sync", "--json", *LINK, source, f"host:{destination}")
    succeeded(done)
    found = result(done)
    assert (found["complete"], found["size"], found["same_bytes"]) == (True, len(DATA), None)
    assert 2 * BLOCK_SIZE < found["sent_bytes"] < 3 * BLOCK_SIZE


def test_the_result_of_a_verify_as_json(source: Path, destination: Path) -> None:
    done = run("verify", "--json", source, destination)
    failed(done, 5)
    found = result(done)
    assert list(found) == [*(each.name for each in dataclasses.fields(VerifyResult)), "ranges"]
    assert (found["command"], found["complete"], found["differing_bytes"]) == ("verify", False, 3 * BLOCK_SIZE)
    assert (found["same_bytes"], found["size"], len(found["ranges"])) == (21 * BLOCK_SIZE, len(DATA), 3)
    assert 0 < found["sent_bytes"] < 2 * BLOCK_SIZE < found["received_bytes"]


def test_the_last_line_says_what_became_of_the_bytes(source: Path, destination: Path) -> None:
    compared = run("verify", "--progress", source, destination).stderr.decode().splitlines()[-2]
    assert compared.startswith("compared in ")
    assert "/s: 2.6 MiB equal, 384.0 KiB different; " in compared
    copied = run("sync", "-v", source, destination).stderr.decode().splitlines()
    [line] = [each for each in copied if each.startswith("complete in ")]
    assert "/s: 2.6 MiB equal, 256.0 KiB fetched, 128.0 KiB zeros; " in line
    assert line.endswith(" received")
    again = run("sync", "--progress", source, destination).stderr.decode().splitlines()[-1]
    assert ": 3.0 MiB recorded, 0 B equal, " in again


def test_json_is_all_that_a_quiet_command_prints(source: Path, destination: Path) -> None:
    done = run("sync", "--json", "-q", source, destination)
    succeeded(done)
    assert result(done)["complete"]
    assert run("verify", source, destination).stderr == b""


def test_a_log_file_has_the_line(source: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    succeeded(run("sync", "--log-file", log, source, written(tmp_path / "copy", DATA)))
    assert "3.0 MiB equal, 0 B fetched" in log.read_text()
