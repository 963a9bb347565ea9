"""launch.sh from outside: help, wrong commands, which Python it takes, what it says when something is missing."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sret_scale import __version__
from sret_scale.commands import COMMANDS

pytestmark = pytest.mark.multi_process

ROOT = Path(__file__).parents[2]
# What the script needs besides Python; a PATH with only these has no Python at all.
TOOLS = ("bash", "env", "readlink", "dirname", "cat", "grep", "sed", "sha256sum", "rm", "mkdir", "ls", "tail", "sleep")
# A python3.11 whose `-m venv FOLDER` makes FOLDER/bin/python, an interpreter that writes down what it was asked for.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin" && cp "$FAKE/interpreter" "$3/bin/python" && : >"$3/pyvenv.cfg"
    echo "venv $3" >>"$FAKE/log"
    ;;
esac
"""
FAKE_INTERPRETER = """#!/bin/sh
case "$*" in
-V) echo "Python 3.11.0" ;;
"-c import pip") ;;
"-m data_pipelines.image.native.library")
    [ ! -e "$FAKE/no_compiler" ] || { printf 'first\nnot built: no compiler\n' >&2; exit 1; }
    echo "library" >>"$FAKE/log"
    ;;
-c*metadata*) cat "$FAKE/torch" ;;
"-P -m pip install "*)
    # The set-ups of packages that pip builds look for modules beside them, which this variable would forbid.
    echo "${PYTHONSAFEPATH:+no package can be built: }pip $*" >>"$FAKE/log"
    case "$*" in
    *" torch=="*)
        tries=0
        while [ -e "$FAKE/hold" ] && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
        [ ! -e "$FAKE/hold" ] || exit 9
        echo 2.13.0+cpu >"$FAKE/torch"
        ;;
    *" -e "*) [ ! -e "$FAKE/replaces" ] || cat "$FAKE/replaces" >"$FAKE/torch" ;;
    esac
    ;;
*) echo "run $* in $PWD" >>"$FAKE/log" ;;
esac
"""


