"""The program as a program: help, usage errors, exit statuses, what goes to which stream."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from support import BLOCKCOPY, PYTHON, failed, run, start, succeeded

import blockcopy
from blockcopy import errors
from blockcopy.cli import option_types
from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of

Mounter = Callable[..., support.Mount]

COPYING = [
    *("--rsh RSH", "--blockcopy-path", "--timeout", "--reconnect-timeout"),
    *("--force", "--state FILE", "--no-state", "--recheck", "--verify", "--limit"),
    *("--on-complete COMMAND", "--log-file FILE"),
    *("SOURCE", "DESTINATION"),
]

OPTIONS = {
    "checksum": ["FILE", "--progress", "--start", "--end"],
    "retrieve": ["FILE", "--lzma"],
    "save": ["FILE", "--force"],
    "mount": [
        *(
            "-f",
            "-o OPTIONS",
            "--no-background",
            "--name",
            "--pid-file",
            "--replace",
        ),
        *COPYING,
        "MOUNTPOINT",
    ],
    "sync": COPYING,
    "verify": [
        *("--rsh RSH", "--blockcopy-path", "--timeout", "--reconnect-timeout", "--json"),
        *("SOURCE", "DESTINATION"),
    ],
    "status": ["--json", "MOUNTPOINT"],
    "wait": ["MOUNTPOINT"],
    "umount": ["MOUNTPOINT"],
    "pause": ["MOUNTPOINT"],
    "resume": ["MOUNTPOINT"],
    "receive": ["FILE", "--force", "--no-sparse", "--compress"],
    "facts": ["FILE"],
    "manual": [],
    "completion": ["SHELL"],
    "doctor": ["HOST", "--rsh RSH", "--python", "--blockcopy-path"],
    "limit": ["MOUNTPOINT", "RATE"],
    "prefetch": ["MOUNTPOINT", "OFFSET:LENGTH"],
}

CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if each.__module__ == errors.__name__ and issubclass(each, Exception)
]


def copies(tmp_path: Path) -> tuple[Path, Path]:
    """Return a source and a destination that differ."""
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(b"Hello World!")
    destination.write_bytes(b"-" * 12)
    return source, destination


# Help and usage


def test_help_names_every_command() -> None:
    done = run("--help")
    succeeded(done)
    for word in (*OPTIONS, "--version", "--verbose"):
        assert word in done.stdout.decode()


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_names_its_options(command: str) -> None:
    said = commands_of(parser())[command].format_help()  # test_manual runs the commands
    assert [option for option in OPTIONS[command] if option not in said] == []


@pytest.mark.parametrize("command", OPTIONS)
def test_a_parser_of_one_command_is_the_one_of_all(command: str) -> None:
    [(name, one)] = commands_of(parser(command)).items()
    assert (name, one.format_help()) == (command, commands_of(parser())[command].format_help())


def test_an_option_before_a_command_asks_for_all_of_them() -> None:
    assert run("--help", "sync").stdout == run("--help").stdout


def test_no_command_at_all_shows_the_help_and_is_no_success() -> None:
    for options in ([], ["-v"]):
        failed(run(*options), 1, stdout=run("--help").stdout)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("20", 20), ("20B", 20), ("20K", 20 << 10), ("20kB", 20_000), ("20KiB", 20 << 10), ("20m", 20 << 20)),
        *(("20MB", 20_000_000), ("20MiB", 20 << 20), ("20G", 20 << 30), ("3GB", 3 * 10**9), ("3tib", 3 << 40)),
        ("3TB", 3 * 10**12),
    ],
)
def test_units_of_sizes_are_those_of_rsync_and_dd(text: str, count: int) -> None:
    assert option_types.size(text) == count
    assert option_types.extent(f"{text}:{text}") == (count, count)
    assert parser().parse_args(["sync", "a", "b", f"--bwlimit={text}"]).limit == count


def test_version_is_the_packages() -> None:
    done = run("--version")
    first, protocol, others = done.stdout.decode().splitlines()
    assert first == f"blockcopy {blockcopy.__version__}"
    assert protocol == "protocol 1, and the streams of messa/blockcopy 0.0.2"
    assert re.fullmatch(r"Python 3\.\d+\.\S+, pyfuse3 3\.\S+, libfuse 3\.\S+", others)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nonsense"], "--nonsense"),
        (["--nonsense", "sync", "a", "b"], "--nonsense"),
        (["frobnicate"], "frobnicate"),
        (["checksum"], "FILE"),
        (["mount", "a", "b"], "MOUNTPOINT"),
        (["sync", "a"], "DESTINATION"),
        (["status"], "MOUNTPOINT"),
        (["sync", "a", "b", "c"], "c"),
        (["checksum", "--start", "one", "a"], "one"),
        (["checksum", "--start=-1", "a"], "-1"),
        (["sync", "a", "b", "--version"], "write --version before the command: blockcopy --version sync"),
        (["sync", "", "b"], "SOURCE"),
        (["sync", "host:", "b"], "host:"),
        (["sync", ":/path", "b"], ":/path"),
        (["sync", "--rsh", "", "host:/path", "b"], "-e"),
        (["sync", "--blockcopy-path", " ", "a", "b"], "--blockcopy-path"),
        (["sync", "--timeout", "soon", "a", "b"], "soon"),
        (["sync", "--timeout", "nan", "a", "b"], "nan"),
        (["sync", "--reconnect-timeout", "-1", "a", "b"], "-1"),
        (["sync", "--limit", "10X", "a", "b"], "10X"),
        (["sync", "--limit", "10iB", "a", "b"], "10iB"),
        (["sync", "--limit", "1MBs", "a", "b"], "1MBs"),
        (["sync", "--bwlimit", "0", "a", "b"], "no rate"),
        (["limit", "m", "-5"], "-5"),
        (["prefetch", "m"], "OFFSET:LENGTH"),
        (["prefetch", "m", "4096"], "4096"),
        (["prefetch", "m", "0:1", "x:1"], "x"),
    ],
)
def test_what_cannot_be_meant_is_status_2(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    failed(done, 2, stdout=b"")
    assert told in done.stderr.decode().splitlines()[-1]
    assert "Traceback" not in done.stderr.decode()
    assert os.listdir(tmp_path) == []


def test_a_host_that_looks_like_an_option_is_refused(tmp_path: Path) -> None:
    done = run("sync", "--", "-oProxyCommand=touch:/path", "copy", cwd=tmp_path)
    failed(done, 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["checksum", "a"], ["sync", "a", "b"], ["mount", "a", "b", "c"]]
)
def test_a_program_that_is_started_does_what_a_forked_one_does(tmp_path: Path, arguments: list[str]) -> None:
    started, forked = start(*arguments, cwd=tmp_path), run(*arguments, cwd=tmp_path)
    assert started.returncode != 0
    failed(forked, started.returncode, started.stderr, stdout=started.stdout)


def test_a_forked_program_is_found_by_the_mark_of_its_test(tmp_path: Path) -> None:
    """`nothing_left_behind` finds what a test leaves by this mark."""
    seen = tmp_path / "seen"
    program = f"sh -c 'cat /proc/$PPID/environ >{seen}'"
    run(
        "sync",
        "--blockcopy-path",
        program,
        "--timeout",
        1,
        "--reconnect-timeout",
        0,
        tmp_path / "a",
        tmp_path / "b",
    )
    assert f"{support.TEST_ID}={os.environ[support.TEST_ID]}".encode() in seen.read_bytes().split(b"\0")


def test_the_program_is_a_module_and_a_script() -> None:
    script = Path(sys.executable).parent / "blockcopy"
    if not script.exists():
        pytest.skip("blockcopy is not installed beside this interpreter")
    done = subprocess.run([script, "--version"], capture_output=True, check=True, timeout=20)
    assert done.stdout == start("--version").stdout


# Errors and exit statuses


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_has_an_exit_status_and_says_when_it_is_raised(error: type[errors.BlockcopyError]) -> None:
    assert issubclass(error, errors.BlockcopyError)
    assert 0 < error.exit_code < 126  # above, a shell uses them for its own
    assert error.__doc__


def test_exit_statuses_are_those_that_scripts_rely_on() -> None:
    of = {error.__name__: error.exit_code for error in CLASSES}
    promised = {
        "UsageError": 2,
        "RemoteError": 3,
        "MissingRequirementError": 1,
        "SourceError": 3,
        "ProtocolViolationError": 3,
        "SourceChangedError": 3,
        "SourceReadError": 3,
        "OriginalProgramError": 3,
        "MountError": 4,
        "MismatchError": 5,
        "IncompleteError": 75,
    }
    assert of == dict.fromkeys(of, 1) | promised


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["checksum", "missing"], 1),
        (["retrieve", "missing"], 1),
        (["save", "missing"], 1),
        (["sync", "missing", "copy"], 3),
        (["status", "missing"], 4),
        (["pause", "missing"], 4),
    ],
)
def test_an_error_is_one_line_with_the_command_and_the_path(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    done = run(*arguments, cwd=tmp_path, input=b"")
    failed(done, status, stdout=b"")
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith(f"ERROR ({arguments[0]}): ")
    assert "missing" in last
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("command", ["checksum", "retrieve", "save", "sync", "status", "wait", "umount"])
def test_an_error_is_told_once(tmp_path: Path, command: str) -> None:
    more = ["copy"] if command == "sync" else []
    done = run(command, "missing", *more, cwd=tmp_path, input=b"")
    assert len(done.stderr.decode().splitlines()) == 1


@pytest.mark.parametrize("command", ["retrieve", "save"])
def test_standard_input_is_no_file_for_them(command: str) -> None:
    done = run(command, "-", input=b"")
    failed(done, 1, b"not `-`", stdout=b"")


# Logging


def test_success_is_silent(tmp_path: Path) -> None:
    source, destination = copies(tmp_path)
    done = run("sync", source, destination, env=os.environ | {"DEBUG": "1"})  # which is other programs'
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == b"Hello World!"


@pytest.mark.parametrize(
    ("before", "after", "environment"),
    [
        *((["-v"], [], {}), ([], ["-v"], {}), (["--verbose"], [], {}), (["-v"], ["-v"], {}), ([], ["-vv"], {})),
        ([], [], {"BLOCKCOPY_DEBUG": "1"}),
    ],
)
def test_verbose_and_debug_log_to_standard_error(
    tmp_path: Path, before: list[str], after: list[str], environment: dict[str, str]
) -> None:
    source, destination = copies(tmp_path)
    done = run(*before, "sync", source, destination, *after, env=os.environ | environment)
    succeeded(done, "complete copy", stdout=b"")
    everything = bool(environment) or len("".join([*before, *after]).replace("--verbose", "v").replace("-", "")) > 1
    assert ("[" in done.stderr.decode()) == everything  # the process and the thread of each line


@pytest.mark.parametrize("options", [["-v"], ["-vv"], ["BLOCKCOPY_DEBUG"]])
def test_an_error_says_where_it_came_from_if_everything_is_logged(tmp_path: Path, options: list[str]) -> None:
    missing = tmp_path / "missing"
    if options == ["BLOCKCOPY_DEBUG"]:
        done = run("checksum", missing, env=os.environ | {"BLOCKCOPY_DEBUG": "1"})
    else:
        done = run("checksum", missing, *options)
    failed(done, 1)
    assert ("Traceback" in done.stderr.decode()) == (options != ["-v"])
    assert done.stderr.decode().splitlines()[-1].startswith("ERROR (checksum): ")


# Output that nobody takes


def run_with_output(
    output: int, *arguments: object, program: list[str] = BLOCKCOPY
) -> subprocess.CompletedProcess[bytes]:
    """Run the command with `output` as its standard output, and close `output` in this process."""
    try:
        command = [*program, *map(str, arguments)]
        return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=20, check=False)
    finally:
        os.close(output)


def nobody_reads() -> int:
    """Return a pipe without a reader, as in `blockcopy status /mnt | head -c 0`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_status_for_a_reader_that_went_away(mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(*copies(tmp_path))
    for options in ([], ["--json"]):
        done = run_with_output(nobody_reads(), "status", *options, mounted.point)
        failed(done, 1)
        assert done.stderr.decode() == "ERROR (status): the reader of the output has gone away\n"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--help"], "blockcopy"),
        (["--version"], "blockcopy"),
        (["sync", "--help"], "blockcopy sync"),
        (["manual"], "manual"),
        (["completion", "bash"], "completion"),
        (["doctor"], "doctor"),
        (["list"], "list"),
    ],
)
def test_words_for_a_reader_that_went_away_are_one_error(words: list[str], name: str) -> None:
    done = run_with_output(nobody_reads(), *words)
    assert (done.returncode, done.stderr.decode()) == (
        1,
        f"ERROR ({name}): the reader of the output has gone away\n",
    )


def test_help_of_the_mount_helper_for_a_reader_that_went_away() -> None:
    done = run_with_output(nobody_reads(), "--help", program=[PYTHON, "-P", "-m", "blockcopy_fuse.mount_helper"])
    failed(done, 1)
    assert done.stderr.decode() == "ERROR (mount.blockcopy): the reader of the output has gone away\n"


@pytest.mark.parametrize("command", ["checksum", "status"])
def test_output_onto_a_full_disk(mount: Mounter, tmp_path: Path, command: str) -> None:
    source, destination = copies(tmp_path)
    subject = source if command == "checksum" else mount(source, destination).point
    done = run_with_output(os.open("/dev/full", os.O_WRONLY), command, subject)
    failed(done, 1, "No space left")
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_standard_stream_is_no_obstacle(tmp_path: Path, closed: str) -> None:
    """What is opened then must not take its place: a message would go into the destination."""
    source, destination = copies(tmp_path)
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *BLOCKCOPY, "sync", str(source), str(destination)]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == b"Hello World!"
