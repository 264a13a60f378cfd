"""dm-clone for the guest's kernel, which lacks it: built once from Debian's source of that kernel, and kept."""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from debian import CACHE as MINIMAL
from debian import carry_settings, login_environment, minimal, run
from guests.cache import kept
from guests.image import RELEASE, Image

MAKEFILE = """
obj-m := dm-clone.o
dm-clone-y := dm-clone-target.o dm-clone-metadata.o
ccflags-y := -I$(src)
"""

SCRIPT = """
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends make gcc xz-utils linux-headers-$1 linux-source-${1%.0-*}
tar -xf /usr/src/linux-source-*.tar.xz -C /usr/src --strip-components=1 --wildcards '*/drivers/md'
cp /Makefile.clone /usr/src/drivers/md/Makefile
make -C /lib/modules/$1/build M=/usr/src/drivers/md modules
"""


@contextlib.contextmanager
def dm_clone(image: Image, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the Path of dm-clone.ko for the kernel of `image`. `say`: called with a line about a long wait."""
    version = kernel_version(image.kernel)

    def build(made: Path) -> None:
        say(f"building dm-clone for Linux {version}; this takes some minutes, once")
        with tempfile.TemporaryDirectory(prefix="build.", dir=made) as temporary:
            tree = Path(temporary) / "tree"
            run("cp", "-a", minimal(RELEASE, MINIMAL, say), tree)
            carry_settings(tree, "guest")
            (tree / "Makefile.clone").write_text(MAKEFILE)
            ours = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={tree}/proc", "chroot"]
            run(*ours, tree, "bash", "-c", SCRIPT, "bash", version, env=login_environment("root", Path("/root")))
            shutil.copy(tree / "usr/src/drivers/md/dm-clone.ko", made)

    with kept("dm-clone", f"{RELEASE} {version} {MAKEFILE} {SCRIPT}", build) as folder:
        yield folder / "dm-clone.ko"


def kernel_version(kernel: Path) -> str:
    """Return the version of the bzImage `kernel`, such as 6.1.0-50-amd64."""
    data = kernel.read_bytes()[:65536]
    (place,) = struct.unpack_from("<H", data, 0x20E)  # Documentation/arch/x86/boot.rst: kernel_version
    return data[place + 0x200 :].split(b"\0", 1)[0].split(b" ", 1)[0].decode()
