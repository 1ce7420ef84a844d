#!/usr/bin/env bash
# scripts/gpu_check.py with the wheels of scripts/gpu_wheels.sh, on a machine without a network. Arguments go through.
#
#   WHEELS=FOLDER bash scripts/gpu_check.sh --part correctness     default: wheels/ in the checkout
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${WHEELS:-$root/wheels}
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install=("$python" -m pip install --quiet --no-index --no-deps --no-cache-dir --target)
"${install[@]}" "$site/server" "$wheels"/*.whl
"${install[@]}" "$site/stock" "$wheels"/stock/*.whl
PYTHONUNBUFFERED=1 PYTHONPATH="$site/server:$root" STOCK_FLA="$site/stock" "$python" "$root/scripts/gpu_check.py" "$@"
