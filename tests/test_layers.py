"""Who may import whom, and what product code may not do. Read from the sources, without running them."""

from __future__ import annotations

import argparse
import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import PYTHON

from blockcopy import cli, parcel
from blockcopy.arguments import parser

CHECKOUT = Path(__file__).resolve().parent.parent
ROOTS = (CHECKOUT, CHECKOUT / "fuse")
OPTIONAL = {"blockcopy.digests": "blake3", "blockcopy.bar": "rich"}
"""What a module of the stages uses where it is installed, and does without elsewhere. (`blockcopy.zstd` names
its own as a string, because it is called differently from one Python to the next.)"""
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


def read(module: str) -> Visitor:
    visitor = Visitor()
    visitor.visit(ast.parse(SOURCES[module].read_text()))
    return visitor


READ = {module: read(module) for module in SOURCES}
CORE = sorted(module for module, path in SOURCES.items() if path.parent == CHECKOUT / "blockcopy")
REPLICA = sorted(module for module in SOURCES if f"{module}.".startswith("blockcopy.replica."))


def top(module: str) -> str:
    return module.partition(".")[0]


def test_the_sources_are_found() -> None:
    assert {"blockcopy", "blockcopy.cli", "blockcopy.wire"} <= set(CORE)
    assert {"blockcopy.replica", "blockcopy.replica.engine"} <= set(REPLICA)
    assert {"blockcopy_fuse", "blockcopy_fuse.mounting"} <= set(SOURCES)


@pytest.mark.parametrize("module", CORE)
def test_the_stages_import_the_standard_library_and_each_other_only(module: str) -> None:
    foreign = {
        each.module
        for each in READ[module].imports
        if top(each.module) not in sys.stdlib_module_names
        and each.module not in CORE
        and not ((each.lazy or each.typing_only) and top(each.module) == OPTIONAL.get(module))
    }
    assert not foreign


def test_the_stages_load_without_any_installed_package() -> None:
    lines = "\n".join(f"import {module}" for module in CORE)
    done = subprocess.run(
        [PYTHON, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{lines}"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("module", REPLICA)
def test_the_replica_knows_no_fuse_and_no_command_line(module: str) -> None:
    imported = {each.module for each in READ[module].imports}
    assert not {each for each in imported if top(each) in ("pyfuse3", "blockcopy_fuse")}
    assert "blockcopy.cli" not in imported


def importers(of: str) -> set[str]:
    names = {module: [f"{each.module}." for each in seen.imports] for module, seen in READ.items()}
    return {module for module, imported in names.items() if any(name.startswith(f"{of}.") for name in imported)}


def test_two_files_import_pyfuse3() -> None:
    assert importers("pyfuse3") == {"blockcopy_fuse.operations", "blockcopy_fuse.mounting"}


def test_only_the_programs_import_the_command_line() -> None:
    assert importers("blockcopy.cli") == {"blockcopy.__main__", "blockcopy_fuse.mount_helper"}


def test_one_place_prints_and_one_exits() -> None:
    calls = {module: seen.calls.intersection(LEAVES) for module, seen in READ.items()}
    assert {module: found for module, found in calls.items() if found} == {
        "blockcopy.console": {"print"},
        "blockcopy.cli": {"os._exit"},
        "blockcopy_fuse.asking": {"os._exit"},  # of a child that asks
        "blockcopy.bootstrap": {"sys.exit"},  # on a host where there is no command line yet
    }


def test_each_command_is_in_the_module_of_its_layer() -> None:
    """They are named in strings, so that one host needs not have them all."""
    for module, commands in cli._LAYERS.items():
        assert set(commands) <= READ[module].functions
    [named] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(named.choices) == {command for commands in cli._LAYERS.values() for command in commands}


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {each.module for each in seen.imports if each.module in SOURCES and not each.typing_only}
        for module, seen in READ.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the cycle
    assert set(order) == set(SOURCES)


def _module_map() -> list[str]:
    """The modules in the order of CONTRIBUTING.md's lists, with their packages."""
    package, found = "", []
    text = (CHECKOUT / "CONTRIBUTING.md").read_text()
    for line in text.partition("## Module map\n")[2].partition("\n## ")[0].splitlines():
        if folder := re.match(r" {4,6}(?:fuse/)?(\w+)/ ", line):
            package = "blockcopy.replica" if folder[1] == "replica" else folder[1]
        elif names := re.match(r" {6,8}(\w+(?: · \w+)*)(?: |$)", line):
            found += [f"{package}.{name}" for name in names[1].split(" · ")]
    return found


def test_imports_inside_a_package_are_of_what_stands_higher_in_the_module_map() -> None:
    order = _module_map()
    packages = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    assert sorted(order) == sorted(SOURCES.keys() - packages), "the map in CONTRIBUTING.md has each module once"
    wrong = [
        f"{module} imports {each.module}"
        for place, module in enumerate(order)
        for each in READ[module].imports
        if each.module in order[place:] and each.module.rpartition(".")[0] == module.rpartition(".")[0]
        if not each.typing_only
    ]
    assert wrong == []


def test_what_travels_to_a_host_is_as_small_as_it_is_said_to_be() -> None:
    said = re.search(r"\| (\d+) KiB, run from memory \|", (CHECKOUT / "CONTRIBUTING.md").read_text())
    assert said is not None
    assert int(said[1]) / 2 < len(parcel.opening(["retrieve"])) / 1024 < int(said[1])


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_product_code_does_not_assert(module: str) -> None:
    """`python -O` leaves assertions out, so nothing may rest on one."""
    assert not READ[module].asserts
