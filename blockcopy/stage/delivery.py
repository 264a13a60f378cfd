"""How the source's answers leave a `retrieve`: over one stream in order, or as `push` wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple

from blockcopy.protocol.handshake import ClientGreeting
from blockcopy.stage.streams import Output, OutputStream


class Answer(NamedTuple):
    """The frames that answer some requests."""

    frames: Sequence[Output]
    release: Callable[[], None]
    """To be called without arguments once the frames need their buffer no more."""
    again: Callable[[], Answer] | None
    """Called without arguments, examines the source again and returns the same Answer.

    None if the order matters: all earlier answers must arrive first."""
    end: int = 0
    """The offset behind the last requested byte. 0 if no bytes were requested."""


class Delivery:
    """Delivery of all answers over one OutputStream. The base class of other ways. Call from one thread only."""

    def __init__(self, output: OutputStream) -> None:
        """Deliver over `output`."""
        self._output = output

    @property
    def seconds_per_byte(self) -> float:
        """Recent time of writing one byte. Small if the streams have room, else the pace of a slow reader."""
        return self._output.seconds_per_byte

    def greeted(self, greeting: ClientGreeting) -> None:
        """Take note of the `greeting` of the client. Called in any thread."""

    def fenced(self) -> None:
        """Take note that the client has sent a fence. Called in any thread."""

    def deliver(self, answer: Answer) -> None:
        """Send `answer`. Raises OutputError if that fails."""
        self._output.write(answer.frames)
        answer.release()

    def close(self) -> None:
        """Release all that the delivery needs. The descriptor of the output stays open."""
        self._output.release()
