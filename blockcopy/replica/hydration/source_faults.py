"""The blocks that the source could not read lately.

A read of such a block fails at once, without another request. After RETRY_SECONDS the block is requested again:
a disk may recover. A failing disk may try for many seconds to read a bad sector, so not each read may ask it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import NamedTuple

import trio

from blockcopy.errors import SourceReadError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5
"""Seconds for which an unreadable block is not requested again."""

_MAX_KNOWN = 4096
"""Most blocks that are remembered. A block that was forgotten is requested again."""

_MAX_LOGGED = 16
"""Most blocks that are logged one by one. The status has the ranges of all."""


class _Fault(NamedTuple):
    at: float
    """When the source reported the fault, in trio's time."""
    error: SourceReadError


class SourceFaults:
    """A bounded memory of recent read faults of the source. Call from trio's thread only."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Fault] = OrderedDict()
        self._logged = 0
        self.last: SourceReadError | None = None
        """The error of the latest fault, or None."""

    def add(self, block: int, reason: str) -> SourceReadError:
        """Record and log that the source could not read `block` just now.

        `reason`: the words of the source. Returns the error to raise for readers of the block.
        """
        error = self.last = SourceReadError(reason)
        self._known.pop(block, None)
        self._known[block] = _Fault(trio.current_time(), error)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        self._logged += 1
        if self._logged <= _MAX_LOGGED:
            logger.warning("%s", reason)
        if self._logged == _MAX_LOGGED:
            logger.warning("no more unreadable blocks of the source are logged; `status` has their ranges")
        return error

    def is_known(self, block: int, since: float) -> bool:
        """Return whether `block` failed after `since` or within the last RETRY_SECONDS.

        `since`: trio's time.
        """
        fault = self._known.get(block)
        return fault is not None and fault.at >= min(since, trio.current_time() - RETRY_SECONDS)

    def error(self, block: int) -> SourceReadError:
        """Return the error of `block`, for which `is_known` was True."""
        return self._known[block].error
