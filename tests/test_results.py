"""What `sync` and `verify` report at their end: the line for people, and the JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import support
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


# --dry-run


def state_of(*paths: Path) -> list[object]:
    """Return all that a dry run must not change: the bytes, times and sizes of `paths`, and the state files."""
    states = Path(os.environ["STATE_DIRECTORY"])
    records = [(path, path.read_bytes()) for path in sorted(states.iterdir())]
    return [(path, path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths] + [
        records
    ]


def test_a_dry_run_says_what_would_be_fetched_and_writes_nothing(source: Path, destination: Path) -> None:
    before = state_of(destination)
    done = run("sync", "-n", source, destination)
    succeeded(done)
    line = done.stdout.decode()
    assert line.startswith("compared in ")
    assert ": 256.0 KiB in 2 blocks would be copied, 128.0 KiB would become zeros, 2.6 MiB equal; " in line
    found = result(run("sync", "--dry-run", "--json", "--on-complete", "false", source, destination))
    assert (found["dry_run"], found["complete"], found["uncompared_bytes"]) == (True, False, 0)
    counts = [found[f"{each}_bytes"] for each in ("same", "fetched", "zero", "resumed", "unreadable")]
    assert counts == [21 * BLOCK_SIZE, 2 * BLOCK_SIZE, BLOCK_SIZE, 0, 0]
    assert state_of(destination) == before
    succeeded(run("sync", source, destination))
    recorded = state_of(destination)
    assert result(run("sync", "-n", "--json", source, destination))["complete"] is True
    assert state_of(destination) == recorded
    assert result(run("sync", "--json", source, destination))["resumed_bytes"] == len(DATA)


def test_a_dry_run_of_a_missing_or_short_destination_creates_and_extends_nothing(tmp_path: Path) -> None:
    source, copy = written(tmp_path / "source", DATA), tmp_path / "copy"
    os.truncate(source, len(DATA) + 10 * BLOCK_SIZE)  # a hole
    done = run("sync", "-n", source, copy)
    succeeded(done)
    assert ": up to 3.0 MiB in 24 blocks would be copied, 1.2 MiB equal; " in done.stdout.decode()
    assert not copy.exists()
    written(copy, DATA[: 3 * BLOCK_SIZE])
    found = result(run("sync", "-n", "--json", source, copy))
    assert (found["fetched_bytes"], found["uncompared_bytes"], found["same_bytes"]) == (
        *(21 * BLOCK_SIZE, 21 * BLOCK_SIZE, 13 * BLOCK_SIZE),
    )
    assert copy.stat().st_size == 3 * BLOCK_SIZE


def test_a_dry_run_of_a_push_compares(source: Path, destination: Path) -> None:
    found = result(run("sync", "-n", "--json", *LINK, source, f"host:{destination}"))
    assert (found["fetched_bytes"], found["zero_bytes"], found["complete"]) == (3 * BLOCK_SIZE, 0, False)
    assert destination.read_bytes() == OLD


def test_a_dry_run_refuses_what_a_sync_refuses(source: Path, destination: Path) -> None:
    with support.held_by_another_process(destination):
        failed(run("sync", "-n", source, destination), 1, "is locked by another program")


# --range


def test_a_range_is_copied_in_whole_blocks_and_recorded(source: Path, destination: Path) -> None:
    ranges = ["--range", f"{3 * BLOCK_SIZE + 5}:1", "--range", f"{20 * BLOCK_SIZE}:1GiB"]
    done = run("sync", "--json", "--progress", "--verify", *ranges, source, destination)
    succeeded(done, None)
    assert "(100.00%)" in done.stderr.decode()
    assert destination.read_bytes() == with_changes(DATA, [17])
    found = result(done)
    counts = [found[f"{each}_bytes"] for each in ("same", "fetched", "zero")]
    assert (counts, found["complete"]) == ([3 * BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE], True)
    rest = result(run("sync", "--json", source, destination))
    assert (rest["resumed_bytes"], rest["fetched_bytes"]) == (5 * BLOCK_SIZE, BLOCK_SIZE)
    assert destination.read_bytes() == DATA


def test_a_range_is_all_that_a_dry_run_and_a_verify_compare(source: Path, destination: Path) -> None:
    wanted = ["--range", f"{16 * BLOCK_SIZE}:{2 * BLOCK_SIZE}", "--range", f"{22 * BLOCK_SIZE}:1", "--range", "0:1"]
    found = result(run("sync", "-n", "--json", *wanted, source, destination))
    assert [found[f"{each}_bytes"] for each in ("same", "fetched", "zero")] == [2 * BLOCK_SIZE, *[BLOCK_SIZE] * 2]
    done = run("verify", *wanted, source, destination)
    failed(done, 5, stdout=f"{17 * BLOCK_SIZE}:{BLOCK_SIZE}\n{22 * BLOCK_SIZE}:{BLOCK_SIZE}\n")
    succeeded(run("verify", "--range", f"0:{3 * BLOCK_SIZE}", source, destination), stdout=b"")
    short = written(destination, DATA[: 5 * BLOCK_SIZE + 9])
    done = run("verify", "--range", f"{5 * BLOCK_SIZE}:{2 * BLOCK_SIZE}", source, short)
    failed(done, 5, stdout=f"{5 * BLOCK_SIZE + 9}:{2 * BLOCK_SIZE - 9}\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--range", "1T:1"], "the source has"),
        (["--range", "0:0"], "is empty"),
        (["--range", "0:1", "--on-complete", "true"], "--on-complete and --range"),
    ],
)
def test_a_range_that_is_impossible_is_refused_before_any_write(
    options: list[str], reason: str, source: Path, tmp_path: Path
) -> None:
    failed(run("sync", *options, source, tmp_path / "copy"), 2, reason)
    assert not (tmp_path / "copy").exists()


def test_a_range_of_a_push_is_refused(source: Path, destination: Path) -> None:
    failed(run("sync", "--range", "0:1", *LINK, source, f"host:{destination}"), 2, "--range needs a local")


def test_what_a_sync_wrote_can_be_told_from_its_result(tmp_path: Path) -> None:
    """Programs ask whether anything changed: a hole at both ends counts as zeros, and is not written."""
    source, destination = written(tmp_path / "source", DATA), tmp_path / "copy"
    os.truncate(source, len(DATA) + 10 * BLOCK_SIZE)  # a hole
    wrote = []
    for _ in range(2):
        found = result(run("sync", "--json", "--recheck", source, destination))
        forecast = result(run("sync", "--json", "--dry-run", source, destination))
        wrote.append(found["fetched_bytes"] + found["zero_bytes"] - found["hole_bytes"])
    assert (wrote[0] > 0, wrote[1]) == (True, 0)
    # What is hashed before the answer about holes comes counts as neither.
    assert found["hole_bytes"] == found["zero_bytes"]
    assert forecast["fetched_bytes"] + forecast["zero_bytes"] - forecast["hole_bytes"] == 0
