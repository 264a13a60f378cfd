"""`mount.blockcopy`: mount(8), fstab and umount(8), in a mount namespace whose /sbin is a copy."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import support
from support import PYTHON, failed, noise, succeeded, written

from blockcopy_fuse import mount_helper

HELPER = [PYTHON, "-P", "-m", "blockcopy_fuse.mount_helper"]
DATA = noise(500_000)


def translated(*words: str) -> list[str]:
    return mount_helper.command_line(mount_helper.parser().parse_args(list(words)))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("dest=/d", ["mount"]),
        ("rw,destination=/d,defaults,noauto,nofail,_netdev,user,x-systemd.automount,comment=x", ["mount"]),
        ("dest=/d,limit=20M,no_state,no-background", ["mount", "--limit=20M", "--no-state", "--no-background"]),
        ("dest=/d,compress=zstd:3,log_file=/l", ["mount", "--compress=zstd:3", "--log-file=/l"]),
        ('rsh="ssh -o A=b,c",dest=/d', ["mount", "--rsh=ssh -o A=b,c"]),
        ("dest=/d,on-complete=touch a\\,b", ["mount", "--on-complete=touch a,b"]),
        ("ro,allow_other,dest=/d,uid=5", ["mount", "-o", "ro", "-o", "allow_other", "-o", "uid=5"]),
        ('dest=/d,fsname="a,b\\\\c"', ["mount", "-o", "fsname=a\\,b\\\\\\\\c"]),
        ("rw,writable,dest=/d", ["mount", "--writable"]),
        ("rw,discard_writes,dest=/d,writable", ["mount", "--discard-writes", "--writable"]),
        ("dest=/d,limit", ["mount", "-o", "limit"]),  # for `mount` to refuse
        ("dest=/d,foreground,remount", ["mount", "-o", "foreground", "-o", "remount"]),
    ],
)
def test_options_become_those_of_the_command(options: str, line: list[str]) -> None:
    assert translated("host:/s", "/m", "-o", options) == [*line, "--", "host:/s", "/d", "/m"]


def test_a_sloppy_mount_passes_over_what_it_does_not_know() -> None:
    words = ["host:/s", "/m", "-s", "-n", "-v", "-t", "blockcopy", "-o", "dest=/d,kernel_cache,noexec,remount"]
    line = ["--verbose", "mount", "-o", "noexec", "-o", "remount"]
    assert translated(*words) == [*line, "--", "host:/s", "/d", "/m"]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["/s", "/m", "-o", "ro"], 2, "dest=DESTINATION"),
        (["/s", "/m", "-f", "-o", "ro"], 0, ""),
        (["/s", "/m", "-o", "dest=/d,limit=fast"], 2, "'fast' is not a number"),
        (["/s", "/m", "-o", "dest=/d,IdentityFile=/k"], 2, "-e 'ssh -o …'"),
        (["/s", "/m", "-o", "dest=/d,limit"], 2, "or in fstab limit=VALUE"),
        (["/s", "/m", "-o", "dest=/d,recheck=yes"], 2, "or in fstab recheck, without a value"),
        (["/s", "/m", "-o", "dest=/d,reconect_timeout=5"], 2, "did you mean reconnect-timeout?"),
        (["/s", "/m", "-o", "dest=/d,nonsense"], 2, "see `blockcopy help mount.blockcopy`"),
        (["/s", "/m", "-o", "dest=/d,remount"], 2, "unmount it, and mount it again"),
        (["/s", "/no such folder", "-o", "dest=/d"], 4, "first: mkdir -p '/no such folder'"),
    ],
)
def test_what_cannot_be_meant_is_told(words: list[str], status: int, told: str) -> None:
    done = subprocess.run([*HELPER, *words], capture_output=True, text=True, timeout=20, check=False)
    failed(done, status, told)
    assert "Traceback" not in done.stderr


PRIVATE_SBIN = """
mount -t tmpfs none /mnt
mkdir /mnt/upper /mnt/work /mnt/point
mount -t overlay -o lowerdir=/usr/sbin,upperdir=/mnt/upper,workdir=/mnt/work none /usr/sbin
cat >/usr/sbin/mount.blockcopy <<'END'
#!/bin/sh
exec {helper} "$@"
END
chmod +x /usr/sbin/mount.blockcopy
cd {folder}
"""


def in_a_namespace(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run it where mount(8) finds the helper; nothing of it is seen outside, or left."""
    support.require_root()
    support.require_fuse()
    able = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    support.require(able.returncode == 0, "mount namespaces cannot be made here")
    support.require(Path("/sbin").resolve() == Path("/usr/sbin"), "/sbin is a folder of its own here")
    written(tmp_path / "source", DATA)
    begin = PRIVATE_SBIN.format(helper=shlex.join(HELPER), folder=shlex.quote(str(tmp_path)))
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", begin + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)


