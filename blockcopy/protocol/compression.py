"""Which compression a client wants for the source's answers, as an option and in a greeting. Expands frames."""

from __future__ import annotations

from typing import Any, NamedTuple

from blockcopy.block.buffers import Buffer
from blockcopy.protocol import wire, xz, zstd


class CompressionSpec(NamedTuple):
    """The wanted compression: `method` "none", "zstd" or "auto", and the zstd `level`.

    "auto" is zstd as long as compressing costs less time than sending.
    """

    method: str = "none"
    level: int = zstd.DEFAULT_LEVEL

    @classmethod
    def parse(cls, text: str) -> CompressionSpec:
        """Return the CompressionSpec that `text` names: "none", "auto", "zstd" or "zstd:LEVEL".

        Raises ValueError for other text.
        """
        method, _, level = text.partition(":")
        if method == "zstd" and level.isdecimal() and int(level) in zstd.LEVELS:
            return cls(method, int(level))
        if text in ("none", "auto", "zstd"):
            return cls(text)
        first, last = zstd.LEVELS[0], zstd.LEVELS[-1]
        raise ValueError(f"{text!r} is neither zstd, zstd:{first} to zstd:{last}, auto nor none")

    def __str__(self) -> str:
        """Return the text that `parse()` reads."""
        return f"zstd:{self.level}" if self.method == "zstd" else self.method

    @classmethod
    def from_greeting(cls, fact: object) -> CompressionSpec:
        """Return the CompressionSpec for `fact`, the value of `compress` in a client's greeting (see `wire`).

        Unknown values mean "none".
        """
        if not isinstance(fact, dict) or fact.get("name") != "zstd":
            return cls()
        level = fact.get("level")
        if type(level) is not int:
            level = zstd.DEFAULT_LEVEL
        return cls("auto" if fact.get("auto") else "zstd", min(max(level, zstd.LEVELS[0]), zstd.LEVELS[-1]))

    def to_greeting(self) -> dict[str, Any] | None:
        """Return the dict that is the value of `compress` in a client's greeting.

        Returns None if the method is "none", or if this host has no zstd.
        """
        if self.method == "none" or not zstd.available():
            return None
        return {"name": "zstd", "level": self.level, "auto": self.method == "auto"}

    def check_available(self) -> None:
        """Raise BlockcopyError if the method is "zstd" and this host has no zstd."""
        if self.method == "zstd":
            zstd.check_available()


NO_COMPRESSION = CompressionSpec()
"""The spec "none"."""


def expand(frame: wire.Frame) -> Buffer:
    """Return the source's bytes in `frame`. Raises as `xz.expand()` and `zstd.expand()` do."""
    if isinstance(frame, wire.XzData):
        return xz.expand(frame)
    return zstd.expand(frame) if isinstance(frame, wire.ZstdData) else frame.payload
