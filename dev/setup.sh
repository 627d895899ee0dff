#!/bin/sh
# Make the virtual environment: a CPU build of torch where there is no NVIDIA GPU, then the requirements.
# Variables (see the Makefile): VENV, PYTHON, TORCH, TORCH_INDEX.
set -eu

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "setup: NVIDIA GPU found; installing the requirements' torch"
    $pip -r requirements/dev.txt
else
    echo "setup: no NVIDIA GPU; installing a CPU build of torch $TORCH"
    $pip "torch==$TORCH+cpu" -c constraints/cpu.txt 2>/dev/null ||
        $pip "torch==$TORCH" --index-url "$TORCH_INDEX" 2>/dev/null ||
        { echo "setup: no CPU build found in the configured indexes or at $TORCH_INDEX; taking the default one"
          $pip "torch==$TORCH"; }
    $pip -r requirements/dev.txt -c constraints/cpu.txt
fi

"$VENV/bin/python" -c "
import torch
cuda = torch.version.cuda
print(f'setup: torch {torch.__version__}', 'CPU build' if cuda is None else f'built for CUDA {cuda}')"
