"""The handshake of the negotiated form (see `wire`). Only this module makes and believes greetings.

client                                                     source
Handshake.greeting   ── digests, compress ──►              read_client
Handshake.read       ◄── digest, compress, identity ──     source_greeting
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from blockcopy import __version__
from blockcopy.block.identity import Identity, is_identity
from blockcopy.errors import StreamError
from blockcopy.protocol import digests, wire
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.protocol.digests import ORIGINAL

_MAX_SHOWN = 500
"""Characters of a greeting in a message."""


class SourceGreeting(NamedTuple):
    """The believed facts of a source: its `identity`, and the name of the `digest` it chose.

    `join`: the token with which further connections join this one, or None.
    """

    identity: Identity
    digest: str
    join: str | None = None


class Handshake:
    """The client's side: offers digests and a compression, and believes the source's answers or refuses them."""

    def __init__(
        self,
        compression: CompressionSpec = NO_COMPRESSION,
        *,
        digest: str | None = None,
        connections: int = 1,
        join: str | bool = False,
    ) -> None:
        """Offer all digests of this host, or only the one called `digest`. Ask the source for `compression`.

        `connections`: how many connections share the source's CPUs. `join`: the token of further connections.
        True asks the source for a token of its own.
        """
        self.offered: Mapping[str, float] = {digest: 1} if digest else digests.speeds()
        """The digests that the source may choose: a mapping, name → bytes per second here."""
        facts: dict[str, Any] = {"digests": dict(self.offered)}
        if fact := compression.to_greeting():
            facts["compress"] = fact
        if connections > 1:
            facts["connections"] = connections
        if join:
            facts["join"] = join
        self.greeting = _encode(facts)
        """Bytes that open the hash stream. Sent again later, they make the source greet again."""

    def read(self, message: wire.Message | None) -> SourceGreeting:
        """Return the SourceGreeting in `message`. Every later greeting must choose the same digest.

        `message`: first message of the source, or a later Hello. None if there is no message.

        Raises StreamError if `message` is no greeting, has no valid identity, or chooses no offered digest.
        """
        facts = message.facts if isinstance(message, wire.Hello) else {}
        identity, name = facts.get("identity"), facts.get("digest")
        if isinstance(identity, dict) and is_identity(identity) and isinstance(name, str) and name in self.offered:
            self.offered = {name: self.offered[name]}
            return SourceGreeting(identity, name, _token(facts.get("join")))
        raise StreamError(f"no agreement with the source's greeting {json.dumps(facts)[:_MAX_SHOWN]}")


class ClientGreeting(NamedTuple):
    """The believed wishes of a client: the name of the `digest`, the `compression`, and its `connections`.

    `join`: the token with which answers may come over further connections, or None.
    `wants_token`: whether the client asks for a token, because it may open further connections.
    """

    digest: str
    compression: CompressionSpec
    connections: int
    join: str | None = None
    wants_token: bool = False


def read_client(hello: wire.Hello) -> ClientGreeting:
    """Return the ClientGreeting in the client's `hello`. Raises StreamError if there is no common digest."""
    spec = CompressionSpec.from_greeting(hello.facts.get("compress"))
    offered, connections = hello.facts.get("digests"), hello.facts.get("connections")
    count = connections if type(connections) is int and connections > 0 else 1
    join = hello.facts.get("join")
    token, wants_token = _token(join), join is True
    if offered is None:
        return ClientGreeting(ORIGINAL, spec, count, token, wants_token)
    remote = offered if isinstance(offered, dict) else {}
    usable = {name: speed for name, speed in remote.items() if type(speed) in (int, float) and speed > 0}
    name = digests.choose(digests.speeds(), usable)
    if name is None:
        has = ", ".join(digests.speeds())
        raise StreamError(f"`helo` without a digest that both ends have; this one has {has}")
    return ClientGreeting(name, spec, count, token, wants_token)


def source_greeting(identity: Identity, digest: str, compression: str, join: str | None = None) -> bytes:
    """Return the source's answer to a greeting, as bytes for the block stream.

    `identity`: the source's Identity. `digest`: name of the chosen digest. `compression`: "zstd" or "none".
    `join`: the token with which further connections join this one, or None.
    """
    facts: dict[str, Any] = {"digest": digest, "compress": compression, "identity": identity}
    if join is not None:
        facts["join"] = join
    return _encode(facts)


def _token(fact: object) -> str | None:
    """Return the token in `fact`, the value of `join` in a greeting. Returns None if it is no token."""
    return fact if isinstance(fact, str) and re.fullmatch("[0-9a-f]{32}", fact) else None


def _encode(facts: dict[str, Any]) -> bytes:
    return wire.encode(wire.Hello({"protocol": wire.PROTOCOL, "program": f"blockcopy {__version__}", **facts}))
