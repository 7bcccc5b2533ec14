#!/bin/sh
# Runs one of the tools with a Python that understands it: start.sh environment.py demo.run
# The version is asked from here because an older Python would stop at the tools' syntax with no useful word.
set -eu
tools=$(cd "$(dirname "$0")" && pwd)

works() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        works "$PYTHON" && echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        works "$candidate" && echo "$candidate" && return
    done
    return 1
}

if ! python=$(find_python); then
    found=$("${PYTHON:-python3}" -V 2>&1) || found="none"
    echo "ConceptGuard: Python 3.11 or newer is needed, ${PYTHON:-python3} is: $found" >&2
    echo "  mend: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
fi
script=$1
shift
exec "$python" "$tools/$script" "$@"
