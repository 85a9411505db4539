#!/usr/bin/env bash
# Removes what no service reads from a virtual environment: slim.sh VENV. Headers, static libraries, tests, pip.
set -euo pipefail
venv=${1:?usage: slim.sh VENV}
packages=$(echo "$venv"/lib/python3*/site-packages)
"$venv/bin/python" -m pip uninstall --quiet --yes pip
rm -rf "$packages"/torch/{include,share,test}
# Programs of the C++ build; torch itself starts torch_shm_manager only.
[[ ! -d $packages/torch/bin ]] || find "$packages/torch/bin" -type f -not -name torch_shm_manager -delete
find "$packages" -name '*.a' -delete
find "$packages" -depth -type d \( -name __pycache__ -o -name tests \) -not -path '*/torch/*' -exec rm -rf {} +
find "$packages" -name '*.pyi' -delete
