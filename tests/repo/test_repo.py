"""What holds for the whole repository: import rules, names, the set of flags, plain text, pinned requirements."""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sret_scale.commands import COMMANDS
from sret_scale.commands.arguments import build_parser

ROOT = Path(__file__).parents[2]
CODE_FOLDERS = ("sret_scale", "data_pipelines", "ds_configs", "benchmarks", "checks", "tests")
CODE = sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXT = [
    *CODE,
    *(path for pattern in ("*.md", "*.sh", "*.cfg", "*.toml", "*.txt", "docs/*.md", "ds_configs/*.json", ".ci/*")
      for path in ROOT.glob(pattern)),
]  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.multi_process
def test_imports_point_downwards_and_through_the_doors() -> None:
    command = [sys.executable, "-c", "import importlinter.cli as cli; cli.lint_imports_command()"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_torch_distributed_has_one_door() -> None:
    door = "sret_scale/train/distributed.py"
    pattern = re.compile(
        r"^\s*(import torch\.distributed|from torch\.distributed|from torch import .*distributed)", re.M
    )
    users = {
        name_of(path) for path in CODE if path.is_relative_to(ROOT / "sret_scale") and pattern.search(path.read_text())
    }
    assert users <= {door}


def test_no_file_is_named_for_what_is_left_over() -> None:
    forbidden = {"utils", "helpers", "common", "misc", "core", "base"}
    assert [name_of(path) for path in CODE if forbidden & {*path.relative_to(ROOT).parts[:-1], path.stem}] == []


def test_functions_fit_a_screen() -> None:
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []


def test_modules_say_what_they_are_for() -> None:
    assert [
        name_of(path) for path in CODE if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


def test_text_is_ascii_and_names_no_machine() -> None:
    # Paths of somebody's machine; /tmp and /proc are everybody's.
    machine = re.compile(r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+|mnt/\w+)/")
    not_ascii = [name_of(path) for path in TEXT if not path.read_bytes().isascii()]
    machines = [name_of(path) for path in TEXT if path != Path(__file__) and machine.search(path.read_text())]
    assert (not_ascii, machines) == ([], [])


def test_todo_needs_an_issue() -> None:
    pattern = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))")
    assert [name_of(path) for path in CODE if path != Path(__file__) and pattern.search(path.read_text())] == []


def test_train_has_at_most_its_six_flags() -> None:
    flags = {option for action in build_parser("train")._actions for option in action.option_strings}
    assert flags == {"-h", "--help", "--debug", "--run", "--ranks", "--hostfile", "--elastic", "--fresh", "--dry-run"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.multi_process
def test_help_has_an_example_and_needs_no_heavy_import(command: str) -> None:
    program = f"""
import contextlib, io, sys
from sret_scale.cli import main
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    main([{command!r}, "--help"])
heavy = {{"torch", "deepspeed", "numpy", "matplotlib", "webdataset"}} & set(sys.modules)
assert "example" in text.getvalue(), text.getvalue()
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of a command's own sub-commands, of every depth."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield child
                yield from actions_of(child)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_action_has_its_own_example(command: str) -> None:
    assert [
        action.prog
        for action in actions_of(build_parser(command))
        if not re.search(rf"^(examples?:)?\s*{re.escape(action.prog)} ", action.epilog or "", re.M)
    ] == []


def test_commands_with_actions_are_walked() -> None:
    assert {name for name in COMMANDS if list(actions_of(build_parser(name)))} == {"labels", "shards", "weights"}


def test_every_requirement_is_pinned() -> None:
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()])
    names = {re.split(r"[<>=\[; ]", line.strip())[0] for line in wanted.splitlines() if line.strip()}
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name for name in names if name.lower() not in pins} == set()
    assert "apex" not in names, "PyPI's apex is not NVIDIA's"
