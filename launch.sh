#!/usr/bin/env bash
# One door for people: sets the project up in .venv (once), then runs the demo, the tests or a sret-scale command.
# Everything it installs is pinned in constraints.txt; it needs no root and writes only inside the project folder.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
venv=$root/.venv
log=$venv/setup.log
use_venv=yes
python=
# Set-up takes no file of the working folder for a module of Python; what it starts afterwards says so itself, by -P.
export PYTHONSAFEPATH=1

# A closed stream is a silent one: else the next file that is opened would be taken for it.
{ : >&1; } 2>/dev/null || exec >/dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null

fail() {
    printf 'error: %s\n' "$@" >&2 || true
    exit 2
}

# Words of a set-up that nobody may be there to read: the reader has left (`| head -1`), or the disk of a log is full.
say() {
    # shellcheck disable=SC2059 # the format is the first argument
    printf "$@" 2>/dev/null || true
}

# Prints the first Python 3.11 to 3.14 that really starts: a pyenv shim exists for versions that it then refuses. Of several
# the oldest, on which the pinned versions are tested most; a .venv that is there already keeps its own.
find_python() {
    local name path
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        while IFS= read -r path; do
            if "$path" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
                >/dev/null 2>&1; then
                printf '%s\n' "$path"
                return 0
            fi
        done < <(type -aP "$name" || true)
    done
    return 1
}

# The names of the extras in setup.cfg, in a line.
extras() {
    local names
    names=$(sed -n '/^\[options.extras_require\]/,/^\[options.entry/s/^\([a-z]*\) =.*/\1/p' "$root/setup.cfg")
    printf '%s' "${names//$'\n'/ }"
}

# What the installed packages depend on: when it changes, set-up runs again. The path counts because a .venv cannot move.
fingerprint() {
    { cat "$root/constraints.txt" "$root/setup.cfg" "$root/pyproject.toml" && printf '%s\n' "$1" "$root"; } | sha256sum
}

# step TEXT COMMAND...: runs it silently into the log; says that it begins, and the seconds it took or the log's end.
step() {
    local text=$1 start=$SECONDS pid status=0
    shift
    { printf '\n== %s: %s\n' "$text" "$*" >>"$log"; } 2>/dev/null ||
        fail "$log cannot be written" "make room on its disk, or see who owns it, then run the same command again"
    "$@" >>"$log" 2>&1 9<&- &
    pid=$!
    if [[ -t 1 ]]; then
        while kill -0 "$pid" 2>/dev/null; do
            say '\r%-52s %4d s' "$text" $((SECONDS - start))
            sleep 1
        done
        say '\r'
    else
        # Installing torch takes minutes: whoever reads a log shall see what is waited for.
        say '%s ...\n' "$text"
    fi
    wait "$pid" || status=$?
    if ((status != 0)); then
        say '%-52s failed after %d s\n' "$text" $((SECONDS - start)) >&2
        tail -n 15 "$log" >&2 || true
        fail "set-up stopped at: $text (whole log: $log)" \
            "check that pip's package index is reachable and the disk is not full, then run the same command again"
    fi
    say '%-52s %4d s\n' "$text" $((SECONDS - start))
}

# -P keeps the working folder from pip alone: a package that pip builds imports files that lie beside its set-up, as
# DeepSpeed's does, and the variable would reach it.
pip_install() {
    env -u PYTHONSAFEPATH "$venv/bin/python" -P -m pip install --no-input --disable-pip-version-check --progress-bar off \
        -c "$root/constraints.txt" "$@"
}

# A name==version pin of constraints.txt.
pin_of() {
    grep -i "^$1==" "$root/constraints.txt"
}

# The build of torch in the .venv, such as 2.13.0+cpu; read from its metadata because importing it takes seconds.
torch_build() {
    "$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))'
}

make_venv() {
    local base
    if [[ -e $venv ]] && ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        [[ -e $venv/pyvenv.cfg || -e $log ]] || fail "$venv exists and is not a virtual environment; move it away"
        rm -rf "$venv"
    fi
    if [[ ! -e $venv/bin/python ]]; then
        base=$(find_python) || fail "no usable Python 3.11 to 3.14 with venv was found on PATH" \
            "install one (Debian: apt-get install python3 python3-venv), or use --no-venv with an active environment"
        mkdir -p "$venv"
        step "virtual environment (.venv)" "$base" -m venv "$venv"
    fi
}

# Optional, because images have the same pixels without it: one line says what is missing.
build_jpeg_library() {
    local said
    if said=$("$venv/bin/python" -m data_pipelines.image.native.library 2>&1 9<&-); then
        said="faster decoding of JPEG: built"
    fi
    say '%s\n' "${said##*$'\n'}"
}

