"""A service that writes to disks until it is stopped, and a journal of what it wrote.

    python3 service.py start NAME FOLDER WHERE FILE...    python3 service.py stop NAME FOLDER
    python3 service.py boot FOLDER                         starts what was started, and never stopped

Each write is one page of 4 KiB. The journal has a line before each write, and one after the sync that followed.
So a page holds what was synced last, or what was written later. Standard library only: it runs on any machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

PAGE = 4096
HOT_PAGES = 24
"""Pages of each disk that the service writes, again and again."""

ON_MOUNTS = "new"
"""Where a service is started that writes to mounts."""

PAUSE = 0.02
SECONDS = 20
SYNC_EVERY = 8


def page(name: str, where: str, number: int) -> bytes:
    """Return the page that the service `name` writes at `where` as its write `number`."""
    return hashlib.blake2b(f"{name} {where} {number}".encode()).digest() * (PAGE // 64)


def hot_pages(name: str, file: int, size: int) -> list[int]:
    """Return the pages that the service `name` writes to its disk `file`, which has `size` bytes."""
    return random.Random(f"{name} {file}").sample(range(size // PAGE), HOT_PAGES)


def _serve(name: str, folder: Path, where: str, files: list[str]) -> None:
    ended = False

    def end(_number: int, _frame: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    fds = [os.open(each, os.O_RDWR) for each in files]
    pages = [hot_pages(name, at, os.lseek(fd, 0, os.SEEK_END)) for at, fd in enumerate(fds)]
    number = sum(1 for each in read(folder, name) if each[0] == "write")
    with (folder / f"{name}.journal").open("a", buffering=1) as journal:
        (folder / f"{name}.pid").write_text(str(os.getpid()))
        choose = random.Random(number)
        while not ended:
            number += 1
            at = choose.randrange(len(fds))
            where_to = choose.choice(pages[at])
            journal.write(json.dumps(["write", where, number, at, where_to]) + "\n")
            os.pwrite(fds[at], page(name, where, number), where_to * PAGE)
            if number % SYNC_EVERY == 0 or ended:
                _sync(fds, journal, number)
            time.sleep(PAUSE)
        _sync(fds, journal, number)
    (folder / f"{name}.pid").unlink()


def _sync(fds: Iterable[int], journal: object, number: int) -> None:
    for fd in fds:
        os.fsync(fd)
    journal.write(json.dumps(["synced", number]) + "\n")  # type: ignore[attr-defined]


def read(folder: Path, name: str) -> list[list[object]]:
    """Return the journal of the service `name` in `folder`, as lists. Leaves out a last line that is cut short."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / f"{name}.journal").read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _pid(folder: Path, name: str) -> int | None:
    """Return the process id of the service `name`, if it runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / f"{name}.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"serve" in words and name.encode() in words:
            return pid
    return None


def _until(condition: object, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {SECONDS} seconds")
        time.sleep(0.02)


def start(name: str, folder: Path, where: str, files: list[str]) -> None:
    """Start the service, unless it runs, and note that it starts at each boot."""
    (folder / f"{name}.enabled").write_text(json.dumps([where, files]))
    if _pid(folder, name) is None:
        with (folder / f"{name}.log").open("ab") as log:
            words = [sys.executable, __file__, "serve", name, str(folder), where, *files]
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    with (folder / f"{name}.starts").open("a") as file:
        file.write(where + "\n")
    _until(lambda: _pid(folder, name) is not None, f"the start of {name}")


def stop(name: str, folder: Path) -> None:
    """Stop the service, if it runs, and note that it does not start again by itself."""
    with contextlib.suppress(FileNotFoundError):
        (folder / f"{name}.enabled").unlink()
    pid = _pid(folder, name)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        _until(lambda: not Path(f"/proc/{pid}").exists() or _pid(folder, name) is None, f"the end of {name}")


def boot(folder: Path) -> None:
    """Start all services that were started and never stopped, but for those on mounts: these are not there yet."""
    for each in folder.glob("*.enabled"):
        where, files = json.loads(each.read_text())
        if where != ON_MOUNTS:
            start(each.stem, folder, where, files)


def main() -> None:
    """Run the action that the command line names."""
    action, *words = sys.argv[1:]
    if action == "boot":
        boot(Path(words[0]))
        return
    name, folder = words[0], Path(words[1])
    folder.mkdir(parents=True, exist_ok=True)
    if action == "stop":
        stop(name, folder)
    elif action == "start":
        start(name, folder, words[2], words[3:])
    elif action == "serve":
        _serve(name, folder, words[2], words[3:])


if __name__ == "__main__":
    main()
