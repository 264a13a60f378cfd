"""Rules for imports and for product code, checked by parsing the sources."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from support import PYTHON, succeeded

from blockcopy.cli import main
from blockcopy.cli.parser import parser
from blockcopy.transport import payload

CHECKOUT = Path(__file__).resolve().parent.parent
ROOTS = (CHECKOUT, CHECKOUT / "fuse")

ROOMS = (
    ("paths", "block", "protocol", "progress", "stage", "cli", "transport", "replica", "blockcopy_fuse"),
    ("replica.tasks", "replica.source", "replica.state", "replica.hydration", "replica.monitor"),
)
"""The rooms, and those inside the replica. Each imports only from those before it."""

TRAVELS = (
    *("errors", "optional_packages", "untrusted_text", "__main__"),
    *("paths", "block", "protocol", "progress", "stage", "cli"),
)
"""The rooms and modules of `blockcopy` that travel to source hosts."""

OPTIONAL = {"blockcopy.protocol.digests": "blake3", "blockcopy.progress.bar": "rich"}
"""The package that a module which travels uses where it is installed. (`protocol.zstd` names its own as a string,
because it is called differently from one Python to the next.)"""

LEAVES = ("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit")


class Import(NamedTuple):
    module: str
    lazy: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING`


class Visitor(ast.NodeVisitor):
    def __init__(self) -> None:
        self.imports: list[Import] = []
        self.calls: set[str] = set()
        self.functions: set[str] = set()
        self.asserts: list[int] = []
        self._functions = self._typing = 0

    def _visit_function(self, node: ast.AST) -> None:
        self.functions.add(getattr(node, "name", ""))
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def visit_If(self, node: ast.If) -> None:
        typing_only = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self._typing += typing_only
        for each in node.body:
            self.visit(each)
        self._typing -= typing_only
        for each in (node.test, *node.orelse):
            self.visit(each)

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._add(name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are written in full here"
        for name in node.names:
            inner = f"{node.module}.{name.name}"
            self._add(inner if inner in SOURCES else str(node.module))

    def visit_Name(self, node: ast.Name) -> None:
        self.calls.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.calls.add(ast.unparse(node))
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.asserts.append(node.lineno)
        self.generic_visit(node)

    def _add(self, module: str) -> None:
        self.imports.append(Import(module, self._functions > 0, self._typing > 0))


def _sources() -> Iterator[tuple[str, Path]]:
    for root, package in zip(ROOTS, ("blockcopy", "blockcopy_fuse"), strict=True):
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


SOURCES = dict(_sources())
PACKAGES = {module for module, path in SOURCES.items() if path.name == "__init__.py"}


@functools.cache
def read(module: str) -> Visitor:
    visitor = Visitor()
    visitor.visit(ast.parse(SOURCES[module].read_text()))
    return visitor


def is_in(module: str, rooms: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"blockcopy.{each}.") for each in rooms)


TRAVELLING = sorted(module for module in SOURCES if module == "blockcopy" or is_in(module, TRAVELS))


def top(module: str) -> str:
    return module.partition(".")[0]


def test_the_sources_are_found() -> None:
    assert {"blockcopy", "blockcopy.cli.main", "blockcopy.protocol.wire"} <= set(TRAVELLING)
    assert {"blockcopy.replica", "blockcopy.replica.engine", "blockcopy_fuse.mounting"} <= set(SOURCES)


def test_each_package_has_a_docstring_and_imports_nothing() -> None:
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse(SOURCES[package].read_text())), package
        assert {each.module for each in read(package).imports} <= {"__future__"}, package


def test_travelling_modules_import_only_each_other_and_the_standard_library() -> None:
    foreign = {
        f"{module} imports {each.module}"
        for module in TRAVELLING
        for each in read(module).imports
        if top(each.module) not in sys.stdlib_module_names
        and each.module not in TRAVELLING
        and not ((each.lazy or each.typing_only) and top(each.module) == OPTIONAL.get(module))
    }
    assert not foreign


def test_travelling_modules_load_without_installed_packages() -> None:
    lines = "\n".join(f"import {module}" for module in TRAVELLING)
    done = subprocess.run(
        [PYTHON, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{lines}"],
        capture_output=True,
        check=False,
    )
    succeeded(done)


def test_the_payload_consists_of_the_travelling_modules() -> None:
    assert sorted(payload.modules()) == TRAVELLING


def importers(of: str) -> set[str]:
    names = {module: [f"{each.module}." for each in read(module).imports] for module in SOURCES}
    return {module for module, imported in names.items() if any(name.startswith(f"{of}.") for name in imported)}


def test_two_files_import_pyfuse3() -> None:
    assert importers("pyfuse3") == {"blockcopy_fuse.operations", "blockcopy_fuse.mounting"}


def test_only_the_programs_import_the_main_function() -> None:
    assert importers("blockcopy.cli.main") == {"blockcopy.__main__", "blockcopy_fuse.mount_helper"}


def test_one_place_prints_and_one_exits() -> None:
    calls = {module: read(module).calls.intersection(LEAVES) for module in SOURCES}
    assert {module: found for module, found in calls.items() if found} == {
        "blockcopy.cli.console": {"print"},
        "blockcopy.cli.program": {"os._exit"},
        "blockcopy_fuse.probe": {"os._exit"},  # of a child that asks
        # on a host, where there is no command line yet
        "blockcopy.transport.bootstrap": {"sys.exit"},
        "blockcopy.stage.hand_over": {"sys.exit"},
    }


def test_each_command_is_in_the_module_of_its_layer() -> None:
    """Strings name these modules, because a host may lack some of them."""
    [named] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    listed = {command: module for module, commands in main._LAYERS.items() for command in commands}
    assert set(listed) <= set(named.choices)
    for command in named.choices:
        assert command.replace("-", "_") in read(listed.get(command, main._MOUNT)).functions


def _module_map() -> Iterator[str]:
    """Yield the modules in the order of the map in CONTRIBUTING.md."""
    text = (CHECKOUT / "CONTRIBUTING.md").read_text().partition("## Module map\n")[2].partition("\n## ")[0]
    packages: list[str] = []
    for line in text.splitlines():
        if found := re.match(r" {4}((?:  )*)(?:fuse/)?(\w+)(/?)(?: |$)", line):
            depth = len(found[1]) // 2
            packages = [*packages[:depth], found[2]]
            if not found[3] and packages[0] in ("blockcopy", "blockcopy_fuse"):
                yield ".".join(packages)


def test_imports_point_upwards_in_the_module_map() -> None:
    order = [*_module_map()]
    assert sorted(order) == sorted(SOURCES.keys() - PACKAGES), "the map in CONTRIBUTING.md has each module once"
    wrong = [
        f"{module} imports {each.module}"
        for place, module in enumerate(order)
        for each in read(module).imports
        if each.module in order[place:] and not each.typing_only
    ]
    assert wrong == []


def test_the_module_map_has_the_rooms_in_order() -> None:
    for rooms in ROOMS:
        dotted = [each if each == "blockcopy_fuse" else f"blockcopy.{each}" for each in rooms]
        places = [
            [place for place, module in enumerate(_module_map()) if f"{module}.".startswith(f"{each}.")]
            for each in dotted
        ]
        assert sorted(places) == places
        for before, behind in itertools.pairwise(places):
            assert before[-1] < behind[0]


def test_the_payload_is_as_small_as_documented() -> None:
    said = re.search(r"\| (\d+) KiB, run from memory \|", (CHECKOUT / "CONTRIBUTING.md").read_text())
    assert said is not None
    largest = max(len(payload.opening([stage])) for stage in ("retrieve", "receive", "facts")) / 1024
    assert int(said[1]) / 2 < largest < int(said[1])


def test_what_the_tools_import_exists() -> None:
    """Neither mypy nor another test covers all tools: some have no .py, and need packages of their own."""
    tools = CHECKOUT / "tools"
    programs = [path for path in [*tools.iterdir(), *(tools / "standins").iterdir()] if path.is_file()]
    missing = []
    for path in programs:
        text = path.read_text()
        if not text.startswith("#!/usr/bin/env python3"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blockcopy"):
                names = [alias.name for alias in node.names]
                missing += [f"{path.name}: {node.module}.{name}" for name in names if not exists(node.module, name)]
    assert not missing


def exists(module: str, name: str) -> bool:
    imported = importlib.import_module(module)
    return hasattr(imported, name) or (hasattr(imported, "__path__") and find_spec(f"{module}.{name}") is not None)


def test_product_code_does_not_assert() -> None:
    """`python -O` removes assertions, so product code must not depend on them."""
    assert not [module for module in SOURCES if read(module).asserts]


def test_the_map_of_the_tests_has_each_file_once() -> None:
    rows = re.findall(r"^\| (test_.*?) \|", (CHECKOUT / "tests/README.md").read_text(), re.MULTILINE)
    assert sorted(", ".join(rows).split(", ")) == sorted(path.stem for path in CHECKOUT.glob("tests/test_*.py"))


def test_the_guide_names_what_there_is() -> None:
    """CONTRIBUTING.md names modules and what is in them as `module.name`."""
    text = (CHECKOUT / "CONTRIBUTING.md").read_text()
    short = {module.rpartition(".")[2]: SOURCES[module] for module in SOURCES}
    named = set(re.findall(r"`(?:\w+\.)?(\w+)\.(_?[a-z]\w+)`", text))
    named = {pair for pair in named if not any(f".{each}".endswith(f".{'.'.join(pair)}") for each in SOURCES)}
    modules = {(owner, name) for owner, name in named if owner in short}
    missing = {(owner, name) for owner, name in modules if not re.search(rf"\b{name}\b", short[owner].read_text())}
    assert missing == set()
    everything = "\n".join(path.read_text() for path in SOURCES.values())
    classes = {(owner, name) for owner, name in named - modules if owner[:1].isupper()}
    assert {pair for pair in classes if f"class {pair[0]}" not in everything or pair[1] not in everything} == set()


def test_the_top_level_has_nothing_but_the_layout() -> None:
    """A program that a test starts in the checkout may leave files there."""
    layout = {"blockcopy", "fuse", "tests", "tools", "pyproject.toml"}
    layout |= {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "build", "dist"}
    layout |= {"PKG-INFO"}  # of an unpacked sdist
    names = {path.name for path in CHECKOUT.iterdir() if path.name[0] != "." and path.suffix != ".egg-info"}
    assert names <= layout
