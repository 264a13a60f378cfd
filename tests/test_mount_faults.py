"""`blockcopy mount` where something goes wrong: before it serves, at the source, at the destination, to itself.

What holds in every case: a read gets the source's bytes or EIO, never the destination's old ones; the
reason is told; nothing stays mounted and no process is left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    FAULTY,
    PYTHON,
    QUEUEING,
    STANDINS,
    Mount,
    failed,
    noise,
    output,
    run,
    succeeded,
    until,
    with_changes,
    written,
)

Mounter = Callable[..., Mount]
LoopDevice = Callable[..., str]

BLOCKS = 24
DATA = noise(BLOCKS * BLOCK_SIZE)
OLD = with_changes(DATA, list(range(BLOCKS)))
"""Differs from DATA in every block."""


@pytest.fixture
def point(tmp_path: Path) -> Path:
    support.require_fuse()
    folder = tmp_path / "mountpoint"
    folder.mkdir()
    return folder


def faulty(fault: str, at: int, *, once: Path | None = None) -> str:
    """--blockcopy-path of a source whose processes fail at the block `at` that they send.

    Only the first of them to come so far where `once` names a file to be made then.
    """
    return f"{FAULTY} --{fault}-at {at}" + (f" --once {once}" if once else "")


def at(block: int) -> int:
    return block * BLOCK_SIZE


READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
print("begin", flush=True)
for position in sys.argv[2:]:
    try:
        print(os.pread(fd, 4096, int(position)).hex())
    except OSError as error:
        print("error", error.errno)
"""
"""Reads of the mount itself: past what the kernel has of it, and with nothing read ahead."""


def reader(file: Path, *positions: int) -> list[str]:
    """The command; a process of its own, because one whose read is not answered can only be killed."""
    return [PYTHON, "-I", "-S", "-c", READ, str(file), *map(str, positions)]


def read_all(file: Path, *positions: int) -> list[bytes | None]:
    """4096 bytes from each position; None for EIO. A read that is not answered for long fails the test."""
    done = subprocess.run(reader(file, *positions), capture_output=True, text=True, timeout=30, check=True)
    lines = done.stdout.splitlines()[1:]
    assert {line for line in lines if line.startswith("error")} <= {f"error {errno.EIO}"}
    return [None if line.startswith("error") else bytes.fromhex(line) for line in lines]


def read(file: Path, block: int, offset: int = 0) -> bytes | None:
    return read_all(file, at(block) + offset)[0]


def is_right(block: int, got: bytes | None, offset: int = 0) -> bool:
    return got == DATA[at(block) + offset :][: len(got or b"x")]


def survey(mounted: Mount) -> tuple[set[int], set[int]]:
    """Read every block. Returns the blocks that are right, and those with EIO. Any other bytes fail the test."""
    right, refused = set(), set()
    for block, got in enumerate(read_all(mounted.file, *map(at, range(BLOCKS)))):
        assert got is None or is_right(block, got), f"block {block} has other bytes than the source"
        (refused if got is None else right).add(block)
    return right, refused


def neither_mixed_nor_foreign(destination: Path) -> None:
    """Check that each block of the destination is the old one or the source's, and that its size is unchanged."""
    stored = destination.read_bytes()
    assert len(stored) == len(DATA)
    for block in range(BLOCKS):
        span = slice(at(block), at(block + 1))
        assert stored[span] in (OLD[span], DATA[span]), f"block {block} is neither old nor the source's"


# Before it serves


