"""Starts the retrieve processes of one source, and finds its size."""

from __future__ import annotations

import trio

from blockcopy.remote import Command
from blockcopy.replica.retriever import Retriever
from blockcopy.replica.sizing import SizeSearch


async def connect(
    command: Command, nursery: trio.Nursery, *, connections: int, guess: int
) -> tuple[list[Retriever], int]:
    """So many retrievers of the source, started side by side in `nursery`, and its size in bytes.

    `guess` is the size that is tried first. SourceError where it cannot be reached or does not tell.
    """

    async def start() -> Retriever:
        retriever = Retriever(command)
        await nursery.start(retriever.run)
        return retriever

    retrievers = [await start() for _ in range(connections)]
    search = SizeSearch(retrievers[0], start)
    size = await search.find(guess)
    retrievers[0] = search.retriever
    for retriever in retrievers:
        retriever.quiet = False  # what it dies of from now on is told by nobody else
    return retrievers, size
