#!/usr/bin/env bash
# Runs mypy --strict over the package and the programs beside it.
set -euo pipefail
cd "$(dirname "$0")/.."

# mypy does not follow editable installs; through this link it sees the root folder under its import name.
mkdir -p .venv/typing
ln -sfn "$PWD" .venv/typing/jobworker
.venv/bin/mypy -p jobworker.worker -p jobworker.handlers -m jobworker.supervisor
shopt -s nullglob
for program in samples/*.py bench/*.py examples/*.py; do programs+=("$program"); done
if [[ ${programs[*]-} ]]; then .venv/bin/mypy "${programs[@]}"; fi
