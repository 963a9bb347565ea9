"""The house stays small enough to be owned: lines by room, files a folder, names used once, no circle of imports."""

import ast
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("sret_scale", "data_pipelines")
# Product lines (*.py, *.c, *.h, *.html) that a room may have. Raising one is a decision: say why in docs/log.md.
LINE_BUDGETS = {
    "data_pipelines": 9_361,
    "sret_scale/commands": 2_386,
    "sret_scale/config": 1_827,
    "sret_scale/distill": 1_280,
    "sret_scale/lab": 4_757,
    "sret_scale/launch": 1_980,
    "sret_scale/memory": 2_638,
    "sret_scale/model": 4_551,
    "sret_scale/runs": 625,
    "sret_scale/tasks": 569,
    "sret_scale/timm": 820,
    "sret_scale/train": 4_284,
}
TOTAL_BUDGET = 35_122
MOST_FILES = 20


def product_files(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\n") if name.endswith(suffixes) and (ROOT / name).exists()]


def lines_of(files: list[Path]) -> int:
    return sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in files)


def imports() -> dict[str, set[str]]:
    """Module -> the product modules that it imports at its top level."""
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in product_files(".py")}
    found: dict[str, set[str]] = defaultdict(set)
    for module, file in modules.items():
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    target = full if full in modules else node.module
                    if target in modules and target != module:
                        found[module].add(target)
    return found


def test_every_room_keeps_its_line_budget() -> None:
    files = product_files(".py", ".c", ".h", ".html")
    too_long = {}
    for room, budget in LINE_BUDGETS.items():
        lines = lines_of([file for file in files if file.is_relative_to(room)])
        if lines > budget:
            too_long[room] = f"{lines} of {budget}"
    assert too_long == {}
    assert lines_of(files) <= TOTAL_BUDGET


def test_every_folder_is_in_the_budget_and_holds_few_files() -> None:
    files = product_files(".py", ".c", ".h", ".html")
    rooms = {"/".join(file.parts[:2]) if file.parts[0] == "sret_scale" else file.parts[0] for file in files}
    assert {room for room in rooms if "." not in room} == set(LINE_BUDGETS)
    counts = Counter(str(file.parent) for file in files)
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_no_two_different_things_have_one_file_name() -> None:
    places = defaultdict(list)
    for file in product_files(".py"):
        if file.stem not in ("__init__", "__main__", "config") and "commands" not in file.parts:
            places[file.stem].append(str(file))
    # `upload` is the same few lines on both sides of a border that no import crosses.
    assert {stem: files for stem, files in places.items() if len(files) > 1 and stem != "upload"} == {}


def test_what_a_rank_has_of_a_tensor_is_called_a_fragment() -> None:
    """As docs/glossary.md says; slices are those of tokens, parts those of a micro-batch."""
    other = re.compile(r"(?i)part|piece|slice|chunk")
    found = {
        f"{file.stem}.{node.name}"
        for file in (ROOT / "sret_scale" / "train" / "engine").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and other.search(node.name)
    }
    assert found == {"whole_state.partition"}


def test_imports_make_no_circle() -> None:
    found = imports()
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(found[module]):
            visit(target)
        done.add(path.pop())

    for module in sorted(found):
        visit(module)


def test_one_step_is_read_in_nine_files() -> None:
    page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    step = [Path(name) for name in re.findall(r"^\d\. `([\w/.]+)`", page, re.M)]
    assert len(step) == 9 and all((ROOT / file).exists() for file in step)
    assert lines_of(step) <= 1_700
    before = [Path(name) for name in re.findall(r"^    (?:\./)?([\w/.]+\.(?:py|sh)) ", page, re.M)]
    before.append(Path("sret_scale/cli.py"))
    assert len(before) + len(step) <= 16 and lines_of([*before, *step]) <= 3_050


def test_pages_name_files_that_exist() -> None:
    missing = {}
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        # The log tells what was; names of files that are gone belong to it.
        if page.name in ("log.md", "CHANGELOG.md"):
            continue
        named = re.findall(
            r"`((?:sret_scale|data_pipelines|tests|checks|benchmarks|docs)/[\w/.]+\.\w+)`", page.read_text()
        )
        if gone := [name for name in named if not (ROOT / name).exists()]:
            missing[page.name] = gone
    assert missing == {}


def test_benchmarks_import_no_tests() -> None:
    """What both need stands in benchmarks: whoever measures reads no tests."""
    found = set()
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {f"{file.name} imports {name}" for name in names}
    assert "engine.py imports benchmarks.tiny_run" in found
    assert [one for one in sorted(found) if one.split()[-1].partition(".")[0] == "tests"] == []
