#!/bin/sh
# Make the virtual environment with the torch that suits this machine, then the requirements.
# Variables (see the Makefile): VENV, PYTHON, TORCH, TORCH_INDEX (CPU builds), ROCM_INDEX (builds for AMD GPUs),
# GPU (which constraints a machine with an NVIDIA GPU takes), KFD (the device file of AMD's driver).
set -eu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: expected Python 3.11 or newer, found $("$PYTHON" --version). Set PYTHON=..." >&2; exit 1; }
system=$(uname -s) machine=$(uname -m)
if [ "$system $machine" = "Darwin x86_64" ]; then
    echo "setup: expected a Mac with an Apple processor and its Python, found x86_64, for which torch is no longer" \
        "built. Set PYTHON=... to an arm64 Python, or use a Linux machine." >&2
    exit 1
fi
# An interrupted set-up can leave an environment without pip: --clear starts it afresh.
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$VENV"
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"

if [ "$system" = Darwin ]; then
    echo "setup: Mac found; installing torch $TORCH, which has Apple's GPU (mps)"
    $pip "torch==$TORCH" -c constraints/cpu.txt
    $pip -r requirements.txt -r requirements/dev.txt -c constraints/cpu.txt
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "setup: NVIDIA GPU found; installing torch as constraints/$GPU.txt says"
    $pip -r requirements.txt -r requirements/dev.txt -c "constraints/$GPU.txt"
elif [ -e "$KFD" ] || { command -v rocminfo >/dev/null 2>&1 && rocminfo >/dev/null 2>&1; }; then
    echo "setup: AMD GPU (ROCm) found; installing a torch of $ROCM_INDEX"
    $pip "torch>=2.9.1,<2.16" --index-url "$ROCM_INDEX" ||
        { echo "setup: no torch at $ROCM_INDEX. Set ROCM_INDEX=... to the index of your ROCm version" >&2; exit 1; }
    $pip -r requirements.txt -r requirements/dev.txt
else
    echo "setup: no NVIDIA or AMD GPU; installing a CPU build of torch $TORCH"
    $pip "torch==$TORCH+cpu" -c constraints/cpu.txt 2>/dev/null ||
        $pip "torch==$TORCH" --index-url "$TORCH_INDEX" 2>/dev/null ||
        { echo "setup: no CPU build in the configured indexes or at $TORCH_INDEX; taking what $TORCH is here"
          $pip "torch==$TORCH" -c constraints/cpu.txt; }
    $pip -r requirements.txt -r requirements/dev.txt -c constraints/cpu.txt
fi

"$VENV/bin/python" -c "
import torch
built = [f'built for {name} {version}' for name, version in
         (('CUDA', torch.version.cuda), ('ROCm', torch.version.hip)) if version]
found = torch.accelerator.current_accelerator(True)
print(f'setup: torch {torch.__version__},', built[0] if built else 'a CPU build' if found is None else 'with its GPU')
if built and found is None:
    print('setup: this torch finds no GPU: make doctor says more')"
echo "setup: for commands that start with python or torchrun: source $VENV/bin/activate"
