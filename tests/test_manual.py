"""Help, the manual and completions: complete, made from the parser, and understood by man and the shells."""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support import BLOCKCOPY, Mount, failed, require_fuse, run, succeeded, written

from blockcopy import __version__, errors
from blockcopy.cli.parser import SHELLS, parser
from blockcopy.cli.suggestions import commands_of
from blockcopy.protocol import digests, wire
from blockcopy.replica.monitor.result import SyncResult, VerifyResult
from blockcopy.replica.monitor.status import State, Status
from blockcopy.transport.command import DEFAULT_PYTHON, DEFAULT_RSH
from blockcopy_fuse.manual import common, markup, pages, roff, text
from blockcopy_fuse.manual.markup import Code

CHECKOUT = Path(__file__).resolve().parent.parent

COMMANDS = commands_of(parser())

STATUS = Status(state=State.STARTING, size=0, source_needed=True).as_dict()

_TALLEST = {"mount": 64, "sync": 60, "verify": 36}
"""Lines of help; the others fit a screen of 30, and the options of these fit one of today's."""

_LONGEST = {"blockcopy-mount": 420, "blockcopy": 340, "blockcopy-json": 300}
"""Lines of a page of 80 columns."""


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


def text_of(title: pages.Title) -> str:
    """Return the page `title` as `help` prints it."""
    return text.page(pages.page(title).blocks, 80)


TITLES = pages.titles()


def terms(page: str, title: str) -> set[str]:
    """Return the terms in the section `title` of `page`, up to the next section."""
    lines = page.partition(f"\n{title}\n")[2].splitlines()
    found = itertools.takewhile(lambda line: line.startswith(" ") or not line, lines)
    return {line.split()[0] for line in found if re.match(r" {4}\S", line)}


@pytest.mark.parametrize("title", TITLES, ids=str)
def test_each_page_is_complete_and_fits_a_terminal(title: pages.Title) -> None:
    page = pages.page(title)
    shown = text_of(title).splitlines()
    assert shown[0] == "NAME"
    assert " ".join(" ".join(shown[1 : shown.index("")]).split()) == f"{title.name} - {page.summary}"
    assert page.summary
    assert "SEE ALSO" in shown
    code = {line.strip() for block in page.blocks if isinstance(block, Code) for line in block.text.splitlines()}
    assert [line for line in shown if len(line) > 80 and line.strip() not in code] == []
    assert len(shown) <= _LONGEST.get(title.name, 260)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_has_its_options_and_the_common_sections(name: str) -> None:
    page = text_of(pages.find(name).title)
    said = page.partition("\nOPTIONS\n")[2].replace(",", " ")
    for action in COMMANDS[name]._actions:
        told = [option for option in action.option_strings if option in (*said.split(), "-h", "--help")]
        assert told == ([] if action.help == argparse.SUPPRESS else list(action.option_strings))
    for part in ("SYNOPSIS", "DESCRIPTION", "EXAMPLES", "EXIT STATUS", "ENVIRONMENT"):
        assert f"\n{part}\n" in page


def test_the_overview_has_every_command_topic_and_exit_status() -> None:
    overview = text_of(pages.find("blockcopy").title)
    listed = run("help").stdout.decode()
    for title in TITLES:
        if title.name != "blockcopy":
            assert f"{title.name}({title.section})" in re.sub(r"\s+", "", overview)
            assert f"{title.name}({title.section})" in re.sub(r"\s+", "", listed)
    statuses = {code for term in terms(overview, "EXIT STATUS") for code in term.rstrip(",").split(", ")}
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.BlockcopyError):
            assert str(error.exit_code) in statuses
    assert {row.term for row in common.EXIT_STATUSES} >= {"0", "2", "129, 130, 143"}


def test_the_pages_describe_every_field_of_a_status() -> None:
    page = text_of(pages.find("json").title)
    demand, link = ({f"{name}.{field}" for field in STATUS[name]} for name in ("demand", "link"))
    assert STATUS.keys() - {"demand", "link"} | demand | link <= terms(page, "STATUS")


def test_the_pages_describe_every_field_of_a_result() -> None:
    page = text_of(pages.find("json").title)
    assert {*SyncResult().as_dict(), *VerifyResult().as_dict()} <= terms(page, "RESULTS")


def test_the_page_of_the_protocol_has_every_message_and_limit() -> None:
    page = text_of(pages.find("protocol").title)
    for layout in wire._LAYOUTS.values():
        assert re.search(rf"^ +{layout.command.decode()} ", page, re.MULTILINE)
    for number in (wire.MAX_BLOCK_SIZE, wire.MAX_ASKED, wire.MAX_TEXT_SIZE, wire.MIN_ASKED_BLOCK):
        assert re.search(rf"^ +{number}$", page, re.MULTILINE)
    sizes = re.findall(r"^ +(\w+)\n +(\d+) bytes\.$", page, re.MULTILINE)
    assert {name: int(size) for name, size in sizes} == {name: digests.named(name).size for name in digests.NAMES}


def test_every_variable_of_the_environment_is_documented() -> None:
    sources = [path.read_text() for folder in ("blockcopy", "fuse") for path in (CHECKOUT / folder).rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'environ(?:\.\w+\(|\[)"(\w+)"', source)}
    used.remove("PYTHONPATH")  # for a child of this program
    assert used - set(", ".join(row.term for row in common.ENVIRONMENT).split(", ")) == set()


def test_pages_that_are_referred_to_exist() -> None:
    known = {f"**{title.name}**({title.section})" for title in TITLES}
    for name, markdown in pages.topic_files().items():
        assert set(re.findall(r"\*\*[\w.-]+\*\*\(\d\)", markdown)) - known == set(), name


