"""Progress of the commands: lines, JSON, nothing, and the bar. test_sync has more tests of the bar."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    STANDINS,
    Mount,
    failed,
    noise,
    run,
    succeeded,
    until,
    with_changes,
    written,
)

from blockcopy.progress.lines import LineProgress
from blockcopy.progress.rate import RateMeter, eta, floored_percent, human_size, human_time
from blockcopy.progress.reporter import Counts

SIZE = 24 * BLOCK_SIZE
DATA = noise(SIZE)
OLD = with_changes(DATA, [3, 17])
LINK = f"{PYTHON} {STANDINS / 'link'}"


def last(stderr: bytes) -> dict[str, Any]:
    """Return the last line of JSON. Checks that all lines are objects with the same fields.

    The first lines of a stage, on a slow machine, have no bytes by outcome.
    """
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert len({tuple(line) for line in lines if line["done_bytes"]} | {tuple(lines[-1])}) == 1
    return lines[-1]  # type: ignore[no-any-return]


# Figures


@pytest.mark.parametrize(
    ("part", "whole", "percent"),
    [(0, 0, 100.0), (0, 7, 0.0), (2, 3, 66.66), (999_999, 10**6, 99.99), (7, 7, 100.0)],
)
def test_percents_are_floored_and_only_the_whole_is_100(part: int, whole: int, percent: float) -> None:
    assert floored_percent(part, whole) == percent


def test_sizes_and_times_as_text() -> None:
    assert [human_size(size) for size in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        *("0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.00 TiB")
    ]
    assert [human_time(seconds) for seconds in (0, 61, 3600)] == ["0:00", "1:01", "1:00:00"]
    assert (eta(0, None, 5), eta(0, 10, 0), eta(1, 10, 2), eta(10, 10, 2)) == (None, None, 5, 0)


def test_the_rate_of_a_restarted_counter_is_not_negative() -> None:
    meter = RateMeter()
    meter.sample(1000)
    meter.sample(10)
    assert meter.rate(10) == 0


def test_a_leap_does_not_count_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, clock = RateMeter(), iter(range(100))
    monkeypatch.setattr("blockcopy.progress.rate.time.monotonic", lambda: float(next(clock)))
    for count in (0, 10**9, 10**9 + 100, 10**9 + 200):
        meter.sample(count)
    assert meter.rate(10**9 + 300) == 100


def test_plain_lines_are_those_of_the_original_program() -> None:
    told: list[str] = []
    progress = LineProgress("checksum", told.append)
    for done in range(0, 101):
        progress.update(Counts(done << 30, 100 << 30, position=done << 30))
    progress.finish()
    assert len(told) == 21
    assert told[0] == "Checksum progress:    5.00 GB / 100.00 GB ( 5.00%)"
    assert told[-1].startswith("Checksum done in 0.0")
    LineProgress("sync", told.append).update(Counts(100 << 30, 100 << 30))
    assert told[-1] == "Sync progress:  100.00 GiB / 100.00 GiB (100.00%)"


# Commands


def test_sync_as_json(source: Path, destination: Path) -> None:
    done = run("sync", "--progress=json", source, destination)
    assert done.returncode == 0
    told = last(done.stderr)
    assert (told["command"], told["state"], told["finished"]) == ("sync", "complete", True)
    assert (told["done_bytes"], told["total_bytes"], told["percent"]) == (SIZE, SIZE, 100.0)
    assert (told["fetched_bytes"], told["same_bytes"]) == (2 * BLOCK_SIZE, SIZE - 2 * BLOCK_SIZE)


def test_sync_as_lines_and_quiet(source: Path, destination: Path) -> None:
    said = run("sync", "--progress", source, destination).stderr.decode().splitlines()
    assert said[-1].startswith("complete in ")
    assert said[-2].startswith("Sync done in ")
    assert "(100.00%)" in said[-3]
    assert run("sync", "-q", source, destination).stderr == b""
    faulty = f"{PYTHON} {STANDINS / 'faulty_retrieve'} --die-at 2 --once {source}.once"
    written(destination, bytes(SIZE))
    done = run("sync", "-q", "--recheck", "--blockcopy-path", faulty, source, destination)
    succeeded(done)
    assert Path(f"{source}.once").exists()
    assert run("sync", source, destination).stderr == b""


@pytest.mark.parametrize("command", ["sync", "mount"])
def test_each_line_has_all_bytes_by_outcome(command: str, source: Path, destination: Path, tmp_path: Path) -> None:
    """Also the lines before the source answers, and those while all is verified."""
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 1.5\nexec {shlex.join(BLOCKCOPY)} "$@"\n')
    slow.chmod(0o755)
    options = ["--progress=json", "--verify", "--blockcopy-path", slow]
    if command == "sync":
        stderr = run("sync", *options, source, destination).stderr
    else:
        support.require_fuse()
        point = tmp_path / "point"
        point.mkdir()
        program = [*BLOCKCOPY, "mount", "-f", *options, source, destination, point]
        with subprocess.Popen(program, stderr=subprocess.PIPE) as process:
            until(lambda: os.path.ismount(point))
            run("wait", point)
            run("umount", point)
            stderr = process.communicate()[1]
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith(b"{")]
    assert lines[0]["state"] == "starting"
    assert lines[0]["total_bytes"] is None
    for line in lines:
        assert {"same_bytes", "fetched_bytes", "zero_bytes"} <= line.keys()


def test_push_as_json_keeps_its_rate_limit(source: Path, destination: Path) -> None:
    way = ["-e", LINK, "--python", PYTHON]
    done = run("sync", "--progress=json", "--limit", "4M", *way, source, f"host:{destination}")
    assert done.returncode == 0
    told = last(done.stderr)
    assert (told["done_bytes"], told["percent"], told["finished"]) == (SIZE, 100.0, True)
    assert 2 * BLOCK_SIZE <= told["sent_bytes"] < 3 * BLOCK_SIZE
    assert told["elapsed_seconds"] > SIZE / (4 << 20) / 2
    assert destination.read_bytes() == DATA


def test_verify_as_json_with_its_result_on_stdout(source: Path, destination: Path) -> None:
    done = run("verify", "--progress=json", source, destination)
    *lines, error = done.stderr.splitlines()
    assert error.startswith(b"ERROR (verify)")
    assert last(b"\n".join(lines))["done_bytes"] == SIZE
    assert done.stdout.decode() == f"{3 * BLOCK_SIZE}:{BLOCK_SIZE}\n{17 * BLOCK_SIZE}:{BLOCK_SIZE}\n"


def test_wait_as_json(source: Path, destination: Path, mount: Callable[..., Mount]) -> None:
    mounted = mount(source, destination)
    told = last(run("wait", "--progress=json", mounted.point).stderr)
    assert (told["command"], told["percent"], told["fetched_bytes"]) == ("wait", 100.0, 2 * BLOCK_SIZE)


def test_the_stages_as_json(source: Path, destination: Path) -> None:
    hashes = run("checksum", "--progress=json", destination)
    assert last(hashes.stderr)["done_bytes"] == SIZE
    blocks = run("retrieve", "--progress=json", source, input=hashes.stdout)
    told = last(blocks.stderr)
    assert (told["done_bytes"], told["percent"], told["sent_bytes"] > 2 * BLOCK_SIZE) == (SIZE, 100.0, True)
    saved = run("save", "--progress=json", destination, input=blocks.stdout)
    told = last(saved.stderr)
    assert (told["done_bytes"], told["total_bytes"], told["finished"]) == (2 * BLOCK_SIZE, None, True)
    assert destination.read_bytes() == DATA


def test_a_stage_whose_stdin_ends_early_reports_that_it_did_not_finish(source: Path) -> None:
    blocks = run("retrieve", "--progress=json", source, input=b"")
    failed(blocks, 1)
    assert json.loads(blocks.stderr.splitlines()[0])["finished"] is False


# The bar


def on_a_terminal(*arguments: object, **environment: str) -> str:
    """Return what a command writes to standard error on a terminal of 80 columns. Its output goes elsewhere."""
    ours, theirs = pty.openpty()
    command = [*BLOCKCOPY, *map(str, arguments)]
    shown = b""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
    ):
        os.close(theirs)
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # EIO: all have closed it
                break
            shown += data
    os.close(ours)
    return shown.decode()


@pytest.mark.long
def test_each_command_draws_a_bar_without_an_option(
    source: Path, destination: Path, mount: Callable[..., Mount]
) -> None:
    assert "100.00 %" in on_a_terminal("verify", source, source)
    shown = on_a_terminal("sync", source, destination)
    assert "100.00 %" in shown
    assert "complete: equal 2.8 MiB, fetched 256.0 KiB, zeros 0 B" in shown
    mounted = mount(source, destination, wait=True)
    assert "100.00 %" in on_a_terminal("wait", mounted.point)
    assert on_a_terminal("checksum", destination) == ""
    assert "100.00 %" in on_a_terminal("checksum", "--progress", destination)
    mounted.umount()
    assert on_a_terminal("sync", "-q", source, destination) == ""


def test_no_colour_or_no_terminal(source: Path, destination: Path) -> None:
    shown = on_a_terminal("sync", source, destination, NO_COLOR="1")
    assert "100.00 %" in shown
    assert "\x1b[31m" not in shown
    assert "\x1b[9" not in shown
    assert on_a_terminal("sync", source, destination, TERM="dumb") == ""
