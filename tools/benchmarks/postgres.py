"""A PostgreSQL server on ext4 on a block device, as Debian installs it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.bench import Bench
from benchmarks.ground import BenchError

USER = "postgres"
IMAGE_MIB, NOISE_MIB = 768, 448
"""The image has a file of noise, so that hydration outlasts the benchmark."""


class Postgres:
    """A database of pgbench, in an image, and a server for copies of it."""

    def __init__(self, bench: Bench) -> None:
        """Choose the newest installed server."""
        self._bench = bench
        self._ground = bench.ground
        self._programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
        self._socket = bench.ground.name("postgres")
        self._socket.mkdir()
        shutil.chown(self._socket, USER)
        self._point = bench.ground.point()

    @staticmethod
    def lacking() -> str | None:
        """Return why no server can run here. Returns None if it can."""
        if os.geteuid() != 0:
            return "only root can mount ext4"
        if not list(Path("/usr/lib/postgresql").glob("*/bin/pgbench")):
            return "missing PostgreSQL (apt-get install postgresql)"
        return None

    def make_image(self) -> Path:
        """Create an image of ext4 with a database. Returns its path."""
        image = self._ground.name("image")
        data.noise(image, [], IMAGE_MIB << 20, 0)
        self._ground.output(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image])
        device = self._ground.attach(image)
        with self._mounted(device):
            data.noise(self._point / "noise", [(0, NOISE_MIB << 20)], NOISE_MIB << 20, self._bench.args.seed)
            shutil.chown(self._point, USER)
            self._run("initdb", "--pgdata", self._data, "--auth", "trust", "--no-sync")
            with self._served():
                self._run("pgbench", "--host", self._socket, "--initialize", "--quiet", "--scale", 4, "postgres")
        self._ground.detach(device)
        return image

    @property
    def _data(self) -> Path:
        return self._point / "data"

    def _run(self, program: str, *words: Any) -> str:
        become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--"]
        return self._ground.output([*become, self._programs / program, *words], seconds=300)

    @contextmanager
    def _mounted(self, device: str | Path) -> Iterator[None]:
        self._ground.output(["mount", "-t", "ext4", device, self._point])
        yield
        self._ground.output(["umount", self._point], seconds=300)

    @contextmanager
    def _served(self) -> Iterator[None]:
        options = f"-k {self._socket} -c listen_addresses= -c shared_buffers=32MB"
        self._run("pg_ctl", "--pgdata", self._data, "--wait", "--log", self._socket / "log", "-o", options, "start")
        yield
        self._run("pg_ctl", "--pgdata", self._data, "--wait", "--mode", "fast", "stop")

    @contextmanager
    def running(self, device: str | Path) -> Iterator[None]:
        """Serve the database on `device`, a copy of the image, inside the `with` block."""
        with self._mounted(device), self._served():
            yield

    def bench(self, seconds: int) -> float:
        """Return the transactions per second of four clients. Raises BenchError if the balances do not match."""
        words = ["--host", self._socket, "--client", 4, "--jobs", 2, "--time", seconds, "postgres"]
        report = self._run("pgbench", *words)
        tables = ("accounts", "branches", "tellers")
        balances = [f"SELECT sum({each[0]}balance) FROM pgbench_{each}" for each in tables]
        query = f"SELECT count(*) FROM ({' UNION '.join(balances)}) AS sums"
        if self._run("psql", "--host", self._socket, "-Atc", query, "postgres").strip() != "1":
            raise BenchError("pgbench: the balances do not match")
        return float(re.findall(r"tps = ([0-9.]+)", report)[0])
