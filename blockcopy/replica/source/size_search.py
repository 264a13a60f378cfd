"""A search for the size of the source, over the original program, which cannot report a size.

The search asks for single bytes, by signatures that cannot be equal. The process answers if and only if the source
has that byte. Past the end of a file the process is silent. So the search asks for many positions at a time.

Past the end of a block device the original exits. From then on the search asks for one position at a time, and
starts another process after each exit. A process may exit for other reasons. So a size that rests on an exit is
proved at the end. The process must survive a request for the byte behind the last one.

The original also exits at a byte that it cannot read. If that is the first byte, the search begins at a later
block. If that is the last byte, the guess and the next sectors are tried as sizes, with the same proof.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from blockcopy.block.geometry import BLOCK_SIZE, MAX_POSITION
from blockcopy.errors import ProtocolViolationError, SourceError
from blockcopy.replica.source.client import Client

_POSITIONS = 64
"""Positions that are asked for at once."""

_SECTOR = 512
"""Bytes of a sector. A block device has whole sectors, so the search tries those first."""

_STARTS = (0, BLOCK_SIZE, 8 * BLOCK_SIZE)
"""Positions that are tried for the first readable byte, in this order."""

_BAD_SECTORS = 8
"""Sectors at the end that may be unreadable. The kernel reads pages of 4 KiB, so these are the least."""


class SizeSearch:
    """A search over one client, and over a new one after each exit.

    The attribute `client` is the one whose process runs.
    """

    def __init__(self, client: Client, connect: Callable[[], Awaitable[Client]]) -> None:
        """Search over `client`. `connect`: awaited without arguments after each exit, returns another client."""
        self.client = client
        self._connect = connect
        self._low = 0  # the source has at least so many bytes
        self._high = MAX_POSITION  # and at most so many
        self._exited = False  # a process exited at a request of the search behind the start
        self._failure: SourceError | None = None  # why the first process exited at a single byte

    async def find(self, guess: int) -> int:
        """Return the size of the source in bytes. `guess`: the size to try first.

        Raises SourceError if the size cannot be found.
        """
        if not await self._find_start():
            return 0
        if guess > self._low:
            await self._ask([guess - 1])
            if self._low == guess:
                await self._ask([guess])
            elif self._exited and await self._ends_at(guess):
                return guess
        while self._low < self._high:
            await self._ask(self._next_positions())
        if not self._exited:
            return self._low
        first = self._low // _SECTOR + 1
        for size in (self._low, *(sector * _SECTOR for sector in range(first, first + _BAD_SECTORS))):
            if await self._ends_at(size):
                return size
        raise SourceError("cannot find the size of the source: its answers contradict one another")

    async def _find_start(self) -> bool:
        """Find a readable byte in the first blocks. Returns False if the source is empty."""
        for position in _STARTS:
            reached = await self._probe(position)
            if reached:
                self._low = position + 1
            if reached is not None:
                break  # else the process cannot read this byte
        if not reached and self._failure is not None:
            raise self._failure
        return bool(reached)

    async def _ends_at(self, size: int) -> bool:
        """Return whether the source has exactly `size` bytes, be the last one readable or not."""
        return await self._probe(size) is False and await self._probe(size - 1) is not False

    async def _probe(self, position: int) -> bool | None:
        """Return whether the source has a byte at `position`. Returns None if the process exits at the request."""
        try:
            return (await self.client.reaches([position]))[0]
        except SourceError as error:
            if isinstance(error, ProtocolViolationError) or self.client.unanswered is None:
                raise  # it is not the exit of a program at a request
            self._failure = self._failure or error
            self.client = await self._connect()
            return None

    def _next_positions(self) -> list[int]:
        """Return a list of the positions to ask for next, ascending, within the limits found so far."""
        low, high = self._low, self._high
        if high == MAX_POSITION:
            return [min(low * _POSITIONS, high - 1)]
        if self._exited:
            first, last = low // _SECTOR + 1, high // _SECTOR
            if first <= last:
                return [(first + last) // 2 * _SECTOR - 1]
            if low % _SECTOR == 0:
                return [low]
        return list(range(low, high, -(-(high - low) // _POSITIONS)))

    async def _ask(self, positions: list[int]) -> None:
        """Ask for the bytes at `positions`, ascending, and narrow the limits by the answers."""
        try:
            answers = await self.client.reaches(positions)
        except ProtocolViolationError:
            raise
        except SourceError:
            # If the source is a block device, it ends before the last of the positions.
            self._exited = True
            self._high = min(self._high, positions[-1] - 1)
            self.client = await self._connect()
            return
        for position, reached in zip(positions, answers, strict=True):
            if reached:
                self._low = max(self._low, position + 1)
            else:
                self._high = min(self._high, position)
        if self._high < self._low:
            raise SourceError("the source changed its size during the search for it")
