"""What a running mount tells of itself: the screen, the map, --watch, list, metrics, what reads wait for."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import support
from rich.console import Console
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    Mount,
    failed,
    fuse_mounts,
    noise,
    run,
    succeeded,
    until,
    with_changes,
    written,
)

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.replica.monitor import prometheus
from blockcopy.replica.monitor.status import (
    LinkState,
    LinkStatus,
    MapCell,
    ReadStatus,
    State,
    Status,
    short_summary,
    summary,
)
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy_fuse import listing
from blockcopy_fuse.mountinfo import Mount as Mounted
from blockcopy_fuse.screen import CELL_KINDS, DeviceMap, cell_kind, screen

Mounter = Callable[..., Mount]

BLOCKS = 32
DATA = noise(BLOCKS * BLOCK_SIZE)
HOLES = DATA[: 8 * BLOCK_SIZE] + bytes(24 * BLOCK_SIZE)

STATUS = Status(
    state=State.HYDRATING,
    source="root@host:/dev/vg/disk",
    destination="/dev/vg/copy",
    mountpoint="/mnt/disk",
    size=1 << 30,
    hydrated_bytes=1 << 29,
    hydrated_percent=50.0,
    same_bytes=1 << 28,
    fetched_bytes=1 << 28,
    sent_bytes=1000,
    received_bytes=1 << 28,
    rate_bytes_per_s=20 << 20,
    eta_seconds=26,
    elapsed_seconds=30.0,
    source_needed=True,
    demand=ReadStatus(
        reads=5,
        bytes=20480,
        waiting=1,
        latency_p50_seconds=0.012,
        latency_p99_seconds=0.04,
        latency_max_seconds=0.05,
    ),
    link=LinkStatus(state=LinkState.CONNECTED),
)

NAMES = """
    schema_version state source destination pid size hydrated_bytes hydrated_percent resumed_bytes same_bytes
    fetched_bytes zero_bytes hole_bytes unreadable_bytes unreadable_ranges written_bytes lost_bytes verified_bytes
    verified_percent sent_bytes received_bytes
    rate_bytes_per_s limit_bytes_per_s eta_seconds elapsed_seconds source_needed demand link state_file error
    on_demand writable mountpoint control_socket
