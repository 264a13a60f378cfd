"""An sshd on loopback with keys of its own, for the demo, the tests and tools/bench. Root is not needed.

    python tools/sshd.py FOLDER      start one with its files in FOLDER, print the words that reach it, and serve
                                     until SIGTERM

It lets its own user in, and nobody else, with one key. Nothing outside of FOLDER is written, but /run/sshd by root.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HOST = "127.0.0.1"

PATIENCE = 20
"""Seconds in which sshd begins to listen."""


class SshdError(Exception):
    """An sshd that is not installed or does not start. The message is for the user."""


def find(name: str) -> str | None:
    """Return the path of the program `name`, which may be one for administrators. Returns None if it is missing."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def free_port() -> int:
    """Return the number of a port on loopback that nobody uses now."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


def prepare(folder: Path, port: int, *settings: str, host: str = HOST) -> list[str]:
    """Write the files of an sshd on `port` of the address `host` into `folder`: host key, user key, configuration.

    Keys that are there stay. `settings`: further lines of the configuration.
    Returns the command that starts the server. The command logs to
    standard error. Raises SshdError if a program is missing.
    """
    missing = [each for each in ("sshd", "ssh", "ssh-keygen") if find(each) is None]
    if missing:
        raise SshdError(
            f"{' and '.join(missing)} not found: as root, run apt-get install openssh-server openssh-client"
        )
    for key in ("host", "user"):
        if (folder / key).exists():
            continue
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    lines = [
        *(f"ListenAddress {host}", f"Port {port}", f"HostKey {folder}/host", "PidFile none"),
        *(f"AuthorizedKeysFile {folder}/authorized", "StrictModes no", "UsePAM no", "PermitRootLogin yes"),
        *("PasswordAuthentication no", "KbdInteractiveAuthentication no"),
        *(f"SetEnv HOME={folder}", *settings),  # start-up files of this user's shell may take more than a stage
    ]
    (folder / "config").write_text("".join(f"{line}\n" for line in lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    return [str(find("sshd")), "-D", "-e", "-f", str(folder / "config")]


class Sshd:
    """An sshd on loopback, at the address `host`, for one user and one key. Leave the context to end it."""

    host = HOST

    def __init__(self, folder: Path, *settings: str) -> None:
        """Choose a port for a server with its files in `folder`. `settings`: further lines of its configuration."""
        self._folder = self.home = folder
        """The files of the server, and the home of each session."""
        self._settings = settings
        self.port = free_port()
        self.user = getpass.getuser()
        self.log = folder / "log"

    @property
    def rsh(self) -> str:
        """The ssh command line that reaches the server, for `-e`."""
        return (
            f"ssh -F none -p {self.port} -i {self._folder}/user -o BatchMode=yes "
            f"-o UserKnownHostsFile={self._folder}/known -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR"
        )

    def __enter__(self) -> Sshd:
        command = prepare(self._folder, self.port, *self._settings)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stderr=log)
        end = time.monotonic() + PATIENCE
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise SshdError(f"sshd does not start: {self.log.read_text()}")
            time.sleep(0.01)
        return self

    def _listens(self) -> bool:
        return f"Server listening on {HOST} port {self.port}." in self.log.read_text(errors="replace")

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    """Serve in the folder that the command line names."""
    folder = Path(sys.argv[1])
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit())
    folder.mkdir(mode=0o700)
    try:
        with Sshd(folder) as server:
            print(f"{server.user}@{server.host} {server.rsh}", flush=True)
            signal.pause()
    except SshdError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
