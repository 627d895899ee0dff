#!/bin/sh
# Make the virtual environment: a CPU build of torch where there is no NVIDIA GPU, then the requirements.
# Variables (see the Makefile): VENV, PYTHON, TORCH, TORCH_INDEX, GPU (which constraints a GPU machine takes).
set -eu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: expected Python 3.11 or newer, found $("$PYTHON" --version). Set PYTHON=..." >&2; exit 1; }
# An interrupted set-up can leave an environment without pip: --clear starts it afresh.
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$VENV"
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "setup: NVIDIA GPU found; installing torch as constraints/$GPU.txt says"
    $pip -r requirements/dev.txt -c "constraints/$GPU.txt"
else
    echo "setup: no NVIDIA GPU; installing a CPU build of torch $TORCH"
    $pip "torch==$TORCH+cpu" -c constraints/cpu.txt 2>/dev/null ||
        $pip "torch==$TORCH" --index-url "$TORCH_INDEX" 2>/dev/null ||
        { echo "setup: no CPU build in the configured indexes or at $TORCH_INDEX; taking what $TORCH is here"
          $pip "torch==$TORCH" -c constraints/cpu.txt; }
    $pip -r requirements/dev.txt -c constraints/cpu.txt
fi

"$VENV/bin/python" -c "
import torch
cuda = torch.version.cuda
print(f'setup: torch {torch.__version__},', 'a CPU build' if cuda is None else f'built for CUDA {cuda}')"
echo "setup: for commands that start with python or torchrun: source $VENV/bin/activate"
