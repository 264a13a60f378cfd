from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import trio

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.errors import SourceError
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.size_search import SizeSearch
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

SIZES = [0, 1, 2, 511, 512, 513, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 77_777, 9_999_999]

GUESSES = {
    "right": lambda size: size,
    "one too small": lambda size: size - 1,
    "one too large": lambda size: size + 1,
    "half": lambda size: size // 2,
    "a sector more": lambda size: size + 512,
    "far too large": lambda size: size * 1000 + 12345,
    "none": lambda size: 0,
}


PROGRAMS = ["ours", "stand-in", "original"]


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str | None:
    """Return the --blockcopy-path of each `retrieve`."""
    if request.param == "original":
        return shlex.join(request.getfixturevalue("original"))
    return support.QUEUEING if request.param == "stand-in" else None


@contextlib.contextmanager
def sparse_file(size: int, folder: Path) -> Iterator[Path]:
    """Make a sparse file in `folder`, or in memory if the file system of `folder` has no files of that `size`."""
    for each in (folder, Path("/dev/shm")):
        if os.access(each, os.W_OK):
            with tempfile.NamedTemporaryFile(dir=each) as file, contextlib.suppress(OSError):
                os.truncate(file.name, size)
                yield Path(file.name)
                return
    pytest.skip(f"no file system here has files of {size} bytes")


def find(path: object, guesses: list[int], program: str | None) -> list[int]:
    """Return the size that is found from each guess, one after the other."""
    command = stage_command(Location(None, str(path)), program=program)
    found = []

    async def main() -> None:
        connected: list[Client] = []
        async with trio.open_nursery() as nursery:

            async def connect() -> Client:
                retriever = Client(command, None)
                await nursery.start(retriever.run)
                connected.append(retriever)
                return retriever

            try:
                retriever = await connect()
                with trio.fail_after(50):
                    for guess in guesses:
                        search = SizeSearch(retriever, connect)
                        found.append(await search.find(guess))
                        retriever = search.client
                        assert retriever.failure is None
            finally:
                with trio.CancelScope(shield=True):
                    for each in connected:
                        await each.close()

    trio.run(main)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_size_of_a_file_whatever_was_guessed(size: int, program: str | None, tmp_path: Path) -> None:
    with sparse_file(size, tmp_path) as path:
        guesses = [max(0, guess(size)) for guess in GUESSES.values()]
        assert find(path, guesses, program) == [size] * len(guesses)


@pytest.mark.parametrize(
    ("size", "program", "guess"),
    support.pairwise([2**40 + 12345, 20 * 2**40, 20 * 2**40 + 1], PROGRAMS, ["none", "right"]),
    indirect=["program"],
)
def test_size_of_a_huge_sparse_file(size: int, guess: str, program: str | None, tmp_path: Path) -> None:
    with sparse_file(size, tmp_path) as path:
        assert find(path, [GUESSES[guess](size)], program) == [size]


@pytest.mark.parametrize(("sectors", "guess"), [(1, "none"), (3, "half"), (8191, "right"), (257, "a sector more")])
def test_size_of_a_block_device(
    sectors: int, guess: str, program: str | None, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    size = sectors * 512
    image = tmp_path / "image"
    image.write_bytes(support.noise(size))
    assert find(loop_device(image), [GUESSES[guess](size)], program) == [size]


@pytest.mark.long
@pytest.mark.parametrize("guess", ["right", "one too small", "one too large", "far too large"])
def test_size_of_a_block_device_that_the_process_dies_at_the_end_of(
    guess: str, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    size = 40 * 512
    image = tmp_path / "image"
    image.write_bytes(support.noise(size))
    assert find(loop_device(image), [GUESSES[guess](size)], support.QUEUEING) == [size]


@pytest.mark.long
def test_size_of_a_huge_block_device(tmp_path: Path, loop_device: Callable[[Path], str]) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 2**40 + 512)
    assert find(loop_device(image), [2**40], support.QUEUEING) == [2**40 + 512]


@pytest.mark.parametrize(("answer", "guess"), [(1, "right"), (2, "right"), (3, "half"), (4, "one too large")])
def test_a_source_that_dies_of_anything_has_its_right_size_or_none(answer: int, guess: str, tmp_path: Path) -> None:
    """Each process dies at its Nth answer, so a death tells nothing about the end."""
    size = 12
    with sparse_file(size, tmp_path) as path:
        found = []
        with contextlib.suppress(ExceptionGroup):
            found = find(path, [GUESSES[guess](size)], f"{support.QUEUEING} --die-at {answer}")
        assert found in ([], [size])
        assert answer > 1 or not found


@pytest.mark.parametrize("program", ["false", "true", "/no/such/program", f"{support.QUEUEING} --die-at 1"])
def test_a_source_that_always_dies_has_no_size(program: str, tmp_path: Path) -> None:
    with sparse_file(100_000, tmp_path) as path, pytest.raises(ExceptionGroup) as caught:
        find(path, [100_000], program)
    assert caught.group_contains(SourceError)


@pytest.mark.parametrize("fault", ["garble", "misplace", "oversize", "short"])
@pytest.mark.parametrize("answer", [1, 2])
def test_a_source_that_lies_has_its_right_size_or_none(fault: str, answer: int, tmp_path: Path) -> None:
    size = 12
    with sparse_file(size, tmp_path) as path:
        found = []
        with contextlib.suppress(ExceptionGroup):
            found = find(path, [size // 2], f"{support.QUEUEING} --{fault}-at {answer}")
        assert found in ([], [size])


def test_a_file_too_large_for_the_seek_of_the_process_kills_it_and_is_found(tmp_path: Path) -> None:
    """A search that goes beyond what the file system can address is no end of the source."""
    with sparse_file(5 * 2**40 + 777, tmp_path) as path:
        assert find(path, [0], support.QUEUEING) == [5 * 2**40 + 777]


class Model:
    """A process of the original program: what it answers for a source with bytes that it cannot read."""

    def __init__(self, size: int, bad: range, *, is_device: bool) -> None:
        self._size = size
        self._bad = bad
        self._is_device = is_device
        self.unanswered: object = None

    async def reaches(self, positions: list[int]) -> list[bool]:
        await trio.lowlevel.checkpoint()
        if any(each in self._bad or (self._is_device and each > self._size) for each in positions):
            self.unanswered = positions
            raise SourceError("it exited")
        return [each < self._size for each in positions]


BAD_PAGES = {
    "none": lambda size: range(0),
    "first": lambda size: range(4096),
    "first block": lambda size: range(BLOCK_SIZE),
    "last": lambda size: range(size - 1 & -4096, size),
    "middle": lambda size: range(size // 2 & -4096, (size // 2 & -4096) + 4096),
}


@pytest.mark.parametrize(
    ("guess", "bad", "tail", "is_device"),
    support.pairwise(GUESSES, BAD_PAGES, [0, 512, 777, 3 * 4096], [True, False]),
)
def test_bytes_that_cannot_be_read_lead_to_no_wrong_size(tail: int, is_device: bool, guess: str, bad: str) -> None:
    size = 20 * BLOCK_SIZE + (tail & -512 if is_device else tail)
    exits = 0

    async def connect() -> Any:
        nonlocal exits
        exits += 1
        return Model(size, BAD_PAGES[bad](size), is_device=is_device)

    async def main() -> int:
        return await SizeSearch(await connect(), connect).find(GUESSES[guess](size))

    if bad in ("none", "first", "first block") or guess == "right" or (bad == "last" and is_device):
        assert trio.run(main) == size
    else:
        with contextlib.suppress(SourceError):
            assert trio.run(main) == size
    assert exits < 60