"""


def test_the_json_of_a_status_is_what_programs_rely_on() -> None:
    shown = json.loads(dataclasses.replace(STATUS, unreadable_ranges=(Extent(5, 7),)).as_json())
    assert list(shown) == NAMES.split()
    assert list(shown["demand"]) == [field.name for field in dataclasses.fields(ReadStatus)]
    assert shown["link"] == {
        "state": "connected",
        "reconnects": 0,
        "last_error": None,
        "connections": 0,
        "round_trip_seconds": None,
        "digest": None,
        "bottleneck": None,
    }
    assert (shown["state"], shown["unreadable_ranges"], shown["error"]) == ("hydrating", [[5, 7]], None)


def test_each_field_has_a_help_text() -> None:
    for kind in (Status, ReadStatus, LinkStatus):
        assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(kind))


def cell(present: int = 0, zero: int = 0, written: int = 0, in_flight: int = 0, reading: int = 0) -> MapCell:
    return MapCell(4, present, zero, written, in_flight, reading)


def drawn(what: object, *, width: int = 80, encoding: str = "utf-8", **options: Any) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, highlight=False, **options)
    made = type("Console", (Console,), {"encoding": property(lambda self: encoding)})
    console.__class__ = made
    console.print(what)
    return stream.getvalue()


# The map


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ({}, "missing"),
        ({"present": 1}, "partly"),
        ({"present": 1, "in_flight": 1}, "in_flight"),
        ({"present": 4}, "present"),
        ({"present": 4, "zero": 3}, "zero"),
        ({"present": 4, "zero": 2}, "present"),
        ({"present": 3, "in_flight": 2, "reading": 1}, "reading"),
        ({"present": 4, "written": 3, "zero": 3}, "written"),
        ({"present": 4, "written": 1}, "written"),
        ({"written": 1}, "partly"),
    ],
)
def test_what_a_cell_is_shown_as(counts: dict[str, int], kind: str) -> None:
    assert cell_kind(cell(**counts)) == kind


def test_the_map_fills_the_width_and_says_what_it_means() -> None:
    *rows, legend = drawn(
        DeviceMap([cell(present=4)] * 50 + [cell()] * 49 + [cell(reading=1)]), width=40
    ).splitlines()
    assert "".join(rows[:3]) == "█" * 50 + "·" * 49 + "◆"
    assert len(rows[0]) == 40
    assert all(meaning in " ".join([*rows, legend]) for _, _, _, meaning in CELL_KINDS.values())


def test_the_map_reads_without_colour_and_without_unicode() -> None:
    shown = drawn(DeviceMap([cell(present=4), cell(), cell(in_flight=1)]), no_color=True, encoding="ascii")
    assert shown.splitlines()[0] == "#.>"
    assert shown.isascii()
    assert (
        len({signs[1] for signs in CELL_KINDS.values()})
        == len({signs[0] for signs in CELL_KINDS.values()})
        == len(CELL_KINDS)
    )


def test_counts_of_a_range_are_those_of_its_blocks() -> None:
    blockmap = BlockMap(Geometry(10_007 * BLOCK_SIZE))
    for blocks in (range(3, 9), range(64, 130), range(9000, 10_007)):
        blockmap.mark(blocks, "same")
    blockmap.mark(range(2000, 4000), "zero")
    for start, stop in ((0, 10_007), (5, 70), (7, 8), (9999, 10_007), (4000, 9000), (2000, 4000)):
        missing = len(list(blockmap.missing(range(start, stop))))
        present, zeros = blockmap.count(range(start, stop))
        assert present == stop - start - missing
        assert 0 <= zeros <= present
    assert blockmap.count(range(2100, 3900)) == (1800, 1800)
    assert blockmap.count(range(4100, 8000)) == (0, 0)
    blockmap.mark(range(1990, 4000), "zero")  # some of them once more
    assert sum(blockmap.count(range(start, start + 1))[1] for start in range(1980, 2010)) <= 20
    whole = BlockMap(Geometry(10_007 * BLOCK_SIZE))
    whole.mark(range(1000), "same")
    whole.mark(range(10_007), "zero")
    assert whole.count(range(10_007)) == (10_007, 9_007)
    assert whole.count(range(10_005, 10_007)) == (2, 2)


def test_the_map_of_a_mount(mount: Mounter, tmp_path: Path) -> None:
    source, destination = written(tmp_path / "source", HOLES), written(tmp_path / "copy", bytes(len(HOLES)))
    mounted = mount(source, destination, "--no-background")
    with mounted.file.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 100, 3 * BLOCK_SIZE)
        os.pread(file.fileno(), 100, 20 * BLOCK_SIZE)
    from blockcopy_fuse.control_client import read_map

    cells = read_map(str(mounted.point), BLOCKS)
    assert [number for number, each in enumerate(cells) if each.present] == [3, 20]
    assert [cell_kind(each) for each in (cells[3], cells[4])] == ["present", "missing"]
    assert sum(each.blocks for each in read_map(str(mounted.point), 5)) == BLOCKS


# The screen


@pytest.mark.parametrize("width", [80, 200])
def test_the_screen_fits_and_says_what_counts(width: int) -> None:
    lines = drawn(screen(STATUS, [cell(present=4)] * 2 * width), width=width).splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("HYDRATING 50.00 %")
    assert lines[1].startswith("The source is still needed: root@host:/dev/vg/disk")
    text = "\n".join(lines)
    for told in ("512.0 MiB of 1.0 GiB, 20.0 MiB/s, 0:26 to go", "connected", "12.0, 40.0, 50.0 ms", "1 waiting"):
        assert told in text
    labels = [line.split()[0] for line in lines[2:] if re.match(r"[A-Z][a-z]+  ", line)]
    assert labels == ["Progress", "Transferred", "Connection", "Reads", "Destination"]


def test_the_screen_of_a_copy_that_is_complete_or_in_trouble() -> None:
    complete = dataclasses.replace(STATUS, state=State.COMPLETE, source_needed=False, hydrated_percent=100.0)
    assert "The source is no longer needed" in drawn(screen(complete, []))
    link = LinkStatus(state=LinkState.RECONNECTING, reconnects=2, last_error="host is away")
    failed = dataclasses.replace(STATUS, state=State.FAILED, link=link, error="a bad sector")
    shown = drawn(screen(failed, []))
    for told in ("FAILED", "reconnected 2 times", "host is away", "a bad sector"):
        assert told in shown


def test_the_screen_of_what_is_compared_once_more() -> None:
    hydrated = dataclasses.replace(STATUS, hydrated_bytes=1 << 30, hydrated_percent=100.0)
    verifying = dataclasses.replace(hydrated, state=State.VERIFYING, verified_bytes=1 << 28, verified_percent=25.0)
    shown = drawn(screen(verifying, []))
    assert shown.startswith("VERIFYING 25.00 %")
    assert "1.0 GiB of 1.0 GiB, 256.0 MiB of them compared once more" in shown
    assert summary(verifying).startswith("verifying: 25.00 % of 1.0 GiB; 20.0 MiB/s")
    assert short_summary(verifying) == "verifying: 25.00 % of 1.0 GiB, 20.0 MiB/s, 0:26 to go"


def test_what_a_source_says_is_no_command_to_the_terminal() -> None:
    link = LinkStatus(state=LinkState.RECONNECTING, reconnects=1, last_error="sorry \x1b[2J\r\udcff")
    shown = drawn(screen(dataclasses.replace(STATUS, link=link, error="bad\x1b]0;title\x07"), []))
    assert r"sorry \x1b[2J" in shown
    assert not set(shown) & set("\x1b\r\x07\udcff")


@contextmanager
def on_a_terminal(*arguments: object) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Start a command on a terminal. Yields the other end of the terminal, and the process."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*BLOCKCOPY, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        try:
            yield ours, process
        finally:
            process.kill()  # a test that fails reads no more, and it would wait for that
            os.close(ours)


def shown_until(terminal: int, wanted: bytes) -> bytes:
    """Return all output up to `words`. Raises AssertionError if they do not come."""
    shown = b""
    while wanted not in shown:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            data = b""
        assert data, shown
        shown += data
    return shown


def test_status_on_a_terminal_is_a_screen(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, tmp_path / "copy", wait=True)
    with on_a_terminal("status", mounted.point) as (terminal, process):
        shown = shown_until(terminal, b"missing")
        assert process.wait(support.PATIENCE) == 0
    assert b"COMPLETE" in shown
    assert b"no longer needed" in shown
    assert "█".encode() in shown


@pytest.mark.parametrize("end", ["q", "SIGINT"])
def test_watch_until_q_or_an_interrupt(mount: Mounter, tmp_path: Path, end: str) -> None:
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, tmp_path / "copy", "--no-background")
    with on_a_terminal("status", "--watch", mounted.point) as (terminal, process):
        shown_until(terminal, b"0.00 %")
        assert mounted.file.read_bytes() == DATA
        shown_until(terminal, b"COMPLETE")
        if end == "q":
            os.write(terminal, b"q")
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(support.PATIENCE) == 0
        shown_until(terminal, b"\x1b[?1049l")  # the terminal shows again what it did before


def test_watch_ends_with_the_mount(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, tmp_path / "copy", wait=True)
    with on_a_terminal("status", "--watch", mounted.point) as (terminal, process):
        shown_until(terminal, b"COMPLETE")
        mounted.umount()
        shown_until(terminal, b"no replica is mounted on")
        assert process.wait(support.PATIENCE) == 4


def test_a_mount_that_stands_still_is_told_and_watched_on(mount: Mounter, tmp_path: Path) -> None:
    """A process that reads a file of such a mount cannot be interrupted."""
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, tmp_path / "copy", "--no-background")
    pid = mounted.status()["pid"]
    with on_a_terminal("status", "--watch", mounted.point) as (terminal, process):
        shown_until(terminal, b"0.00 %")
        os.kill(pid, signal.SIGSTOP)
        try:
            shown_until(terminal, b"has not answered for")
            with ThreadPoolExecutor() as pool:  # each waits for 5 seconds
                status = pool.submit(run, "status", mounted.point)
                umount = pool.submit(run, "umount", mounted.point)
                second = pool.submit(run, "mount", source, tmp_path / "other", mounted.point)
            failed(status.result(), 4, b"gave no answer")
            failed(umount.result(), 4, b"fusermount3 -uz")
            failed(second.result(), 4, b"gave no answer")
        finally:
            os.kill(pid, signal.SIGCONT)
        shown_until(terminal, b"missing")  # the map is drawn again
        os.write(terminal, b"q")
        assert process.wait(support.PATIENCE) == 0


def test_a_mount_that_stands_still_is_waited_for(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, tmp_path / "copy", "--no-background")
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        command = [*support.BLOCKCOPY, "wait", str(mounted.point)]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert waiting.stderr is not None
        assert b"gave no answer" in waiting.stderr.readline()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert mounted.file.read_bytes() == DATA
    waiting.communicate(timeout=support.PATIENCE)
    assert waiting.returncode == 0


# list


def test_a_mountpoint_that_is_no_text(tmp_path: Path) -> None:
    support.require_fuse()
    source, name = written(tmp_path / "source", DATA), os.fsencode(tmp_path) + b"/mnt\xff\n"
    os.mkdir(name)
    point = os.fsdecode(name)
    assert run("mount", source, tmp_path / "copy", point).returncode == 0
    try:
        [line] = [each for each in run("list").stdout.decode().splitlines() if rf"{tmp_path}/mnt\xff\n" in each]
        assert str(source) in line
        assert point in [each["mountpoint"] for each in json.loads(run("list", "--json").stdout)]
        assert run("status", point).returncode == 0
    finally:
        assert run("umount", point).returncode in (0, 75)


def test_list_tells_of_all_and_waits_for_none(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    living = mount(source, tmp_path / "one", wait=True)
    dead = mount(source, tmp_path / "two", "--no-background")
    stopped = mount(source, tmp_path / "three", "--no-background")
    os.kill(dead.status()["pid"], signal.SIGKILL)
    pid = stopped.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        found = {each["mountpoint"]: each for each in json.loads(run("list", "--json").stdout)}
        table = run("list").stdout.decode().splitlines()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found[str(living.point)]["state"] == "complete"
    assert "blockcopy umount" in found[str(dead.point)]["error"]
    assert found[str(stopped.point)]["error"] == "no answer within 1 s"
    assert table[0].split() == ["MOUNTPOINT", "SOURCE", "STATE", "PRESENT", "RATE", "TO", "GO", "SOURCE", "IS"]
    [line] = [line for line in table if str(living.point) in line]
    assert re.search(r"complete +100\.00 % .* not needed$", line)


@pytest.mark.parametrize("width", [80, 100, 200, None])
def test_list_fits_the_terminal_and_shows_the_ends_of_long_names(width: int | None) -> None:
    def listed(point: str, source: str) -> listing.ListedMount:
        mounted = Mounted(point, "0:99", "fuse.blockcopy", source, 0)
        return listing.ListedMount(mounted, dataclasses.replace(STATUS, source=source))

    long = "/a/very/long/path" * 8
    names = [("/mnt", f"host:{long}/disk"), (f"{long}/point", "host:/dev/sda"), (f"{long}/one", f"host:{long}/two")]
    lines = listing.table([listed(*each) for each in names], width).splitlines()
    assert width is None or max(map(len, lines)) <= width
    assert lines[1].startswith("/mnt ")
    assert "/disk" in lines[1]
    assert "/point " in lines[2]
    assert "host:/dev/sda" in lines[2]
    assert "/one " in lines[3]
    assert "/two " in lines[3]
    assert ("…" in lines[3]) == (width is not None)


def test_a_mount_on_demand_is_called_so_and_has_the_state_that_programs_know() -> None:
    on_demand = dataclasses.replace(STATUS, state=State.PAUSED, on_demand=True)
    assert on_demand.as_dict()["state"] == "paused"
    assert summary(on_demand).startswith("on-demand: ")
    assert short_summary(on_demand).startswith("on-demand: ")
    assert drawn(screen(on_demand, [])).startswith("ON-DEMAND ")
    assert on_demand.counts.word == "on-demand"
    assert summary(dataclasses.replace(on_demand, on_demand=False)).startswith("paused: ")
    assert summary(dataclasses.replace(on_demand, state=State.COMPLETE)).startswith("complete: ")


# Metrics


def test_metrics_are_in_the_format_of_prometheus() -> None:
    odd = dataclasses.replace(STATUS, source='a "b"\\c\nd', eta_seconds=None)
    lines = prometheus.exposition(odd).splitlines()
    assert len(lines) == len(set(lines))
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    for line in lines:
        if not line.startswith("#"):
            found = re.fullmatch(r'([a-z0-9_]+)\{([a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+\} [-0-9.e+]+', line)
            assert found, line
            assert found[1] in typed
    assert 'blockcopy_state{source="a \\"b\\"\\\\c\\nd"' in "\n".join(lines)
    assert not any(line.startswith("blockcopy_eta_seconds") for line in lines)


def test_metrics_of_a_sync_and_of_a_mount(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    file = tmp_path / "blockcopy.prom"
    assert run("sync", "--metrics", file, source, tmp_path / "copy").returncode == 0
    text = file.read_text()
    assert re.search(rf"^blockcopy_hydrated_bytes{{.*}} {len(DATA)}$", text, re.MULTILINE)
    assert re.search(r'^blockcopy_state{.*state="complete"} 1$', text, re.MULTILINE)
    assert file.stat().st_mode & 0o777 == 0o644
    mounted = mount(source, tmp_path / "copy2", "--metrics", file, "--no-background")
    until(lambda: f'mountpoint="{mounted.point}"' in file.read_text(), "the first metrics")
    mounted.file.read_bytes()
    mounted.umount()
    until(lambda: str(mounted.point) not in fuse_mounts(), "the end")
    assert re.search(rf"^blockcopy_read_bytes_total{{.*}} {len(DATA)}$", file.read_text(), re.MULTILINE)
    assert list(tmp_path.glob("*.new")) == []


def test_metrics_that_cannot_be_written_are_no_failure_of_the_copy(tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    done = run("sync", "--metrics", tmp_path / "no" / "folder", source, tmp_path / "copy")
    succeeded(done, b"cannot write --metrics")


def test_metrics_of_a_source_whose_name_is_no_text(tmp_path: Path) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(source).write_bytes(DATA)
    assert run("sync", "--metrics", tmp_path / "m.prom", source, tmp_path / "copy").returncode == 0
    assert (tmp_path / "m.prom").read_text(encoding="utf-8").startswith("# HELP blockcopy_")


# What reads wait for


def test_reads_that_wait_are_timed_and_others_are_counted(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, written(tmp_path / "copy", with_changes(DATA, [3])), "--no-background")
    before = mounted.status()["demand"]
    assert (before["reads"], before["latency_max_seconds"]) == (0, None)
    with mounted.file.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4096, 3 * BLOCK_SIZE)
        once = mounted.status()["demand"]
        os.pread(file.fileno(), 4096, 3 * BLOCK_SIZE + 8192)
    after = mounted.status()["demand"]
    assert (once["reads"], once["bytes"], once["waiting"]) == (1, 4096, 0)
    assert 0 < once["latency_p50_seconds"] == once["latency_max_seconds"] < support.PATIENCE
    assert (after["reads"], after["latency_max_seconds"]) == (2, once["latency_max_seconds"])


def test_watch_without_a_terminal_tells_lines_until_the_mount_goes(
    tmp_path: Path, mount: Callable[..., support.Mount]
) -> None:
    source = written(tmp_path / "source", DATA)
    mounted = mount(source, tmp_path / "copy", "--no-background")
    command = [*support.BLOCKCOPY, "status", "--watch", str(mounted.point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("on-demand: 0.00 %")
        assert mounted.file.read_bytes() == DATA
        assert process.stdout.readline().startswith("complete: 100.00 %")
        mounted.umount()
        _, said = process.communicate(timeout=20)
    assert (process.returncode, "no replica is mounted" in said) == (4, True)


def test_watch_without_a_terminal_ends_with_whoever_reads_it(
    tmp_path: Path, mount: Callable[..., support.Mount]
) -> None:
    """Although nothing changes any more that could be written."""
    mounted = mount(written(tmp_path / "source", DATA), tmp_path / "copy", wait=True)
    command = [*support.BLOCKCOPY, "status", "--watch", str(mounted.point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 1
