"""The image of the guest: a Debian with all that scenarios use, built once and kept in a cache.

The program is not in the image (see `carried`), so a commit costs no build. A change of this file, or of the
program's requirements, makes another image, and removes those that nobody uses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from checkout import CHECKOUT
from debian import CACHE as MINIMAL
from debian import ToolError, carry_settings, login_environment, minimal, run
from guests.cache import kept

RELEASE = "bookworm"
SIZE = 6 << 30
"""Bytes of the image. It is sparse."""

CARRIED = "/run/carried"
"""The folder in the guest with what the host gives it at each boot: `program`, and the scenario's `files`."""

PACKAGES = """
    busybox-static ca-certificates cpio dbus fuse3 kmod linux-image-amd64 python3 python3-venv
    systemd systemd-sysv udev

    btrfs-progs dmsetup e2fsprogs fio iproute2 lvm2 nbd-client openssh-client openssh-server
    procps psmisc qemu-utils sqlite3 xfsprogs
"""
"""Packages of the guest. Those below the empty line are for scenarios."""

BUILD_PACKAGES = "gcc pkg-config libfuse3-dev python3-dev"
"""pyfuse3 has no wheels."""

MODULES = "virtio_pci virtio_blk virtio_net virtio_rng virtio_console ext4 fuse 9p 9pnet_virtio"
"""Modules that the initial RAM disk loads. The guest's /lib/modules has all others of the kernel, for modprobe."""

