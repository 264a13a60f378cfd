"""What is looked at in the page cache is answered, and asked about, as what was read."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import BLOCK_SIZE, BLOCKCOPY, PATIENCE, FedDecoder, needs_views, noise, run, written

from blockcopy.block import syscalls
from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import Geometry
from blockcopy.block.pieces import PIECE_SIZE, PieceScanner
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.protocol import digests, wire
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.stage.compressors import Compressor
from blockcopy.stage.delta import Request, Terms
from blockcopy.stage.streams import DeviceFrame, Output

DIGEST = digests.named("sha256")


@pytest.fixture(params=range(4))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    """Return an open file of data, written zeros, and holes, in ranges of any length."""
    chance = random.Random(request.param)
    path = tmp_path / "source"
    with path.open("wb") as file:
        at = 0
        while at < PIECE_SIZE + BLOCK_SIZE:
            length = chance.choice([1, 4095, 4096, BLOCK_SIZE, chance.randrange(4 * BLOCK_SIZE)])
            file.seek(at)
            file.write(chance.choice([noise(length), noise(length), bytes(length), b""]))
            at += length
        file.truncate(max(at, 1))
    with open_source(str(path)) as device:
        yield device


def copying(device: Device) -> Device:
    """Return the same device, but without views: it only reads."""
    other = open_source(device.path)
    other._views._possible = False
    return other


def as_sent(frames: Sequence[Output]) -> list[tuple[str, int, bytearray]]:
    """Return kind, position and bytes of what `frames` say; neighbours of a kind are one.

    How an answer is parted into frames may differ.
    """
    decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
    found: list[tuple[str, int, bytearray]] = []
    for each in frames:
        if isinstance(each, DeviceFrame):
            decoder.feed(each.header + each.device.read(each.offset, each.length))
        else:
            decoder.feed(each)
        while (message := decoder.next()) is not None:
            assert isinstance(message, (wire.Data, wire.Zero))
            data = bytearray(message.payload if isinstance(message, wire.Data) else message.length)
            name, position = type(message).__name__, message.position
            if found and found[-1][0] == name and found[-1][1] + len(found[-1][2]) == position:
                found[-1][2].extend(data)
            else:
                found.append((name, position, data))
    return found


@pytest.mark.parametrize("block_size", [4096, BLOCK_SIZE])
@pytest.mark.parametrize(("extended", "negotiated"), [(False, False), (True, False), (True, True)])
def test_the_answers_are_the_same(source: Device, extended: bool, negotiated: bool, block_size: int) -> None:
    chance = random.Random(block_size)
    terms = Terms(DIGEST, Compressor(), UnreadableRanges(), extended=extended, negotiated=negotiated)
    size, room = source.size(), memoryview(bytearray(PIECE_SIZE))
    for position in (0, block_size, PIECE_SIZE):
        piece = PieceScanner(source).piece(position, min(PIECE_SIZE, size - position), block_size)
        asked = []
        for at in range(0, piece.length, block_size):
            own = source.read(position + at, min(block_size, piece.length - at))
            asked.append(chance.choice([DIGEST(own), bytes(DIGEST.size), DIGEST.of_zeros(len(own))]))
        for theirs in (b"".join(asked), None):
            with copying(source) as other:
                read = as_sent(Request(piece, block_size, theirs, terms).answer(other, room))
            assert as_sent(Request(piece, block_size, theirs, terms).answer(source, room)) == read


@pytest.mark.parametrize("block_size", [4096, BLOCK_SIZE])
def test_the_questions_are_the_same(source: Device, block_size: int) -> None:
    geometry = Geometry(source.size(), block_size)
    blocks = [block for block in range(geometry.block_count) if block % 50 != 7]
    with copying(source) as other:
        read = read_signatures(other, geometry, blocks, DIGEST, UnreadableRanges())
    assert read_signatures(source, geometry, blocks, DIGEST, UnreadableRanges()) == read


@needs_views
def test_what_is_sent_is_not_copied(tmp_path: Path) -> None:
    path = written(tmp_path / "source", noise(2 * BLOCK_SIZE))
    terms = Terms(DIGEST, Compressor(), UnreadableRanges(), extended=True, negotiated=True)
    with open_source(str(path)) as device:
        piece = PieceScanner(device).piece(0, 2 * BLOCK_SIZE, BLOCK_SIZE)
        frames = Request(piece, BLOCK_SIZE, bytes(2 * DIGEST.size), terms).answer(device, memoryview(b""))
    assert [frame[:-1] for frame in frames] == [
        (device, 0, 2 * BLOCK_SIZE, wire.frame_header(wire.Data, 0, 2 * BLOCK_SIZE))
    ]


@pytest.mark.parametrize(
    ("release", "returns"),
    [
        ("4.18.0-553.el8_10.x86_64", False),
        ("5.14.0-503.11.1.el9_5.x86_64", False),
        ("5.15.0-130-generic", False),
        ("6.1.0-50-amd64", False),
        ("6.1.176", False),
        ("6.6.0-30-generic", False),
        ("6.6-30", False),
        ("6.6.29", False),
        ("6.6.30", True),
        ("6.6.87.2-microsoft-standard-WSL2", True),
        ("6.7.12", False),
        ("6.8.0-51-generic", False),
        ("6.9.0", True),
        ("6.12.117+deb13-amd64", True),
        ("6.12-rc1", True),
        ("10.0.0", True),
        ("2.6.75", False),
        ("", False),
    ],
)
def test_a_kernel_is_asked_for_a_view_only_where_it_fails_at_a_read_error(
    release: str, returns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(syscalls, "_call", lambda name, *_: calls.append(name))
    with open_source(str(written(tmp_path / "source", noise(BLOCK_SIZE)))) as device:
        piece = PieceScanner(device).piece(0, BLOCK_SIZE, BLOCK_SIZE)
        for _ in range(2):
            assert (piece.examine_view(device, len) is not None) == returns
    assert bool(calls) == returns


@needs_views
def test_a_refused_view_leaves_no_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object) -> None:
        raise PermissionError(name)

    path = written(tmp_path / "source", bytes(BLOCK_SIZE))
    monkeypatch.setattr(syscalls, "_call", refuse)
    with path.open("rb") as file, pytest.raises(PermissionError, match="munlock"):
        syscalls.map_to_read(file.fileno(), BLOCK_SIZE)
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("left", [0, 5000, PIECE_SIZE, PIECE_SIZE + 100, 3 * PIECE_SIZE])
def test_a_source_that_is_cut_off_while_it_is_looked_at(tmp_path: Path, left: int) -> None:
    """The result is a reported error or death by SIGBUS, and never other bytes than the source's."""
    data = noise(4 * PIECE_SIZE)
    path, copy = written(tmp_path / "source", data), written(tmp_path / "copy", bytes(len(data)))
    asked = written(tmp_path / "asked", run("checksum", "--digest", "sha256", copy).stdout)
    with (
        asked.open("rb") as stream,
        subprocess.Popen(
            [*BLOCKCOPY, "retrieve", path], stdin=stream, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as stage,
    ):
        assert stage.stdout is not None
        first = stage.stdout.read(4)
        os.truncate(path, left)
        rest, _ = stage.communicate(timeout=PATIENCE)
    assert stage.returncode in (0, 1, 3, -signal.SIGBUS)
    run("save", copy, input=first + rest)
    copied = copy.read_bytes()
    for at in range(0, len(data), BLOCK_SIZE):
        block = copied[at : at + BLOCK_SIZE]
        assert block in (data[at : at + BLOCK_SIZE], bytes(BLOCK_SIZE)) or at < left < at + BLOCK_SIZE
