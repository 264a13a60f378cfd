"""The greetings of the agreed form (see `wire`): how they are made, and the only place that believes them.

mount, sync, verify, receive  ── greeting_of_asker ──►  retrieve: `digest_for`, `compression.wish_of`
                              ◄─ greeting_of_source ──
`read_source`
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from blockcopy import __version__
from blockcopy.block.identity import Identity, is_identity
from blockcopy.errors import StreamError
from blockcopy.protocol import digests, wire
from blockcopy.protocol.digests import ORIGINAL

_MOST_SHOWN = 500
"""Characters of a greeting in a message."""


class SourceGreeting(NamedTuple):
    """The believed facts of a source: its `identity`, and the name of the `digest` it chose."""

    identity: Identity
    digest: str


def greeting_of_asker(offered: Mapping[str, float], compress: Mapping[str, Any] | None) -> bytes:
    """Return the greeting of the end that asks, which has the `offered` digests, with their speeds in MB/s."""
    facts: dict[str, Any] = {"digests": dict(offered)}
    if compress:
        facts["compress"] = dict(compress)
    return wire.encode(_greeting(facts))


def greeting_of_source(identity: Identity, digest: str, compress: str) -> bytes:
    """Return the answer to a greeting."""
    return wire.encode(_greeting({"digest": digest, "compress": compress, "identity": identity}))


def _greeting(facts: dict[str, Any]) -> wire.Hello:
    return wire.Hello({"protocol": wire.PROTOCOL, "program": f"blockcopy {__version__}", **facts})


def read_source(message: wire.Message | None, offered: Collection[str]) -> SourceGreeting:
    """Return the facts of a source's greeting. Raises StreamError if they cannot be agreed to.

    `offered`: names of the digests that this end has offered.
    """
    facts = message.facts if isinstance(message, wire.Hello) else {}
    identity, name = facts.get("identity"), facts.get("digest")
    if isinstance(identity, dict) and is_identity(identity) and isinstance(name, str) and name in offered:
        return SourceGreeting(identity, name)
    raise StreamError(f"no agreement with the source's {json.dumps(facts)[:_MOST_SHOWN]}")


def digest_for(facts: Mapping[str, Any]) -> str:
    """Return the name of the digest that suits both ends, of those that an asker offers in its greeting.

    Raises StreamError if there is none in common.
    """
    offered = facts.get("digests")
    if offered is None:
        return ORIGINAL
    there = offered if isinstance(offered, dict) else {}
    usable = {name: speed for name, speed in there.items() if type(speed) in (int, float) and speed > 0}
    name = digests.choose(digests.speeds(), usable)
    if name is None:
        has = ", ".join(digests.speeds())
        raise StreamError(f"`helo` without a digest that both ends have; this one has {has}")
    return name