def refused(point: Path, *arguments: object, status: int, told: str) -> None:
    """Check that `mount` with `arguments` fails with `status` and the reason `told`, and leaves nothing."""
    done = run("mount", *arguments, point)
    said = done.stderr.decode()
    failed(done, status)
    assert done.stdout == b""
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("ERROR (mount): ")
    assert re.search(told, said.splitlines()[-1]), said
    assert str(point) not in support.fuse_mounts()


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
def test_a_missing_source_is_told(point: Path, tmp_path: Path, foreground: bool) -> None:
    missing, copy = tmp_path / "nowhere", tmp_path / "copy"
    options = ["-f"] if foreground else []
    refused(point, *options, missing, copy, status=3, told="nowhere.*No such file")
    assert not copy.exists()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("/no/such/program", "/no/such/program.*No such file"),
        ("false", "ended with exit status 1"),
        ("sh -c 'echo not for you >&2; exit 77'", "exit status 77.*not for you"),
        ("sh -c 'kill -9 $$'", "SIGKILL"),
        ("echo Welcome to", "unexpected reply from"),
        ("true", "ended with exit status 0"),
    ],
)
def test_a_program_that_is_no_retrieve_is_told(
    point: Path, source: Path, tmp_path: Path, program: str, told: str
) -> None:
    copy = tmp_path / "copy"
    refused(point, "--blockcopy-path", program, source, copy, status=3, told=told)
    assert not copy.exists()


def test_a_source_that_is_neither_file_nor_device_is_told(point: Path, tmp_path: Path) -> None:
    refused(point, tmp_path, tmp_path / "copy", status=3, told="neither a regular file nor a block device")


def test_an_unreadable_source_is_told(point: Path, tmp_path: Path) -> None:
    """Its processes run without root's right to read everything."""
    support.require_root()
    secret = written(tmp_path / "secret", DATA)
    secret.chmod(0)
    program = f"setpriv --bounding-set=-dac_override,-dac_read_search {shlex.join(BLOCKCOPY)}"
    refused(point, "--blockcopy-path", program, secret, tmp_path / "copy", status=3, told="Permission denied")


def test_a_destination_that_is_mounted_is_refused(
    point: Path, source: Path, tmp_path: Path, loop_device: LoopDevice
) -> None:
    image, folder = tmp_path / "ext4", tmp_path / "elsewhere"
    folder.mkdir()
    output("mkfs.ext4", "-q", image, "4M")
    before = image.read_bytes()
    device = loop_device(image)
    output("mount", "-o", "ro", device, folder)
    try:
        refused(point, source, device, status=1, told=f"{device} is in use")
    finally:
        output("umount", folder)
    assert image.read_bytes() == before


def test_a_destination_behind_a_loop_device_is_refused(
    point: Path, source: Path, destination: Path, loop_device: LoopDevice
) -> None:
    refused(point, source, destination, status=1, told=f"attached to the loop device {loop_device(destination)}")
    assert destination.read_bytes() == OLD


def test_a_locked_destination_is_refused(point: Path, source: Path, destination: Path) -> None:
    with destination.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        refused(point, source, destination, status=1, told=f"{destination} is locked")
    assert destination.read_bytes() == OLD


def test_a_destination_of_another_mount_is_refused(
    mount: Mounter, point: Path, source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, "--no-background")
    refused(point, source, destination, status=1, told=f"{destination} is locked")
    assert is_right(3, read(mounted.file, 3))


def test_a_device_that_is_too_small_is_refused(
    point: Path, source: Path, tmp_path: Path, loop_device: LoopDevice
) -> None:
    small = written(tmp_path / "small", OLD[:-512])
    refused(point, source, loop_device(small), status=1, told="too small")
    assert small.read_bytes() == OLD[:-512]


@pytest.mark.parametrize("alias", ["itself", "symbolic link", "hard link"])
def test_the_source_as_its_own_destination_is_refused(
    point: Path, source: Path, tmp_path: Path, alias: str
) -> None:
    other = tmp_path / "alias"
    if alias == "symbolic link":
        other.symlink_to(source)
    elif alias == "hard link":
        other.hardlink_to(source)
    else:
        other = source
    refused(point, source, other, status=1, told="the source itself")
    assert source.read_bytes() == DATA


