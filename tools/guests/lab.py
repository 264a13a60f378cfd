"""What a scenario is given: a folder, choices that a seed repeats, and machines that end with it."""

from __future__ import annotations

import contextlib
import fcntl
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from guests.cache import CACHE
from guests.carried import pack_files, pack_program
from guests.image import Image
from guests.machine import Disk, Machine


class Options(NamedTuple):
    """The options of `tools/vm run`. `cuts`: power cuts of a scenario that has some. `accel`: of QEMU."""

    seed: int = 1
    cuts: int = 3
    accel: str = "tcg"
    verbose: bool = False


class Lab:
    """The surroundings of one scenario."""

    def __init__(self, name: str, image: Image, program: Path, folder: Path, options: Options) -> None:
        """Make the surroundings of the scenario `name`. `program`: its archive."""
        self.folder = folder
        """For files of the scenario. A failed scenario's folder is kept."""
        self.options = options
        self.choose = random.Random(f"{name} {options.seed}")
        """All choices of the scenario come from here."""
        self.image = image
        """The image of the guests."""
        self._program = program
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line about the scenario's progress, with its time, if verbose."""
        if self.options.verbose:
            print(f"    {time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def machine(
        self,
        name: str = "guest",
        *,
        disks: Sequence[Disk] = (),
        files: Mapping[str, bytes | str | Path] | None = None,
        init: str | None = None,
        memory: int = 1024,
        cpus: int = 1,
    ) -> Machine:
        """Return a guest that is still off. Its name must be new in this scenario.

        `files`: name → content or Path, executable, in the guest's /run/carried/files. The rest: as for Machine.
        """
        folder = self.folder / name
        folder.mkdir()
        pack_files(files or {}, folder / "files", folder / "files.cpio")
        archives = [self._program, folder / "files.cpio"]
        how = {"init": init, "memory": memory, "cpus": cpus, "accel": self.options.accel}
        made = Machine(self.image, folder, archives, disks, **how)
        self._stack.callback(made.close)
        return made

    def on_end(self, function: Callable[[], object]) -> None:
        """Call `function` when the scenario ends, after the machines that are made later have ended."""
        self._stack.callback(function)

    def close(self) -> None:
        """End the machines, and all else that the scenario began."""
        self._stack.close()


class Runs:
    """The folders of a `tools/vm run`: one for the program's archive, one for each scenario."""

    def __init__(self, image: Image, folder: Path) -> None:
        """Pack the program of the checkout."""
        self._image = image
        self._folder = folder
        self._program = folder / "program.cpio"
        (folder / "program").mkdir()
        pack_program(image, folder / "program", self._program)

    @contextlib.contextmanager
    def lab(self, name: str, options: Options) -> Iterator[Lab]:
        """Yield the Lab of the scenario `name`. Keeps its folder if the block raises an Exception."""
        folder = self._folder / name
        folder.mkdir()
        lab = Lab(name, self._image, self._program, folder, options)
        try:
            with contextlib.closing(lab):
                yield lab
        except Exception:
            kept = CACHE / "failed" / name
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            raise
        shutil.rmtree(folder)


@contextlib.contextmanager
def runs(image: Image) -> Iterator[Runs]:
    """Yield Runs in a folder of the cache that is removed at the end. Removes those of killed runs, too."""
    with contextlib.ExitStack() as stack:
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for path in CACHE.glob("run.*"):
                with contextlib.suppress(OSError), (path / "lock").open("w") as other:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free: its run has ended
                    shutil.rmtree(path)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run.", dir=CACHE)))
            ours = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(ours, fcntl.LOCK_EX)
        yield Runs(image, folder)
