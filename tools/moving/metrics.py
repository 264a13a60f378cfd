"""The metrics of all machines of a campaign, sampled as a Prometheus would scrape them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moving.fleet import Fleet

SECONDS = 2


class Sampler:
    """Reads the files of all `--metrics` of a fleet every two seconds, and keeps what changed."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._ended = threading.Event()
        self._last: dict[Path, float] = {}
        self._lock = threading.Lock()
        self.samples: list[dict[str, object]] = []
        """Each has `time`, `host`, `file`, `mtime` and `text`."""

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._ended.wait(SECONDS):
            self.sample()

    def sample(self) -> None:
        """Read what changed since the last time."""
        with self._lock:
            for name, machine in self._fleet.machines.items():
                for path in (machine.folder / "lib" / "metrics").glob("*.prom"):
                    with contextlib.suppress(OSError):
                        mtime = path.stat().st_mtime
                        if self._last.get(path) != mtime:
                            self._last[path] = mtime
                            text = path.read_text()
                            self.samples.append(
                                {"time": time.time(), "host": name, "file": path.name, "mtime": mtime, "text": text}
                            )

    def save(self, path: Path) -> None:
        """Write the samples to `path`, as one JSON object a line."""
        path.write_text("".join(json.dumps(each) + "\n" for each in self.samples))
