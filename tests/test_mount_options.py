"""`-o`, `--replace`, and mountpoints that are files: how a mount is shown, and what stands in its way."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
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

from blockcopy.errors import UsageError
from blockcopy_fuse import fuse_support, mountinfo, options

Mounter = Callable[..., Mount]
LoopDevice = Callable[..., str]

DATA = noise(16 * BLOCK_SIZE)
OLD = with_changes(DATA, list(range(16)))
USER = 65534
SLOW = ("--limit", "64K")


# What is understood


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a,,b", ["a", "b"]),
        ('a="b,c",d', ["a=b,c", "d"]),
        ("a=b\\,c,d=\\\\", ["a=b,c", "d=\\"]),
        ('a="', ['a="']),
        ("a=\\x", ["a=\\x"]),
    ],
)
def test_options_are_parted_as_others_do(text: str, parts: list[str]) -> None:
    assert list(options.split(text)) == parts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("uid", "needs a value"),
        ("uid=", "needs a value"),
        ("uid=no such user", "no such user"),
        ("uid=4294967295", "no such user"),
        ("gid=nobody at all", "no such group"),
        ("umask=8", "octal"),
        ("umask=1000", "octal"),
        ("noexec=1", "takes no value"),
        ("subtype=a,subtype=b c", "one word"),
        ("allow_other,allow_root", "exclude each other"),
        ("ServerAliveInterval=15", "-e 'ssh -o …'"),
        ("kernel_cache", "-o has allow_other,"),
        ("remount", "mount it again"),
    ],
)
def test_options_that_cannot_be_are_told_beforehand(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        options.parse([text])


def test_what_is_the_default_anyway_is_kept_from_libfuse() -> None:
    """Version 3.17 of libfuse refuses `atime`, which older ones take."""
    assert options.parse(["atime,noexec"]).fuse == {"noexec"}


TOGETHER = [
    {"allow_other", "default_permissions", "ro", "noexec", "nosuid", "nodev", "sync", "dirsync", "noatime"},
    {"allow_root", "exec", "suid", "dev", "async", "atime"},
    {"debug", "rw"},
]
"""Flags that do not contradict each other."""


def test_no_flag_is_left_out() -> None:
    assert set().union(*TOGETHER) == options.FLAGS - {"auto_unmount"}


@pytest.mark.parametrize("flags", TOGETHER, ids=lambda flags: ",".join(sorted(flags)))
def test_each_flag_is_one_that_can_be_used(
    mount: Mounter, source: Path, destination: Path, flags: set[str]
) -> None:
    support.require_root()
    mounted = mount(source, destination, "--no-background", "-o", ",".join(sorted(flags)))
    assert mounted.file.read_bytes() == DATA
    mounted.umount()


def test_what_is_shown_is_what_was_asked_for(mount: Mounter, source: Path, destination: Path) -> None:
    support.require_root()
    asked = "uid=nobody,gid=12,umask=027,fsname=host:/dev/a\\,b,subtype=disk"
    mounted = mount(source, destination, "-o", asked)
    entry = mountinfo.mount_at(str(mounted.point))
    assert entry is not None
    assert (entry.kind, entry.source) == ("fuse.disk", "host:/dev/a,b")
    for path, kind, mode in (
        (mounted.point, stat.S_IFDIR, 0o550),
        (mounted.file, stat.S_IFREG, 0o440),
        (mounted.point / "status.json", stat.S_IFREG, 0o440),
    ):
        shown = path.stat()
        assert (shown.st_uid, shown.st_gid, shown.st_mode) == (USER, 12, kind | mode)
    mounted.umount()


def test_auto_unmount_leaves_no_dead_mount(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, *SLOW, "-o", "auto_unmount")
    assert mounted.file.stat().st_size == len(DATA)
    pid = mounted.status()["pid"]
    # What is closed at a process's end is let go of from the last to the first. Who watches the socket is to
    # find the connection ended, else it leaves the mount alone: one of twenty was left.
    open_files = {int(each.name): os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
    devices = [number for number, name in open_files.items() if name == "/dev/fuse"]
    sockets = [number for number, name in open_files.items() if name.startswith("socket:")]
    assert any(min(devices) < number < max(devices) for number in sockets)
    os.kill(pid, signal.SIGKILL)
    until(lambda: str(mounted.point) not in support.fuse_mounts(), "the unmount")
    again = mount(source, destination, "-o", "auto_unmount", wait=True)
    again.umount()
    assert destination.read_bytes() == DATA


# --replace


def killed(mounted: Mount) -> None:
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not support.alive(pid), "its end")


def test_replace_clears_a_dead_mount(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, *SLOW, "-o", "subtype=disk")
    killed(mounted)
    ends = [source, destination, mounted.point]
    told = run("mount", "-o", "subtype=disk", *ends)
    failed(told, 4, b"blockcopy umount")
    failed(run("mount", "--replace", *ends), 4)  # not of a type of ours: whose is it?
    done = run("mount", "--replace", "-o", "subtype=disk", *ends)
    succeeded(done)
    mounted.wait()
    assert output("grep", "-c", f" {mounted.point} ", "/proc/mounts") == "1\n"
    mounted.umount()
    assert destination.read_bytes() == DATA


def test_replace_tells_of_a_loop_device_on_the_dead_mount(
    mount: Mounter, source: Path, destination: Path, loop_device: Callable[[Path], str]
) -> None:
    mounted = mount(source, destination, *SLOW)
    device = loop_device(mounted.file, "--read-only")
    killed(mounted)
    done = run("mount", "--replace", source, destination, mounted.point)
    succeeded(done, f"losetup -d {device}")
    mounted.umount()


def test_replace_spares_a_living_mount(mount: Mounter, source: Path, destination: Path, tmp_path: Path) -> None:
    mounted = mount(source, destination, *SLOW)
    done = run("mount", "--replace", source, tmp_path / "second", mounted.point)
    failed(done, 4, b"has a replica mounted already")
    assert mounted.file.read_bytes() == DATA
    mounted.umount()


# A file for a mountpoint


@pytest.fixture
def point(tmp_path: Path) -> Path:
    support.require_fuse()
    return written(tmp_path / "point.img", b"what was here before")


class FileMount(Mount):
    """Its status is asked of the command: there is no file beside it."""

    def __init__(self, point: Path, *arguments: object) -> None:
        super().__init__(point, *arguments)
        self.file = point

    def status(self) -> dict[str, Any]:
        done = run("status", "--json", self.point)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture
def on_file(point: Path) -> Iterator[Callable[..., FileMount]]:
    made: list[FileMount] = []

    def make(*arguments: object) -> FileMount:
        made.append(FileMount(point, *arguments))
        return made[-1]

    yield make
    for each in made:
        subprocess.run(["fusermount3", "-u", "-z", str(each.point)], capture_output=True, check=False)


def test_a_file_is_the_replica(
    on_file: Callable[..., FileMount], source: Path, destination: Path, loop_device: LoopDevice
) -> None:
    mounted = on_file(source, destination, *SLOW)
    point = mounted.point
    assert (point.stat().st_size, stat.S_IMODE(point.stat().st_mode)) == (len(DATA), 0o400)
    assert point.read_bytes() == DATA
    entry = mountinfo.mount_at(str(point))
    assert entry is not None
    assert Path("/sys/class/bdi", entry.device, "read_ahead_kb").read_text() == "4096\n"
    output("cmp", "-n", len(DATA), loop_device(point, "--read-only"), source)
    with pytest.raises(OSError, match="Read-only"):
        point.open("r+b")


def test_a_file_takes_every_command(on_file: Callable[..., FileMount], source: Path, destination: Path) -> None:
    mounted = on_file(source, destination, *SLOW)
    for command in (["pause"], ["limit", "1G"], ["prefetch", "0:1M"], ["resume"], ["wait"]):
        done = run(command[0], mounted.point, *command[1:])
        succeeded(done, stdout=b"")
    status = mounted.status()
    assert (status["state"], status["mountpoint"]) == ("complete", str(mounted.point))
    pid = status["pid"]
    assert run("umount", mounted.point).returncode == 0
    assert not support.alive(pid)
    assert mounted.point.read_bytes() == b"what was here before"
    assert destination.read_bytes() == DATA


def test_two_files_are_told_apart(
    on_file: Callable[..., FileMount], mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    folder = mount(source, tmp_path / "other copy", *SLOW)
    first = on_file(source, destination, *SLOW)
    second = FileMount(written(tmp_path / "second", b""), source, tmp_path / "third copy", *SLOW)
    link = tmp_path / "link"
    link.symlink_to(second.point)
    assert run("status", link).returncode == 0
    assert first.status()["destination"] == str(destination)
    assert second.status()["destination"] == str(tmp_path / "third copy")
    for each in (folder, first, second):
        failed(run("umount", each.point), 75)


def test_a_file_without_a_control_socket_is_unmounted_all_the_same(
    on_file: Callable[..., FileMount], source: Path, destination: Path
) -> None:
    mounted = on_file(source, destination, *SLOW)
    status = mounted.status()
    Path(status["control_socket"]).unlink()
    done = run("status", mounted.point)
    failed(done, 4, b"has no control socket")
    done = run("umount", mounted.point)
    succeeded(done, b"cannot tell when")
    until(lambda: not support.alive(status["pid"]), "its end")


def test_a_file_whose_program_died(on_file: Callable[..., FileMount], source: Path, destination: Path) -> None:
    mounted = on_file(source, destination, *SLOW)
    killed(mounted)
    for words in (["status"], ["pause"], ["mount", source, destination]):
        done = run(*words, mounted.point)
        failed(done, 4, f"blockcopy umount {mounted.point}")
    again = on_file(source, destination, "--replace")
    again.wait()
    done = run("mount", "--replace", source, destination, mounted.point)
    failed(done, 4, b"has a replica mounted already")
    again.umount()
    assert destination.read_bytes() == DATA


def test_a_file_that_is_one_of_the_ends_is_refused(point: Path, source: Path, tmp_path: Path) -> None:
    state = written(tmp_path / "state", b"")
    link = tmp_path / "link"
    link.symlink_to(point)
    hard = tmp_path / "hard"
    hard.hardlink_to(point)
    for words, told in (
        ([source, point, point], "destination"),
        ([source, hard, point], "destination"),
        ([source, point, link], "destination"),
        ([point, tmp_path / "copy", point], "source"),
        (["--state", state, source, tmp_path / "copy", state], "state file"),
        (["--name", "disk", source, tmp_path / "copy", point], "is a file"),
    ):
        done = run("mount", *words)
        failed(done, 2, told)
    done = run("mount", source, tmp_path / "copy", "/dev/null")
    failed(done, 4, b"neither a folder nor a regular file")
    assert not (tmp_path / "copy").exists()
    failed(run("status", point), 4)
    assert point.read_bytes() == b"what was here before"


ORDINARY = """
umount -a -l -t fuse.blockcopy || true  # the copies that are here; some go by themselves
mount -t tmpfs -o mode=755 none /mnt
mknod /mnt/fuse c 10 229
chmod 666 /mnt/fuse
mount --bind /mnt/fuse /dev/fuse
mount -t fusectl none /sys/fs/fuse/connections
cp /etc/fuse.conf /mnt/fuse.conf
mount --bind /mnt/fuse.conf /etc/fuse.conf
sed -i /^user_allow_other/d /mnt/fuse.conf
mkdir /mnt/home
chown {user}:{user} /mnt/home
cd /mnt/home
export HOME=/mnt/home XDG_RUNTIME_DIR=/mnt/home
unset STATE_DIRECTORY XDG_STATE_HOME
cat >/mnt/script <<'END'
head -c 500000 /dev/urandom >source
head -c 400000 source >copy
echo old >disk
mkdir folder
{blockcopy} mount -o allow_other source copy folder 2>&1 && exit 1
{blockcopy} mount -o umask=0,fsname=host:/dev/a,noexec --limit 64K source copy disk
mount | sed -n "s/^\\(host:.* on .* type [^ ]* \\).*/\\1/p"
stat --format="%u %a %s" disk
{blockcopy} pause disk
{blockcopy} status disk | cut -d : -f 1
cmp disk source
number=$(sed -n "s/^[0-9]* [0-9]* 0:\\([0-9]*\\) .* - fuse.blockcopy host:.*/\\1/p" /proc/self/mountinfo)
echo "$(cat /sys/fs/fuse/connections/$number/max_background) reads may wait"
kill -9 $({blockcopy} status --json disk | sed -n "s/^ *\\"pid\\": \\([0-9]*\\),/\\1/p")
until ! cat disk >copied 2>&-; do sleep 0.01; done
on_complete='echo $BLOCKCOPY_SIZE $BLOCKCOPY_MOUNTPOINT >done'
{blockcopy} mount --replace --log-file log --on-complete "$on_complete" source copy disk
{blockcopy} wait disk
until [ -s done ]; do sleep 0.01; done
cat done
{blockcopy} umount disk
cat disk
cmp copy source
END
chmod 644 /mnt/script
exec setpriv --reuid={user} --regid={user} --clear-groups {reach} sh -e /mnt/script
"""


def test_an_ordinary_user_can_do_all_of_it() -> None:
    """In a mount namespace of its own, where /dev/fuse is for everyone, as udev makes it."""
    support.require_root()
    support.require_fuse()
    able = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    support.require(able.returncode == 0, "mount namespaces cannot be made here")
    support.require(bool(os.stat("/usr/bin/fusermount3").st_mode & stat.S_ISUID), "fusermount3 is not setuid")
    # The interpreter may lie in a folder of root's: this capability reaches it, and can change nothing.
    reach = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    script = ORDINARY.format(user=USER, reach=reach, blockcopy=shlex.join(BLOCKCOPY))
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.stdout.splitlines() == [
        "ERROR (mount): -o allow_other is not possible: only root may, unless there is a line "
        "`user_allow_other` in /etc/fuse.conf",
        "host:/dev/a on /mnt/home/disk type fuse.blockcopy ",
        f"{USER} 444 500000",
        "paused",
        "256 reads may wait",
        "500000 /mnt/home/disk",
        "old",
    ], done.stderr
    succeeded(done)


FUSE_CONF = {
    "user_allow_other": False,  # it has no end
    "user_allow_other\n": True,
    "  user_allow_other \t# for the backup\n": True,
    "#user_allow_other\n": False,
    "mount_max = 5\nuser_allow_other\n": True,
    "user_allow_other" + " " * 300 + "\n": False,
    "user_allow_other = 1\n": False,
}


@pytest.mark.parametrize("text", FUSE_CONF)
def test_fuse_conf_is_read_as_fusermount3_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(fuse_support, "FUSE_CONF", str(written(tmp_path / "fuse.conf", text.encode())))
    assert fuse_support.users_may_share() == FUSE_CONF[text]
