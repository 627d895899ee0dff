"""What quantization does to every tensor of a run: bits, bytes, errors, and what it costs in val_bpb.

    python -m dev.quant_report RUN            a table
    python -m dev.quant_report RUN --json     one JSON object

RUN is a run folder with a checkpoint, which run.save_every=N writes every N steps: its float weights are
quantized as the recipe says. val_bpb is measured on the first --tokens validation tokens, once with float
weights, once for each tensor with only that one quantized, once with all of them.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import CommandParser, format_table, run_command
from dev.trained import Trained, open_checkpoint
from formats.artifact import compress
from formats.codes_encode import encode_codes, encode_halves
from quantizers.gptq import Calibrated, output_error
from quantizers.grid import Quantized, dequantize
from quantizers.rate import entropy_bits
from train_gpt import (
    Environment,
    EvalConfig,
    Ranks,
    calibrated_matrices,
    collect_statistics,
    pack_model,
    quantize_model,
    score_model,
)

COLUMNS = {"shape": ">13", "bits": ">7.2f", "clip": ">7.1f", "bytes": ">11,", "/entropy": ">9.3f"}
COLUMNS |= {"weight": ">9.4f", "output": ">9.4f", "bpb cost": ">+10.5f"}

say = partial(print, file=sys.stderr, flush=True)


class TensorReport(NamedTuple):
    """One tensor's row."""

    name: str
    shape: list[int]
    bits: float  # order-0 entropy of its codes, a weight
    clip: float  # where the codes end, in deviations of a row: the mean
    bytes: int  # of codes, scales and column steps, coded alone
    entropy_ratio: float  # these bytes against the entropy of the codes
    weight_error: float  # |stored - weight| / |weight|
    output_error: float  # the same in the norm of Hessian and row weights
    val_bpb_cost: float  # with only this tensor quantized


def stored_bytes(stored: Quantized, codec: str) -> int:
    """Return what the parts of one tensor take when they are coded alone."""
    codes, scales = stored.codes.cpu().numpy(), stored.scales.cpu().numpy()
    columns = 0 if stored.column_steps is None else len(stored.column_steps)
    if codec == "rans":
        return len(encode_codes([codes])) + len(encode_halves([scales.ravel()])) + columns
    return len(compress(codes.tobytes(), codec)) + len(compress(scales.tobytes(), codec)) + columns


def relative_norm(error: Tensor, matrix: Calibrated) -> float:
    """Return an error of a weight's outputs against the outputs' own size."""
    hessian, weights = matrix.factor.hessian, matrix.row_weights
    sizes = (float(output_error(part, hessian, weights).sum()) for part in (error, matrix.weight))
    lost, whole = (max(size, 0.0) ** 0.5 for size in sizes)
    return lost / whole if whole else 0.0


class Scorer:
    """Score a model on the first tokens of its validation text, with some of its weights replaced."""

    def __init__(self, trained: Trained, ranks: Ranks, num_tokens: int):
        training, text = trained.training, trained.text
        cfg = training.cfg
        self.ranks, self.model = ranks, training.model
        self.cfg = dataclasses.replace(cfg, eval=EvalConfig(context_len=cfg.data.seq_len))
        self.text = text._replace(
            tokens=text.tokens[: num_tokens + 1], target_bytes=text.target_bytes[:num_tokens]
        )

    @torch.no_grad()
    def val_bpb(self, replaced: dict[str, Tensor]) -> float:
        """Return the bits per byte with these parameters; the model is left as it was."""
        params = dict(self.model.named_parameters())
        kept = {name: params[name].clone() for name in replaced}
        for name, weight in replaced.items():
            params[name].copy_(weight)
        score = score_model(self.model, self.cfg, self.text, self.ranks)
        for name, weight in kept.items():
            params[name].copy_(weight)
        return score.val_bpb


def report_tensor(name: str, stored: Quantized, matrix: Calibrated, codec: str, cost: float) -> TensorReport:
    """Measure one tensor."""
    weight, numel = matrix.weight, max(stored.codes.numel(), 1)
    error = dequantize(stored) - weight
    entropy = entropy_bits(stored.codes)
    size = stored_bytes(stored, codec)
    reach = stored.codes.abs().amax() * stored.scales.float().amax(1)
    deviations = weight.std(dim=1, correction=0).clamp_min(1e-12)
    return TensorReport(
        name, list(weight.shape), entropy / numel, float((reach / deviations).median()), size,
        8 * size / max(entropy, 1.0), float(error.norm() / weight.norm().clamp_min(1e-12)),
        relative_norm(error, matrix), cost,
    )  # fmt: skip


def make_report(folder: Path, num_tokens: int, ranks: Ranks) -> dict:
    """Quantize the weights of a run's checkpoint and measure every tensor."""
    trained = open_checkpoint(folder, ranks)
    training, program = trained.training, folder / "train_gpt.py"
    model, cfg = training.model, training.cfg
    code_bytes = program.stat().st_size if program.is_file() else 0
    say(f"step {training.step} of {folder}: calibrating on {cfg.quant.calib_batches} micro-batches")
    stats = collect_statistics(training)[0]

    def packed_bytes(quantized: dict[str, Quantized]) -> int:
        return len(pack_model(model, cfg, quantized, trained.text.tokenizer_sha256)[0])

    quantized = quantize_model(model, cfg, stats, lambda found: code_bytes + packed_bytes(found))
    matrices = calibrated_matrices(model, cfg, stats)
    scorer = Scorer(trained, ranks, num_tokens)
    weights = {name: dequantize(stored) for name, stored in quantized.items()}
    plain, rows = scorer.val_bpb({}), []
    for number, (name, stored) in enumerate(quantized.items(), 1):
        cost = scorer.val_bpb({name: weights[name]}) - plain
        rows.append(report_tensor(name, stored, matrices[name], cfg.quant.codec, cost))
        say(f"{number}/{len(quantized)} {name}: {rows[-1].bits:.2f} bits, {cost:+.5f} bpb")
    facts = {"run": str(folder), "step": training.step, "tokens": len(scorer.text.target_bytes)}
    facts |= {"val_bpb": plain, "quantized_val_bpb": scorer.val_bpb(weights)}
    return facts | {"artifact_bytes": packed_bytes(quantized), "tensors": [row._asdict() for row in rows]}


def print_table(report: dict) -> None:
    """Print the report for people."""
    print(
        f"{report['run']}, step {report['step']}: val_bpb {report['val_bpb']:.5f} with float weights, "
        f"{report['quantized_val_bpb']:.5f} quantized ({report['tokens']:,} tokens), "
        f"{report['artifact_bytes']:,} bytes"
    )
    width = max(map(len, (row["name"] for row in report["tensors"])), default=6)
    cells = [
        (name, "x".join(map(str, shape)), *numbers)
        for name, shape, *numbers in (row.values() for row in report["tensors"])
    ]
    print(format_table({"tensor": f"<{width}"} | COLUMNS, cells))
    num_bytes, cost = (sum(row[key] for row in report["tensors"]) for key in ("bytes", "val_bpb_cost"))
    print(f"sum: {num_bytes:,.0f} bytes, {cost:+.5f} bpb")


def main(argv: list[str] | None = None) -> None:
    """Report on a run folder."""
    parser = CommandParser(prog="python -m dev.quant_report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--tokens", type=int, default=20_000, help="validation tokens to score; 20,000")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    report = make_report(args.run, args.tokens, Ranks(Environment({}), "auto"))
    if args.json:
        print(json.dumps(report))
    else:
        print_table(report)


if __name__ == "__main__":
    run_command(main)