@pytest.mark.parametrize(
    ("word", "name"),
    [("sync", "blockcopy-sync"), ("state", "blockcopy-state"), ("mount.blockcopy", "mount.blockcopy")],
)
def test_help_shows_a_page(word: str, name: str) -> None:
    done = run("help", word)
    assert done.stdout.decode().startswith(f"NAME\n    {name} - ")
    assert b"\x1b" not in done.stdout


def test_help_suggests_a_page() -> None:
    failed(run("help", "recipe"), 2, "did you mean recipes?")
    failed(run("manual", "synch"), 2, "did you mean sync?")


@pytest.mark.skipif(shutil.which("script") is None, reason="script is not installed")
@pytest.mark.parametrize("pager", ["sed s/^/paged:/", "/nowhere"])
def test_help_uses_a_pager_on_a_terminal(pager: str) -> None:
    command = shlex.join([*BLOCKCOPY, "help", "sync"])
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        env={**os.environ, "PAGER": pager, "TERM": "xterm"},
    )
    assert b"\x1b[1mNAME\x1b[0m" in done.stdout
    assert (b"paged:" in done.stdout) == pager.startswith("sed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Install all pages, and return the paths of the files."""
    return sorted(map(Path, pages.install(str(tmp_path_factory.mktemp("manual")))))


def test_all_pages_are_installed(tmp_path: Path) -> None:
    folder = tmp_path / "share/man"
    succeeded(run("manual", "--install", str(folder)))
    installed = sorted(folder.glob("man*/*"))
    names = {f"man{title.section}/{title.name}.{title.section}" for title in TITLES}
    assert {str(path.relative_to(folder)) for path in installed} == names
    assert (folder / "man1/blockcopy.1").read_bytes() == run("manual").stdout
    assert (folder / "man7/blockcopy-state.7").read_bytes() == run("manual", "state.7").stdout
    assert (folder / "man1/blockcopy-state.1").read_bytes() == run("manual", "state").stdout


def test_a_folder_that_cannot_be_written() -> None:
    failed(run("manual", "--install", "/proc/none"), 1, "cannot write /proc/none/man1")


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_has_nothing_to_complain_of(installed: list[Path]) -> None:
    shown = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", *installed],
        capture_output=True,
        check=True,
        env={**os.environ, "LANG": "C.UTF-8", "MAN_KEEP_STDERR": "1"},
    )
    assert shown.stderr == b""
    assert shown.stdout.count(b"x T utf8") == len(installed)


@pytest.mark.skipif(shutil.which("lexgrog") is None, reason="lexgrog is not installed")
def test_apropos_finds_each_page(installed: list[Path]) -> None:
    done = subprocess.run(["lexgrog", *installed], capture_output=True, text=True, check=True)
    assert [line.split('"')[1].split(" - ")[0] for line in done.stdout.splitlines()] == [
        path.stem for path in installed
    ]


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_has_nothing_to_complain_of(installed: list[Path]) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *installed], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def test_pages_have_the_date_of_the_version_in_the_changelog(installed: list[Path]) -> None:
    changelog = (Path(__file__).resolve().parent.parent / "CHANGELOG.md").read_text()
    [(version, date)] = re.findall(r"^## (\S+) — (\S+)$", changelog, re.MULTILINE)[:1]
    assert version == __version__
    for path in installed:
        assert f'"{date}" "blockcopy {version}"' in path.read_text()


@pytest.mark.parametrize("markdown", ["1. numbered", "> quoted", "![picture](x)", "- one\n\n  two"])
def test_what_the_pages_do_not_use_is_refused(markdown: str) -> None:
    with pytest.raises(markup.MarkupError):
        markup.parse(markdown)


def test_roff_takes_no_text_for_a_request() -> None:
    page = roff.page(
        "x", 1, "2026-01-01", "x", markup.parse("## A\n\n.TH a\n\n'quoted' `-o` \\\\n\n    .SH code\n    'x\n")
    )
    lines = page.splitlines()[3:]
    assert [line for line in lines if line.startswith((".TH", ".SH code", "'"))] == []
    assert "\\fB\\-o\\fR" in page


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
    [
        (["mou"], {"mount"}),
        (["sync", "--no-sp"], {"--no-sparse"}),
        (["completion", "f"], {"fish"}),
        (["help", "recip"], {"recipes"}),
        (["sync", "--compress", "z"], {"zstd"}),
        (["checksum", "--digest", "sha2"], {"sha256"}),
        (["mount", "-o", "allow_o"], {"allow_other"}),
        (["umount", "/et"], {"/etc"}),  # no mount has this name
    ],
)
def test_bash_completes(tmp_path: Path, typed: list[str], found: set[str]) -> None:
    assert completed(tmp_path, typed) == found


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_the_mountpoints_of_blockcopy(tmp_path: Path) -> None:
    require_fuse()
    source, point = written(tmp_path / "source", b"data"), tmp_path / "a point"
    point.mkdir()
    (tmp_path / "another").mkdir()
    mount = Mount(point, source, tmp_path / "copy")
    for command in ("umount", "status", "wait", "limit", "prefetch"):
        assert completed(tmp_path, [command, f"{tmp_path}/a"]) == {str(point)}
    assert str(point) not in completed(tmp_path, ["mount", "-o", "ro", source, "copy", f"{tmp_path}/an"])
    mount.umount()


def completed(tmp_path: Path, typed: list[object]) -> set[str]:
    """Return what bash offers for the words `typed`, the last of which is not complete."""
    (tmp_path / "script").write_bytes(run("completion", "bash").stdout)
    asked = f"""
        source {tmp_path}/script
        COMP_WORDS=(blockcopy {" ".join(map(str, typed))}); COMP_CWORD={len(typed)}
        $(complete -p blockcopy | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    return {line.strip() for line in done.stdout.splitlines()}
