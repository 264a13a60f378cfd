"""The copy stages as commands.

Each public function runs the command of its name with the parsed arguments, and raises a BlockcopyError if that
fails. It opens the streams and devices that the arguments name, and imports only its own stage.
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
    """Run `checksum`: write the hashes of a destination's blocks to standard output. `args`: its parsed options."""
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
    """Return the name of the digest for `name`, the value of `--digest`: this host's fastest for "auto".

    Returns any other `name` as it is. None stands for the digest of the original program.
    """
    from blockcopy.protocol import digests

    if name != "auto":
        return name
    speeds = digests.speeds()
    return max(speeds, key=lambda each: speeds[each])


@contextlib.contextmanager
def _checksum_input(path: str) -> Iterator[int]:
    """Return a context manager that opens `path` to read it, and yields the file descriptor.

    `path`: a file, device or pipe, or `-` for standard input. Raises DeviceError if the open fails.
    """
    if path == "-":
        yield 0
        return
    with DeviceError.on_os_error("open", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def retrieve(args: argparse.Namespace) -> None:
    """Run `retrieve`: read hashes from stdin, write the blocks that differ to stdout.

    Answers further connections of the same client too, until each has ended. `args`: its parsed options.
    """
    from blockcopy.block.device import open_source
    from blockcopy.stage.compressors import Compressor, XzCompressor, compressor_for
    from blockcopy.stage.join import join
    from blockcopy.stage.retrieve import serve

    def new_compressor(output: streams.OutputStream) -> Compressor:
        return XzCompressor() if args.lzma else compressor_for(args.compress, output)

    if args.join is not None:
        join(args.join)
        return
    _refuse_dash(args.source_file)
    streams.refuse_terminal(1)
    args.compress.check_available()
    with (
        open_source(args.source_file) as source,
        streams.InputStream(0) as hashes,
        console.progress(args) as progress,
    ):
        serve(source, hashes, streams.OutputStream(1), new_compressor=new_compressor, progress=progress)


def save(args: argparse.Namespace) -> None:
    """Run `save`: write blocks from standard input to the destination, and sync it. `args`: its parsed options."""
    from blockcopy.block.claim import open_destination
    from blockcopy.block.records import invalidate_records
    from blockcopy.stage.save import save as write_blocks

    _refuse_dash(args.destination_file)
    with (
        open_destination(args.destination_file, force=args.force) as destination,
        streams.InputStream(0) as blocks,
        console.progress(args) as progress,
    ):
        invalidate_records(destination)  # the records of a mount or sync no longer hold
        write_blocks(destination, blocks, sparse=not args.no_sparse, progress=progress)


def receive(args: argparse.Namespace) -> None:
    """Run `receive`: request blocks on stdout, write blocks from stdin to a file. `args`: its parsed options."""
    from blockcopy.stage.join import join
    from blockcopy.stage.receive import receive as write_answers

    if args.join is not None:
        join(args.join)
        return
    _refuse_dash(args.destination_file)
    streams.refuse_terminal(1)
    with streams.InputStream(0) as answers:
        write_answers(
            args.destination_file,
            streams.OutputStream(1),
            answers,
            force=args.force,
            sparse=not args.no_sparse,
            compression=args.compress,
        )


def facts(args: argparse.Namespace) -> None:
    """Run `facts`: print what this host can do for a copy, as JSON. `args`: its parsed options."""
    from blockcopy.stage import facts as stage

    console.write(json.dumps(stage.facts(args.source_file)))
    if args.echo:
        stage.echo(0, 1)


def _refuse_dash(path: str) -> None:
    if path == "-":
        raise DeviceError("FILE must be a file or device, not `-`: standard input carries the stream")
