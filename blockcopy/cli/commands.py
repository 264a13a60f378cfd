"""The copy stages as commands: what the command line says → a stage, with its streams and devices.

A stage is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator

from blockcopy.cli import console
from blockcopy.errors import DeviceError
from blockcopy.stage import streams


def checksum(args: argparse.Namespace) -> None:
    from blockcopy.stage.checksum import checksum as write_hashes

    streams.refuse_terminal(1)
    with _checksum_input(args.destination_file) as fd, console.progress(args) as progress:
        write_hashes(
            fd,
            args.destination_file,
            streams.OutputStream(1),
            start=args.start,
            end=args.end,
            digest=_digest(args.digest),
            progress=progress,
        )


def _digest(name: str | None) -> str | None:
    """The fastest of this host for `auto`."""
    from blockcopy.protocol import digests

    if name != "auto":
        return name
    speeds = digests.speeds()
    return max(speeds, key=lambda each: speeds[each])


@contextlib.contextmanager
def _checksum_input(path: str) -> Iterator[int]:
    """Whatever can be read: a file, a device, a pipe, and `-` for standard input."""
    if path == "-":
        yield 0
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError.from_os_error("open", path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def retrieve(args: argparse.Namespace) -> None:
    from blockcopy.block.device import open_source
    from blockcopy.protocol import zstd
    from blockcopy.stage import compression
    from blockcopy.stage.retrieve import retrieve as answer

    _refuse_dash(args.source_file)
    streams.refuse_terminal(1)
    output = streams.OutputStream(1)
    if args.compress and not args.compress.auto:
        zstd.check_available()
    chosen = compression.Xz() if args.lzma else compression.wished(args.compress, output)
    with (
        open_source(args.source_file) as source,
        streams.InputStream(0) as hashes,
        console.progress(args) as progress,
    ):
        answer(source, hashes, output, packing=chosen, progress=progress)


def save(args: argparse.Namespace) -> None:
    from blockcopy.block.claim import open_destination
    from blockcopy.block.records import invalidate_records
    from blockcopy.stage.save import save as write_blocks

    _refuse_dash(args.destination_file)
    with (
        open_destination(args.destination_file, force=args.force) as destination,
        streams.InputStream(0) as blocks,
        console.progress(args) as progress,
    ):
        invalidate_records(destination)  # what a mount or sync has on record is overwritten
        write_blocks(destination, blocks, sparse=not args.no_sparse, progress=progress)


def receive(args: argparse.Namespace) -> None:
    from blockcopy.stage.compression import fact_of
    from blockcopy.stage.receive import receive as write_answers

    _refuse_dash(args.destination_file)
    streams.refuse_terminal(1)
    with streams.InputStream(0) as answers:
        write_answers(
            args.destination_file,
            streams.OutputStream(1),
            answers,
            force=args.force,
            sparse=not args.no_sparse,
            compress=fact_of(args.compress),
        )


def facts(args: argparse.Namespace) -> None:
    from blockcopy.stage.facts import facts as found

    console.write(json.dumps(found(args.source_file)))


def _refuse_dash(path: str) -> None:
    if path == "-":
        raise DeviceError("FILE must be a file or device, not `-`: the stream takes standard input")
