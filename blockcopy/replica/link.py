"""Starts the retrieve processes of one source, settles the form they are asked in, and finds its size.

Ours says its size when greeted. The original ends at the first command that it does not know; it is
started again then, and asked in its own form.
"""

from __future__ import annotations

from functools import partial

import trio

from blockcopy.errors import OriginalProgramError, SourceError
from blockcopy.remote import Command
from blockcopy.replica.retriever import Retriever
from blockcopy.replica.sizing import SizeSearch


async def connect(
    command: Command, nursery: trio.Nursery, *, connections: int, guess: int
) -> tuple[list[Retriever], int]:
    """So many retrievers of the source, started side by side in `nursery`, and its size in bytes.

    `guess` is the size that the search tries first. SourceError where it cannot be reached or does not tell.
    """

    async def start(*, original: bool) -> Retriever:
        retriever = Retriever(command, original=original)
        await nursery.start(retriever.run)
        return retriever

    retrievers = [await start(original=False) for _ in range(connections)]
    try:
        size, *others = [await retriever.greet() for retriever in retrievers]
        if any(other != size for other in others):
            raise SourceError(f"{command.source} changed its size while it was being opened")
    except OriginalProgramError:
        async with trio.open_nursery() as closing:
            for retriever in retrievers:
                closing.start_soon(retriever.close)
        retrievers = [await start(original=True) for _ in range(connections)]
        search = SizeSearch(retrievers[0], partial(start, original=True))
        size = await search.find(guess)
        retrievers[0] = search.retriever
    for retriever in retrievers:
        retriever.quiet = False  # what it dies of from now on is told by nobody else
    return retrievers, size
