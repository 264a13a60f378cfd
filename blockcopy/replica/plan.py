"""A plan of a replica: what is copied, to where, and how long anybody waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from subprocess import Popen

from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.transport.command import Command


@dataclass(frozen=True)
class Plan:
    """A copy to be made: with `read_stats` it is read meanwhile, with `hydrate` the full pass runs.

    Times are in seconds. `timeout`: a connection that makes no progress for so long, while it is asked, is
    started again. `reconnect_timeout`: who reads, or who is there for the pass alone, waits so long
    for the source. `read_timeout`: no read may take longer, whatever happens.
    """

    command: Command
    destination: str
    started: list[Popen[bytes]] = field(default_factory=list)
    """A process of `command` that was started already, if any; out of the list once it is put to use."""
    demand: bool = True
    hydrate: bool = True
    force: bool = False
    keep_state: bool = True
    state: str | None = None
    """The state file; where it belongs if None."""
    recheck: bool = False
    may_be_away: bool = False
    """Begin with what is recorded where the source cannot be reached."""
    timeout: float = 30
    reconnect_timeout: float = 60
    read_timeout: float = math.inf
    prompts: bool = False
    """There is a terminal, where ssh may ask for a password: once at a time, and without haste."""
    limit: int | None = None
    verify: bool = False
    compression: CompressionSpec = NO_COMPRESSION
    """The compression that the source is asked for, as in `wire`."""
    sparse: bool = True
    """Zeros are written as holes where that can be."""
    metrics: str | None = None
    """The file that Prometheus is told by."""
    on_complete: str | None = None
    """A command line for the shell, once the copy is complete."""

    def max_wait(self, blocks: int) -> float:
        """Return the most seconds that a read waits for so many blocks, whatever the source does meanwhile.

        Each block has the time in which a slow link must make progress.
        """
        return min(self.read_timeout, self.reconnect_timeout + self.timeout * blocks)
