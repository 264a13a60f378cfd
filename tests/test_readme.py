"""All command lines of README.md and the manual's topics, run as written, on a machine that has all they name.

The machine is a mount namespace: a copy-on-write view of this machine, with devices, an sshd and stand-ins for LVM,
systemd and docker. `tools/fresh` runs the command lines that install packages.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import support
from support import BLOCKCOPY, PYTHON

from blockcopy_fuse.manual.pages import find, topic_files

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text()
DOCUMENTS = {"README.md": README, **topic_files()}
"""The texts with command lines, by the names of their files."""

PROGRAMS = "apt-get blockcopy cp docker ln losetup lvcreate man mkdir mount pip pipx qemu-img ssh systemctl"
"""A code span of three words or more is a command line if it begins with one of these programs."""

MENTIONED = {
    "blockcopy COMMAND --help": "test_command_line",
    "blockcopy doctor [HOST]": "test_doctor",
    "mount -t blockcopy SOURCE MOUNTPOINT -o dest=DESTINATION": "test_mount_helper",
    'blockcopy umount "$BLOCKCOPY_MOUNTPOINT" && …': "test_boot",
    "blockcopy list --json": "test_status",
    "blockcopy state list": "test_state_command",
    "blockcopy status --json": "test_status",
    "blockcopy sync --json": "test_results",
    "blockcopy verify --json": "test_verify",
    "blockcopy mount --discard-writes": "test_mount_helper",
    "docker exec -i": "test_readme",
    "apt-get purge blockcopy": "tools/try-package",
    "pipx uninstall blockcopy": "tools/try-package",
    "mount -o ro,noload": "test_readme",
    "mount -o ro,norecovery,nouuid": "test_readme",
    "mount -t blockcopy": "test_mount_helper",
}
"""Command lines in running text, and the tests that run them with values for the words in capitals."""

BY_HAND = (
    "blockcopy mount --writable --force ",
    "blockcopy mount --writable --pid-file ",
    "loop=$(losetup -rP ",
)
"""Beginnings of blocks for a machine of their own: device-mapper, partitions by udev, swap.

`tools/vm run hand_off swap` runs what the first two say.
"""

BY_FRESH = ("tools/demo ", "apt-get install -y pipx ", 'apt-get install -y "$(tools/deb)"')
"""Beginnings of blocks that change the machine. `tools/fresh` runs these blocks.