ENTRY = """#!/opt/blockcopy/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""

INIT = f"""#!/bin/busybox sh
# Mount the root, bring along what the host carries in, and start init= of the command line.
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
for module in $(cat /modules); do insmod /lib/$module; done
init=/sbin/init mode=ro
for word in $(cat /proc/cmdline); do
    case $word in init=*) init=${{word#init=}} ;; rw) mode=rw ;; esac
done
until mount -t ext4 -o $mode /dev/vda /root 2>/tmp/why; do
    if [ -b /dev/vda ]; then cat /tmp/why; poweroff -f; fi
    usleep 20000
done
mount -t tmpfs -o mode=755,size=128m none /root/run     # systemd keeps a /run that is there, and never unmounts it
mkdir -p /root{CARRIED}
cp -a /carried/. /root{CARRIED}/
umount /proc /sys
mount --move /dev /root/dev
exec switch_root /root $init
"""

FILES = {
    "etc/hostname": "guest\n",
    "etc/hosts": "127.0.0.1 localhost guest\n",
    "etc/resolv.conf": "",
    "etc/fstab": "/dev/vda / ext4 defaults 0 0\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/systemd/network/ether.network": "[Match]\nType=ether\n[Network]\nDHCP=ipv4\n",
    "etc/systemd/journald.conf.d/guest.conf": "[Journal]\nStorage=volatile\nForwardToConsole=no\n",
    "etc/ssh/sshd_config.d/guest.conf": "UseDNS no\nPermitRootLogin prohibit-password\n",
}
MASKED = """
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
"""


class Image(NamedTuple):
    """A built image: the Paths of its files."""

    root: Path
    kernel: Path
    initrd: Path
    key: Path


def _requirements() -> list[str]:
    """Return the program's requirements for a mount, with all that makes it fast, as pip takes them."""
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [each for each in [*extras["fuse"], *extras["fast"]] if not each.startswith("blockcopy")]


@contextlib.contextmanager
def image(say: Callable[[str], None], *, again: bool = False) -> Iterator[Image]:
    """Yield the Image, built if the cache has none of today's recipe, or if `again`. The cache keeps it meanwhile.

    `say` is called with lines about a long wait. Raises ToolError if the image cannot be built.
    """

    def build(folder: Path) -> None:
        say("building the guest; this takes about four minutes, once")
        with tempfile.TemporaryDirectory(prefix="build.", dir=folder) as temporary:
            _build(Path(temporary), folder, say)

    recipe = "\n".join([Path(__file__).read_text(), *_requirements()])
    with kept(RELEASE, recipe, build, again=again) as folder:
        yield Image(*(folder / each for each in Image._fields))


def _build(folder: Path, made: Path, say: Callable[[str], None]) -> None:
    """Build the image in the folder `made`. `folder`: for other files."""
    tree = folder / "tree"
    run("cp", "-a", minimal(RELEASE, MINIMAL, say), tree)
    carry_settings(tree, "guest")
    say("installing packages")
    _install(tree)
    say("making the file system")
    _configure(tree, made / "key")
    _make_initrd(tree, folder / "initrd", made / "initrd")
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, made / "kernel")
    with (made / "root").open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", "-L", "root", "-d", tree, made / "root")


def _in(tree: Path, *words: object, **variables: str) -> str:
    """Run a program in the Debian at `tree`, with a /proc of its own. Returns its output."""
    ours = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={tree}/proc", "chroot", tree]
    return run(*ours, *words, env={**login_environment("root", Path("/root")), **variables})


def _install(tree: Path) -> None:
    """Install the packages, and the environment of the program."""
    (tree / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # no service starts here
    (tree / "usr/sbin/policy-rc.d").chmod(0o755)
    (tree / "etc/dpkg/dpkg.cfg.d/guest").write_text(
        "force-unsafe-io\nforce-confold\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/locale/*\n"
        "path-exclude=/usr/share/man/*\n"
    )
    apt = {"DEBIAN_FRONTEND": "noninteractive", "INITRD": "No"}
    _in(tree, "apt-get", "update", **apt)
    _in(
        tree,
        "apt-get",
        "install",
        "-y",
        "--no-install-recommends",
        *PACKAGES.split(),
        *BUILD_PACKAGES.split(),
        **apt,
    )
    _in(tree, "python3", "-m", "venv", "/opt/blockcopy")
    _in(tree, "/opt/blockcopy/bin/pip", "install", "--quiet", "--no-cache-dir", *_requirements())
    _in(tree, "apt-get", "purge", "-y", "--autoremove", *BUILD_PACKAGES.split(), **apt)
    _in(tree, "apt-get", "clean")
    shutil.rmtree(tree / "var/lib/apt/lists")
    (tree / "usr/sbin/policy-rc.d").unlink()


def _configure(tree: Path, key: Path) -> None:
    """Write the settings of the guest, and the entry points of the program. `key`: a new key of ssh for root."""
    for name, text in FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, entry in scripts.items():
        module, _, function = entry.partition(":")
        path = tree / "opt/blockcopy/bin" / name
        path.write_text(ENTRY.format(module=module, function=function))
        path.chmod(0o755)
        for folder in ("bin", "sbin"):  # mount(8) looks in sbin
            (tree / "usr/local" / folder / name).symlink_to(f"/opt/blockcopy/bin/{name}")
    (packages,) = (tree / "opt/blockcopy/lib").glob("python3*/site-packages")
    (packages / "program.pth").write_text(f"{CARRIED}/program\n{CARRIED}/program/fuse\n")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tools/vm", "-f", key)
    folder = tree / "root/.ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(f"{key}.pub", folder / "authorized_keys")
    _in(tree, "systemctl", "enable", "systemd-networkd", "ssh")
    _in(tree, "systemctl", "mask", *MASKED.split())
    _in(tree, "ssh-keygen", "-A")


def _make_initrd(tree: Path, folder: Path, file: Path) -> None:
    """Make the initial RAM disk `file`, in `folder`: busybox, MODULES and INIT."""
    for name in ("bin", "proc", "sys", "dev", "root", "tmp", "lib", "carried"):
        (folder / name).mkdir(parents=True)
    shutil.copy(tree / "bin/busybox", folder / "bin/busybox")
    (version,) = (each.name for each in (tree / "lib/modules").iterdir())
    names: dict[str, None] = {}  # in the order of dependency
    for each in MODULES.split():
        for line in _in(tree, "modprobe", "--show-depends", "-S", version, each).splitlines():
            kind, _, path = line.partition(" ")
            if kind == "insmod":
                names[Path(path.strip()).name] = None
                shutil.copy(tree / path.strip().lstrip("/"), folder / "lib")
    (folder / "modules").write_text("\n".join(names))
    (folder / "init").write_text(INIT)
    (folder / "init").chmod(0o755)
    pack(folder, file)


def pack(folder: Path, file: Path) -> None:
    """Pack `folder` into `file` as an archive that the kernel unpacks at boot."""
    names = "\n".join(sorted(str(each.relative_to(folder)) for each in folder.rglob("*")))
    command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0", f"--file={file}"]
    try:
        subprocess.run(command, input=names, text=True, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        raise ToolError("cpio is not installed here: apt-get install cpio") from None
    except subprocess.CalledProcessError as error:
        raise ToolError(f"cpio: {error.stderr}") from error


def compile_for_guest(image: Image, folder: Path) -> None:
    """Compile the Python files below `folder`, which the guest has at CARRIED/program, with the guest's Python."""
    script = 'mount -o loop,ro,noload "$1" /mnt && mount --bind "$2" /mnt/mnt && exec chroot /mnt "${@:3}"'
    words = ["/opt/blockcopy/bin/python3", "-m", "compileall", "-q", "-s", "/mnt", "-p", f"{CARRIED}/program"]
    words += ["--invalidation-mode", "unchecked-hash", "/mnt"]
    run("unshare", "--mount", "bash", "-c", script, "bash", image.root, folder, *words, env=dict(os.environ))
