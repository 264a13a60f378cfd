"""`--metrics FILE`: the status as text for Prometheus, to be read by node_exporter's textfile collector.

The format has one line for each number: name, labels, value. See "Exposition formats" on prometheus.io.
The text is made here: a client library would bring a registry and a server that nobody needs.
Names and help texts of the metrics come from the fields of `status`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial

import trio

from blockcopy.paths import safe_write
from blockcopy.replica.monitor.status import LinkStatus, ReadStatus, State, Status
from blockcopy.replica.tasks import abandonable

logger = logging.getLogger(__name__)

_SECONDS = 10
"""Interval between two writes."""

_LAST_WRITE_SECONDS = 2
"""How long the last write may take when the program ends."""


def exposition(status: Status) -> str:
    """Return the metrics of `status` as text in Prometheus' format. A metric whose value is None is left out."""
    labels = {
        name: value
        for name in ("source", "destination", "mountpoint")
        if (value := getattr(status, name)) is not None
    }
    return "".join(f"{line}\n" for line in _lines(status, labels))


def _lines(status: Status | ReadStatus | LinkStatus, labels: dict[str, str]) -> Iterator[str]:
    for field in dataclasses.fields(status):
        value, name = getattr(status, field.name), field.metadata["metric"]
        if isinstance(value, (ReadStatus, LinkStatus)):
            yield from _lines(value, labels)
        elif name and value is not None:
            yield f"# HELP {name} {field.metadata['help']}"
            yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
            if isinstance(value, State):  # 1 for the current state, 0 for all others
                states = (each for each in State if each is not State.UNKNOWN)
                yield from (_sample(name, each is value, {**labels, "state": each}) for each in states)
            else:
                yield _sample(name, value, labels)


def _sample(name: str, value: float, labels: dict[str, str]) -> str:
    pairs = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    return f"{name}{{{pairs}}} {float(value):.16g}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def keep_writing(path: str | None, status: Callable[[], Status]) -> None:
    """Write metrics to the file `path` each ten seconds, and once more when cancelled.

    `status`: called without arguments, returns the Status of that moment.
    Does nothing if `path` is None. A file that cannot be written is logged as a warning.
    Call from trio's thread only.
    """
    if path is None:
        return
    try:
        while True:
            await abandonable.run(partial(_write, path, status()))
            await trio.sleep(_SECONDS)
    finally:
        try:
            await abandonable.run_within(partial(_write, path, status()), _LAST_WRITE_SECONDS)
        except TimeoutError as error:
            logger.warning("cannot write --metrics %s: %s", path, error.strerror)


def _write(path: str, status: Status) -> None:
    """Replace the file `path` at once by the metrics of `status`: a reader sees those of one moment.

    A file that cannot be written is logged as a warning.
    """
    try:
        # A path may be any bytes, and a file of metrics is UTF-8.
        safe_write.replace(path, exposition(status).encode(errors="replace"), 0o644)
    except OSError as error:
        logger.warning("cannot write --metrics %s: %s", path, error.strerror)
