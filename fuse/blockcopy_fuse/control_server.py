"""The control socket of a mount: one line of JSON is the request, one line of JSON is the reply.

    {"command": "pause"}                                     {"ok": true}
    {"command": "resume"}                                    {"error": "…", "exit_code": 3}
    {"command": "limit", "rate": bytes per second, or null}
    {"command": "prefetch", "extents": [[offset, length], …]}     the reply comes when the bytes are present
    {"command": "end"}                                       the same as SIGTERM; the reply comes first
    {"command": "status"}                                    {"ok": true, "status": {…}}
    {"command": "map", "cells": at most this many}           {"ok": true, "cells": [{…}, …]}, as `MapCell`

The socket lies in a folder that only the mounting user and root can enter. Its name has the mount's device number.
So clients find the socket even if the mountpoint is a file, which has no status file beside it.
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
from blockcopy.replica.monitor import typed_json
from blockcopy.replica.monitor.status import Status
from blockcopy.replica.replica import Replica
from blockcopy.replica.tasks import abandonable
from blockcopy_fuse import probe

logger = logging.getLogger(__name__)

_MAX_REQUEST = 64 * 1024
"""Bytes of a request."""

_MAX_CELLS = 65536
"""Cells of a map."""

_FOLDER_SECONDS = 5
"""How long the socket's folder may take to answer."""


class ControlServer:
    """The control socket of this process, at `path`."""

    def __init__(self, path: str, listener: socket.socket) -> None:
        """Take over `listener`, a socket that listens at `path`."""
        self.path = path
        self.listener = listener

    async def serve(
        self,
        replica: Replica,
        status: Callable[[], Status],
        end: Callable[[], None],
        is_unmounted: Callable[[], bool],
    ) -> None:
        """Answer requests about `replica` until cancelled.

        `status`: called without arguments, returns the Status of the moment. `end`: called to end the mount.
        `is_unmounted`: called without arguments, returns whether the mount is gone. From then on only `end` gets a
        reply, because a new mount may have the same device number. Call from trio's thread only.
        """

        async def reply_to(stream: trio.SocketStream) -> dict[str, Any] | None:
            request = await _request(stream)
            command = request.get("command")
            if is_unmounted() and command != "end":
                return None
            if command == "status":
                return {"ok": True, "status": status().as_dict()}
            if command == "map" and _is_cell_count(request.get("cells")):
                return {"ok": True, "cells": [cell.as_dict() for cell in replica.map(request["cells"])]}
            if command == "end":
                end()
            else:
                await _change(replica, request)
            return {"ok": True}

        async def answer(stream: trio.SocketStream) -> None:
            try:
                try:
                    reply = await reply_to(stream)
                except BlockcopyError as error:
                    reply = {"error": str(error), "exit_code": error.exit_code}
                if reply is not None:
                    await stream.send_all(json.dumps(reply).encode() + b"\n")
            except trio.BrokenResourceError:
                logger.debug("the client of the control socket has gone away")
            except Exception as error:
                logger.error("a fault of blockcopy in a control request; the socket still works", exc_info=error)

        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listener))
        await trio.serve_listeners(answer, [listener])


@asynccontextmanager
async def opened(device: str) -> AsyncIterator[ControlServer | None]:
    """Open the control socket of the mount with the number `device`, MAJOR:MINOR, and remove it in the end.

    Yields the open ControlServer. Yields None, after a warning, if the socket cannot be made. Call from trio's
    thread only.
    """
    try:
        server = await abandonable.run_within(partial(_listen, device), _FOLDER_SECONDS)
    except (OSError, DeviceError) as error:
        logger.warning("pause, resume, limit and prefetch will not work: %s", error)
        yield None
        return
    with server.listener:
        try:
            yield server
        finally:
            with suppress(TimeoutError, OSError):  # the next mount removes what is left
                await abandonable.run_within(partial(Path(server.path).unlink, missing_ok=True), _FOLDER_SECONDS)


def _listen(device: str) -> ControlServer:
    """Make the socket of the mount with the number `device`, and return its ControlServer.

    Raises OSError or DeviceError if the socket cannot be made.
    """
    path = make_runtime_dir() / probe.socket_name(device, os.getpid())
    _remove_dead_sockets(path.parent)
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


def _remove_dead_sockets(folder: Path) -> None:
    """Remove the sockets in `folder` at which nobody listens any more: their mounts were killed."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            try:
                client.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # busy, or gone by now


async def _request(stream: trio.SocketStream) -> dict[str, Any]:
    """Receive one request from `stream`, and return it, an object of JSON.

    Raises UsageError if the request is malformed or too long.
    """
    line = b""
    while not line.endswith(b"\n"):
        data = await stream.receive_some(_MAX_REQUEST)
        line += data
        if len(line) > _MAX_REQUEST:
            raise UsageError(f"the request is longer than {_MAX_REQUEST} bytes")
        if not data:
            raise UsageError("the request is not a line of JSON")
    try:
        return parse_object(line)
    except ValueError as error:
        raise UsageError(f"the request is not JSON: {error}") from error


async def _change(replica: Replica, request: dict[str, Any]) -> None:
    """Do to `replica` what `request`, an object of JSON, asks for.

    Raises UsageError if the request is unknown or malformed, BlockcopyError if it fails.
    """
    command = request.get("command")
    if command in ("pause", "resume", "limit") and not replica.hydrates:
        raise UsageError(f"there is nothing to {command}: the replica was mounted with --no-background")
    if command in ("pause", "resume"):
        replica.throttle.paused = command == "pause"
        if replica.throttle.paused:
            await replica.commit()
    elif command == "limit" and _is_rate(request.get("rate")):
        replica.throttle.limit = request["rate"]
    elif command == "prefetch" and (extents := _extents(request.get("extents"))) is not None:
        for extent in extents:
            if extent.offset >= replica.volume.size:
                raise UsageError(f"there is nothing at {extent.offset}: the source has {replica.volume.size} bytes")
        await replica.prefetch(extents)
    else:
        raise UsageError(f"unknown or invalid request: {json.dumps(request)[:200]}")


def _is_cell_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_CELLS


def _is_rate(value: object) -> bool:
    return value is None or (type(value) is int and 0 < value <= MAX_POSITION)


def _extents(value: object) -> tuple[Extent, ...] | None:
    """Return `value`, decoded JSON, as Extents. Returns None if it is no list of [offset, length]."""
    try:
        return typed_json.parse(tuple[Extent, ...], value)
    except ValueError:
        return None