`test_install` runs the second, and `tools/try-package` all that install.
"""

MOUNT = "blockcopy mount --limit 8M root@host:/dev/vg/disk /dev/vg/copy /mnt/disk"
EQUAL = "cmp /dev/vg/disk /dev/vg/copy"
SNAPSHOT = "lvcreate -s -n snap -L 5G vg/disk"


class Scene(NamedTuple):
    """Scripts that run before and after a block."""

    before: str = ""
    after: str = ""


WRITABLE = "blockcopy mount --writable root@host:/dev/vg/disk /dev/vg/copy /mnt/disk"

SCENES = {
    WRITABLE: Scene(
        after="echo words >/mnt/files/new; umount /mnt/files; ! blockcopy umount /mnt/disk 2>/dev/null"
    ),
    "blockcopy discard-writes ": Scene(
        f"{WRITABLE}; echo words | dd of=/mnt/disk/copy conv=notrunc,fsync; "
        "blockcopy umount /mnt/disk || [ $? = 75 ]; ! blockcopy sync /dev/vg/disk /dev/vg/copy",
        EQUAL,
    ),
    "blockcopy sync root@old:/dev/vg/disk ": Scene(
        "mount /dev/vg/disk /srv",
        "echo words >/srv/new; umount /srv; blockcopy discard-writes /dev/vg/copy",
    ),
    "mkdir -p /mnt/disk /mnt/files\nblockcopy mount root@host:/dev/vg/snap": Scene(
        SNAPSHOT, "cmp /dev/vg/snap /dev/vg/copy"
    ),
    "mkdir -p /mnt/disk /mnt/files": Scene(after=EQUAL),
    "mkdir -p /mnt/disk\n": Scene(after=EQUAL),
    "blockcopy mount root@host:/dev/vg/disk ": Scene(after=EQUAL),
    "blockcopy pause ": Scene(MOUNT, "blockcopy umount /mnt/disk || [ $? = 75 ]"),
    "echo 'root@host:/dev/vg/disk /mnt/disk": Scene(after="cmp /dev/vg/disk /mnt/disk/copy; umount /mnt/disk"),
    "cp tools/systemd/": Scene(after="cmp /dev/vg/disk /mnt/disk/copy; blockcopy umount /mnt/disk || [ $? = 75 ]"),
    "blockcopy state list": Scene("blockcopy sync root@host:/dev/vg/disk /dev/vg/copy"),
    "blockcopy status /mnt/disk ": Scene(MOUNT, "blockcopy umount /mnt/disk || [ $? = 75 ]"),
    "blockcopy sync root@host:/dev/vg/disk ": Scene(after=EQUAL),
    "blockcopy sync /dev/vg/disk ": Scene(after=EQUAL),
    "blockcopy verify ": Scene("cp /dev/vg/disk /dev/vg/copy"),
    "ssh root@old lvcreate ": Scene("lvremove -y vg/copy", EQUAL),
    "mount -o ro,noload ": Scene(MOUNT, "umount /mnt/files"),
    "debugfs -R ": Scene(
        MOUNT,
        "mount -o ro,noload,loop /dev/vg/disk /mnt/files; cmp /mnt/files/shop.db shop.db; umount /mnt/files; "
        "blockcopy umount /mnt/disk || [ $? = 75 ]",
    ),
    "qemu-img create ": Scene(MOUNT, "qemu-img compare vm.qcow2 -F raw /dev/vg/disk"),
    "blockcopy sync root@host:/dev/vg/snap ": Scene(SNAPSHOT, "cmp /dev/vg/snap /backup/disk.raw"),
    "blockcopy sync /dev/vg/snap ": Scene(SNAPSHOT, "cmp /dev/vg/snap /backup/disk.raw"),
    "blockcopy sync -e 'docker exec -i' ": Scene(after="cmp /var/lib/data.img data.img"),
    "blockcopy checksum /dev/vg/copy ": Scene(after=EQUAL),
    "blockcopy checksum --digest ": Scene(after=EQUAL),
    "blockcopy manual ": Scene(after="test -s /usr/local/share/man/man7/blockcopy-state.7"),
    "blockcopy completion ": Scene(after="test -s ~/.config/fish/completions/blockcopy.fish"),
}
"""The scenes of blocks, by the beginning of the block. Other blocks run without a scene."""

SETUP = """
mount -t tmpfs none {folder}
cd {folder}
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root
mount -t proc none root/proc
mount --rbind /sys root/sys
mount -t tmpfs none root/run
mount -t tmpfs none root/dev
cd root/dev
mknod null c 1 3; mknod zero c 1 5; mknod full c 1 7; mknod random c 1 8; mknod urandom c 1 9; mknod tty c 5 0
mknod fuse c 10 229; mknod loop-control c 10 237
for number in $(seq 0 127); do mknod loop$number b 7 $number; done
chmod 666 *
ln -s /proc/self/fd fd; ln -s fd/0 stdin; ln -s fd/1 stdout; ln -s fd/2 stderr; ln -s pts/ptmx ptmx
mkdir pts shm vg
mount -t devpts -o ptmxmode=666 none pts
exec chroot ../ sh -ec {inside}
"""

INSIDE = """
mkdir -p /backup /images /mnt/disk /mnt/files /run/sshd
cd /images
for name in blockcopy mount.blockcopy lvcreate lvremove docker systemctl man sqlite3; do
    rm -f /usr/local/bin/$name
    case $name in
    blockcopy) echo 'exec {blockcopy} "$@"' ;;
    mount.blockcopy) echo 'exec {python} -P -m blockcopy_fuse.mount_helper "$@"' ;;
    lvcreate) cat <<'END' ;;
while getopts sn:L: option; do eval "given_$option=\\${{OPTARG:-yes}}"; done
shift $((OPTIND - 1))
[ $given_s ] && cp /dev/$1 /images/$given_n || truncate -s ${{given_L%b}} /images/$given_n
ln -s "$(losetup --find --show /images/$given_n)" /dev/vg/$given_n
END
    lvremove) echo '[ $1 = -y ] && losetup -d "$(readlink /dev/$2)" && rm /dev/$2' ;;
    docker) echo '[ "$*" != "${{*#exec -i CONTAINER }}" ] && shift 3 && exec "$@"' ;;
    systemctl) echo 'exec {python} {systemctl} "$@"' ;;
    man) [ -x /usr/bin/man ] && continue; echo 'cat >&2' ;;
    sqlite3) echo 'exec {python} {sqlite} "$@"' ;;
    esac >/usr/local/bin/$name
    sed -i '1i #!/bin/sh' /usr/local/bin/$name
    chmod 755 /usr/local/bin/$name
