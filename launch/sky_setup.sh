#!/bin/bash
# Prepare a machine that SkyPilot rented: a Python of its own, `make setup`, the contest's shards.
set -eu
cd "$(dirname "$0")/.."
command -v uv >/dev/null || export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || uv venv --quiet --seed --python 3.12 .venv
make setup
.venv/bin/python -m data.download --variant "${VARIANT:-sp1024}" --train-shards "${TRAIN_SHARDS:-80}"
