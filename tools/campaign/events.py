"""The events of a round. After each event the round has a mount."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

from campaign.ground import WrongError, until
from campaign.rounds import COMPLETION_LIMIT, FAULTY, READERS, TIMEOUT, Round


@contextlib.contextmanager
def unmounted(a: Round) -> Iterator[None]:
    """Unmount or kill the mount, run the block, and mount again."""
    a.down(kill=a.choose.random() < 0.5)
    yield
    a.up()


def remount(a: Round, *, kill: bool) -> None:
    """Mount again after an unmount, or after a SIGKILL if `kill`."""
    a.down(kill=kill)
    a.up()


def kill_source(a: Round) -> None:
    """Kill one of the retrieve processes, and not its link."""
    found = [pid for pid, words in a.others().items() if words[2:5] == ["-m", "blockcopy", "retrieve"]]
    if found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(a.choose.choice(sorted(found)), signal.SIGKILL)


def damage_state(a: Round) -> None:
    """Unmount, truncate the state file or flip one of its bits, and mount again."""
    with unmounted(a):
        if a.state.exists() and (data := bytearray(a.state.read_bytes())):
            at = a.choose.randrange(len(data))
            if a.choose.random() < 0.5:
                os.truncate(a.state, at)
            else:
                data[at] ^= 1 << a.choose.randrange(8)
                a.state.write_bytes(data)


def replace_source(a: Round) -> None:
    """Unmount, put another file in place of the source, and mount again."""
    with unmounted(a):
        a.stop_readers()  # they expect the bytes of the old source
        a.ends.replace_source()
        # A mount that cannot reach its source rightly serves the recorded blocks, which are the old source's.
        until(lambda: time.monotonic() > a.calm_at, "the link")


def rewrite_source(a: Round) -> None:
    """Unmount, change the source and set its mtime back, and mount again."""
    with unmounted(a):
        a.stop_readers()
        a.ends.rewrite_source()
        until(lambda: time.monotonic() > a.calm_at, "the link")


GREETINGS = [
    "exec head -c 300 /dev/urandom",
    "exec cat",
    *(
        f'exec {FAULTY} --hello {shlex.quote(json)} "$@"'
        for json in ('{"digest": []}', '{"size": "large"}', f'{{"more": {"[" * 900}{"]" * 900}}}')
    ),
]
"""Commands of the source's host whose output is no valid greeting."""


def garble(a: Round) -> None:
    """Answer new connections with an invalid greeting for a moment, and kill a retrieve process."""
    a.disturb(a.instead, a.choose.uniform(0.5, 2), a.choose.choice(GREETINGS))
    kill_source(a)


def bad_block(a: Round) -> None:
    """Unmount, sync from a source with an unreadable block, and mount again.

    Raises WrongError unless the sync fails and every other block is equal.
    """
    with unmounted(a):
        until(lambda: time.monotonic() > a.calm_at, "the link")
        different = a.ends.different(but_zeros=True)
        if not different:
            return
        bad = a.choose.choice(different)
        a.instead.write_text(f'exec {FAULTY} --fail-for {bad} "$@"')
        status = a.wait_for(a.popen(*a.command("sync")), "`blockcopy sync`", range(126), COMPLETION_LIMIT)
        a.instead.unlink()
        if status == 0 or (left := a.ends.different()) != [bad]:
            raise WrongError(f"sync with a bad block at {bad}: exit status {status}, {len(left)} blocks differ")


def remount_unread(a: Round) -> None:
    """Mount again with a standard error that nobody reads."""
    a.down(kill=a.choose.random() < 0.5)
    a.up(unread=True)


def sync(a: Round) -> None:
    """Unmount, run `sync` for a moment, and mount again."""
    with unmounted(a):
        process = a.popen(*a.command("sync"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(a.choose.uniform(0.1, 0.8))
        signum = a.choose.choice([signal.SIGTERM, signal.SIGKILL])
        process.send_signal(signum)
        a.wait_for(process, "`blockcopy sync`", {0, -signum, 3 if time.monotonic() < a.calm_at else 0})
        a.await_no_others()


def kill_reader(a: Round) -> None:
    """Kill a reader, and start another."""
    a.stop_readers([a.choose.randrange(READERS)])
    a.start_readers()


def prefetch(a: Round) -> None:
    """Prefetch one to three random ranges."""
    offsets = [a.choose.randrange(a.ends.size) for _ in range(a.choose.randint(1, 3))]
    a.prefetch(*(f"{offset}:{a.choose.choice([1, 4096, 3_000_000])}" for offset in offsets))


EVENTS: dict[str, tuple[int, Callable[[Round], object]]] = {
    "kill the source": (4, kill_source),
    "cut": (4, lambda a: a.disturb(a.cut, a.choose.uniform(0.1, 1))),
    "freeze": (4, lambda a: a.disturb(a.frozen, a.choose.choice([0.1, 0.3, 0.6, 1, 1, TIMEOUT + 0.5]))),
    "kill the mount": (3, lambda a: remount(a, kill=True)),
    "remount": (2, lambda a: remount(a, kill=False)),
    "damage the state": (2, damage_state),
    "replace the source": (2, replace_source),
    "set the mtime back": (2, rewrite_source),
    "bad block": (1, bad_block),
    "trickle": (2, lambda a: a.disturb(a.trickling, a.choose.choice([0.3, 1, TIMEOUT + 0.5]))),
    "garble the greeting": (2, garble),
    "stderr unread": (2, remount_unread),
    "sync instead": (2, sync),
    "kill a reader": (2, kill_reader),
    "pause": (1, lambda a: a.blockcopy("pause", a.point)),
    "resume": (1, lambda a: a.blockcopy("resume", a.point)),
    "limit": (2, lambda a: a.blockcopy("limit", a.point, a.choose.choice(["4M", "16M", "64M", "none"]))),
    "prefetch": (2, prefetch),
    "fsync": (2, lambda a: a.wait_for(a.popen("sync", "--data", a.file), "the sync of the file")),
}
"""The relative frequency and the function of each event."""
