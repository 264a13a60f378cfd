"""Relay TCP connections to a port of this host, over a line with a round trip and a rate. A program of its own.

    relay.py PORT ROUND_TRIP [RATE]     milliseconds; bytes per second each way, of all connections together

Prints the port on which it listens, and runs until a signal ends it. Each byte takes half of the round trip.
A new connection first waits for the round trip of its handshake.

The line has a queue, as a router's: QUEUE seconds of its rate. If the queue is full, the relay reads no more.
The receive buffer is small then, so that nothing waits elsewhere: latency under load is a real line's.
There is no loss, and no slow start.

The relay shares its CPUs with what is measured. So bytes move by splice(2) through pipes, without a copy, and
the relay wakes up once a TICK at most.
"""

from __future__ import annotations

import math
import mmap
import select
import socket
import sys
import time
from collections import deque

HOST = "127.0.0.1"
QUEUE = 0.05
"""Seconds."""

TICK = 0.001
"""Seconds between two wake-ups if the round trip is long. See `tick`."""

MAX_HELD = 64 << 20
"""Bytes of one direction of a connection that the relay holds."""

RECEIVE_BUFFER = 256 << 10
"""Bytes of a socket's receive buffer before a line with a rate. The kernel uses about half of it for data."""


class Line:
    """One direction of the line, which all connections share."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._piece = max(1500, int(rate * 2 * TICK)) if rate < math.inf else MAX_HELD
        self._busy_until = 0.0

    def room(self, now: float) -> int:
        """Return how many bytes the queue admits at the time `now`, which is 0 if the queue is full."""
        return self._piece if self.free_at() <= now else 0

    def free_at(self) -> float:
        """Return the time from which the queue admits bytes."""
        return self._busy_until - QUEUE + self._piece / self._rate

    def send(self, size: int, now: float) -> float:
        """Put `size` bytes at the end of the queue at the time `now`. Return when the last of them has left."""
        self._busy_until = max(self._busy_until, now) + size / self._rate
        return self._busy_until


class Way:
    """One direction of a connection: from the socket `source` to the socket `sink`, through a ring of bytes."""

    def __init__(self, source: socket.socket, sink: socket.socket, line: Line, delay: float, opened: float) -> None:
        """`delay`: seconds of a byte. `opened`: the time before which nothing is sent."""
        self._source, self._sink, self._line = source, sink, line
        self._delay, self._opened = delay, opened
        self._ring = memoryview(mmap.mmap(-1, MAX_HELD))
        self._first = self._held = 0  # the oldest byte, and how many there are
        self._queue: deque[tuple[float, int]] = deque()  # time of arrival, bytes; 0 bytes are the end
        self.readable = self.writable = True
        """Whether the sockets may have bytes, or space. The edges of epoll set both."""
        self.ended = False

    def receive(self, now: float) -> bool:
        """Take what the source has and the line admits at the time `now`. Return whether anything was taken."""
        if not self._held:
            self._first = 0  # the memory that the caches may still have
        start = (self._first + self._held) % MAX_HELD
        room = min(self._line.room(now), MAX_HELD - self._held, MAX_HELD - start)
        if not self.readable or room <= 0:
            return False
        try:
            size = self._source.recv_into(self._ring[start : start + room])
        except BlockingIOError:
            self.readable = False
            return False
        self._queue.append((max(self._line.send(size, now), self._opened) + self._delay, size))
        self._held += size
        if not size:
            self.readable = False
        return size > 0

    def deliver(self, now: float) -> None:
        """Pass on what has arrived at the time `now`."""
        while self.writable and self._queue and self._queue[0][0] <= now:
            arrival, size = self._queue.popleft()
            if not size:
                self._sink.shutdown(socket.SHUT_WR)
                self.ended = True
                return
            while self._queue and self._queue[0][0] <= now and self._queue[0][1]:
                size += self._queue.popleft()[1]
            try:
                passed = self._sink.send(self._ring[self._first : self._first + size])
            except BlockingIOError:
                passed = 0
                self.writable = False
            self._first = (self._first + passed) % MAX_HELD
            self._held -= passed
            if passed < size:
                self._queue.appendleft((arrival, size - passed))

    def next_time(self) -> float:
        """Return the time at which this direction has something to do without an event."""
        arrival = self._queue[0][0] if self._queue and self.writable else math.inf
        return min(arrival, self._line.free_at()) if self.readable and self._held < MAX_HELD else arrival

    def close(self) -> None:
        """Close the source."""
        self._source.close()


class Relay:
    """A listening socket and its connections."""

    def __init__(self, port: int, round_trip: float, rate: float) -> None:
        """`port`: of this host. `round_trip`: seconds. `rate`: bytes per second."""
        self._port, self._delay, self._rate = port, round_trip / 2, rate
        self._tick = min(TICK, self._delay / 20)
        self._up, self._down = Line(rate), Line(rate)
        self._epoll = select.epoll()
        self._ways: dict[int, tuple[Way, Way]] = {}
        """By the number of a socket: the direction from that socket, and the direction to that socket."""
        self.listening = socket.create_server((HOST, 0), backlog=64)
        self.listening.setblocking(False)
        if rate < math.inf:  # accepted sockets inherit it
            self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._epoll.register(self.listening, select.EPOLLIN)

    def run(self) -> None:
        """Relay for ever."""
        turn = 0
        while True:
            now = time.monotonic()
            wake = min((way.next_time() for way, _ in self._ways.values()), default=math.inf)
            # select waits for microseconds, epoll for whole milliseconds
            select.select([self._epoll], [], [], None if wake == math.inf else max(0.0, wake - now))
            began, now = now, time.monotonic()
            if now - began < self._tick:
                time.sleep(self._tick - (now - began))
            now = time.monotonic()
            for number, events in self._epoll.poll(0):
                self._note(number, events)
            pairs = list(self._ways.items())
            turn += 1
            self._move(pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)] if pairs else [], now)

    def _note(self, number: int, events: int) -> None:
        """Note the events of the socket `number`."""
        if number == self.listening.fileno():
            self._accept()
        elif number in self._ways:
            outgoing, incoming = self._ways[number]
            if events & ~select.EPOLLOUT:
                outgoing.readable = not outgoing.ended
            if events & ~select.EPOLLIN:
                incoming.writable = True

    def _move(self, pairs: list[tuple[int, tuple[Way, Way]]], now: float) -> None:
        """Move bytes of the sockets `pairs` at the time `now`, a piece of each in turn."""
        lost = set()
        active = dict(pairs)
        while active:
            for number, (way, _) in list(active.items()):
                try:
                    if not way.receive(now):
                        del active[number]
                except OSError:
                    lost.add(number)
                    del active[number]
        for number, (way, back) in pairs:
            try:
                way.deliver(now)
            except OSError:
                lost.add(number)
            if way.ended and back.ended:
                lost.add(number)
        for number in lost:
            self._close(number)

    def _accept(self) -> None:
        client, _ = self.listening.accept()
        server = socket.socket()
        if self._rate < math.inf:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        try:
            server.connect((HOST, self._port))
        except OSError:
            client.close()
            server.close()
            return
        opened = time.monotonic() + 2 * self._delay
        up = Way(client, server, self._up, self._delay, opened)
        down = Way(server, client, self._down, self._delay, opened + self._delay)
        for each, ways in ((client, (up, down)), (server, (down, up))):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ways[each.fileno()] = ways
            self._epoll.register(each, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _close(self, number: int) -> None:
        """Close the connection of the socket `number`, if it is still open."""
        if number in self._ways:
            pair = self._ways[number]
            self._ways = {each: ways for each, ways in self._ways.items() if ways[0] not in pair}
            for way in pair:
                way.close()


def main() -> None:
    """Run the relay that the command line describes."""
    port, round_trip, *rate = sys.argv[1:]
    relay = Relay(int(port), float(round_trip) / 1000, float(rate[0]) if rate else math.inf)
    print(relay.listening.getsockname()[1], flush=True)
    relay.run()


if __name__ == "__main__":
    main()
