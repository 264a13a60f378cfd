"""Blocks that the source could not read of late: who wants one is told at once, and it is asked again later.

A disk may recover; and one that tries for many seconds to read a bad sector is not to be asked by each read.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import NamedTuple

import trio

from blockcopy.errors import SourceReadError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5
"""Time for which a block is not asked for again."""

_MAX_KNOWN = 4096
"""Blocks that are remembered. One that is forgotten is asked for again."""

_MAX_LOGGED = 16
"""Blocks that are logged one by one. The status has the ranges of all."""


class _Fault(NamedTuple):
    at: float  # in trio's time
    error: SourceReadError


class SourceFaults:
    """See the module. Call from trio's thread only."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Fault] = OrderedDict()
        self._logged = 0
        self.last: SourceReadError | None = None

    def add(self, block: int, reason: str) -> SourceReadError:
        """Note that `block` could not be read now. Returns what to tell who wants it."""
        error = self.last = SourceReadError(reason)
        self._known.pop(block, None)
        self._known[block] = _Fault(trio.current_time(), error)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        self._logged += 1
        if self._logged <= _MAX_LOGGED:
            logger.warning("%s", reason)
        if self._logged == _MAX_LOGGED:
            logger.warning("more blocks that cannot be read are not logged; the status has their ranges")
        return error

    def is_known(self, block: int, since: float) -> bool:
        """Return whether `block` could not be read since then, in trio's time, or RETRY_SECONDS ago."""
        fault = self._known.get(block)
        return fault is not None and fault.at >= min(since, trio.current_time() - RETRY_SECONDS)

    def error(self, block: int) -> SourceReadError:
        """Return why a block that is known cannot be had."""
        return self._known[block].error