# is_in EXTRA: whether a stamp says that it is installed as the fingerprint in $print has it. With "*" any stamp will do.
is_in() {
    local stamp
    for stamp in "$venv"/installed-$1; do
        if [[ -e $stamp && $(<"$stamp") == "$print" ]]; then return 0; fi
    done
    return 1
}

# set_up [EXTRA...]: nothing to do when the stamps fit. Extras that are in stay in.
set_up() {
    local print='' all=yes build extra name
    local -A extras=()
    if [[ -x $venv/bin/python ]]; then print=$(fingerprint "$("$venv/bin/python" -V 2>/dev/null || true)"); fi
    for name in "${@:-*}"; do is_in "$name" || all=no; done
    if [[ $all == yes ]]; then return 0; fi
    [[ -w $root ]] || fail "$root is not writable, and set-up writes .venv there; copy the project or use --no-venv"
    # Two starts at once would install over each other; the second waits and then finds the stamp.
    if command -v flock >/dev/null; then
        exec 9<"$root/constraints.txt"
        if ! flock -n 9; then
            say 'another set-up is running here; waiting for it\n'
            flock 9
            exec 9<&-
            set_up "$@"
            return
        fi
    fi
    make_venv
    print=$(fingerprint "$("$venv/bin/python" -V)")
    for name in "$@" "$venv"/installed-*; do extras[${name##*installed-}]=1; done
    unset 'extras[core]' 'extras[*]'
    extra=${!extras[*]}
    extra=${extra:+[${extra// /,}]}
    step "build tools" pip_install "$(pin_of setuptools)" "$(pin_of wheel)"
    # torch alone and first: a package's dependency range must never choose its build.
    step "$(pin_of torch)" pip_install "$(pin_of torch)"
    build=$(torch_build)
    step "the project and its dependencies${extra:+ $extra}" pip_install --no-build-isolation -e "$root$extra"
    if [[ $(torch_build) != "$build" || "torch==${build%%+*}" != "$(pin_of torch)" ]]; then
        fail "torch is $(torch_build) after installing, expected $(pin_of torch) (build $build)" \
            "a dependency replaced it: remove .venv, and check the package indexes that pip is configured with"
    fi
    build_jpeg_library
    for name in core "${!extras[@]}"; do printf '%s' "$print" >"$venv/installed-$name"; done
    exec 9<&-
}

# check_active_python [EXTRA...]: says what the active environment lacks of setup.cfg, or has in a version it does not take.
check_active_python() {
    "$python" - "$root" "$@" <<'CHECK'
import configparser, importlib.metadata, importlib.util, re, shlex, sys

root, *extras = sys.argv[1:]
if sys.version_info < (3, 11):
    sys.exit(f"error: --no-venv: {sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or later")
config = configparser.ConfigParser(interpolation=None)
config.read(f"{root}/setup.cfg", encoding="utf-8")
wanted = "\n".join([config["options"]["install_requires"], *(config["options.extras_require"][name] for name in extras)])

def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]

missing, wrong, remedy = [], [], []
for name, relation, version in re.findall(r"^([\w-]+)(==|>=)?([\d.]*)$", wanted, re.M):
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "of unknown version"
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            missing.append(name)
            remedy.append(name + relation + version)
            continue
    have, least = numbers(found), numbers(version)
    if have != least if relation == "==" else have < least:
        wrong.append(f"{name} {found}, expected {name}{relation}{version}")
        remedy.append(name + relation + version)
if remedy:
    # Pins could replace a container's own torch by another build.
    pins = ["-c", f"{root}/constraints.txt"] if remedy[0].startswith("torch>") else []
    state = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {'; '.join(wrong)}"] * bool(wrong)
    command = shlex.join([sys.executable, "-m", "pip", "install", *pins, *remedy])
    sys.exit(f"error: --no-venv: {sys.executable} {' and '.join(state)}\nerror: install with: {command}")
CHECK
}

# Sets $python for the rest, installing when that is wanted.
prepare() {
    # What set-up says is for whoever listens; what it does is not stopped by one who left.
    trap '' PIPE
    if [[ $use_venv == yes ]]; then
        set_up "$@"
        python=$venv/bin/python
    else
        python=$(type -P python || type -P python3 || true)
        [[ -n $python ]] || fail "--no-venv: no python on PATH; activate your environment first"
        check_active_python "$@" || exit 2
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    unset PYTHONSAFEPATH
}

# check NAME COMMAND...: runs one of the checks; all run even if one fails, so that one start shows every complaint.
summary=()
failed=0
check() {
    local name=$1 start=$SECONDS status=passed
    shift
    printf '== %s\n' "$name"
    "$@" || { status=FAILED && failed=1; }
    summary+=("$(printf '%-14s %s (%d s)' "$name" "$status" $((SECONDS - start)))")
}

run_tests() {
    local output
    trap - PIPE
    cd "$root"
    output=$(mktemp)
    # shellcheck disable=SC2064 # the name is wanted as it is now, it is local
    trap "rm -f '$output'" EXIT
    if [[ ${1-} == --fast ]]; then
        shift
        set -- -m "not multi_process and not lengthy and not slow" "$@"
    else
        # .pre-commit-config.yaml has the same four commands.
        check "ruff check" "$python" -m ruff check .
        check "ruff format" "$python" -m ruff format --check .
        check "mypy" "$python" -m mypy
        # Its command is a script, which an active environment may not have on PATH; the module is there.
        check "import rules" "$python" -c 'import importlinter.cli as cli; cli.lint_imports_command()'
    fi
    # Threads of several libraries on few cores slow each other: one each is fastest for tiny sizes.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Two processes, a file of tests at a time; the files that start processes first (tests/conftest.py), so that short
    # ones fill the end.
    check "pytest" "$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" \
        > >(tee "$output") 2>&1
    wait $! || true
    printf '\n== summary\n'
    printf '%s\n' "${summary[@]}"
    tail -n 1 "$output"
    return "$failed"
}

usage() {
    cat <<'USAGE'
usage: ./launch.sh [--no-venv] [COMMAND [ARGUMENT ...]]

Sets the project up in .venv when needed (once), then:
  ./launch.sh                    the demo on the data that ships with the project, into runs/demo
  ./launch.sh demo reach         what depth is for: mazes, in minutes, into runs/reach
  ./launch.sh demo text          a translator on help pages that ship with the project, into runs/text
  ./launch.sh test [...]         every check and test; arguments go to pytest
  ./launch.sh test --fast [...]  only tests that start no processes and take no seconds
  ./launch.sh setup [EXTRA ...]  only the set-up, and the packages of optional parts
  ./launch.sh COMMAND ...        a sret-scale command of the list below; COMMAND --help says more

options:
  --no-venv   use the Python environment that is active and install nothing
  -h, --help  this text
  --version   sret-scale's version

USAGE
    printf 'extras: %s\n\ncommands:\n' "$(extras)"
    # Read as text: a fresh machine has no package yet, and perhaps no Python.
    local name text
    while IFS=$'\t' read -r name text; do
        printf '  %-11s %s\n' "$name" "$text"
    done < <(sed -n 's/^    "\([a-z]*\)": "\(.*\)",$/\1\t\2/p' "$root/sret_scale/commands/__init__.py")
}

# A question with the command that was meant, where any Python can tell.
nearest_command() {
    python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' "$1" \
        $(sed -n 's/^    "\([a-z]*\)": ".*",$/\1/p' "$root/sret_scale/commands/__init__.py") 2>/dev/null |
        sed -n 's/\(..*\)/did you mean \1? /p' || true
}

main() {
    if [[ ${1-} == --no-venv ]]; then
        use_venv=no
        shift
    fi
    local command=${1-demo}
    [[ $# -eq 0 ]] || shift
    case $command in
    -h | --help | help) usage ;;
    --version) sed -n 's/^__version__ = "\(.*\)"/sret-scale \1/p' "$root/sret_scale/__init__.py" ;;
    setup)
        for name in "$@"; do
            [[ " $(extras) " == *" $name "* ]] || fail "setup knows no extra \"$name\"; there are: $(extras)"
        done
        prepare "$@"
        say 'ready: %s\n' "$python"
        ;;
    test)
        prepare test
        run_tests "$@"
        ;;
    *[!a-z-]* | -*) fail "unknown option or command $command (--no-venv comes first); see ./launch.sh --help" ;;
    *)
        # A wrong name must not cost an installation first: the table of commands is read as text.
        grep -q "^    \"$command\": " "$root/sret_scale/commands/__init__.py" ||
            fail "unknown command $command; $(nearest_command "$command")see ./launch.sh --help"
        if [[ "$command ${1-}" == "demo text" ]]; then prepare text; else prepare; fi
        # The demo's files belong to the project; every other command works where the user stands.
        if [[ $command == demo ]]; then cd "$root"; fi
        trap - PIPE
        exec "$python" -P -m sret_scale.cli "$command" "$@"
        ;;
    esac
}

main "$@"