def run(script: Path, *arguments: str, cwd: Path, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PATH": os.environ["PATH"] if path is None else path}
    return subprocess.run(
        [str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script with what it reads, in a folder with a space."""
    folder = tmp_path / "a folder"
    (folder / "sret_scale" / "commands").mkdir(parents=True)
    for name in (
        "launch.sh",
        "constraints.txt",
        "setup.cfg",
        "pyproject.toml",
        "sret_scale/commands/__init__.py",
        "sret_scale/__init__.py",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder / "launch.sh"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def fake(tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A python3.11 on the bare PATH that installs nothing; `log` in this folder tells what was asked of it."""
    folder = tools.parent / "fake"
    folder.mkdir()
    (tools / "cp").symlink_to(shutil.which("cp") or "")
    program(tools / "python3.11", FAKE_PYTHON)
    program(folder / "interpreter", FAKE_INTERPRETER)
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def taken_log(fake: Path) -> list[str]:
    """What was asked for since the last time."""
    path = fake / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def expected_calls(project: Path, extra: str = "") -> list[str]:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pip = "pip -P -m pip install --no-input --disable-pip-version-check --progress-bar off "
    pip += f"-c {project}/constraints.txt "
    return [
        f"{pip}setuptools=={pins['setuptools']} wheel=={pins['wheel']}",
        f"{pip}torch=={pins['torch']}",
        f"{pip}--no-build-isolation -e {project}{extra}",
        "library",
    ]


def test_first_start_installs_in_order_and_the_second_nothing(copy: Path, tools: Path, fake: Path) -> None:
    project = copy.parent
    first = run(copy, "setup", cwd=project, path=str(tools))
    assert first.returncode == 0, first.stderr
    assert taken_log(fake) == [f"venv {project}/.venv", *expected_calls(project)]
    assert first.stdout.splitlines()[-1] == f"ready: {project}/.venv/bin/python"
    assert "faster decoding of JPEG: built" in first.stdout.splitlines()
    second = run(copy, "setup", cwd=project, path=str(tools))
    assert (second.returncode, second.stdout, taken_log(fake)) == (0, f"ready: {project}/.venv/bin/python\n", [])


def test_without_a_compiler_set_up_says_so_in_a_line_and_goes_on(copy: Path, tools: Path, fake: Path) -> None:
    (fake / "no_compiler").touch()
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-2:] == ["not built: no compiler", f"ready: {copy.parent}/.venv/bin/python"]


def test_test_setup_adds_its_extra_and_holds_the_core(copy: Path, tools: Path, fake: Path) -> None:
    project = copy.parent
    run(copy, "setup", cwd=project, path=str(tools))
    taken_log(fake)
    assert run(copy, "setup", "test", cwd=project, path=str(tools)).returncode == 0
    assert taken_log(fake) == expected_calls(project, "[test]")
    (project / ".venv" / "installed-core").unlink()
    assert run(copy, "setup", cwd=project, path=str(tools)).returncode == 0
    assert taken_log(fake) == []


def test_extras_are_installed_once_and_stay_in(copy: Path, tools: Path, fake: Path) -> None:
    project = copy.parent

    def asked(*extras: str) -> list[str]:
        result = run(copy, "setup", *extras, cwd=project, path=str(tools))
        assert result.returncode == 0, result.stderr
        calls = [call for call in taken_log(fake) if " -e " in call]
        return sorted(calls[0].partition(f" -e {project}")[2].strip("[]").split(",")) if calls else []

    assert asked("wandb", "remote") == ["remote", "wandb"]
    assert asked() == asked("remote") == asked("wandb", "remote") == []
    assert asked("parquet", "wandb") == ["parquet", "remote", "wandb"]
    with (project / "constraints.txt").open("a") as stream:
        stream.write("zipp==1.0\n")
    assert asked() == ["parquet", "remote", "wandb"]


def test_unknown_extra_is_an_error_that_lists_all(copy: Path, tools: Path, fake: Path) -> None:
    result = run(copy, "setup", "remote", "wandv", cwd=copy.parent, path=str(tools))
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = " ".join(config["options.extras_require"])
    assert (result.returncode, result.stderr) == (2, f'error: setup knows no extra "wandv"; there are: {names}\n')
    assert taken_log(fake) == []


def test_changed_pin_installs_again_without_a_new_environment(copy: Path, tools: Path, fake: Path) -> None:
    project = copy.parent
    run(copy, "setup", cwd=project, path=str(tools))
    taken_log(fake)
    with (project / "constraints.txt").open("a") as stream:
        stream.write("zipp==1.0\n")
    assert run(copy, "setup", cwd=project, path=str(tools)).returncode == 0
    assert taken_log(fake) == expected_calls(project)


@pytest.mark.parametrize("replaced", ["2.14.1+cpu", "2.13.0+cu130"])
def test_torch_replaced_by_a_dependency_is_an_error(copy: Path, tools: Path, fake: Path, replaced: str) -> None:
    (fake / "replaces").write_text(f"{replaced}\n")
    for _ in range(2):  # The second start must not take the failed one for done.
        result = run(copy, "setup", cwd=copy.parent, path=str(tools))
        assert result.returncode == 2
        assert f"error: torch is {replaced} after installing, expected torch==2.13.0" in result.stderr
        assert "a dependency replaced it" in result.stderr and "ready" not in result.stdout


def test_no_argument_is_the_demo_in_the_projects_folder(copy: Path, tools: Path, fake: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(copy, cwd=elsewhere, path=str(tools)).returncode == 0
    assert taken_log(fake)[-1] == f"run -P -m sret_scale.cli demo in {copy.parent}"
    assert run(copy, "train", "a b", "c=d", cwd=elsewhere, path=str(tools)).returncode == 0
    assert taken_log(fake) == [f"run -P -m sret_scale.cli train a b c=d in {elsewhere}"]


def test_step_says_that_it_begins_also_off_a_terminal(copy: Path, tools: Path, fake: Path) -> None:
    (fake / "hold").touch()  # torch's installation waits (for 10 s at most) until this goes away.
    environment = {**os.environ, "PATH": str(tools)}
    command = [str(copy), "setup"]
    with subprocess.Popen(command, cwd=copy.parent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line.rstrip())
            if line.startswith("torch==2.13.0 ..."):
                (fake / "hold").unlink()
    assert process.returncode == 0
    names = [re.sub(r" +\d+ s$| \.\.\.$", "", line) for line in seen[:-2]]
    assert names[::2] == names[1::2]
    assert names[::2] == [
        "virtual environment (.venv)",
        "build tools",
        "torch==2.13.0",
        "the project and its dependencies",
    ]


@pytest.mark.parametrize("how", ["2>&1 >&-", ">&- 2>&-", ">/dev/full 2>&1", "", "2>&1", "<&- >&-"])
def test_output_that_nobody_takes_stops_no_set_up(copy: Path, tools: Path, fake: Path, how: str) -> None:
    project = copy.parent
    read_end, write_end = os.pipe()
    os.close(read_end)  # The reader has left, as of `| head`; what is not redirected elsewhere is written to it.
    command = ["bash", "-c", f'exec "$0" train demo {how}', str(copy)]
    environment = {**os.environ, "PATH": str(tools)}
    result = subprocess.run(
        command, cwd=project, env=environment, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    ran = f"run -P -m sret_scale.cli train demo in {project}"
    assert taken_log(fake) == [f"venv {project}/.venv", *expected_calls(project), ran]
    assert (result.returncode, result.stderr) == (0, "")
    assert run(copy, "setup", cwd=project, path=str(tools)).stdout == f"ready: {project}/.venv/bin/python\n"


@pytest.mark.parametrize("how", ["", ">&-", "2>&-", ">/dev/full 2>&1"])
def test_set_up_that_fails_has_its_status_wherever_its_words_go(copy: Path, tools: Path, fake: Path, how: str) -> None:
    (fake / "replaces").write_text("2.14.1+cpu\n")
    result = run(Path("bash"), "-c", f'"$0" train demo {how}', str(copy), cwd=copy.parent, path=str(tools))
    assert result.returncode == 2 and not any(line.startswith("run ") for line in taken_log(fake))


def test_a_full_disk_under_the_log_of_set_up_is_an_error_that_names_it(copy: Path, tools: Path, fake: Path) -> None:
    run(copy, "setup", cwd=copy.parent, path=str(tools))
    taken_log(fake)
    (copy.parent / ".venv" / "installed-core").unlink()
    log = copy.parent / ".venv" / "setup.log"
    log.unlink()
    log.symlink_to("/dev/full")
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    first, advice = result.stderr.splitlines()
    assert (result.returncode, first) == (2, f"error: {log} cannot be written")
    assert advice.startswith("error: make room") and taken_log(fake) == []


def test_fast_tests_are_those_without_processes_and_nothing_else_is_checked(
    copy: Path, tools: Path, fake: Path
) -> None:
    for name in ("mktemp", "tee"):
        (tools / name).symlink_to(shutil.which(name) or "")
    run(copy, "setup", "test", cwd=copy.parent, path=str(tools))
    calls = {}
    for arguments in ((), ("--fast", "-k", "name")):
        taken_log(fake)
        run(copy, "test", *arguments, cwd=copy.parent, path=str(tools))
        calls[arguments] = [line for line in taken_log(fake) if line.startswith("run ")]
    pytest_run = "run -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder"
    where = f" in {copy.parent}"
    assert calls["--fast", "-k", "name"] == [
        f"{pytest_run} -m not multi_process and not lengthy and not slow -k name{where}"
    ]
    assert calls[()][-1] == f"{pytest_run}{where}" and "run -m mypy" + where in calls[()]


def test_pre_commit_runs_the_commands_of_the_script() -> None:
    checks = re.findall(r'^ +check "(.*)" "\$python" (.*)$', (ROOT / "launch.sh").read_text(), re.M)
    (source,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [(hook["name"], hook["entry"]) for hook in source["hooks"]]
    assert hooks == [(name, f".venv/bin/python {command}") for name, command in checks if name != "pytest"]
    # Every hook sees the whole tree, as CI does, whatever the commit changes.
    assert all(hook["always_run"] and not hook["pass_filenames"] for hook in source["hooks"])


def test_help_lists_everything_at_once_from_anywhere(tmp_path: Path) -> None:
    began = time.monotonic()
    result = run(ROOT / "launch.sh", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("launch.sh test", "setup", "--no-venv"):
        assert word in result.stdout
    listed = re.findall(r"^  ([a-z]+) +(.*)$", result.stdout.partition("\ncommands:\n")[2], re.M)
    assert dict(listed) == COMMANDS
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("name", ["trian", "$(touch x)", "--fast", "-x", "describe.*"])
def test_wrong_command_is_named_before_anything_is_installed(copy: Path, name: str) -> None:
    result = run(copy, name, cwd=copy.parent)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown") and name in result.stderr
    assert not (copy.parent / ".venv").exists() and not (copy.parent / "x").exists()


def test_no_python_says_what_to_install(copy: Path, tools: Path) -> None:
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert "no usable Python 3.11 to 3.14" in result.stderr and "--no-venv" in result.stderr


def test_shim_that_does_not_start_is_passed_over(copy: Path, tools: Path) -> None:
    program(tools / "python3.11", "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
    program(tools / "python3.12", '#!/bin/sh\ncase "$1" in -m) echo "the next makes it" >&2; exit 1;; esac\nexit 0\n')
    assert "the next makes it" in run(copy, "setup", cwd=copy.parent, path=str(tools)).stderr


def test_help_and_version_need_no_python(copy: Path, tools: Path) -> None:
    result = run(copy, "--help", cwd=copy.parent, path=str(tools))
    assert (result.returncode, result.stderr) == (0, "")
    assert dict(re.findall(r"^  ([a-z]+) +(.*)$", result.stdout.partition("\ncommands:\n")[2], re.M)) == COMMANDS
    assert run(copy, "--version", cwd=copy.parent, path=str(tools)).stdout == f"sret-scale {__version__}\n"


@pytest.mark.parametrize(("version", "is_taken"), [("3.10", False), ("3.11", True), ("3.14", True), ("3.15", False)])
def test_python_3_11_to_3_14_is_taken_under_any_name(copy: Path, tools: Path, version: str, is_taken: bool) -> None:
    # The interpreter of this test, which says that it is of another version.
    info = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0, 'final', 0)"
    program(
        tools / "python3",
        f"""#!{sys.executable}
import sys
{info}
if sys.argv[1] == "-c":
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    sys.exit("venv is asked for")
""",
    )
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert ("venv is asked for" in result.stderr) == is_taken
    assert ("no usable Python" in result.stderr) != is_taken


def test_of_several_pythons_the_oldest_makes_the_environment(copy: Path, tools: Path) -> None:
    for name in ("python3", "python3.14", "python3.13"):
        program(tools / name, f'#!/bin/sh\ncase "$1" in -m) echo "{name} makes it" >&2; exit 1;; esac\nexit 0\n')
    assert "python3.13 makes it" in run(copy, "setup", cwd=copy.parent, path=str(tools)).stderr


def test_failed_step_shows_the_log_and_what_to_do(copy: Path, tools: Path) -> None:
    program(
        tools / "python3.11",
        '#!/bin/sh\ncase "$1" in -m) echo "the disk is full" >&2; exit 1;; esac\nexit 0\n',
    )
    result = run(copy, "setup", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert "the disk is full" in result.stderr
    assert "run the same command again" in result.stderr.splitlines()[-1]


def test_no_venv_names_what_the_environment_lacks(copy: Path, tools: Path) -> None:
    program(tools / "python", f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    result = run(copy, "--no-venv", "describe", "sret_t", cwd=copy.parent, path=str(tools))
    assert result.returncode == 2
    assert "lacks torch, deepspeed" in result.stderr
    assert not (copy.parent / ".venv").exists()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"deepspeed": "0.20.0"}, "has deepspeed 0.20.0, expected deepspeed==0.19.8"),
        ({"deepspeed": "0.19.8+local"}, None),
        ({"torch": "2.10.0+cu128"}, "has torch 2.10.0+cu128, expected torch>=2.11"),
        ({"torch": "2.9.1", "deepspeed": "0.19.7"}, "torch 2.9.1, expected torch>=2.11; deepspeed 0.19.7, expected"),
        ({"torch": "2.11.0a0+git1234"}, None),
        ({"torch": None}, "has torch of unknown version, expected torch>=2.11"),
    ],
)
def test_no_venv_names_a_wrong_version(
    copy: Path, tools: Path, versions: dict[str, str | None], message: str | None
) -> None:
    # The interpreter of this test, whose metadata say something else about some packages.
    site = copy.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"""
import importlib.metadata as metadata
real, changed = metadata.version, {versions!r}
def version(name):
    if name in changed and changed[name] is None:
        raise metadata.PackageNotFoundError(name)
    return changed.get(name) or real(name)
metadata.version = version
""")
    program(tools / "python", f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    result = run(copy, "--no-venv", "setup", cwd=copy.parent, path=str(tools))
    if message is None:
        assert (result.returncode, result.stderr) == (0, "")
    else:
        assert result.returncode == 2
        assert message in result.stderr
        # Pins must not replace a torch that will do.
        command = ["-c", f"{copy.parent}/constraints.txt", "torch>=2.11"] if "torch" in versions else []
        command += ["deepspeed==0.19.8"] if "deepspeed" in versions else []
        remedy = shlex.join([sys.executable, "-m", "pip", "install", *command])
        assert result.stderr.splitlines()[-1] == f"error: install with: {remedy}"
    assert not (copy.parent / ".venv").exists()


def test_no_file_of_the_working_folder_is_taken_for_a_module(tmp_path: Path) -> None:
    for name in ("configparser", "sret_scale", "argparse", "ensurepip"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported from the working folder')")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = run(ROOT / "launch.sh", "--no-venv", "train", "--help", cwd=tmp_path, path=path)
    assert result.returncode == 0, result.stderr
    result = run(ROOT / "launch.sh", "--help", cwd=tmp_path, path=path)
    assert result.returncode == 0 and "doctor" in result.stdout, result.stderr


def test_no_venv_runs_a_command_where_the_user_stands(tmp_path: Path) -> None:
    folder = tmp_path / "some where"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = run(ROOT / "launch.sh", "--no-venv", "train", "--help", cwd=folder, path=path)
    assert result.returncode == 0, result.stderr
    assert "--hostfile" in result.stdout
    assert list(folder.iterdir()) == []
