"""Prometheus: promtool and the server, from Debian's package. It is unpacked into the cache, and not installed."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moving.environment import CACHE

START_SECONDS = 60


def found(cache: Path = CACHE) -> Path | None:
    """Return the folder of promtool and prometheus. Returns None if neither this machine nor `cache` has them."""
    folder = cache / "prometheus" / "usr" / "bin"
    if (folder / "promtool").exists():
        return folder
    promtool = shutil.which("promtool")
    return Path(promtool).parent if promtool else None


def fetch(cache: Path = CACHE) -> Path | None:
    """Unpack Debian's package into `cache`, unless that was done. Returns the folder, or None if that fails."""
    folder = found(cache)
    if folder is not None or shutil.which("apt-get") is None:
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name, contextlib.suppress(subprocess.CalledProcessError):
        words = ["apt-get", "download", "--quiet", "--option=APT::Sandbox::User=root", "prometheus"]
        subprocess.run(words, check=True, cwd=name, stdout=subprocess.DEVNULL)
        package = next(Path(name).glob("prometheus_*.deb"))
        subprocess.run(["dpkg-deb", "--extract", package, f"{name}/tree"], check=True)
        Path(name, "tree").rename(cache / "prometheus")
    return found(cache)


def openmetrics(samples: Iterable[dict[str, Any]], step: int = 5) -> str:
    """Return `samples` as one OpenMetrics text with times, as a scrape every `step` seconds would have seen them.

    `samples`: those of `moving.metrics`: each host's files as they were at a time.
    """
    families: dict[str, list[tuple[str, float, str]]] = {}
    files: dict[tuple[str, str], str] = {}
    ordered = sorted(samples, key=lambda each: each["time"])
    pending = iter([*ordered, None])
    sample = next(pending)
    now, end = int(ordered[0]["time"]), ordered[-1]["time"] + 3 * step
    while now <= end:
        while sample is not None and sample["time"] <= now:
            files[sample["host"], sample["file"]] = sample["text"]
            sample = next(pending)
        for (host, _file), text in files.items():
            for line in text.splitlines():
                if line.startswith("#"):
                    continue
                series, value = line.rsplit(" ", 1)
                name, labels = series.split("{", 1)
                families.setdefault(name, []).append((f'{{instance="{host}",{labels}', now, value))
        now += step
    lines = []
    for name, rows in families.items():
        family, kind = (name.removesuffix("_total"), "counter") if name.endswith("_total") else (name, "gauge")
        lines.append(f"# TYPE {family} {kind}")
        rows.sort()
        lines += [f"{name}{labels} {value} {at}" for labels, at, value in rows]
    return "\n".join([*lines, "# EOF", ""])


class Server:
    """A Prometheus on loopback that holds `text`, in OpenMetrics with times. Leave the context to end it."""

    def __init__(self, programs: Path, text: str) -> None:
        self._programs, self._text = programs, text

    def __enter__(self) -> Server:
        self._stack = contextlib.ExitStack()
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "metrics").write_text(self._text)
            (folder / "config.yml").write_text("global: {}\n")
            words = ["tsdb", "create-blocks-from", "openmetrics", folder / "metrics", folder / "data"]
            subprocess.run([self._programs / "promtool", *words], check=True, capture_output=True)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._address = f"127.0.0.1:{free.getsockname()[1]}"
            options = {"config.file": folder / "config.yml", "storage.tsdb.path": folder / "data"}
            options |= {"web.listen-address": self._address, "storage.tsdb.retention.time": "10y"}
            # A real scrape marks what has vanished. These samples do not, so they count for a moment only.
            options["query.lookback-delta"] = "12s"
            words = [self._programs / "prometheus", *(f"--{name}={value}" for name, value in options.items())]
            log = self._stack.enter_context((folder / "log").open("wb"))
            process = subprocess.Popen(words, stdout=log, stderr=log)
            self._stack.callback(process.wait)
            self._stack.callback(process.terminate)
            end = time.monotonic() + START_SECONDS
            while not self._ready() and time.monotonic() < end and process.poll() is None:
                time.sleep(0.1)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self._get("/-/ready", {}) is not None)
        return False

    def _get(self, path: str, query: dict[str, object]) -> bytes:
        url = f"http://{self._address}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bytes(answer.read())

    def range(self, expr: str, start: float, end: float, step: int) -> Iterator[tuple[dict[str, str], list[Any]]]:
        """Evaluate `expr` from `start` to `end` (Unix times), each `step` seconds.

        Yields the labels of each series, and its pairs of time and value.
        """
        answer = self._get("/api/v1/query_range", {"query": expr, "start": start, "end": end, "step": step})
        for each in json.loads(answer)["data"]["result"]:
            yield each["metric"], [(at, float(value)) for at, value in each["values"]]
