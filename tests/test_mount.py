"""`blockcopy mount`, status, wait and umount, where nothing goes wrong. SourceFaults are in test_mount_faults."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import pty
import random
import shlex
import signal
import stat
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    QUEUEING,
    Mount,
    errno_of,
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

SIZE = 40 * BLOCK_SIZE
DATA = noise(SIZE)
NOBODY = 65534


@pytest.fixture(params=["ours", "queueing", "original"])
def program(request: pytest.FixtureRequest) -> str | None:
    """Return the --blockcopy-path of each `retrieve` that a mount must work with. None: the default."""
    if request.param == "original":
        return shlex.join(request.getfixturevalue("original"))
    return {"ours": None, "queueing": QUEUEING}[request.param]


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Return a path without a file."""
    return tmp_path / "replica.img"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open the file without read-ahead of the kernel."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        yield fd
    finally:
        os.close(fd)


def read_at(path: Path, offset: int, length: int) -> bytes:
    with opened(path) as fd:
        return os.pread(fd, length, offset)


# What it shows


def test_the_kernel_reads_ahead_in_large_requests_for_root(mount: Mounter, source: Path, destination: Path) -> None:
    """From the first open on: before that, the kernel takes it back."""
    support.require_root()
    mounted = mount(source, destination)
    number = next(
        line.split()[2].decode()
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines()
        if line.split()[4] == os.fsencode(mounted.point)
    )
    assert read_at(mounted.file, 0, 1) == source.read_bytes()[:1]
    assert Path("/sys/class/bdi", number, "read_ahead_kb").read_text() == "4096\n"


def test_shows_the_replica_and_its_status_and_nothing_else(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination)
    assert sorted(os.listdir(mounted.point)) == ["replica.img", "status.json"]
    shown = mounted.file.stat()
    assert (shown.st_mode, shown.st_size) == (stat.S_IFREG | 0o400, SIZE)
    assert (shown.st_uid, shown.st_gid) == (os.getuid(), os.getgid())
    assert stat.S_IMODE((mounted.point / "status.json").stat().st_mode) == 0o400
    assert stat.S_IMODE(mounted.point.stat().st_mode) == 0o500
    assert stat.S_IMODE(destination.stat().st_mode) == 0o600


def test_allow_other_lets_other_users_read(mount: Mounter, source: Path, destination: Path, tmp_path: Path) -> None:
    support.require_root()
    mounted = mount(source, destination, "-o", "allow_other")
    assert stat.S_IMODE(mounted.file.stat().st_mode) == 0o444
    assert read_as_nobody(mounted, tmp_path).stdout == DATA


def test_without_allow_other_only_the_mounting_user_reads(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    support.require_root()
    refused = read_as_nobody(mount(source, destination), tmp_path)
    assert refused.returncode != 0
    assert b"Permission denied" in refused.stderr


def read_as_nobody(mounted: Mount, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """From inside `folder`, because those above are not for nobody."""
    folder.chmod(0o755)
    name = mounted.file.relative_to(folder)
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "cat", str(name)]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=20, check=False)


@pytest.mark.parametrize("name", ["disk", "mit Leerzeichen, Komma & ümlaut"])
def test_name_names_the_file(mount: Mounter, source: Path, destination: Path, name: str) -> None:
    mounted = mount(source, destination, "--name", name)
    assert sorted(os.listdir(mounted.point)) == sorted([name, "status.json"])
    assert mounted.file.read_bytes() == DATA


def test_nothing_can_be_changed(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination)
    file, new = mounted.file, mounted.point / "new"
    actions: dict[str, Callable[[], object]] = {
        "write": lambda: os.open(file, os.O_WRONLY),
        "read and write": lambda: os.open(file, os.O_RDWR),
        "append": lambda: os.open(file, os.O_WRONLY | os.O_APPEND),
        "truncate": lambda: os.truncate(file, 0),
        "create": lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
        "make folder": lambda: os.mkdir(new),
        "link": lambda: os.link(file, new),
        "symlink": lambda: os.symlink("x", new),
        "unlink": lambda: os.unlink(file),
        "rename": lambda: os.rename(file, new),
        "chmod": lambda: os.chmod(file, 0o600),
        "touch": lambda: os.utime(file),
        "write status": lambda: os.open(mounted.point / "status.json", os.O_WRONLY),
    }
    assert {what: errno_of(action) for what, action in actions.items()} == dict.fromkeys(actions, errno.EROFS)
    assert file.read_bytes() == DATA