done
# A disk with a file system in use, whose journal was not written back: what a snapshot of it has.
truncate -s 64M disk
mkfs.ext4 -q disk
cp disk copy
mount -o loop disk /mnt/files
{python} {sqlite} file:/mnt/files/shop.db 'create table things (name)'
head -c 1M /dev/urandom >/mnt/files/data
fsfreeze -f /mnt/files
fsfreeze -u /mnt/files
cp disk snapshot
umount /mnt/files
mv snapshot disk
cp disk /var/lib/data.img
for name in disk copy; do ln -s "$(losetup --find --show $name)" /dev/vg/$name; done
! mount -o ro "$(losetup --find --show -r disk)" /mnt/files 2>/dev/null
rm -rf /root/.ssh /root/.bashrc  # this user's start-up file may wait for a lock that was held outside
mkdir -m 700 /root/.ssh
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
printf 'HostKey /root/.ssh/id_ed25519\\nStrictModes no\\nUsePAM no\\nPermitRootLogin yes\\n' >/root/sshd
cat >/root/.ssh/config <<END
Host host old here
    ProxyCommand $(command -v sshd || echo /usr/sbin/sshd) -i -f /root/sshd
    StrictHostKeyChecking accept-new
    LogLevel ERROR
END
echo ready
trap '' CHLD  # orphans are reaped
exec cat
"""

TIDY = """
umount -q /mnt/files || true
find {folders} -type f -exec stat -c %Hd:%Ld {{}} + | sort -u | while read -r device; do
    losetup --list --noheadings --output BACK-MAJ:MIN,NAME | sed -n "s/^ *$device *//p" | xargs -r losetup -d
done
blockcopy umount /mnt/disk 2>/dev/null || true
"""
"""Remove what a block left: a file system in the replica, its loop device, the replica.

`folders`: detach the loop devices on the file systems of these folders.
"""

XFS = """
cd /images
truncate -s 300M xfs
mkfs.xfs -q xfs
mount -o loop xfs /mnt/files
echo words >/mnt/files/text
fsfreeze -f /mnt/files; fsfreeze -u /mnt/files
cp xfs snapshot
loop=$(losetup --find --show -r snapshot)
mkdir /mnt/snapshot
! mount -o ro $loop /mnt/snapshot 2>/dev/null
mount -o {options} $loop /mnt/snapshot
grep words /mnt/snapshot/text
umount /mnt/snapshot
"""

SYSTEMCTL = f"""
import re, shlex, shutil, subprocess, sys, time
from pathlib import Path
if sys.argv[2:] == ["shop"]:
    sys.exit()
[template] = re.findall("enable --now (blockcopy-mount@)disk", " ".join(sys.argv[1:]))
unit = Path(f"/etc/systemd/system/{{template}}.service").read_text()
settings = dict(line.split("=", 1) for line in Path("/etc/blockcopy/disk.conf").read_text().splitlines())
words = []
for word in re.findall("^ExecStart=(.*)", unit, re.MULTILINE)[0].split():
    value = settings.get(word.strip("${{}}"), word) if word.startswith("$") else word
    words += shlex.split(value) if word[:2] != "${{" else [value]
