"""Modules for the guest's kernel that Debian has as source only: each is built on the host once, and kept."""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from debian import CACHE as MINIMAL
from debian import carry_settings, login_environment, minimal, run
from guests.cache import kept
from guests.image import RELEASE, Image

DM_CLONE = """
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends make gcc xz-utils linux-headers-$1 linux-source-${1%.0-*}
tar -xf /usr/src/linux-source-*.tar.xz -C /usr/src --strip-components=1 --wildcards '*/drivers/md'
cat >/usr/src/drivers/md/Makefile <<'END'
obj-m := dm-clone.o
dm-clone-y := dm-clone-target.o dm-clone-metadata.o
ccflags-y := -I$(src)
END
make -C /lib/modules/$1/build M=/usr/src/drivers/md modules
mv /usr/src/drivers/md/dm-clone.ko /
"""

# The package of the modules is only unpacked: its installation would build them for the kernel of the host.
ZFS = """
set -e
export DEBIAN_FRONTEND=noninteractive
sed -i 's/ main$/ main contrib/' /etc/apt/sources.list
apt-get update
apt-get install -y --no-install-recommends linux-headers-$1 dkms make gcc libc6-dev file zfsutils-linux
cd /root
apt-get download zfs-dkms
dpkg -x zfs-dkms_*.deb /
source=$(echo /usr/src/zfs-*)
dkms build -m zfs -v ${source#*zfs-} -k $1
mkdir -p /lib/modules/zfs
find /var/lib/dkms/zfs -name '*.ko' -exec mv -t /lib/modules/zfs {} +
strip -g /lib/modules/zfs/*.ko
for package in zfsutils-linux libzfs4linux libzpool5linux libnvpair3linux libuutil3linux; do
    dpkg -L $package
done | while read -r each; do
    case $each in /usr/share/* | /etc/* | */systemd/*) continue ;; esac
    [ -d $each ] || echo ${each#/}
done >files
tar --create --file /zfs.tar --directory / --files-from /root/files lib/modules/zfs
"""


def dm_clone(image: Image, say: Callable[[str], None]) -> AbstractContextManager[Path]:
    """Yield the Path of dm-clone.ko for the kernel of `image`. `say`: called with a line about a long wait."""
    return _built("dm-clone", DM_CLONE, "dm-clone.ko", image, say)


def zfs(image: Image, say: Callable[[str], None]) -> AbstractContextManager[Path]:
    """Yield the Path of an archive of ZFS for the root of a guest. `say`: called with a line about a long wait.

    The archive has Debian's programs and libraries, and the modules in lib/modules/zfs.
    """
    return _built("zfs", ZFS, "zfs.tar", image, say)


@contextlib.contextmanager
def _built(kind: str, script: str, name: str, image: Image, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the file `name` that `script` leaves in / of a Debian. `kind`: what the file is, in the cache."""
    version = kernel_version(image.kernel)

    def build(made: Path) -> None:
        say(f"building {kind} for Linux {version}; this takes some minutes, once")
        with tempfile.TemporaryDirectory(prefix="build.", dir=made) as temporary:
            tree = Path(temporary) / "tree"
            run("cp", "-a", minimal(RELEASE, MINIMAL, say), tree)
            carry_settings(tree, "guest")
            ours = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={tree}/proc", "chroot"]
            run(*ours, tree, "bash", "-c", script, "bash", version, env=login_environment("root", Path("/root")))
            shutil.copy(tree / name, made)

    with kept(kind, f"{RELEASE} {version} {script}", build) as folder:
        yield folder / name


def kernel_version(kernel: Path) -> str:
    """Return the version of the bzImage `kernel`, such as 6.1.0-50-amd64."""
    data = kernel.read_bytes()[:65536]
    (place,) = struct.unpack_from("<H", data, 0x20E)  # Documentation/arch/x86/boot.rst: kernel_version
    return data[place + 0x200 :].split(b"\0", 1)[0].split(b" ", 1)[0].decode()
