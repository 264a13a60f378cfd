"""The model of a writable mount: what each page of 4 KiB may be. Thread-safe.

Of each page the model knows the bytes that a read must return, the version that is surely durable, and all versions
since. A page is in doubt after a crash, or after a write that failed: it may be any of these. The first read of all
of the page decides. After a crash it also decides for good: the page may not change again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from campaign.ground import WrongError

PAGE = 4096


def digest(data: bytes) -> bytes:
    """Return a digest of a page."""
    return hashlib.blake2b(data, digest_size=12).digest()


class Pages:
    """The pages of a mount of a source with the bytes `content`."""

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)
        self._durable: dict[int, bytes] = {}  # digests, of pages with versions below
        self._later: dict[int, list[tuple[bytes, int]]] = {}  # digest, number of the write
        self._returned: dict[int, int] = {}  # number of a write → number of the writes that returned before
        self._writes = 0
        self._busy: set[int] = set()
        self._changes: Counter[int] = Counter()  # writes by page
        self._crashed: set[int] = set()
        self._failed: set[int] = set()
        self._lost: set[int] = set()  # crashed after a failed sync: a read may be refused until it is written anew
        self._lock = threading.RLock()
        self.size = len(content)
        self.has_writes = False
        """Whether a write has been acknowledged."""

    def touched(self, offset: int, length: int) -> range:
        """Return the pages of `length` bytes at `offset`."""
        return range(offset // PAGE, -(-(offset + length) // PAGE))

    def _page(self, page: int) -> bytes:
        return bytes(self._content[page * PAGE : (page + 1) * PAGE])

    def _parts(self, offset: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield the parts of `data` at `offset` by pages: the page, the offset in the page, and the bytes."""
        at = 0
        while at < len(data):
            page, start = divmod(offset + at, PAGE)
            part = data[at : at + PAGE - start]
            yield page, start, part
            at += len(part)

    def doubtful_edge(self, offset: int, length: int) -> int | None:
        """Return a page in doubt that `length` bytes at `offset` cover in part, or None if there is none."""
        with self._lock:
            for page in {offset // PAGE, (offset + length - 1) // PAGE}:
                is_whole = offset <= page * PAGE and min(self.size, (page + 1) * PAGE) <= offset + length
                if not is_whole and page in self._crashed | self._failed:
                    return page
            return None

    @property
    def doubtful(self) -> set[int]:
        """The pages in doubt after a crash."""
        with self._lock:
            return set(self._crashed)

    def begin_write(self, offset: int, data: bytes) -> int | None:
        """Note that `data` is being written at `offset`. Returns a number, or None if another write is there."""
        with self._lock:
            pages = self.touched(offset, len(data))
            if not self._busy.isdisjoint(pages) or self.doubtful_edge(offset, len(data)) is not None:
                return None
            self._busy.update(pages)
            self._writes += 1
            for page, start, part in self._parts(offset, data):
                old = self._page(page)
                new = old[:start] + part + old[start + len(part) :]
                self._durable.setdefault(page, digest(old))
                self._later.setdefault(page, []).append((digest(new), self._writes))
                self._changes[page] += 1
            return self._writes

    def end_write(self, number: int, offset: int, data: bytes, written: int, *, durable: bool) -> None:
        """Note that the write `number` of `data` at `offset` has ended, and has `written` so many bytes.

        `durable`: the write is flushed too.
        """
        with self._lock:
            self._returned[number] = len(self._returned)
            self.has_writes = self.has_writes or written > 0
            for page, start, part in self._parts(offset, data):
                self._busy.discard(page)
                if page * PAGE + start + len(part) > offset + written:
                    self._failed.add(page)
                    continue
                at = page * PAGE + start
                self._content[at : at + len(part)] = part
                self._failed.discard(page)
                self._crashed.discard(page)
                self._lost.discard(page)
                if durable:
                    self._settle(page)

    def _settle(self, page: int) -> None:
        self._later.pop(page, None)
        self._durable.pop(page, None)

    def flush_began(self) -> int:
        """Return a number for `flushed`."""
        with self._lock:
            return len(self._returned)

    def flushed(self, began: int) -> None:
        """Note that a flush was acknowledged that `began` then: writes that had returned before are durable."""
        with self._lock:
            for page, versions in list(self._later.items()):
                covered = [
                    at for at, (_, number) in enumerate(versions) if self._returned.get(number, began) < began
                ]
                if not covered or page in self._failed | self._crashed:
                    continue
                self._durable[page] = versions[covered[-1]][0]
                self._later[page] = versions[covered[-1] + 1 :]
                if not self._later[page]:
                    self._settle(page)

    def unmounted(self) -> None:
        """Note that the mount has ended in order: all writes are durable. None is in progress."""
        self.flushed(self.flush_began())

    def crashed(self, *, after_failed_sync: bool) -> None:
        """Note that the mount was killed, perhaps after a failed sync. No write is in progress."""
        with self._lock:
            self._crashed.update(self._later)
            if after_failed_sync:
                self._lost.update(self._later)
            self._failed -= self._crashed

    def reading(self, offset: int, length: int) -> Callable[..., str | None]:
        """Return a function that takes the bytes of a read that begins now, and returns what is wrong with them."""
        with self._lock:
            pages = self.touched(offset, length)
            before = {page: self._changes[page] for page in pages if page not in self._busy}

        def check(data: bytes, *, but_lost: bool = False) -> str | None:
            with self._lock:
                for page, start, part in self._parts(offset, data):
                    is_still = before.get(page) == self._changes[page] and page not in self._busy
                    if (
                        is_still
                        and not (but_lost and page in self._lost)
                        and (wrong := self._check(page, start, part))
                    ):
                        return wrong
            return None

        return check

    def _check(self, page: int, start: int, part: bytes) -> str | None:
        known = self._page(page)
        if page not in self._crashed and page not in self._failed:
            return None if known[start : start + len(part)] == part else self._wrong(page, part)
        if len(part) < len(known):
            return None
        found = digest(part)
        if found not in {self._durable[page], *(each for each, _ in self._later[page])}:
            return self._wrong(page, part)
        self._content[page * PAGE : page * PAGE + len(part)] = part
        if page in self._crashed:
            self._settle(page)
        else:  # a version of the past is the latest one now
            self._writes += 1
            self._later[page].append((found, self._writes))
            self._returned[self._writes] = len(self._returned)
        self._crashed.discard(page)
        self._failed.discard(page)
        self._lost.discard(page)
        return None

    def _wrong(self, page: int, part: bytes) -> str:
        versions = len(self._later.get(page, ()))
        kind = "crashed" if page in self._crashed else "failed" if page in self._failed else "known"
        known = [self._durable.get(page), *(each for each, _ in self._later.get(page, ()))]
        which = f"version {known.index(digest(part))}" if digest(part) in known else part[:16].hex()
        return f"page {page} ({kind}, {versions} unflushed versions) is {which}, not {self._page(page)[:16].hex()}"

    def check_all(self, path: str) -> None:
        """Compare the file at `path` with the model. Nothing is being written. Raises WrongError if it is wrong.

        A page that a failed sync may have lost is left out: the mount refuses to read it.
        """
        with open(path, "rb") as file:
            for offset in range(0, self.size, PAGE * 256):
                length = min(PAGE * 256, self.size - offset)
                data = file.read(length)
                if len(data) != length:
                    raise WrongError(f"{path} ends at {offset + len(data)}")
                if wrong := self.reading(offset, length)(data, but_lost=True):
                    raise WrongError(f"{path}: {wrong}")
