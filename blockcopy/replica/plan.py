"""The plan of a replica: what is copied, to where, and how long anybody waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from subprocess import Popen

from blockcopy.block.geometry import Extent, Geometry, join_extents
from blockcopy.errors import UsageError
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.transport.command import Command


@dataclass(frozen=True)
class Plan:
    """A copy to make, with all options of `mount` or `sync`. Times are in seconds."""

    command: Command
    """The command that runs `retrieve` at the source."""
    destination: str
    """The path of the destination, absolute."""
    started: list[Popen[bytes]] = field(default_factory=list)
    """A process of `command` that was started early, or none. Whoever uses the process removes it from the list."""
    demand: bool = True
    """Serve reads during the copy, over a link of their own."""
    hydrate: bool = True
    """Run background hydration."""
    force: bool = False
    """Use the destination even if it cannot be claimed: it may be mounted, in use or locked."""
    overwrite: bool = False
    """Overwrite a file system, partition table or the like that the source has not."""
    keep_state: bool = True
    """Write a state file, so that a later run can resume."""
    state: str | None = None
    """The path of the state file. None: its default place."""
    recheck: bool = False
    """Ignore what an earlier run has recorded, and check every block."""
    extents: tuple[Extent, ...] = ()
    """The byte ranges to copy, in whole blocks. Empty: the whole device."""
    writable: bool = False
    """Accept writes of a user, and preserve those of earlier runs."""
    resume_offline: bool = False
    """Start from the state file if the source cannot be reached."""
    timeout: float = 30
    """A connection is replaced if it makes no progress for so long while a request is open."""
    reconnect_timeout: float = 60
    """A read fails if the source is away for so long. `sync` fails too."""
    read_timeout: float = math.inf
    """No read takes longer, whatever happens."""
    prompts: bool = False
    """Whether ssh may ask for a password at a terminal. Then connections open one by one, and without haste."""
    connections: int | None = None
    """The number of connections for background hydration, and the most for readers. None: as many as pay."""
    limit: int | None = None
    """The rate limit of background hydration in bytes per second, or None."""
    verify: bool = False
    """Compare all blocks once more before the copy counts as complete."""
    compression: CompressionSpec = NO_COMPRESSION
    """The compression to request from the source."""
    sparse: bool = True
    """Write zeros as holes if the destination can have holes."""
    metrics: str | None = None
    """The path of the file for Prometheus, or None."""
    on_complete: str | None = None
    """The shell command to run once the copy is complete, or None."""

    def blocks_to_copy(self, geometry: Geometry) -> list[range]:
        """Return the blocks of `geometry` that are wanted: ranges of block numbers, ascending, none of them empty.

        Raises UsageError if a byte range of the attribute `extents` lies beyond the end.
        """
        spans = [geometry.span(*each) for each in self.extents or [Extent(0, geometry.size)]]
        for extent, span in zip(self.extents, spans, strict=False):
            if not span:
                raise UsageError(
                    f"the range {extent.offset}:{extent.length} is empty: the source has {geometry.size} bytes"
                )
        joined = join_extents(sorted(Extent(span.start, len(span)) for span in spans))
        return [range(each.offset, each.end) for each in joined]

    def max_wait(self, blocks: int) -> float:
        """Return the most seconds that a read of a number of `blocks` waits, whatever the source does.

        Each block gets the time in which a slow link must make progress.
        """
        return min(self.read_timeout, self.reconnect_timeout + self.timeout * blocks)
