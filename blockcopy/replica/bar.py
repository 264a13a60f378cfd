"""The progress bar of `sync` and `mount -f`, for a terminal."""

from __future__ import annotations

from typing import NoReturn, TextIO

import trio
from tqdm import tqdm

from blockcopy.replica.replica import Replica
from blockcopy.replica.status import human_size

_SECONDS = 0.2

_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


async def show(replica: Replica, stream: TextIO) -> None:
    """Draw until the replica is settled, or the caller cancels."""
    snapshot = replica.snapshot()
    with tqdm(
        total=snapshot["size"],
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=stream,
        bar_format=_FORMAT,
        dynamic_ncols=True,
    ) as bar:
        try:
            while not replica.settled.is_set():
                _draw(bar, replica)
                with trio.move_on_after(_SECONDS):
                    await replica.settled.wait()
        finally:
            _draw(bar, replica)


def _draw(bar: tqdm[NoReturn], replica: Replica) -> None:
    snapshot = replica.snapshot()
    bar.n = snapshot["hydrated_bytes"]
    # tqdm rounds its percentage up to 100; this one is floored.
    bar.set_description_str(f"{snapshot['hydrated_percent']:6.2f} % ", refresh=False)
    bar.set_postfix_str(
        f"equal {human_size(snapshot['same_bytes'])}, fetched {human_size(snapshot['fetched_bytes'])}",
        refresh=False,
    )
    bar.refresh()
