#!/usr/bin/env bash
# Makes or updates the virtual environment: make-venv.sh VENV EXTRAS. Shows one line a package; the whole log is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: make-venv.sh VENV EXTRAS}
extras=${2:?usage: make-venv.sh VENV EXTRAS}
started_s=$SECONDS

if [[ ! -x $venv/bin/python ]]; then
    python=$(scripts/find-python.sh)
    echo "== making $venv with $python ($("$python" --version))"
    "$python" -m venv "$venv"
fi
# Where the configured package index has no CPU build of torch, name one that has (PyTorch's own installation
# page tells): TORCH_INDEX=... make run
log=$venv/install.log
echo "== installing jobworker[$extras] and its dependencies (torch: CPU build; log: $log)"
if ! "$venv/bin/pip" install --no-input ${TORCH_INDEX:+"--extra-index-url=$TORCH_INDEX"} -c constraints.txt -e ".[$extras]" 2>&1 |
    tee "$log" | sed -un 's/^Collecting \([^ ]*\).*/   \1/p; s/^Installing collected packages.*/   installing …/p'; then
    tail -20 "$log" >&2
    echo "error: pip could not install; its last lines are above, all of them in $log" >&2
    exit 1
fi
echo "== $venv is ready after $((SECONDS - started_s)) s"
