"""All three stages together; the golden streams; every pairing with the original program; every Python.

The original sends `rest` blocks before hashed ones that are still in its queue, and in pieces of the size
of the last `Hash`; ours sends all in the order asked, in whole blocks. Where a case has such a `rest`, the
streams differ on purpose and the destinations are what is compared.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import pytest
from forkserver import Forked
from support import (
    BLOCKCOPY,
    PATIENCE,
    SERVERS,
    FedDecoder,
    failed,
    noise,
    run,
    succeeded,
    with_changes,
)

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.protocol import zstd
from blockcopy.protocol.digests import speeds
from blockcopy.protocol.wire import BLOCK_STREAM, XzData, encode
from blockcopy.protocol.xz import expand

GOLDEN = Path(__file__).resolve().parent / "golden"
CHECKOUT = Path(__file__).resolve().parent.parent
B = BLOCK_SIZE


@cache
def pattern(size: int) -> bytes:
    """Every block another one, and each small when compressed."""
    blocks = (hashlib.sha3_256(b"%d" % block).digest() * (B // 32) for block in range(-(-size // B)))
    return b"".join(blocks)[:size]


class Case(NamedTuple):
    source: bytes
    destination: bytes
    start: int = 0
    end: int | None = None
    lzma: bool = False
    pipe: bool = False
    more: tuple[str, str] = ("", "")
    """Options of `checksum` and `retrieve` that the original has not."""

    @property
    def checksum_options(self) -> list[str]:
        end = [] if self.end is None else ["--end", str(self.end)]
        return ([f"--start={self.start}"] if self.start else []) + end + [each for each in self.more[:1] if each]

    @property
    def retrieve_options(self) -> list[str]:
        return (["--lzma"] if self.lzma else []) + [each for each in self.more[1:] if each]

    @property
    def result(self) -> bytes:
        """What the destination is to become: the source in the part that was asked for, else as before."""
        stop = self.end
        if stop is None:
            stop = len(self.destination) if self.pipe else len(self.source)
        part = self.source[self.start : stop]
        return self.destination[: self.start] + part + self.destination[self.start + len(part) :]


RANDOM = noise(20 * B + 777)
CHANGED = with_changes(RANDOM, [7])  # 1 of 21 is 5 %
ALL_CHANGED = with_changes(RANDOM, list(range(21)))
SPARSE = RANDOM[: 3 * B] + bytes(9 * B) + RANDOM[:55]

CASES = {
    "equal": Case(RANDOM, RANDOM),
    "5 % different": Case(RANDOM, CHANGED),
    "all different": Case(RANDOM, ALL_CHANGED),
    "empty destination": Case(RANDOM, b""),
    "shorter destination": Case(RANDOM, CHANGED[: 9 * B]),
    "shorter by a part of a block": Case(RANDOM, CHANGED[: 19 * B + 100]),
    "longer destination": Case(RANDOM, CHANGED + noise(2 * B + 9, 2)),
    "longer in the last block": Case(RANDOM, CHANGED + b"tail"),
    "whole blocks": Case(RANDOM[: 4 * B], CHANGED[: 2 * B] + bytes(2 * B)),
    "sparse source": Case(SPARSE, RANDOM[: len(SPARSE)]),
    "sparse destination": Case(SPARSE, bytes(12 * B + 55)),
    "0 bytes": Case(b"", b""),
    "0 bytes of source": Case(b"", b"abc"),
    "1 byte": Case(b"x", b"y"),
    "1 byte to 0": Case(b"x", b""),
    "start": Case(RANDOM, ALL_CHANGED, start=3 * B + 5),
    "start of a shorter one": Case(RANDOM, ALL_CHANGED[: 9 * B], start=2 * B),
    "end": Case(RANDOM, ALL_CHANGED, end=5 * B + 1),
    "start and end": Case(RANDOM, ALL_CHANGED, start=1000, end=50_000),
    "start and end beyond the source": Case(RANDOM[: 3 * B], ALL_CHANGED, start=B, end=5 * B),
    "lzma": Case(pattern(5 * B) + RANDOM[:999], bytes(5 * B + 999), lzma=True),
    "lzma of what cannot be compressed": Case(RANDOM, ALL_CHANGED, lzma=True),
    "lzma to an empty destination": Case(SPARSE, b"", lzma=True),
    "lzma from a pipe": Case(SPARSE, bytes(12 * B + 55), lzma=True, pipe=True),
    "from a pipe": Case(RANDOM, CHANGED, pipe=True),
    "from a pipe of a shorter one": Case(RANDOM, CHANGED[: 9 * B + 100], pipe=True),
    "from an empty pipe": Case(RANDOM, b"", pipe=True),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def write_sparse(path: Path, data: bytes) -> None:
    """Blocks of zeros become holes."""
    with path.open("wb") as file:
        for at in range(0, len(data), B):
            if any(data[at : at + B]):
                file.seek(at)
                file.write(data[at : at + B])
        file.truncate(len(data))


# Ours


def stages(case: Case, source: object, destination: object) -> list[list[str]]:
    """Return the arguments of `checksum | retrieve | save`. With `case.pipe`, `checksum` reads standard input."""
    return [
        ["checksum", "-" if case.pipe else str(destination), *case.checksum_options],
        ["retrieve", str(source), *case.retrieve_options],
        ["save", str(destination)],
    ]


def copy(case: Case, source: object, destination: object) -> None:
    """As in a shell: `checksum | retrieve | save`, or `cat | checksum - | …`. Each is a fork, see `forkserver`."""
    running: list[Forked] = []
    with TemporaryFile() as said, ExitStack() as stack:
        stdin = os.open(os.devnull if not case.pipe else destination, os.O_RDONLY)
        if case.pipe:
            cat = stack.enter_context(subprocess.Popen(["cat"], stdin=stdin, stdout=subprocess.PIPE))
            os.close(stdin)
            stdin = os.dup(cat.stdout.fileno())
            cat.stdout.close()
        for number, words in enumerate(stages(case, source, destination)):
            reader, stdout = os.pipe() if number < 2 else (-1, os.dup(said.fileno()))
            running.append(stack.enter_context(SERVERS[0].start(words, (stdin, stdout, said.fileno()))))
            os.close(stdin)
            os.close(stdout)
            stdin = reader
        statuses = [process.wait(PATIENCE) for process in reversed(running)]
        said.seek(0)
        assert (statuses, said.read()) == ([0, 0, 0], b"")


def test_the_three_stages_make_a_copy(tmp_path: Path, case: Case) -> None:
    write_sparse(tmp_path / "source", case.source)
    write_sparse(tmp_path / "destination", case.destination)
    copy(case, tmp_path / "source", tmp_path / "destination")
    assert (tmp_path / "destination").read_bytes() == case.result
    assert (tmp_path / "source").read_bytes() == case.source


DIGESTS = sorted(speeds())
COMPRESSIONS = ["", "--compress=zstd", "--lzma"]
SHAPES = [
    *("shorter by a part of a block", "longer in the last block", "sparse source", "sparse destination"),
    "from a pipe",
]
"""Cases that each look different in the extended form: runs, zeros, holes, rests. The others run once."""


@pytest.mark.parametrize(
    ("name", "digest", "compression"),
    [
        *(
            (name, digest, compression)
            for (name, compression), digest in zip(
                itertools.product(SHAPES, COMPRESSIONS), cycle(DIGESTS), strict=False
            )
        ),
        *zip([name for name in CASES if name not in SHAPES], cycle(DIGESTS), cycle(COMPRESSIONS), strict=False),
    ],
)
def test_the_three_stages_make_a_copy_in_the_extended_form(
    tmp_path: Path, name: str, digest: str, compression: str
) -> None:
    if compression == "--compress=zstd" and not zstd.available():
        pytest.skip("this host has no zstd")
    case = CASES[name]._replace(lzma=False, more=(f"--digest={digest}", compression))
    write_sparse(tmp_path / "source", case.source)
    write_sparse(tmp_path / "destination", case.destination)
    copy(case, tmp_path / "source", tmp_path / "destination")
    assert (tmp_path / "destination").read_bytes() == case.result
    assert (tmp_path / "source").read_bytes() == case.source


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("more", [0, 3 * B], ids=["same size", "longer destination"])
def test_the_three_stages_copy_devices(
    tmp_path: Path, loop_device: Callable[[Path], str], compress: bool, more: int
) -> None:
    source = SPARSE[: 12 * B] + RANDOM[:512]
    case = Case(source, with_changes(source, [1, 11]) + noise(more), lzma=compress)
    (tmp_path / "source").write_bytes(case.source)
    (tmp_path / "destination").write_bytes(case.destination)
    devices = [loop_device(tmp_path / name) for name in ("source", "destination")]
    copy(case, *devices)
    with open(devices[1], "rb") as destination:
        assert destination.read() == case.result


# Golden streams


GOLDEN_CASES = {
    "equal": Case(pattern(20 * B + 777), pattern(20 * B + 777)),
    "different": Case(pattern(20 * B + 777), with_changes(pattern(20 * B + 777), [0, 7, 19, 20])),
    "rest-after-whole-blocks": Case(pattern(40 * B + 5), pattern(32 * B)),
    "longer-destination": Case(pattern(3 * B + 100), with_changes(pattern(5 * B + 9), [1])),
    "start-end": Case(pattern(9 * B), with_changes(pattern(9 * B), [1, 2, 3]), start=1000, end=3 * B + 9),
    "zero-bytes-of-source": Case(b"", b"abc"),
    "one-byte": Case(b"x", b"y"),
    "from-a-pipe": Case(pattern(9 * B), with_changes(pattern(8 * B + 5), [8]), pipe=True),
    "from-an-empty-pipe": Case(pattern(B), b"", pipe=True),
    "lzma": Case(pattern(5 * B) + RANDOM[:999], bytes(5 * B + 999), lzma=True),
}


class Streams(NamedTuple):
    hashes: bytes
    blocks: bytes


def stage(program: Sequence[str], *args: object, input: bytes = b"") -> bytes:
    if program is BLOCKCOPY:
        done = run(*args, input=input)
        succeeded(done)
        return done.stdout
    done = subprocess.run(
        [*program, *map(str, args)], input=input, capture_output=True, timeout=PATIENCE, check=False
    )
    succeeded(done)
    return done.stdout


def checksum(program: Sequence[str], case: Case, folder: Path) -> bytes:
    (folder / "destination").write_bytes(case.destination)
    path = "-" if case.pipe else folder / "destination"
    return stage(program, "checksum", path, *case.checksum_options, input=case.destination if case.pipe else b"")


def retrieve(program: Sequence[str], case: Case, folder: Path, hashes: bytes) -> bytes:
    (folder / "source").write_bytes(case.source)
    return stage(program, "retrieve", folder / "source", *case.retrieve_options, input=hashes)


def save(program: Sequence[str], case: Case, folder: Path, blocks: bytes) -> bytes:
    path = folder / "destination"
    path.write_bytes(case.destination)
    assert stage(program, "save", path, input=blocks) == b""
    return path.read_bytes()


def streams(program: Sequence[str], case: Case, folder: Path) -> Streams:
    hashes = checksum(program, case, folder)
    return Streams(hashes, retrieve(program, case, folder, hashes))


def golden(name: str) -> Streams:
    return Streams(*(lzma.decompress((GOLDEN / f"{name}.{kind}.xz").read_bytes()) for kind in Streams._fields))


def expanded(blocks: bytes) -> list[tuple[bytes, int, bytes]]:
    """Frames with their commands; compressed bytes may differ from one liblzma to the next."""
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(blocks)
    return [
        (encode(each)[:4], each.position, expand(each))
        if isinstance(each, XzData)
        else (encode(each)[:4], 0, encode(each))
        for each in iter(decoder.next, None)
    ]


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_the_golden_streams_hold(tmp_path: Path, name: str) -> None:
    case, kept = GOLDEN_CASES[name], golden(name)
    assert checksum(BLOCKCOPY, case, tmp_path) == kept.hashes
    blocks = retrieve(BLOCKCOPY, case, tmp_path, kept.hashes)
    if case.lzma:
        assert expanded(blocks) == expanded(kept.blocks)
        assert b"dlzm" in blocks
    else:
        assert blocks == kept.blocks
    assert save(BLOCKCOPY, case, tmp_path, kept.blocks) == case.result


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_the_golden_streams_are_the_originals(tmp_path: Path, name: str, original: list[str]) -> None:
    case, kept = GOLDEN_CASES[name], golden(name)
    made = streams(original, case, tmp_path)
    assert made.hashes == kept.hashes
    assert expanded(made.blocks) == expanded(kept.blocks)
    assert save(original, case, tmp_path, kept.blocks) == case.result


def test_every_golden_stream_is_used() -> None:
    names = {path.name for path in GOLDEN.glob("*.xz")}
    assert names == {f"{name}.{kind}.xz" for name in GOLDEN_CASES for kind in Streams._fields}


# Pairings with the original


def crashes_the_original(hashes: bytes) -> bool:
    """Its `retrieve` does not survive `rest` before any `Hash`."""
    return hashes.startswith(b"rest")


def test_all_pairings_with_the_original_give_the_same_bytes(
    tmp_path: Path, case: Case, original: list[str]
) -> None:
    """A stage is run once for each input: what it does depends on nothing else."""
    programs = {"ours": BLOCKCOPY, "original": original}

    @cache
    def hashes(first: str) -> bytes:
        return checksum(programs[first], case, tmp_path)

    @cache
    def blocks(second: str, stream: bytes) -> bytes:
        return retrieve(programs[second], case, tmp_path, stream)

    @cache
    def result(third: str, stream: bytes) -> bytes:
        return save(programs[third], case, tmp_path, stream)

    assert hashes("ours") == hashes("original")
    for first, second, third in itertools.product(programs, repeat=3):
        if second == "original" and crashes_the_original(hashes(first)):
            continue
        assert result(third, blocks(second, hashes(first))) == case.result, (first, second, third)


def test_what_is_skipped_does_crash_the_original(tmp_path: Path, original: list[str]) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    command = [*original, "retrieve", str(tmp_path / "source")]
    done = subprocess.run(command, input=b"rest" + bytes(8) + b"done", capture_output=True, check=False)
    failed(done, 1)


# Every Python


def versions() -> Iterator[tuple[str, str]]:
    """Each Python from 3.9 on, by version: ours, those of pyenv, names on the PATH."""
    for minor in range(9, 15):
        if minor == sys.version_info[1]:
            yield f"3.{minor}", sys.executable
            continue
        name = f"python3.{minor}"
        paths = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/*/bin/{name}")))
        if path := next(iter(paths), shutil.which(name)):
            yield f"3.{minor}", path


PYTHONS = dict(versions())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("version", PYTHONS)
def test_the_stages_work_under_each_python(tmp_path: Path, version: str, compress: bool) -> None:
    """Out of the checkout, with warnings as errors and nothing installed."""
    python = [PYTHONS[version], "-S", "-W", "error"]
    if subprocess.run([*python, "-c", "pass"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHONS[version]} starts no Python here")
    if compress and subprocess.run([*python, "-c", "import lzma"], capture_output=True, check=False).returncode:
        pytest.skip(f"the Python {version} here was built without lzma")
    case = Case(SPARSE + b"abc", with_changes(SPARSE, [0, 5])[: 11 * B + 5], lzma=compress)
    (tmp_path / "source").write_bytes(case.source)
    (tmp_path / "destination").write_bytes(case.destination)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    stream = b""
    for words in stages(case, tmp_path / "source", tmp_path / "destination"):
        command = [*python, "-m", "blockcopy", *words]
        done = subprocess.run(
            command, input=stream, env=environment, cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=False
        )
        succeeded(done)
        stream = done.stdout
    assert (tmp_path / "destination").read_bytes() == case.result


def write_golden(program: Sequence[str], folder: Path) -> None:
    """What golden/README.md describes."""
    for name, case in GOLDEN_CASES.items():
        for kind, stream in streams(program, case, folder)._asdict().items():
            (GOLDEN / f"{name}.{kind}.xz").write_bytes(lzma.compress(stream, preset=9))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_golden([sys.executable, sys.argv[1]], Path(scratch))
