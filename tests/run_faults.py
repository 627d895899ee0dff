"""Put known faults of the GPU path back, one by one, and see that a test notices each.

    python -m tests.run_faults                all of them, in a copy of the repository
    python -m tests.run_faults launches fp8   those whose names contain a word

None of these faults shows on a CPU by itself; each was found by reading, on an emulated GPU or on a null one.
The status is 1 where a fault goes unnoticed, or where what it replaces is no longer in the source.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

from common import UserError, format_table, run_command

REPOSITORY = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """A change that breaks something, and the tests that are to fail with it."""

    name: str
    path: str
    sound: str  # occurs once in the file
    broken: str
    tests: str  # arguments of pytest


FAULTS = (
    Fault(
        "fillers of short LoRA rows start documents",
        "scoring/adaptive.py",
        "(inputs == options.bos_id) & ~fills",
        "inputs == options.bos_id",
        "tests/test_varlen.py -k fillers",
    ),
    Fault(
        "room for a document every 128 tokens, whatever comes",
        "kernels/attention.py",
        "    while room < num_docs:\n        room *= 2\n",
        "",
        "tests/test_varlen.py",
    ),
    Fault(
        "attention launches for the packed row, not for its longest document",
        "train_gpt.py",
        "extent_of(rows.starts_segment, stage.seq_len)",
        "extent_of(rows.starts_segment, num_tokens)",
        "tests/test_varlen.py -k launches_for",
    ),
    Fault(
        "biased attention goes to cuDNN, which plans anew for every shape",
        "kernels/attention.py",
        'pinned = bias is not None and q.device.type != "cpu"',
        "pinned = False",
        "tests/test_attention.py -k cudnn",
    ),
    Fault(
        "calibration keeps the activations of a whole batch",
        "train_gpt.py",
        "in_pieces(batch, CALIBRATION_TOKENS)",
        "[batch]",
        "tests/test_artifact.py -k pieces",
    ),
    Fault(
        "every torch's varlen kernel is asked for windows",
        "kernels/attention.py",
        'if varlen_takes("window_size"):',
        "if True:",
        "tests/test_varlen.py -k arguments",
    ),
    Fault(
        "an attention backend is passed over in silence",
        "train_gpt.py",
        "    model.passed_over = choice.refused\n",
        "",
        "tests/test_train.py -k passed_over",
    ),
    Fault(
        "8-bit products are not compiled",
        "train_gpt.py",
        "self.is_compiled = resolve_compile",
        "self.is_compiled = self.fp8 is None and resolve_compile",
        "tests/test_compiled.py -k 8-bit",
    ),
    Fault(
        "8-bit products count steps in the compiled graph, one graph a step",
        "kernels/fp8.py",
        "if self.state.calibrated:",
        "if self.state.steps >= self.state.rule.calibration_steps:",
        "tests/test_compiled.py -k 8-bit",
    ),
    Fault(
        "float32 products without TF32",
        "kernels/machine.py",
        'torch.set_float32_matmul_precision("high")',
        "pass",
        "tests/test_devices.py -k auto_and",
    ),
    Fault(
        "the softcap rounds to bfloat16 three times",
        "train_gpt.py",
        "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "pass",
        "tests/test_model.py -k softcap",
    ),
    Fault(
        "the loss is read in every step",
        "train_gpt.py",
        "        losses.append(StepLoss(step, train_loss, ",
        "        losses.append(StepLoss(step, torch.tensor(train_loss.item()).to(train_loss), ",
        "tests/test_emulator.py -k waits",
    ),
    Fault(
        "the clock is read in every step",
        "train_gpt.py",
        "self.due = 1 if on_cpu else",
        "self.due = 1 if True else",
        "tests/test_emulator.py -k waits",
    ),
    Fault(
        "batches come from memory that is not locked",
        "kernels/machine.py",
        "tensor.pin_memory().to(",
        "tensor.to(",
        "tests/test_emulator.py -k waits",
    ),
    Fault(
        "a chunk of LoRA scoring brings its nats to the CPU",
        "scoring/adaptive.py",
        "self.charge(batch, start, logits, losses.detach(), targets)",
        "self.charge(batch, start, logits, losses.detach(), targets).cpu()",
        "tests/test_emulator.py -k adaptive_scoring",
    ),
    Fault(
        "weights on one device, a table on the other",
        "train_gpt.py",
        "torch.arange(seq_len, dtype=torch.float32, device=like.device)",
        "torch.arange(seq_len, dtype=torch.float32)",
        "tests/test_emulator.py -k tiny_run",
    ),
)


def copy_repository(target: Path) -> None:
    """Copy what git tracks or would track, and link the environment and its data."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target / name)


def is_noticed(fault: Fault, folder: Path) -> str:
    """Put a fault into a copy, run its tests, mend it again; returns what happened."""
    path = folder / fault.path
    source = path.read_text(encoding="utf-8")
    if source.count(fault.sound) != 1:
        return f"STALE: {fault.path} has {fault.sound.strip()!r} {source.count(fault.sound)} times"
    path.write_text(source.replace(fault.sound, fault.broken), encoding="utf-8")
    emulated = {"EMULATED_GPU": "1"} if "emulator" in fault.tests else {}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", *fault.tests.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | emulated
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    path.write_text(source, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode == 1 and failed:
        return f"noticed by {failed[0].split('::')[-1].split(' - ')[0]}"
    return f"UNNOTICED: pytest ended with {done.returncode}"


def main(argv: list[str] | None = None) -> int:
    """Try the chosen faults; prints a table."""
    parser = ArgumentParser(prog="python -m tests.run_faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="of the faults' names; default: all")
    words = parser.parse_args(argv).words
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not chosen:
        raise UserError(
            f"expected words of a fault's name, found {' '.join(words)}. Without any, all are tried."
        )
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        rows = []
        for fault in chosen:
            rows.append((fault.name, is_noticed(fault, Path(folder))))
            print(": ".join(rows[-1]), flush=True)
    print(format_table({"fault put back": "<75", "what the tests say": ""}, rows))
    return int(any(not found.startswith("noticed") for _, found in rows))


if __name__ == "__main__":
    run_command(main)
