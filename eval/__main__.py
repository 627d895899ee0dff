"""Reload an artifact in a fresh process and reproduce its val_bpb.

    python -m eval                        the newest complete run in runs/
    python -m eval runs/ID                that run; exits with 1 when the score is not the recorded one
    python -m eval artifact.bin --val 'DIR/fineweb_val_*.bin' --tokenizer MODEL

Model, quantizer and scoring settings come from the artifact; nothing that it stores is taken from the
environment or from the run folder.
"""

import argparse
import json
import sys
from pathlib import Path

from data.errors import UserError, run_command
from data.shards import read_json, sha256_file
from eval.budget import format_ledger
from train_gpt import (
    Config,
    Environment,
    Ranks,
    Score,
    ValidationText,
    check_config,
    live_config,
    load_artifact,
    load_validation,
    read_environment,
    score_model,
    show_progress,
    with_values,
)

TOLERANCE = 1e-6  # bits per byte; the same machine reproduces its own score far closer than this


def newest_run(root: Path) -> Path:
    """Return the complete run folder (it has result.json) that was finished last."""
    results = sorted(root.glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise UserError(f"{root}: no complete run found. `make run` trains one; or name an artifact file.")
    return results[-1].parent


def say(text: str) -> None:
    """Write a line for people: standard error, so that --json leaves one object on standard output."""
    print(text, file=sys.stderr, flush=True)


def print_report(
    score: Score, artifact: Path, recorded: dict | None, with_budget: bool, limits: Config
) -> None:
    """Print the result table, and with a recorded run its ledgers."""
    rows = [
        ("val_loss (nats/token)", f"{score.val_loss:.8f}"),
        ("val_bpb (bits/byte)", f"{score.val_bpb:.8f}"),
        ("tokens, bytes scored", f"{score.num_tokens:,}, {score.num_bytes:,}"),
        ("scoring", f"{score.mode}, context {score.context_len}, stride {score.stride}, tail {score.tail}"),
        ("seconds", f"{score.seconds:.1f}"),
        ("artifact", f"{artifact} ({artifact.stat().st_size:,} bytes)"),
    ]
    if recorded:
        rows.append(
            ("training", f"{recorded['steps']:,} steps, {recorded['tokens_per_second']:,.0f} tokens/s")
        )
        rows.append(("recorded val_bpb", f"{recorded['score']['val_bpb']:.8f}"))
    print("\n".join(f"{name:<24} {value}" for name, value in rows))
    if with_budget and recorded:
        print("bytes\n" + format_ledger(recorded["ledger"], limits.quant.limit_bytes, "bytes"))
        training = [(name, value) for name, value in recorded["seconds"].items() if name == "training"]
        print("training clock\n" + format_ledger(training, limits.run.max_wallclock_seconds, "s"))
        print("scoring clock\n" + format_ledger([("scoring", score.seconds)], limits.eval.limit_seconds, "s"))
    elif with_budget:
        parts = [("artifact", artifact.stat().st_size)]
        print(
            "bytes (code not weighed: no run folder)\n"
            + format_ledger(parts, limits.quant.limit_bytes, "bytes")
        )


def find_artifact(target: Path) -> tuple[Path, Config, dict | None]:
    """Resolve a run folder or an artifact file to (artifact, live settings, recorded result)."""
    if target.is_dir():
        if not (target / "result.json").is_file():
            raise UserError(
                f"{target}: no result.json: the run is not complete. Run it again or name an artifact."
            )
        return (
            target / "artifact.bin",
            live_config(target / "recipe.toml", {}),
            read_json(target / "result.json"),
        )
    return target, live_config(None, read_environment().overrides), None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target", nargs="?", type=Path, help="run folder or artifact; default: the newest run"
    )
    parser.add_argument("--val", help="glob of validation shards; default: those of the run")
    parser.add_argument("--tokenizer", help="tokenizer file; default: that of the run")
    parser.add_argument("--mode", choices=("chunked", "sliding"), help="default: the artifact's")
    parser.add_argument("--stride", type=int, help="targets a sliding window scores; default: the artifact's")
    parser.add_argument("--context-len", type=int, help="tokens a window may see; default: the artifact's")
    parser.add_argument("--budget", action="store_true", help="print the ledgers of bytes and seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    artifact, live, recorded = find_artifact(args.target or newest_run(Path("runs")))
    if args.tokenizer:
        live = with_values(live, {"data.tokenizer_path": args.tokenizer}, "command line")
    ranks = Ranks(Environment({}, 0, 0, 1), live.run.device)
    model, cfg, header = load_artifact(artifact, live, ranks.device)
    changes = {"eval.mode": args.mode, "eval.stride": args.stride, "eval.context_len": args.context_len}
    changes = {name: value for name, value in changes.items() if value is not None}
    cfg = with_values(cfg, changes, "command line")
    check_config(cfg)
    text: ValidationText = load_validation(cfg.data, args.val or "", header["tokenizer_sha256"])
    score = score_model(model, cfg, text, ranks, show_progress(say))
    comparable = recorded is not None and not changes and not args.val
    difference = score.val_bpb - recorded["score"]["val_bpb"] if comparable else None
    if args.json:
        facts = {"vocab_size": cfg.data.vocab_size, "bos_id": text.bos_id, "artifact": str(artifact)}
        facts |= {"artifact_sha256": sha256_file(artifact), "difference": difference}
        print(json.dumps(score._asdict() | facts))
    else:
        print_report(score, artifact, recorded, args.budget, cfg)
    if difference is not None and abs(difference) > TOLERANCE:
        say(f"error: not reproduced: val_bpb differs from the recorded one by {difference:+.3e}")
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
