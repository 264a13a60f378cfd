"""Target `state`: a state file, after any damage."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import atheris

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.block.identity import sample_extents
from blockcopy.errors import StateError, StateWriteError
from blockcopy.replica.state import statefile
from blockcopy.replica.state.blockmap import Changes
from blockcopy.replica.state.statefile import Binding, Record, StateFile, WriteTimes
from fuzzing import BrokenPromise

SCRATCH = "BLOCKCOPY_FUZZ_SCRATCH"
"""The environment variable with the path of a folder in memory, shared with the process that this one starts."""

CHUNK = statefile.CHUNK_BLOCKS // 8
"""Bytes of a chunk's bits."""

RECORDED: list[dict[int, bytes]] = [{}, {0: b"\xff" * CHUNK, 1: bytes(range(200))}, {0: b"\x0f" * 40}, {2: b"\x01"}]
"""The chunks that the seeds' state files record. The inode of the source is the index of the seed."""

RAW, EDITED, SEALED = range(3)
"""Kinds of input, chosen by its last byte. RAW: a whole file. EDITED: the number of a seed, and edits of its bytes.
SEALED: the facts, for a file whose seals are right."""

MAX_STATE = 16 * 1024


def binding(seed: int) -> Binding:
    """Return the binding of the state file of `seed`."""
    size = 3 * statefile.CHUNK_BLOCKS * BLOCK_SIZE
    source = {"size": size, "sample": ["ab"] * len(sample_extents(size)), "inode": seed, "mtime_ns": 4}
    return Binding(source, {"file": 1, "file_system": "f"}, size, BLOCK_SIZE)


def scratch() -> Path:
    """Empty the folder in memory. Returns the path for a state file in the folder."""
    folder = Path(os.environ[SCRATCH]) / "states"
    folder.mkdir(exist_ok=True)
    for each in folder.iterdir():
        each.unlink()
    return folder / "state"


@cache
def state_files() -> list[bytes]:
    """Return the seeds' state files, always the same.

    First all with small pages, which have more structure in fewer bytes, then all with pages of StateFile's size.
    """
    logging.disable(logging.CRITICAL)
    made = []
    for page_size in (512, 4096):
        for seed, chunks in enumerate(RECORDED):
            path = scratch()
            token, now = mock.Mock(return_value=f"{seed:032}"), mock.Mock(return_value=1 << 60)
            with (
                contextlib.closing(StateFile(path)) as state,
                mock.patch("secrets.token_hex", token),
                mock.patch("time.time_ns", now),
            ):
                state.begin_record(binding(seed), WriteTimes(1, 1, 2))
                state.write_changes(Changes(chunks, {}, {}), WriteTimes(2, 2, 3))
                state.write_times(WriteTimes(3, 3, None))
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.executescript(f"PRAGMA page_size = {page_size}; VACUUM")
            made.append(path.read_bytes())
    return made


def open_state(data: bytes) -> None:
    """Load the state file of an input, then begin a new record in this file, and load the record.

    Raises BrokenPromise if a wrong record is believed, or an unusable file is altered.
    """
    kind = data[-1] % 3 if data else RAW
    path = scratch()
    content = {RAW: lambda: data[:-1], EDITED: lambda: edited(data[:-1]), SEALED: lambda: sealed(data[:-1], path)}
    path.write_bytes(content[kind]())
    path.chmod(0o600)
    before = path.read_bytes()
    try:
        with contextlib.closing(StateFile(path)) as state:
            if state.record is not None:
                if kind != SEALED:
                    check_record(state.record)
            elif len(before) and not (aside := path.with_name("state.unusable-1")).exists():
                raise BrokenPromise("the file is neither believed nor set aside")
            elif len(before) and aside.read_bytes() != before:
                raise BrokenPromise("the file was altered when set aside")
            state.begin_record(binding(99), WriteTimes(1, 1, 2))
            state.write_changes(Changes({1: b"\x10"}, {}, {}), WriteTimes(2, 2, 3))
        with contextlib.closing(StateFile(path)) as state:
            if state.record is not None and (state.record.binding, state.record.rows.chunks) != (
                binding(99),
                {1: b"\x10"},
            ):
                raise BrokenPromise(f"{state.record} differs from what was recorded")
    except (StateError, StateWriteError):
        pass


def edited(data: bytes) -> bytes:
    """Return a seed's file with the edits that `data` describes."""
    given = atheris.FuzzedDataProvider(data)
    made = bytearray(state_files()[given.ConsumeIntInRange(0, len(state_files()) - 1)])
    while given.remaining_bytes() and made:
        at = given.ConsumeIntInRange(0, len(made) - 1)
        what = given.ConsumeIntInRange(0, 9)
        if what < 8:
            made[at] ^= 1 << what
        elif what == 8:
            piece = given.ConsumeBytes(given.ConsumeIntInRange(0, 16))
            made[at : at + len(piece)] = piece
        else:
            del made[at:]
    return bytes(made)


def sealed(data: bytes, path: Path) -> bytes:
    """Return a seed's file with the facts `data`, and right seals. `path`: a place to make it.

    A faulty program could make such a file, and no accident. Loading it may raise no other exception either.
    """
    text = data.decode(errors="replace")
    path.write_bytes(state_files()[1])
    with contextlib.closing(sqlite3.connect(path)) as database:
        seal = statefile._seal("facts", text.encode())
        database.execute("UPDATE facts SET text = ?, seal = ?", [text, seal])
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            for number in (0, 1):
                seal = statefile._seal(f"{json.loads(text)['token']} {number}", b"")
                database.execute("UPDATE chunks SET bits = x'', seal = ? WHERE number = ?", [seal, number])
        database.commit()
    return path.read_bytes()


def check_record(record: Record) -> None:
    """Raise BrokenPromise unless `record` is a seed's record, or a part of one."""
    seed = record.binding.source["inode"]
    if seed not in range(len(RECORDED)) or record.binding != binding(seed):
        raise BrokenPromise(f"{record.binding} is believed")
    for number, bits in record.rows.chunks.items():
        right = int.from_bytes(RECORDED[seed].get(number, b""), "little")
        if int.from_bytes(bits, "little") & ~right:
            raise BrokenPromise(f"{bits!r} is believed of chunk {number} of seed {seed}")


def state_seeds() -> Iterator[bytes]:
    """Generate inputs of all kinds for `open_state`."""
    for number, data in enumerate(state_files()):
        yield data + bytes([RAW])
        yield bytes([1, 2, 3, 4, 5, number, EDITED])
        path = scratch()
        path.write_bytes(data)
        with contextlib.closing(sqlite3.connect(path)) as database:
            ((text,),) = database.execute("SELECT text FROM facts")
        yield text.encode() + bytes([SEALED])
