"""Folders that take long to make: made once, kept in a cache, removed when nobody uses their recipe any more."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CACHE = Path("/var/cache/blockcopy-vm")
UNUSED_SECONDS = 24 * 60 * 60
"""How long a folder is kept that nobody uses: two checkouts in turn may have two recipes."""


@contextlib.contextmanager
def kept(kind: str, recipe: str, make: Callable[[Path], None], *, again: bool = False) -> Iterator[Path]:
    """Yield the folder of the kind `kind` that was made by `recipe`. The cache keeps it meanwhile.

    If there is none, or if `again`, calls `make` with a new folder to fill. Then it removes those of other recipes
    that nobody uses.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with Path(f"{folder}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for whoever makes it, not for who uses it
        if again or not folder.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if again or not folder.exists():  # another run may have made it
                _make(folder, make)
                _remove_unused(kind)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock.fileno())
        yield folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.made.", dir=CACHE) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        make(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _remove_unused(kind: str) -> None:
    """Remove the folders of other recipes and of killed runs that nobody has used for UNUSED_SECONDS."""
    for path in CACHE.glob(f"{kind}-*.lock"):
        if time.time() - path.stat().st_mtime < UNUSED_SECONDS:
            continue
        with path.open("a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for each in (path.with_suffix(""), *CACHE.glob(f"{path.stem}.made.*")):
                shutil.rmtree(each, ignore_errors=True)
            path.unlink()
