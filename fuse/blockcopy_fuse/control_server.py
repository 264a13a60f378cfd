"""The control socket of a mount: a line of JSON in, the deed done, a line of JSON back.

    {"command": "pause"}                                     {"ok": true}
    {"command": "resume"}                                    {"error": "…", "exit_code": 3}
    {"command": "limit", "rate": bytes a second, or null}
    {"command": "prefetch", "extents": [[offset, length], …]}     answered when they are here
    {"command": "end"}                                       as SIGTERM does; answered before
    {"command": "status"}                                    {"ok": true, "status": {…}}
    {"command": "map", "cells": most of them}                {"ok": true, "cells": [{…}, …]}, as `Replica.map`

It lies in a folder that only the mounting user, and root, can enter, and has the mount's device number in
its name: so it is found where the mount has no status file, because it is a file itself.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from blockcopy.block.geometry import MAX_POSITION, Extent
from blockcopy.errors import BlockcopyError, DeviceError, UsageError
from blockcopy.paths.runtime_dir import make_runtime_dir
from blockcopy.protocol.strict_json import parse_object
from blockcopy.replica.replica import Replica
from blockcopy.replica.tasks import abandonable
from blockcopy_fuse import probe

logger = logging.getLogger(__name__)

_MAX_REQUEST = 64 * 1024

_MOST_CELLS = 65536

_PATIENCE_SECONDS = 5
"""How long the folder of the socket may take to answer."""

Snapshot = Callable[[], dict[str, Any]]


class ControlServer:
    """A listening socket at `path`."""

    def __init__(self, path: str, listener: socket.socket) -> None:
        self.path = path
        self.listener = listener

    async def serve(self, replica: Replica, snapshot: Snapshot, end: Callable[[], None]) -> None:
        """Until cancelled. `end` ends the mount."""

        async def answer(stream: trio.SocketStream) -> None:
            try:
                await stream.send_all(json.dumps(await _reply(stream, replica, snapshot, end)).encode() + b"\n")
            except trio.BrokenResourceError:
                logger.debug("who asked has gone away")
            except Exception as error:
                logger.error("a request met a fault of blockcopy's; the control socket goes on", exc_info=error)

        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listener))
        await trio.serve_listeners(answer, [listener])


@asynccontextmanager
async def opened(device: str) -> AsyncIterator[ControlServer | None]:
    """The socket of the mount of that number, gone at the end; None, with a warning, where none can be made."""
    try:
        made = await abandonable.run_within(partial(_listen, device), _PATIENCE_SECONDS)
    except (OSError, DeviceError) as error:
        logger.warning("pause, resume, limit and prefetch will not work: %s", error)
        yield None
        return
    with made.listener:
        try:
            yield made
        finally:
            with suppress(TimeoutError, OSError):  # what is left of it, the next one sweeps
                await abandonable.run_within(partial(Path(made.path).unlink, missing_ok=True), _PATIENCE_SECONDS)


def _listen(device: str) -> ControlServer:
    """Make the socket. Raises OSError or DeviceError if it cannot be made."""
    path = make_runtime_dir() / probe.socket_name(device, os.getpid())
    _sweep(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
    except OSError as error:
        listener.close()
        raise DeviceError.from_os_error("listen at", str(path), error) from error
    return ControlServer(str(path), listener)


def _sweep(folder: Path) -> None:
    """Sockets that nobody listens at any more: of mounts that were killed."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # busy, or gone by now: not ours to take away


async def _reply(
    stream: trio.SocketStream, replica: Replica, snapshot: Snapshot, end: Callable[[], None]
) -> dict[str, Any]:
    try:
        request = await _request(stream)
        if request.get("command") == "status":
            return {"ok": True, "status": snapshot()}
        if request.get("command") == "map" and _is_count(request.get("cells")):
            return {"ok": True, "cells": replica.map(request["cells"])}
        if request.get("command") == "end":
            end()
            return {"ok": True}
        await _obey(request, replica)
    except BlockcopyError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    return {"ok": True}


async def _request(stream: trio.SocketStream) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        data = await stream.receive_some(_MAX_REQUEST)
        line += data
        if not data or len(line) > _MAX_REQUEST:
            raise UsageError("the request is not a line of JSON")
    try:
        return parse_object(line)
    except ValueError as error:
        raise UsageError(f"the request is not JSON: {error}") from error


async def _obey(request: dict[str, Any], replica: Replica) -> None:
    command = request.get("command")
    if command in ("pause", "resume", "limit") and not replica.hydrates:
        raise UsageError(f"there is nothing to {command}: it was mounted with --no-background")
    if command in ("pause", "resume"):
        replica.throttle.paused = command == "pause"
        if replica.throttle.paused:
            await replica.commit()
    elif command == "limit" and _is_rate(request.get("rate")):
        replica.throttle.limit = request["rate"]
    elif command == "prefetch" and _are_extents(request.get("extents")):
        await replica.prefetch(_existing(request["extents"], replica.volume.size))
    else:
        raise UsageError(f"the mount does not understand {json.dumps(request)[:200]}")


def _existing(ranges: list[list[int]], size: int) -> list[Extent]:
    """Raises UsageError if one of the ranges begins behind the end of a source of `size` bytes."""
    for offset, _ in ranges:
        if offset >= size:
            raise UsageError(f"there is nothing at {offset}: the source has {size} bytes")
    return [Extent(*each) for each in ranges]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST_CELLS


def _is_rate(value: object) -> bool:
    return value is None or (type(value) is int and 0 < value <= MAX_POSITION)


def _are_extents(value: object) -> bool:
    def is_extent(each: object) -> bool:
        return (
            isinstance(each, list)
            and len(each) == 2
            and all(type(number) is int and 0 <= number <= MAX_POSITION for number in each)
        )

    return isinstance(value, list) and all(map(is_extent, value))
