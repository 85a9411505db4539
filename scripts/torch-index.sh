#!/usr/bin/env bash
# Prints the pip option that makes the CPU build of torch available: nothing where the configured indexes have it.
set -euo pipefail

venv=${1:?usage: torch-index.sh VENV}
# Elsewhere than on Linux the plain build is the CPU build.
[[ $(uname -s) == Linux ]] || exit 0
versions=$("$venv/bin/pip" index versions torch 2>/dev/null || true)
[[ $versions == *+cpu* ]] || echo "--extra-index-url=https://download.pytorch.org/whl/cpu"