def test_mount_and_umount(tmp_path: Path) -> None:
    done = in_a_namespace(
        tmp_path,
        f"""
        mount -t blockcopy $PWD/source /mnt/point -o dest=$PWD/copy,ro,allow_other,noexec,name=disk
        mount | grep " /mnt/point " | sed "s/relatime.*//"
        cmp source /mnt/point/disk
        pid=$(sed -n 's/^ *"pid": \\([0-9]*\\),/\\1/p' /mnt/point/status.json)
        mount -t blockcopy $PWD/source /mnt/point -o remount,dest=$PWD/copy && exit 1
        {shlex.join(support.BLOCKCOPY)} wait /mnt/point
        umount /mnt/point
        timeout 10 tail -f --pid=$pid /dev/null
        cmp source copy
        """,
    )
    shown = f"{tmp_path}/source on /mnt/point type fuse.blockcopy (ro,nosuid,nodev,noexec,\n"
    succeeded(done, "unmount it, and mount it again", stdout=shown)


def test_only_the_option_writable_makes_it_so(tmp_path: Path) -> None:
    """For mount(8) adds `rw` by itself."""
    done = in_a_namespace(
        tmp_path,
        f"""
        mount -t blockcopy $PWD/source /mnt/point -o rw,dest=$PWD/copy,name=disk
        printf new | dd of=/mnt/point/disk conv=notrunc status=none 2>/dev/null && exit 1
        umount /mnt/point
        echo $PWD/source /mnt/point blockcopy dest=$PWD/copy,writable,name=disk >fstab
        mount -T fstab /mnt/point
        printf new | dd of=/mnt/point/disk conv=notrunc,fsync status=none
        {shlex.join(support.BLOCKCOPY)} wait /mnt/point
        {shlex.join(support.BLOCKCOPY)} umount /mnt/point
        head --bytes 3 copy
        """,
    )
    succeeded(done, None, stdout="new")


def test_fstab(tmp_path: Path) -> None:
    """Spaces, a command with a comma in it, and a second `mount -a` that finds all mounted."""
    options = 'dest=$PWD/copy,nofail,_netdev,on_complete="echo\\\\040a,b>done",log_file=log'
    done = in_a_namespace(
        tmp_path,
        f"""
        mkdir "/mnt/a b"
        cat >fstab <<END
$PWD/source /mnt/a\\\\040b blockcopy {options} 0 0
END
        mount -T fstab -a
        mount -T fstab -a
        grep -c " /mnt/a.040b fuse.blockcopy" /proc/mounts
        cmp source "/mnt/a b/copy"
        {shlex.join(support.BLOCKCOPY)} wait "/mnt/a b"
        until [ -s done ]; do sleep 0.01; done
        cat done
        mount -T fstab -o remount "/mnt/a b" && exit 1
        umount "/mnt/a b"
        """,
    )
    succeeded(done, "unmount it, and mount it again", stdout="1\na,b\n")
    assert f"{tmp_path}/copy is a complete copy" in (tmp_path / "log").read_text()
