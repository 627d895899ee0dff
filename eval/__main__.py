"""Reload an artifact in a fresh process and reproduce its val_bpb.

    python -m eval                        the newest complete run in runs/
    python -m eval runs/ID                that run; exits with 1 when the score is not the recorded one
    python -m eval artifact.bin --val 'DIR/fineweb_val_*.bin' --tokenizer MODEL

Model, quantizer and scoring settings come from the artifact; nothing that it stores is taken from the
environment or from the run folder.
"""

import json
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

from data.errors import CommandParser, UserError, run_command
from data.shards import read_json, sha256_file
from eval.adaptive import Reports
from eval.budget import format_ledger
from eval.modes import EVAL_MODES, Scoring
from eval.sliding import ProgressLines
from formats.recipe import parse_overrides, read_recipe, with_values
from train_gpt import (
    Config,
    Environment,
    Ranks,
    Score,
    check_config,
    load_artifact,
    load_validation,
    only_live,
    read_environment,
    score_model,
    scoring_limit,
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


def find_artifact(target: Path) -> tuple[Path, Config, dict | None]:
    """Resolve a run folder or an artifact file to (artifact, live settings, recorded result)."""
    if not target.is_dir():
        return target, only_live(with_values(Config(), read_environment().overrides, "environment")), None
    if not (target / "result.json").is_file():
        raise UserError(
            f"{target}: no result.json: the run is not complete. Run it again or name an artifact."
        )
    recorded = read_json(target / "result.json")
    artifact = target / "artifact.bin"
    if sha256_file(artifact) != recorded["artifact_sha256"]:
        raise UserError(
            f"{artifact}: not the file that result.json describes. Run it again, or name the artifact."
        )
    live = with_values(Config(), read_recipe(target / "recipe.toml") | recorded["places"], str(target))
    return artifact, only_live(live), recorded


def changed_settings(args: Namespace) -> dict:
    """Return the scoring settings that the command line changes."""
    changes = {"eval.mode": args.mode, "eval.stride": args.stride, "eval.context_len": args.context_len}
    changes |= {"eval.tilt_online": args.tilt} | parse_overrides([f"eval.{text}" for text in args.set])
    return {name: value for name, value in changes.items() if value is not None}


@contextmanager
def event_writer(path: Path | None):
    """Yield what writes events as JSON lines to a file, or None without one."""
    if path is None:
        yield None
        return
    with open(path, "w", encoding="utf-8") as file:
        yield lambda event: print(json.dumps(event), file=file)


def ledgers(score: Score, artifact: Path, recorded: dict | None, cfg: Config) -> list[tuple]:
    """Return (title, parts, limit, unit) of every ledger that can be drawn up."""
    size = artifact.stat().st_size
    parts = recorded["ledger"] if recorded else [("artifact (code not weighed)", size)]
    rows = [("bytes of the submission", parts, cfg.quant.limit_bytes, "bytes")]
    if recorded:
        training = [("training", recorded["train_ms"] / 1000)]
        rows.append(("training clock", training, cfg.run.max_wallclock_seconds, "s"))
    scoring = [("scoring", score.seconds)]
    rows.append(("scoring clock", scoring, scoring_limit(cfg.eval, score.num_bytes), "s"))
    if recorded:
        rows.append(("seconds by phase", list(recorded["seconds"].items()), None, "s"))
    return rows


def print_table(score: Score, artifact: Path, recorded: dict | None) -> None:
    """Print the result table; a recorded run adds its training."""
    rows = [
        ("val_loss", f"{score.val_loss:.8f} nats a token"),
        ("val_bpb", f"{score.val_bpb:.8f} bits a byte"),
        ("scored", f"{score.num_tokens:,} tokens, {score.num_bytes:,} bytes in {score.seconds:.1f} s"),
        ("how", f"{score.mode}, context {score.context_len}, stride {score.stride}, tail {score.tail}"),
        ("adapted", f"{score.switch_at} of {score.num_units} units"),
        ("artifact", f"{artifact}, {artifact.stat().st_size:,} bytes"),
    ]
    if recorded:
        rows.append(
            ("trained", f"{recorded['steps']:,} steps, {recorded['tokens_per_second']:,.0f} tokens/s")
        )
        rows.append(("recorded val_bpb", f"{recorded['score']['val_bpb']:.8f}"))
    if score.invalid:
        rows.insert(0, ("INVALID", score.invalid))
    print("\n".join(f"{name:<18}{value}" for name, value in rows))


def build_parser() -> CommandParser:
    """Declare the command line."""
    parser = CommandParser(prog="python -m eval", description=__doc__)
    parser.add_argument(
        "target", nargs="?", type=Path, help="run folder or artifact; default: the newest run"
    )
    parser.add_argument("--val", default="", help="glob of validation shards; default: those of the run")
    parser.add_argument("--tokenizer", help="tokenizer file; default: that of the run")
    parser.add_argument("--mode", choices=EVAL_MODES, help="default: the artifact's")
    parser.add_argument("--tilt", type=float, help="strength of online n-gram hints; default: the artifact's")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other [eval] settings")
    parser.add_argument("--switch-at", type=int, default=-1, help="replay: units that adapt")
    parser.add_argument("--event-log", type=Path, help="write score and update events as JSON lines")
    parser.add_argument("--stride", type=int, help="targets a sliding window scores; default: the artifact's")
    parser.add_argument("--context-len", type=int, help="tokens a window may see; default: the artifact's")
    parser.add_argument("--budget", action="store_true", help="add the ledgers of bytes and seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Score an artifact; returns 1 when a recorded score is not reproduced."""
    args = build_parser().parse_args(argv)
    artifact, live, recorded = find_artifact(args.target or newest_run(Path("runs")))
    if args.tokenizer:
        live = with_values(live, {"data.tokenizer_path": args.tokenizer}, "command line")
    ranks = Ranks(Environment({}), live.run.device)
    model, cfg, header = load_artifact(artifact, live, ranks.device)
    changes = changed_settings(args)
    cfg = with_values(cfg, changes, "command line")
    check_config(cfg)
    text = load_validation(cfg.data, args.val, header["tokenizer_sha256"])
    with event_writer(args.event_log) as on_event:
        scoring = Scoring(Reports(on_event, ProgressLines(say)), args.switch_at)
        score = score_model(model, cfg, text, ranks, scoring)
    comparable = recorded is not None and not changes and not args.val
    difference = score.val_bpb - recorded["score"]["val_bpb"] if comparable else None
    accounts = ledgers(score, artifact, recorded, cfg) if args.budget else []
    if args.json:
        facts = {"vocab_size": cfg.data.vocab_size, "bos_id": text.bos_id, "difference": difference}
        facts |= {"artifact": str(artifact), "artifact_sha256": sha256_file(artifact)}
        facts |= {"ledgers": [dict(zip(("title", "parts", "limit", "unit"), row)) for row in accounts]}
        print(json.dumps(score._asdict() | facts))
    else:
        print_table(score, artifact, recorded)
        for title, parts, limit, unit in accounts:
            print(f"{title}\n{format_ledger(parts, limit, unit)}")
    if difference is not None and not abs(difference) <= TOLERANCE:
        say(f"error: not reproduced: val_bpb differs from the recorded one by {difference:+.3e}")
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