program = shutil.which(words[0], path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
subprocess.Popen([program, *words[1:]], start_new_session=True)
end = time.monotonic() + {support.PATIENCE}
while f" {{settings['MOUNTPOINT']}} fuse" not in Path("/proc/mounts").read_text() and time.monotonic() < end:
    time.sleep(0.05)
"""

SQLITE = """
import sqlite3, sys
file, words = sys.argv[1:]
words = "select name from sqlite_master" if words == ".tables" else words
with sqlite3.connect(file, uri=True) as base:
    for name, in base.execute(words):
        print(name)
"""


class Block(NamedTuple):
    """A block of the file `document`, in a section called `section`."""

    document: str
    section: str
    text: str


def blocks() -> list[Block]:
    """Find the indented blocks of the documents, without the fenced ones."""
    found = []
    for document, whole in DOCUMENTS.items():
        text, section = re.sub(r"^```.*?^```", "", whole, flags=re.DOTALL | re.MULTILINE), ""
        for title, lines in re.findall(r"^## (.*)|((?:^    .*\n)+)", text, re.MULTILINE):
            section = title or section
            if lines:
                found.append(Block(document, section, re.sub(r"^    ", "", lines, flags=re.MULTILINE)))
    return found


RUN_HERE = [block for block in blocks() if not block.text.startswith(BY_FRESH + BY_HAND)]


class World:
    """The machine. `holder`: the process id of its namespace's first process."""

    def __init__(self, holder: int) -> None:
        self._enter = ["nsenter", "--target", str(holder), "--mount", "--pid", "--root", "--wd"]

    def run(self, script: str) -> None:
        """Run a script in the checkout, at a terminal. Types `q` repeatedly, for programs that end at a key."""
        environment = ["env", "-i", "HOME=/root", "TERM=xterm", "LANG=C.UTF-8"]
        environment += ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        shell = shlex.join(["bash", "-eo", "pipefail", "-c", f"cd {shlex.quote(str(CHECKOUT))}\n{script}"])
        typed = ["sh", "-c", 'while sleep 0.2; do echo q; done | script -qec "$1" /dev/null', "sh", shell]
        done = subprocess.run(
            [*self._enter, *environment, *typed], capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


@contextmanager
def world(folder: Path) -> Iterator[World]:
    support.require_root()
    support.require_fuse()
    support.require_sshd()
    names = {"python": shlex.quote(PYTHON), "blockcopy": shlex.join(BLOCKCOPY)}
    for name, text in {"systemctl": SYSTEMCTL, "sqlite": SQLITE}.items():
        names[name] = str(support.written(folder / name, text.encode()))
    machine = folder / "machine"
    machine.mkdir()
    setup = SETUP.format(folder=shlex.quote(str(machine)), inside=shlex.quote(INSIDE.format(**names)))
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    with subprocess.Popen(
        [*command, "sh", "-ec", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as holder:
        assert holder.stdout is not None
        said = [holder.stdout.readline()]
        while said[-1] not in (b"ready\n", b""):
            said.append(holder.stdout.readline())
        assert said[-1], b"".join(said).decode()
        made = World(*support.children(holder.pid))
        try:
            yield made
        finally:
            made.run(TIDY.format(folders="/mnt/disk /images"))
            holder.communicate()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("document", "section"), sorted({block[:2] for block in RUN_HERE}))
def test_blocks_do_as_they_are_written(tmp_path: Path, document: str, section: str) -> None:
    with world(tmp_path) as machine:
        for text in (block.text for block in RUN_HERE if block[:2] == (document, section)):
            scene = next((SCENES[start] for start in SCENES if text.startswith(start)), Scene())
            machine.run(f"{scene.before}\n{text}\n{scene.after}\n{TIDY.format(folders='/mnt/disk')}")


@pytest.mark.long
def test_the_options_for_xfs_mount_a_snapshot_of_one_in_use(tmp_path: Path) -> None:
    support.require(shutil.which("mkfs.xfs", path="/usr/sbin") is not None, "mkfs.xfs is not installed")
    [options] = {found for text in DOCUMENTS.values() for found in re.findall(r"for XFS:? -o (\S+)", text)}
    with world(tmp_path) as machine:
        machine.run(XFS.format(options=options))


@pytest.mark.long
def test_the_quick_start_prints_what_it_says(tmp_path: Path) -> None:
    support.require_fuse()
    [block] = [block.text for block in blocks() if block.text.startswith("mkdir -p /tmp/try/")]
    [said] = re.findall(r"^It prints, beside a progress bar:\n\n```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "bin").mkdir()
    program = support.written(
        tmp_path / "bin" / "blockcopy", f'#!/bin/sh\nexec {shlex.join(BLOCKCOPY)} "$@"\n'.encode()
    )
    program.chmod(0o755)
    here = str(tmp_path / "try")
    done = subprocess.run(
        ["bash", "-ec", block.replace("/tmp/try", here)],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    expected = [" ".join(line.split()) for line in said.replace("/tmp/try", here).splitlines()]
    assert [line for line in expected if line not in printed] == []


def test_the_readme_is_short_and_warns_at_its_top() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130, "the manual has what most users do not need at first"
    assert any("is overwritten" in line for line in lines[:15])


def test_every_scene_is_of_a_block() -> None:
    starts = [*SCENES, *BY_FRESH, *BY_HAND]
    assert [start for start in starts if not any(block.text.startswith(start) for block in blocks())] == []


def test_command_lines_in_running_text_are_run_as_well() -> None:
    everything = "\n".join(DOCUMENTS.values())
    prose = re.sub(r"^(```.*?^```|    .*?$)", "", everything, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines = {span for span in spans if span.partition(" ")[0] in PROGRAMS.split() and span.count(" ") > 1}
    shown = {line for line in lines if re.fullmatch(r"blockcopy help [\w.-]+", line)}
    for line in shown - {"blockcopy help PAGE"}:
        find(line.rpartition(" ")[2])
    assert lines - shown - MENTIONED.keys() == set(), "write them as blocks, which are run"
    assert MENTIONED.keys() <= lines


@pytest.mark.long
@pytest.mark.timeout(200)
def test_the_move_of_a_machine_is_shown() -> None:
    support.require_root()
    support.require_fuse()
    support.require_sshd()
    done = subprocess.run([CHECKOUT / "tools/demo", "move"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "integrity_check: ok" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert re.search(r"Nobody could write for\S* [0-9.]+ s", done.stdout)


@pytest.mark.skipif(os.environ.get("BLOCKCOPY_FRESH") != "1", reason="installs packages: run by tools/fresh")
@pytest.mark.timeout(900)
def test_install(tmp_path: Path) -> None:
    [text] = [block.text for block in blocks() if block.text.startswith("apt-get install -y pipx ")]
    script = f"cd {shlex.quote(str(CHECKOUT))}\napt-get update\n{text}\n/usr/local/bin/blockcopy doctor\n"
    done = subprocess.run(["sh", "-ec", script], input="y\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access("/usr/local/bin/mount.blockcopy", os.X_OK)
