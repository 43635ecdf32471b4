#!/bin/sh
# Make a virtual environment and install into it, for the Makefile:
#
#     tools/environment.sh PYTHON FOLDER ABOUT [--torch REQUIREMENT DEFAULT] PIP_ARGUMENTS...
#
# Says what it does and how long that takes, shows every 15 seconds where it is, and keeps pip's own talk in FOLDER.log.
# What is missing (Python, its venv module, a network) is one line.
set -eu
python=$1 folder=$2 about=$3
shift 3
log=$folder.log

stop() {
    echo "error: $*" >&2
    exit 1
}

# Run a command with its output in the log; show the newest step of pip from time to time.
quietly() {
    "$@" >>"$log" 2>&1 &
    pid=$!
    trap 'kill $pid 2>/dev/null; exit 130' INT TERM
    told=$(date +%s)
    while kill -0 $pid 2>/dev/null; do
        sleep 0.2 2>/dev/null || sleep 1
        now=$(date +%s)
        if [ $((now - told)) -ge 15 ]; then
            step=$(grep -E '^ *(Collecting|Downloading|Building|Installing)' "$log" | tail -n 1 | cut -c 1-90)
            echo "  $((now - begun)) s: ${step:-working}"
            told=$now
        fi
    done
    trap - INT TERM
    wait $pid
}

install() {
    quietly "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --retries 2 "$@"
}

explain() {
    if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|Network is unreachable|name resolution' "$log"; then
        stop "no package index can be reached: connect to a network (only the first time needs one), and run it again"
    fi
    reason=$(grep -E '^ERROR' "$log" | head -n 1)
    stop "$folder cannot be made: ${reason:-see the log}: the whole log is $log"
}

[ -n "$python" ] && command -v "$python" >/dev/null 2>&1 ||
    stop "there is no python3: install Python 3.11, or name it: make PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$("$python" -V 2>&1) is too old: install Python 3.11, or name it: make PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"

mkdir -p "$(dirname "$folder")"
: >"$log"
begun=$(date +%s)
echo "making $folder: $about"
quietly "$python" -m venv "$folder" || explain
install --upgrade pip || explain
if [ "${1:-}" = --torch ]; then
    echo "installing $2"
    if ! install "$2"; then
        grep -q 'No matching distribution' "$log" || explain
        echo "no $2 in your package index: installing its default build $3 instead"
        install "$3" || explain
    fi
    shift 3
    echo "installing all the rest"
fi
install "$@" || explain
echo "made $folder in $(($(date +%s) - begun)) s"