def test_a_destination_that_cannot_be_made_is_told(point: Path, source: Path, tmp_path: Path) -> None:
    refused(point, source, tmp_path / "no" / "folder", status=1, told="cannot create .*no folder")
    refused(point, source, tmp_path, status=1, told="neither a regular file nor a block device")


def test_a_mountpoint_that_is_none_is_refused(source: Path, destination: Path, tmp_path: Path) -> None:
    support.require_fuse()
    refused(tmp_path / "missing", source, destination, status=4, told="missing: No such file")
    refused(source, source, destination, status=2, told="would hide the source")
    assert destination.read_bytes() == OLD


def test_a_mountpoint_that_has_a_replica_is_refused(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    mounted = mount(source, destination, "--no-background")
    done = run("mount", source, tmp_path / "second", mounted.point)
    failed(done, 4, b"has a replica mounted already")
    assert not (tmp_path / "second").exists()
    assert is_right(0, read(mounted.file, 0))


def test_a_mountpoint_that_hides_the_destination_is_refused(point: Path, source: Path, tmp_path: Path) -> None:
    inside = written(point / "copy", OLD)
    refused(point, source, inside, status=2, told="would hide the destination")
    link = tmp_path / "link"
    link.symlink_to(inside)
    refused(point, source, link, status=2, told="would hide the destination")
    assert inside.read_bytes() == OLD


@pytest.mark.parametrize("options", ["max_read=4096", "max_background=64", "allow_other,remount"])
def test_fuse_options_that_cannot_work_are_refused(
    point: Path, source: Path, destination: Path, options: str
) -> None:
    refused(
        point, "-o", options, source, destination, status=2, told=f"-o {options.split(',')[-1]} is not possible"
    )


def test_fuse_options_that_are_unknown_are_refused(point: Path, source: Path, destination: Path) -> None:
    refused(point, "-o", "no_such_option", source, destination, status=2, told="-o no_such_option is not possible")
    assert destination.read_bytes() == OLD


@pytest.mark.parametrize("name", ["a/b", ".", "..", "status.json"])
def test_names_that_cannot_be_are_refused(point: Path, source: Path, destination: Path, name: str) -> None:
    refused(point, "--name", name, source, destination, status=2, told="--name .* cannot be the name")


def test_a_pid_file_that_cannot_be_written_is_told(point: Path, source: Path, destination: Path) -> None:
    refused(point, "--pid-file", "/no/such/folder/pid", source, destination, status=4, told="--pid-file")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_it_serves_ends_it(
    point: Path, source: Path, destination: Path, signum: signal.Signals
) -> None:
    """A source that never tells its size keeps it from serving."""
    command = ["mount", "--blockcopy-path", f"{QUEUEING} --stall-at 1", source, destination, point]
    with subprocess.Popen([*BLOCKCOPY, *map(str, command)], stderr=subprocess.PIPE) as process:
        until(lambda: grandchildren(process.pid), "the source's processes")
        process.send_signal(signum)
        _, said = process.communicate(timeout=10)
    assert process.returncode == -signum
    assert b"Traceback" not in said
    assert str(point) not in support.fuse_mounts()
    assert destination.read_bytes() == OLD


def grandchildren(pid: int) -> list[int]:
    return [each for child in support.children(pid) for each in support.children(child)]


# The source


BIG_BLOCKS = 320
"""More than what the pass asks for at a time in the beginning: four batches of 8."""


def big_pair(folder: Path) -> tuple[Path, Path]:
    """Different in every block."""
    big, copy = folder / "big", folder / "big copy"
    big.write_bytes(noise(at(BIG_BLOCKS)))
    return big, written(copy, b"\xff" * at(BIG_BLOCKS))


def stalled_pass(mount: Mounter, folder: Path) -> Mount:
    """The pass's source answers no more from the fifth batch on; that of the reads goes on."""
    mounted = mount(*big_pair(folder), program=faulty("stall", 40, once=folder / "stalled"))
    until(lambda: mounted.status()["hydrated_bytes"] == 32 * BLOCK_SIZE, "four batches")
    until((folder / "stalled").exists, "the stall")  # a process that is killed before leaves it to the next one
    return mounted


@pytest.fixture(params=["stopped", "stalled"])
def unfinished(request: pytest.FixtureRequest, mount: Mounter, tmp_path: Path) -> Mount:
    """Return a mount in the middle of background hydration, whose process answers no more."""
    if request.param == "stalled":
        mounted = stalled_pass(mount, tmp_path)
    else:
        mounted = mount(*big_pair(tmp_path), "--limit", "16M")
        until(lambda: mounted.status()["hydrated_bytes"], "the first batch")
        for pid in mounted.retrievers():
            os.kill(pid, signal.SIGSTOP)
    assert mounted.status()["state"] == "hydrating"
    return mounted


@pytest.mark.long
def test_killed_processes_in_mid_pass(unfinished: Mount, tmp_path: Path) -> None:
    """Started again, and asked again for what they had not answered."""
    big, copy = tmp_path / "big", tmp_path / "big copy"
    for pid in unfinished.retrievers():
        os.kill(pid, signal.SIGKILL)
    whole = big.read_bytes()
    positions = [at(block) for block in range(0, BIG_BLOCKS, 40)]
    assert read_all(unfinished.file, *positions) == [whole[each : each + 4096] for each in positions]
    unfinished.wait()
    status = unfinished.status()
    assert (status["error"], status["fetched_bytes"]) == (None, at(BIG_BLOCKS))
    assert status["link"]["reconnects"] >= 1
    assert "SIGKILL" in status["link"]["last_error"]
    assert copy.read_bytes() == whole


def test_what_is_here_is_served_while_the_source_is_away(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    """The rest gets EIO at once, for readers who do not wait, and is there when the source is back."""
    away = tmp_path / "away"
    rsh = f"{PYTHON} {STANDINS / 'link'} --cut-while {away}"
    options = ["--no-background", "--reconnect-timeout", 0, "-e", rsh]
    mounted = mount(f"there:{source}", destination, *options, program=shlex.join(BLOCKCOPY))
    assert is_right(0, read(mounted.file, 0))
    away.touch()
    until(lambda: mounted.status()["state"] == "reconnecting", "the end of the link")
    assert survey(mounted) == ({0}, set(range(1, BLOCKS)))
    assert f"gave up on there:{source} after 0 seconds without an answer" in mounted.status()["error"]
    assert b"connection lost, reconnecting" in run("status", mounted.point).stdout
    away.unlink()
    until(lambda: mounted.status()["state"] == "paused", "another link")
    assert survey(mounted) == (set(range(BLOCKS)), set())
    mounted.wait()
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize("where", ["far from it", "in its window"])
def test_a_read_does_not_wait_for_a_pass_that_stands_still(mount: Mounter, tmp_path: Path, where: str) -> None:
    """The connection for reads is healthy: it has answered less than the one of the pass."""
    mounted, (big, copy) = stalled_pass(mount, tmp_path), (tmp_path / "big", tmp_path / "big copy")
    stored, wanted = copy.read_bytes(), big.read_bytes()
    missing = [block for block in range(BIG_BLOCKS) if stored[at(block)] != wanted[at(block)]]
    block = missing[-1 if where == "far from it" else 0]
    assert read(mounted.file, block) == wanted[at(block) : at(block) + 4096]


REASONS = {
    "die": "SIGKILL",
    "garble": "Last login",
    "misplace": "unexpected reply",
    "oversize": "unexpected reply",
    "short": "unexpected reply",
}


@pytest.mark.parametrize("fault", ["die", "misplace", "short"])
def test_a_fault_in_the_answer_to_a_read_that_does_not_wait(
    mount: Mounter, source: Path, destination: Path, fault: str, tmp_path: Path
) -> None:
    """Three blocks are there before; the answer to the fourth read is bad. A second later, all is well."""
    program = faulty(fault, 4, once=tmp_path / "it-happened")
    mounted = mount(source, destination, "--no-background", "--reconnect-timeout", 0, program=program)
    for block in (0, 10, 23):
        assert is_right(block, read(mounted.file, block))
    read(mounted.file, 5)  # an error, unless the kernel asks again and the link is up by then
    assert re.search(REASONS[fault], mounted.status()["link"]["last_error"])
    neither_mixed_nor_foreign(destination)
    assert survey(mounted)[0] >= {0, 10, 23}
    until(lambda: mounted.status()["state"] != "reconnecting", "another link")
    assert survey(mounted) == (set(range(BLOCKS)), set())
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize("fault", ["garble", "oversize"])
def test_a_fault_in_mid_pass(mount: Mounter, source: Path, destination: Path, fault: str, tmp_path: Path) -> None:
    program = faulty(fault, 9, once=tmp_path / "it-happened")  # less than half of the blocks
    mounted = mount(source, destination, program=program)
    assert survey(mounted) == (set(range(BLOCKS)), set())
    mounted.wait()
    status = mounted.status()
    assert (status["error"], status["source_needed"]) == (None, False)
    assert re.search(REASONS[fault], status["link"]["last_error"])
    assert destination.read_bytes() == DATA


def test_a_source_that_garbles_again_and_again_ends_the_pass(
    mount: Mounter, source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, program=faulty("garble", 3))
    waited = run("wait", mounted.point)
    failed(waited, 75, b"Last login")
    status = mounted.status()
    assert (status["state"], status["source_needed"]) == ("failed", True)
    assert "Last login" in status["error"]
    for block in (0, 11, BLOCKS - 1):  # each read connects again
        got = read(mounted.file, block)
        assert got is None or is_right(block, got)
    mounted.umount()
    neither_mixed_nor_foreign(destination)


def test_a_source_that_shrinks_gives_no_old_bytes(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    os.truncate(source, at(10))
    right, _ = survey(mounted)
    assert right == set(range(10))
    assert "it is shorter" in mounted.status()["error"]
    neither_mixed_nor_foreign(destination)


# The destination


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """1 MiB."""
    support.require_root()
    folder = tmp_path / "small"
    folder.mkdir()
    output("mount", "-t", "tmpfs", "-o", "size=1M", "none", folder)
    yield folder
    output("umount", "--lazy", folder)  # whatever a failed test left in it


def test_a_full_destination_refuses_what_finds_no_room(
    small_file_system: Path, mount: Mounter, source: Path
) -> None:
    mounted = mount(source, small_file_system / "copy", "--no-background")
    right, none = survey(mounted)
    assert 0 < len(right) <= 8
    assert "No space left" in mounted.status()["error"]
    assert mounted.status()["hydrated_bytes"] == len(right) * BLOCK_SIZE
    assert survey(mounted) == (right, none)
    assert mounted.retrievers()
    mounted.umount()


def test_a_full_destination_ends_the_pass(small_file_system: Path, mount: Mounter, source: Path) -> None:
    mounted = mount(source, small_file_system / "copy")
    waited = run("wait", mounted.point)
    failed(waited, 75, b"No space left")
    survey(mounted)
    mounted.umount()


def test_what_cannot_be_read_of_a_destination_is_fetched(
    mount: Mounter, source: Path, tmp_path: Path, loop_device: LoopDevice
) -> None:
    backing = written(tmp_path / "backing", OLD)
    device = loop_device(backing)
    os.truncate(backing, at(12))
    mounted = mount(source, device, "--no-background")
    right, none = survey(mounted)
    assert (right, none) == (set(range(BLOCKS)), set())


def test_a_destination_that_fails_to_sync_is_not_complete(
    small_file_system: Path, mount: Mounter, source: Path, loop_device: LoopDevice
) -> None:
    """Its backing file finds no room, which a write into the page cache does not tell: only the sync does."""
    backing = small_file_system / "backing"
    backing.touch()
    os.truncate(backing, len(DATA))
    mounted = mount(source, loop_device(backing))
    waited = run("wait", mounted.point)
    failed(waited, 75, b"Input/output error")
    status = mounted.status()
    assert (status["state"], status["source_needed"]) == ("failed", True)
    survey(mounted)
    told = run("umount", mounted.point)
    failed(told, 75, b"unmounted; the copy has failed: cannot sync")


def test_umount_tells_that_a_changed_source_needs_a_new_start(
    mount: Mounter, source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, "--no-background")
    pids = mounted.retrievers()
    written(source, DATA[:-1])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: mounted.status()["state"] == "failed", "the end of the copy")
    told = run("umount", mounted.point)
    failed(told, 75, b"unmounted; the copy has failed: source changed: ")
    assert b"checks every block" in told.stderr
    assert b"progress is recorded" not in told.stderr


# Its end while reads are waiting


@contextlib.contextmanager
def waiting_reader(mounted: Mount, block: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose read is not answered."""
    with subprocess.Popen(reader(mounted.file, at(block)), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begin\n"
            # The kernel's word for a read that waits, and cannot be interrupted but by a kill.
            until(lambda: " D " in Path(f"/proc/{process.pid}/stat").read_text(), "the read")
            assert mounted.status()["pid"]  # it has got the read, then: it is asked in order
            yield process
        finally:
            process.kill()


@pytest.fixture
def stalled(mount: Mounter, source: Path, destination: Path) -> Mount:
    """Serves, but its source answers no read."""
    return mount(source, destination, "--no-background", program=faulty("stall", 1))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_reads_are_waiting(stalled: Mount, destination: Path, signum: signal.Signals) -> None:
    status = stalled.status()
    processes = [status["pid"], *stalled.retrievers()]
    with waiting_reader(stalled, 3) as one, waiting_reader(stalled, 9) as two:
        os.kill(status["pid"], signum)
        got = {each.communicate(timeout=8)[0].decode() for each in (one, two)}
    assert got <= {f"error {number}\n" for number in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)}
    until(lambda: not any(support.alive(pid) for pid in processes), "the end")
    assert str(stalled.point) not in support.fuse_mounts()
    assert destination.read_bytes() == OLD


def test_unmounting_while_reads_are_waiting_is_refused(stalled: Mount) -> None:
    with waiting_reader(stalled, 3) as reader:
        done = subprocess.run(["fusermount3", "-u", stalled.point], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "busy" in done.stderr
        assert stalled.status()["state"] == "paused"
        reader.kill()
        reader.wait(timeout=8)
    stalled.umount()


def test_unmounting_lazily_while_reads_are_waiting(stalled: Mount) -> None:
    """Out of sight at once; the process stays for as long as the file is open, and not longer."""
    pid = stalled.status()["pid"]
    with waiting_reader(stalled, 3) as reader:
        output("fusermount3", "-u", "-z", stalled.point)
        assert str(stalled.point) not in support.fuse_mounts()
        reader.kill()
        reader.wait(timeout=8)
        until(lambda: not support.alive(pid), "the end")


def test_unmounting_in_mid_pass(unfinished: Mount) -> None:
    pid = unfinished.status()["pid"]
    processes = [pid, *unfinished.retrievers()]
    output("fusermount3", "-u", unfinished.point)
    until(lambda: not any(support.alive(each) for each in processes), "the end")


def test_a_mount_namespace_that_has_a_copy_does_not_hold_it(
    mount: Mounter, source: Path, destination: Path
) -> None:
    """As one that a container or a service made meanwhile."""
    mounted = mount(source, destination, wait=True)
    pid = mounted.status()["pid"]
    script = "echo begin; exec cat"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        support.require(other.stdout.readline() == b"begin\n", "mount namespaces cannot be made here")
        mounted.umount()
        assert not support.alive(pid)
        other.communicate()


def test_the_umount_command_in_mid_pass(unfinished: Mount) -> None:
    processes = [unfinished.status()["pid"], *unfinished.retrievers()]
    done = run("umount", unfinished.point)
    failed(done, 75, b"before the copy was complete")
    assert [pid for pid in processes if support.alive(pid)] == []


def test_status_answers_while_reads_are_waiting(stalled: Mount) -> None:
    with contextlib.ExitStack() as readers:
        for block in range(0, BLOCKS, 3):
            readers.enter_context(waiting_reader(stalled, block))
        assert stalled.status()["state"] == "paused"
        assert os.listdir(stalled.point)


def test_a_reader_killed_while_waiting_harms_nobody(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    assert is_right(0, read(mounted.file, 0))
    [retriever] = mounted.retrievers()
    os.kill(retriever, signal.SIGSTOP)
    with waiting_reader(mounted, 5) as killed, waiting_reader(mounted, 5) as other:
        killed.kill()
        killed.wait(timeout=8)
        assert is_right(0, read(mounted.file, 0, 4096), 4096)
        os.kill(retriever, signal.SIGCONT)
        got = bytes.fromhex(other.communicate(timeout=8)[0].decode())
        assert is_right(5, got)
    assert is_right(5, read(mounted.file, 5))
    assert survey(mounted) == (set(range(BLOCKS)), set())
    assert mounted.status()["error"] is None


# Its own death


@pytest.fixture
def dead(mount: Mounter, source: Path, destination: Path) -> Iterator[Mount]:
    """A mount whose process was killed while a file in it was open."""
    mounted = mount(source, destination, "--no-background")
    assert is_right(7, read(mounted.file, 7))
    processes = [mounted.status()["pid"], *mounted.retrievers()]
    held = os.open(mounted.file, os.O_RDONLY)
    os.kill(processes[0], signal.SIGKILL)
    until(lambda: not any(support.alive(pid) for pid in processes), "the end of it and of its source's")
    yield mounted
    with contextlib.suppress(OSError):  # its file system is dead
        os.close(held)


def test_a_dead_mount_is_told_with_its_cure(dead: Mount, source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not connected") as told:
        os.listdir(dead.point)
    assert told.value.errno == errno.ENOTCONN
    for command in (["status", dead.point], ["wait", dead.point], ["mount", source, tmp_path / "copy", dead.point]):
        done = run(*command)
        failed(done, 4, f"blockcopy umount {dead.point}")
    assert not (tmp_path / "copy").exists()


def test_umount_clears_a_dead_mount_and_the_next_one_works(dead: Mount, source: Path, destination: Path) -> None:
    done = run("umount", dead.point)
    succeeded(done)
    assert str(dead.point) not in support.fuse_mounts()
    again = run("mount", source, destination, dead.point)
    assert again.returncode == 0
    dead.wait()
    assert dead.status()["same_bytes"] >= BLOCK_SIZE
    dead.umount()
    assert destination.read_bytes() == DATA


# Its memory


@pytest.mark.timeout(120)
@pytest.mark.parametrize("content", ["holes", "data"])
def test_memory_is_bounded(mount: Mounter, tmp_path: Path, content: str) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    size = 512 << 20
    with source.open("wb") as file:
        piece = noise(32 << 20)
        for _ in range(size // len(piece) if content == "data" else 0):
            file.write(piece)
        file.truncate(size)
    mounted = mount(source, destination)
    pid = mounted.status()["pid"]
    subprocess.run([*BLOCKCOPY, "wait", str(mounted.point)], check=True, timeout=110)
    status = mounted.status()
    assert status["fetched_bytes"] + status["zero_bytes"] + status["same_bytes"] == size
    assert status["fetched_bytes"] == (size if content == "data" else 0)
    assert support.peak_memory(pid) < 80 << 20
    assert (destination.stat().st_blocks == 0) is (content == "holes")