def test_tools_that_look_around_work(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination)
    room = os.statvfs(mounted.point)
    assert room.f_blocks * room.f_frsize >= SIZE
    assert room.f_bavail == 0
    assert room.f_flag & os.ST_RDONLY
    assert output("stat", "--format=%s %F", mounted.file).strip() == f"{SIZE} regular file"
    listed = {line.split()[-1] for line in output("ls", "-la", mounted.point).splitlines()[1:]}
    assert listed - {".", ".."} == {"replica.img", "status.json"}
    assert output("find", mounted.point, "-type", "f", "-size", f"{SIZE}c").splitlines() == [str(mounted.file)]
    assert output("du", "-b", mounted.file).split()[0] == str(SIZE)
    assert "blockcopy" in output("df", "--output=fstype", mounted.point)


def test_proc_mounts_names_the_source(mount: Mounter, tmp_path: Path) -> None:
    source = written(tmp_path / "a, b\\c, size=1", b"x" * 1000)
    mounted = mount(source, tmp_path / "copy")
    entries = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    [entry] = [entry for entry in entries if entry[1] == str(mounted.point)]
    assert entry[2] == "fuse.blockcopy"
    assert entry[0].replace("\\040", " ").replace("\\134", "\\") == str(source)
    assert "ro" in entry[3].split(",")
    assert mounted.file.read_bytes() == b"x" * 1000


# Who reads it


