#!/usr/bin/env bash
# Prints the first Python that can make a virtual environment for this project; says what is missing if none can.
set -euo pipefail

# 3.11 first: it is what the suite is run with. Running each one also sorts out launchers of absent versions.
for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
echo "error: no Python 3.11 or newer with the venv module found (on Debian: apt-get install python3 python3-venv;" \
    "elsewhere name one: make PYTHON=/path/to/python3.11 …)" >&2
exit 1
