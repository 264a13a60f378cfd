"""How large the source is, asked of a process that has no word for it.

A 1-byte question that cannot be equal is answered if and only if the source reaches there. Files,
and our own `retrieve`, stay silent past the end, so the search asks many positions at a time. The
original dies past the end of a block device: from then on one position is asked at a time, of a
new process after each miss. Because a process can die of other things too, a size that rests on a
death is proved at the end: its last byte is there, and asking right behind it is survived.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from blockcopy.block.geometry import MAX_POSITION
from blockcopy.errors import ProtocolViolationError, SourceError
from blockcopy.replica.source.client import Client

_AT_ONCE = 64
_SECTOR = 512
"""Block devices have whole sectors; the search tries those first once it knows it asks one."""


class SizeSearch:
    """Finds the size over one retriever, or over as many as it kills; `client` is the one alive."""

    def __init__(self, retriever: Client, connect: Callable[[], Awaitable[Client]]) -> None:
        self.retriever = retriever
        self._connect = connect
        self._low = 0  # it has at least so many bytes
        self._high = MAX_POSITION  # and at most so many
        self._mortal = False  # it died of a question

    async def find(self, guess: int) -> int:
        """The size in bytes. `guess` is tried first. SourceError where the source does not tell."""
        if not (await self.retriever.reaches([0]))[0]:
            return 0
        self._low = 1
        if guess > 1:
            await self._ask([guess - 1])
            if self._low == guess:
                await self._ask([guess])
        while self._low < self._high:
            await self._ask(self._positions())
        if self._mortal and await self.retriever.reaches([self._low - 1, self._low]) != [True, False]:
            raise SourceError("the source gives no steady answer to how large it is")
        return self._low

    def _positions(self) -> list[int]:
        """Where to ask next: ascending, each in low … high-1."""
        low, high = self._low, self._high
        if high == MAX_POSITION:
            return [min(low * _AT_ONCE, high - 1)]
        if self._mortal:
            first, last = low // _SECTOR + 1, high // _SECTOR
            if first <= last:
                return [(first + last) // 2 * _SECTOR - 1]
            if low % _SECTOR == 0:
                return [low]
        return list(range(low, high, -(-(high - low) // _AT_ONCE)))

    async def _ask(self, positions: list[int]) -> None:
        try:
            answers = await self.retriever.reaches(positions)
        except ProtocolViolationError:
            raise
        except SourceError:
            # A block device of that size is shorter than the last of the positions.
            self._mortal = True
            self._high = min(self._high, positions[-1] - 1)
            if self._high < self._low:
                raise
            self.retriever = await self._connect()
            return
        for position, reached in zip(positions, answers, strict=True):
            if reached:
                self._low = max(self._low, position + 1)
            else:
                self._high = min(self._high, position)
        if self._high < self._low:
            raise SourceError("the source changed its size while it was asked for it")