READERS = {
    "dd": "dd if={file} bs=100k status=none | sha256sum",
    "dd, direct": "dd if={file} bs=64k iflag=direct status=none | sha256sum",
    "dd, backwards": "for i in $(seq 39 -1 0); do dd if={file} bs=128k skip=$i count=1 status=none; done"
    " | cat >{folder}/backwards; sha256sum <{source}; for i in $(seq 39 -1 0); do"
    " dd if={source} bs=128k skip=$i count=1 status=none; done | cmp - {folder}/backwards >&2",
    "cat": "cat {file} | sha256sum",
    "cmp": "cmp {file} {source} && sha256sum <{source}",
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_what_is_not_there_yet(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path, reader: str
) -> None:
    mounted = mount(source, destination, "--no-background")
    command = READERS[reader].format(file=mounted.file, source=source, folder=tmp_path)
    assert output("sh", "-ec", command).split()[0] == hashlib.sha256(DATA).hexdigest()


def test_mmap_and_reads_at_random_offsets(mount: Mounter, source: Path, destination: Path, program: str) -> None:
    mounted = mount(source, destination, "--no-background", program=program)
    choice = random.Random(5)
    with opened(mounted.file) as fd:
        for _ in range(30):
            offset, length = choice.randrange(SIZE), choice.randrange(1, 3 * BLOCK_SIZE)
            assert os.pread(fd, length, offset) == DATA[offset : offset + length]
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[SIZE - 5 :] == DATA[-5:]
            assert hashlib.sha256(mapped).digest() == hashlib.sha256(DATA).digest()


RANDOM_READER = """
import os, random, sys
file, source, seed = sys.argv[1:]
choice, data, fd = random.Random(int(seed)), open(source, "rb").read(), os.open(file, os.O_RDONLY)
for _ in range(60):
    offset, length = choice.randrange(len(data)), choice.randrange(1, 300_000)
    assert os.pread(fd, length, offset) == data[offset : offset + length], offset
"""


def test_several_readers_at_once_while_the_pass_runs(
    mount: Mounter, source: Path, destination: Path, program: str
) -> None:
    mounted = mount(source, destination, program=program)
    readers = [
        subprocess.Popen([PYTHON, "-c", RANDOM_READER, str(mounted.file), str(source), str(seed)])
        for seed in range(4)
    ]
    assert [reader.wait(timeout=30) for reader in readers] == [0, 0, 0, 0]
    mounted.wait()
    assert destination.read_bytes() == DATA


def test_a_file_system_inside_is_mounted_before_the_copy_is_complete(
    mount: Mounter, loop_device: LoopDevice, tmp_path: Path
) -> None:
    files, inside = tmp_path / "files", tmp_path / "inside"
    (files / "sub").mkdir(parents=True)
    written(files / "sub" / "text", DATA[:200_000])
    inside.mkdir()
    image = tmp_path / "ext4"
    output("mkfs.ext4", "-q", "-d", files, image, "16M")
    mounted = mount(image, tmp_path / "copy", "--no-background")
    device = loop_device(mounted.file, "--read-only")
    output("mount", "-o", "ro,noload", device, inside)
    try:
        assert (inside / "sub" / "text").read_bytes() == DATA[:200_000]
    finally:
        output("umount", inside)
    status = mounted.status()
    assert 0 < status["hydrated_bytes"] < status["size"]


def test_qemu_img_finds_its_size_and_contents(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    told = json.loads(output("qemu-img", "info", "--output=json", "-f", "raw", mounted.file))
    assert told["virtual-size"] == SIZE
    assert "identical" in output("qemu-img", "compare", "-f", "raw", "-F", "raw", mounted.file, source)


# Sizes


@pytest.mark.parametrize(
    ("size", "queueing"),
    [
        *((0, False), (1, True), (511, False), (BLOCK_SIZE + 1, True)),
        *((17 * BLOCK_SIZE + 4711, queueing) for queueing in (False, True)),
    ],
)
def test_sources_of_any_size(mount: Mounter, tmp_path: Path, size: int, queueing: bool) -> None:
    source = written(tmp_path / "source", DATA[:size])
    mounted = mount(source, tmp_path / "copy", program=QUEUEING if queueing else None)
    assert mounted.file.stat().st_size == size
    assert mounted.file.read_bytes() == DATA[:size]
    mounted.wait()
    assert (tmp_path / "copy").read_bytes() == DATA[:size]
    assert mounted.status()["hydrated_bytes"] == size


def test_reads_at_and_past_the_end(mount: Mounter, tmp_path: Path) -> None:
    size = 2 * BLOCK_SIZE + 100
    mounted = mount(written(tmp_path / "source", DATA[:size]), tmp_path / "copy", "--no-background")
    with opened(mounted.file) as fd:
        assert os.pread(fd, 1000, size - 10) == DATA[size - 10 : size]
        assert os.pread(fd, 10, size) == b""
        assert os.pread(fd, 10, size + (1 << 40)) == b""
        assert os.lseek(fd, 0, os.SEEK_END) == size


@pytest.mark.parametrize(
    ("old", "kept"),
    [(DATA[: SIZE - 999], b""), (b"", b""), (bytes(SIZE) + b"the tail", b"the tail")],
    ids=["shorter", "empty", "longer"],
)
def test_destinations_of_another_size(
    mount: Mounter, source: Path, destination: Path, program: str | None, old: bytes, kept: bytes
) -> None:
    written(destination, old)
    mounted = mount(source, destination, program=program, wait=True)
    assert mounted.file.read_bytes() == DATA
    assert destination.read_bytes() == DATA + kept


def test_loop_devices_at_both_ends(
    mount: Mounter, loop_device: LoopDevice, tmp_path: Path, program: str | None
) -> None:
    old = with_changes(DATA, [0, 7, 39])
    source = loop_device(written(tmp_path / "one", DATA), "--read-only")
    destination = loop_device(written(tmp_path / "two", old))
    mounted = mount(source, destination, program=program)
    assert mounted.file.name == Path(destination).name
    assert read_at(mounted.file, 7 * BLOCK_SIZE, 4096) == DATA[7 * BLOCK_SIZE :][:4096]
    mounted.wait()
    assert mounted.status()["fetched_bytes"] == 3 * BLOCK_SIZE
    assert mounted.file.read_bytes() == DATA
    mounted.umount()
    assert Path(destination).read_bytes() == DATA


# The pass, its end, and what it costs


def test_a_differing_block_is_right_at_once(
    mount: Mounter, source: Path, destination: Path, program: str | None
) -> None:
    written(destination, with_changes(DATA, [23]))
    mounted = mount(source, destination, "--no-background", program=program)
    offset = 23 * BLOCK_SIZE
    assert read_at(mounted.file, offset, 4096) == DATA[offset : offset + 4096]
    assert mounted.status()["fetched_bytes"] == BLOCK_SIZE


def test_only_what_differs_is_fetched(mount: Mounter, source: Path, destination: Path, program: str | None) -> None:
    written(destination, with_changes(DATA, [3, 39]))  # 5 %
    mounted = mount(source, destination, program=program, wait=True)
    status = mounted.status()
    assert (status["fetched_bytes"], status["same_bytes"]) == (2 * BLOCK_SIZE, SIZE - 2 * BLOCK_SIZE)
    samples = 0 if program is None else 3 * support.sample_answers(SIZE) * 4200  # one a connection, one at the end
    assert status["received_bytes"] < 3 * BLOCK_SIZE + samples
    assert destination.read_bytes() == DATA


def test_a_complete_copy_needs_no_source(
    mount: Mounter, source: Path, destination: Path, program: str | None
) -> None:
    mounted = mount(source, destination, program=program)
    mounted.wait()
    assert destination.read_bytes() == DATA
    status = mounted.status()
    assert (status["state"], status["source_needed"], status["error"]) == ("complete", False, None)
    assert (status["size"], status["hydrated_bytes"]) == (SIZE, SIZE)
    assert mounted.retrievers() == []
    source.unlink()
    drop_cache(mounted.file)
    assert mounted.file.read_bytes() == DATA


def drop_cache(path: Path) -> None:
    """The kernel forgets what it has of the file, so that the mount is asked again."""
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_without_background_only_what_is_read_is_stored(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    assert len(mounted.retrievers()) == 1
    assert read_at(mounted.file, 5 * BLOCK_SIZE + 10, 100) == DATA[5 * BLOCK_SIZE + 10 :][:100]
    assert (mounted.status()["state"], mounted.status()["hydrated_bytes"]) == ("paused", BLOCK_SIZE)
    mounted.umount()
    expected = bytearray(SIZE)
    expected[5 * BLOCK_SIZE : 6 * BLOCK_SIZE] = DATA[5 * BLOCK_SIZE : 6 * BLOCK_SIZE]
    assert destination.read_bytes() == expected


def test_without_background_a_file_read_in_full_is_complete(
    mount: Mounter, source: Path, destination: Path
) -> None:
    mounted = mount(source, destination, "--no-background")
    assert mounted.file.read_bytes() == DATA
    mounted.wait()
    assert mounted.retrievers() == []
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize(
    ("option", "field"), [(None, "resumed_bytes"), ("--recheck", "same_bytes"), ("--no-state", "same_bytes")]
)
def test_a_second_mount_of_the_same_pair_fetches_nothing(
    mount: Mounter, source: Path, destination: Path, option: str | None, field: str
) -> None:
    mount(source, destination, wait=True).umount()
    mounted = mount(source, destination, *([option] if option else []), wait=True)
    status = mounted.status()
    expected = {"resumed_bytes": 0, "same_bytes": 0, "fetched_bytes": 0} | {field: SIZE}
    assert status | expected == status
    assert mounted.file.read_bytes() == DATA


def test_fsync_through_the_mount_succeeds(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    with opened(mounted.file) as fd:
        os.pread(fd, 10, 0)
        os.fsync(fd)


# Foreground, background, process id


@contextlib.contextmanager
def foreground(
    tmp_path: Path, *options: object, stderr: int = subprocess.PIPE
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    point = tmp_path / "mnt"
    point.mkdir()
    command = [*BLOCKCOPY, "mount", "-f", *map(str, options), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            until(lambda: process.poll() is not None or str(point) in support.fuse_mounts(), "the mount")
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield process, point
        finally:
            if process.poll() is None:
                process.terminate()


@pytest.mark.parametrize(
    ("signum", "complete"), [(signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGHUP, False)]
)
def test_foreground_serves_until_a_signal_and_ends_well(
    tmp_path: Path, source: Path, destination: Path, signum: signal.Signals, complete: bool
) -> None:
    support.require_fuse()
    options = [] if complete else ["--no-background"]
    with foreground(tmp_path, *options, source, destination) as (process, point):
        assert read_at(point / "replica.img", BLOCK_SIZE, 10) == DATA[BLOCK_SIZE:][:10]
        if complete:
            assert run("wait", point).returncode == 0
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out) == (0 if complete else 75, b"")
        assert complete == (not err)
        assert complete or b"before the copy was complete; the progress is recorded in" in err
        assert str(point) not in support.fuse_mounts()
        assert os.listdir(point) == []


def test_foreground_ends_when_it_is_unmounted(tmp_path: Path, source: Path, destination: Path) -> None:
    support.require_fuse()
    with foreground(tmp_path, source, destination) as (process, point):
        assert run("wait", point).returncode == 0
        output("fusermount3", "-u", point)
        assert process.wait(timeout=10) == 0


def test_foreground_shows_progress_on_a_terminal(tmp_path: Path, source: Path, destination: Path) -> None:
    support.require_fuse()
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    try:
        with foreground(tmp_path, source, destination, stderr=theirs) as (process, point):
            assert run("wait", point).returncode == 0
            seen = b""
            while b"100.00 %" not in seen:
                seen += os.read(ours, 4096)
            process.terminate()
            assert process.wait(timeout=10) == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_background_leaves_the_terminal_and_the_folder(mount: Mounter, source: Path, destination: Path) -> None:
    """`run` reads to the end of standard output and error: a mount that kept them would not return."""
    pid = mount(source, destination, "--no-background").status()["pid"]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_mounts_with_standard_streams_closed(tmp_path: Path, source: Path, destination: Path, closed: str) -> None:
    """What is opened must not take the place of a standard stream, which the background lets go."""
    support.require_fuse()
    point = tmp_path / "mnt"
    point.mkdir()
    command = [*BLOCKCOPY, "mount", str(source), str(destination), str(point)]
    closing = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    done = subprocess.run([*closing, *command], capture_output=True, timeout=20, check=False)
    succeeded(done)
    assert (point / "replica.img").read_bytes() == DATA
    assert run("wait", point).returncode == 0
    assert run("umount", point).returncode == 0
    assert destination.read_bytes() == DATA


def test_relative_paths_are_those_of_where_it_was_started(tmp_path: Path, source: Path) -> None:
    support.require_fuse()
    point = tmp_path / "here"
    point.mkdir()
    done = run("mount", "--pid-file", "pid", "--no-background", source.name, "copy", "here", cwd=tmp_path)
    succeeded(done)
    assert (point / "copy").read_bytes() == DATA
    assert run("wait", "here", cwd=tmp_path).returncode == 0
    assert run("umount", "here", cwd=tmp_path).returncode == 0
    assert (tmp_path / "copy").read_bytes() == DATA
    assert not (tmp_path / "pid").exists()


def test_pid_file_holds_the_process_id_and_goes_with_it(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    mounted = mount(source, destination, "--pid-file", pid_file)
    assert pid_file.read_text() == f"{mounted.status()['pid']}\n"
    mounted.umount()
    assert not pid_file.exists()


def test_a_signal_ends_the_background_process_in_order(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    mounted = mount(source, destination, "--pid-file", pid_file, wait=True)
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    until(lambda: not support.alive(pid), "the end")
    assert str(mounted.point) not in support.fuse_mounts()
    assert not pid_file.exists()


ORDINARY_USER = """
umount -a -l -t fuse.blockcopy || true  # the copies that are here; some go by themselves
mount -t tmpfs -o mode=755 none /mnt
mknod /mnt/fuse c 10 229
chmod 666 /mnt/fuse
mount --bind /mnt/fuse /dev/fuse
mkdir /mnt/home
chown {user}:{user} /mnt/home
cd /mnt/home
export HOME=/mnt/home
unset STATE_DIRECTORY XDG_STATE_HOME
export XDG_RUNTIME_DIR=/mnt/home
exec setpriv --reuid={user} --regid={user} --clear-groups {reach} sh -ec '
    head -c 500000 /dev/urandom >source
    head -c 400000 source >copy
    mkdir here
    {blockcopy} mount source copy here
    stat --format="%u %a" here/copy
    cmp here/copy source
    {blockcopy} wait here
    {blockcopy} umount here
    cmp copy source
    ls -A here
    ls .local/state/blockcopy | sed "s/^[0-9a-f]*[.]/./"
'
"""


def test_an_ordinary_user_mounts_files_of_his_own() -> None:
    """In a mount namespace of its own, where /dev/fuse is for everyone, as udev makes it."""
    support.require_root()
    support.require_fuse()
    able = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    support.require(able.returncode == 0, "mount namespaces cannot be made here")
    setuid = os.stat("/usr/bin/fusermount3").st_mode & stat.S_ISUID
    support.require(bool(setuid), "fusermount3 is not setuid")
    # The interpreter may lie in a folder of root's: this capability reaches it, and can change nothing.
    reach = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    script = ORDINARY_USER.format(user=NOBODY, reach=reach, blockcopy=shlex.join(BLOCKCOPY))
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    succeeded(done, stdout=f"{NOBODY} 400\n.state\n")


# status, wait, umount


def test_status_for_people_and_for_programs(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, wait=True)
    people = run("status", mounted.point)
    assert people.returncode == 0
    assert people.stdout.decode().startswith("complete: 100.00 % of 5.0 MiB; ")
    assert "no longer needed" in people.stdout.decode()
    programs = run("status", "--json", mounted.point)
    assert programs.returncode == 0
    at_once = {"elapsed_seconds": None}
    assert {**json.loads(programs.stdout), **at_once} == {**mounted.status(), **at_once}


def test_status_tells_all_that_was_promised(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    read_at(mounted.file, 0, 1)
    status = mounted.status()
    expected = {
        "state": "paused",
        "source": str(source),
        "destination": str(destination),
        "size": SIZE,
        "hydrated_bytes": BLOCK_SIZE,
        "hydrated_percent": 2.5,
        "resumed_bytes": 0,
        "same_bytes": 0,
        "fetched_bytes": BLOCK_SIZE,
        "limit_bytes_per_s": None,
        "source_needed": True,
        "error": None,
    }
    assert status | expected == status
    link = {"state": "connected", "reconnects": 0, "last_error": None, "connections": 1, "bottleneck": None}
    assert status["link"] | link == status["link"]
    assert Path(status["state_file"]).parent == Path(os.environ["STATE_DIRECTORY"])
    assert stat.S_ISSOCK(os.stat(status["control_socket"]).st_mode)
    people = run("status", mounted.point).stdout.decode()
    assert status["on_demand"]
    assert people.startswith("on-demand: 2.50 % of 5.0 MiB; ")
    assert "still needed" in people


def test_the_status_file_is_whole_for_each_of_its_readers(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    before = (mounted.point / "status.json").open("rb", buffering=0)
    with before:
        first = before.read(20)
        assert mounted.file.read_bytes() == DATA
        status = json.loads(first + before.read())
    assert status["hydrated_bytes"] == 0
    assert mounted.status()["hydrated_bytes"] == SIZE


@pytest.mark.parametrize("command", ["status", "wait", "umount"])
@pytest.mark.parametrize("point", ["folder", "missing", "file"])
def test_what_is_no_mount_is_told(tmp_path: Path, command: str, point: str) -> None:
    (tmp_path / "folder").mkdir()
    written(tmp_path / "file", b"")
    done = run(command, tmp_path / point)
    failed(done, 4)
    assert done.stderr.decode() == f"ERROR ({command}): no replica is mounted on {tmp_path / point}\n"
    assert done.stdout == b""


def test_a_file_named_status_json_is_no_mount(tmp_path: Path) -> None:
    written(tmp_path / "status.json", b"[1, 2]")
    for command in ("status", "wait", "umount"):
        done = run(command, tmp_path)
        failed(done, 4, b"no replica is mounted")


def test_umount_returns_when_the_process_has_ended(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, wait=True)
    pid = mounted.status()["pid"]
    done = run("umount", mounted.point)
    assert not support.alive(pid)
    succeeded(done, stdout=b"")
    assert str(mounted.point) not in support.fuse_mounts()


@pytest.mark.parametrize("keeps", [True, False], ids=["with a state", "without"])
def test_umount_tells_of_a_copy_that_is_not_complete(
    mount: Mounter, source: Path, destination: Path, keeps: bool
) -> None:
    mounted = mount(source, destination, "--no-background", *([] if keeps else ["--no-state"]))
    children, state = mounted.retrievers(), mounted.status()["state_file"]
    done = run("umount", mounted.point)
    failed(done, 75)
    [said] = done.stderr.decode().splitlines()
    assert said.startswith("ERROR (umount): unmounted before the copy was complete; ")
    assert (f"recorded in {state}" if keeps else "no state is kept") in said
    assert [child for child in children if support.alive(child)] == []
    assert str(mounted.point) not in support.fuse_mounts()


def test_a_busy_mount_is_told_and_stays(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    with opened(mounted.file) as fd:
        refused = run("umount", mounted.point)
        failed(refused, 4, "busy")
        assert "still uses it: lsof, losetup" in refused.stderr.decode()
        assert os.pread(fd, 100, BLOCK_SIZE) == DATA[BLOCK_SIZE:][:100]
    mounted.umount()


def test_wait_tells_of_a_mount_that_went_away(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--no-background")
    pid = mounted.status()["pid"]
    with subprocess.Popen([*BLOCKCOPY, "wait", str(mounted.point)], stderr=subprocess.PIPE) as waiting:
        wchan = Path(f"/proc/{waiting.pid}/wchan")
        until(lambda: "nanosleep" in wchan.read_text(), "its first look")
        os.kill(pid, signal.SIGTERM)
        _, said = waiting.communicate(timeout=10)
    assert waiting.returncode == 75, said
    assert f"{mounted.point} went away before the copy was complete" in said.decode()
