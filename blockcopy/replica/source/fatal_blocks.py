"""Blocks at which every connection ends: found by asking for each block by itself.

A source may exit, or hang, at a block that it cannot read. The original program exits. Such a block must not keep
all others from being copied.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from blockcopy.block.geometry import Extent
from blockcopy.errors import BlockcopyError, SourceError
from blockcopy.replica.source.batches import Delta, Signatures, UnreadableBlock
from blockcopy.replica.source.connector import Connector

SUSPECT_AFTER, FATAL_AFTER = 2, 3
"""Connections that end by themselves at the same signatures.

After the first number, each block is asked for by itself. A block that ended the second number of connections
counts as one that the source cannot read.
"""

_MAX_FATAL = 64
"""Blocks that may be found unreadable so. Each costs connections: a source that is bad all over would take for
ever.
"""


class FatalError(SourceError):
    """Connection after connection ended at the same signatures."""


async def ask_each(
    blocks: Sequence[Signatures], ask: Callable[[Signatures], Awaitable[Delta]], connector: Connector
) -> Delta:
    """Ask about `blocks`, signatures of one block each, one by one. Returns the Delta of all.

    A block that ends connection after connection counts as unreadable.
    `ask`: awaited with the signatures of a block, returns its Delta or raises FatalError.
    `connector`: counts the blocks that are found so.
    Raises SourceError if there are too many, and what `ask` raises.
    """
    delta = Delta([], [], [])
    errors: list[BlockcopyError] = []

    async def add(block: Signatures) -> None:
        try:
            found = await ask(block)
        except FatalError as error:
            found = Delta([], [], [UnreadableBlock(Extent(block.position, block.length), str(error))])
            connector.fatal_blocks += 1
            if connector.fatal_blocks > _MAX_FATAL:
                errors.append(SourceError(f"the source ended at more than {_MAX_FATAL} blocks: {error}"))
        except BlockcopyError as error:
            errors.append(error)
            return
        delta.data.extend(found.data)
        delta.zeros.extend(found.zeros)
        delta.unreadable.extend(found.unreadable)

    async with trio.open_nursery() as nursery:
        for block in blocks:
            nursery.start_soon(add, block)
    if errors:
        raise errors[0]
    return delta
