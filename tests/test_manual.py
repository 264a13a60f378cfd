"""Help, the manual page and completions: complete, made from the parser, and understood by man and the shells."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import failed, run, succeeded

from blockcopy import errors
from blockcopy.cli.parser import SHELLS, parser
from blockcopy.cli.suggestions import commands_of
from blockcopy.replica.monitor.status import State, Status
from blockcopy.transport.command import DEFAULT_PYTHON, DEFAULT_RSH

COMMANDS = commands_of(parser())

STATUS = Status(state=State.STARTING, size=0, source_needed=True).as_dict()

_TALLEST = {"mount": 64, "sync": 54, "verify": 34}
"""Lines of help; the others fit a screen of 30, and the options of these fit one of today's."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_ends_with_an_example(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(command, "--help")
    lines = done.stdout.decode().splitlines()
    assert len(lines) <= _TALLEST.get(command, 30)
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].startswith("example: blockcopy ")


@pytest.mark.parametrize("command", ["mount", "sync", "verify", "doctor"])
def test_help_names_the_defaults_that_are_not_the_parsers(command: str) -> None:
    said = {action.dest: action.help or "" for action in COMMANDS[command]._actions}
    assert said["rsh"].endswith(f"(default: {DEFAULT_RSH})")
    assert said["python"].endswith(f"(default: {DEFAULT_PYTHON})")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_an_example_are_those_of_the_command(command: str) -> None:
    epilog = COMMANDS[command].epilog
    assert epilog is not None
    words = epilog.removeprefix("example: blockcopy ").partition("|")[0].partition(">")[0].partition("<")[0]
    name, *arguments = words.partition("#")[0].split()
    if name == command:
        parser().parse_args([name, *arguments])  # exits if the command line is invalid


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["mout", "a", "b", "c"], "did you mean mount?"),
        (["synch", "a", "b"], "did you mean sync?"),
        (["sync", "--no-spare", "a", "b"], "did you mean --no-sparse?"),
        (["sync", "--block-copy-path=x", "a", "b"], "did you mean --blockcopy-path?"),
        (["completion", "bach"], "did you mean bash?"),
    ],
)
def test_wrong_input_suggests_the_right_one(arguments: list[str], meant: str) -> None:
    done = run(*arguments)
    failed(done, 2, meant)


def test_the_manual_has_every_command_option_and_exit_status() -> None:
    text = run("manual").stdout.decode().replace("\\-", "-")
    for name, command in COMMANDS.items():
        assert f"blockcopy {name}" in text
        for action in command._actions:
            assert [option for option in action.option_strings if option not in text] == []
    statuses = text.partition(".SH EXIT STATUS")[2].partition(".SH FILES")[0]
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.BlockcopyError):
            assert f".B {error.exit_code}\n" in statuses
    assert ".B 130\n" in statuses


def test_the_manual_describes_every_field_of_a_status() -> None:
    fields = run("manual").stdout.decode().partition(".SH STATUS FIELDS")[2].partition(".SH FILES")[0]
    names = {line.removeprefix(".B ") for line in fields.splitlines() if line.startswith(".B ")}
    demand, link = ({f"{name}.{field}" for field in STATUS[name]} for name in ("demand", "link"))
    assert names == STATUS.keys() - {"demand", "link"} | demand | link


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_has_nothing_to_complain_of() -> None:
    page = run("manual").stdout
    shown = subprocess.run(
        ["man", "--warnings", "-l", "-Tutf8", "-"],
        input=page,
        capture_output=True,
        check=True,
        env={**os.environ, "LANG": "C.UTF-8"},
    )
    assert shown.stderr == b""
    assert b"blockcopy" in shown.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_are_scripts_of_the_shell(shell: str, tmp_path: Path) -> None:
    script = run("completion", shell).stdout
    assert b"no-sparse" in script
    (tmp_path / "script").write_bytes(script)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    checked = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, check=False)
    succeeded(checked)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("typed", "found"),
    [(["mou"], {"mount"}), (["sync", "--no-sp"], {"--no-sparse"}), (["completion", "f"], {"fish"})],
)
def test_bash_completes(tmp_path: Path, typed: list[str], found: set[str]) -> None:
    (tmp_path / "script").write_bytes(run("completion", "bash").stdout)
    asked = f"""
        source {tmp_path}/script
        COMP_WORDS=(blockcopy {" ".join(typed)}); COMP_CWORD={len(typed)}
        $(complete -p blockcopy | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert {word.strip() for word in done.stdout.split()} == found
