"""Reload an artifact in a fresh process, score it, and reproduce a recorded val_bpb.

    python -m eval                        the newest complete run in runs/
    python -m eval runs/ID                that run; exits with 1 when the score is not the recorded one
    python -m eval records/TRACK/NAME     a record: its artifact.bin, or the one in runs/ that it states
    python -m eval artifact.bin --val 'DIR/fineweb_val_*.bin' --tokenizer MODEL
    python -m eval runs/ID --mode lora-ttt --set lora_rank=8 lora_lr=0.01 --documents 200
    python -m eval --compare runs/A runs/B          also with different tokenizers
    python -m eval runs/ID --domains web=c4_val.jsonl sums=gsm8k_test.jsonl code=HumanEval.jsonl.gz
    torchrun --nproc_per_node=8 -m eval runs/ID     the same score, from more devices

Model, quantizer and scoring settings come from the artifact. From the environment come paths, device and
ranks, nothing that the artifact stores; --mode, --tilt, --stride, --context-len and --set change scoring.
"""

import json
import math
import sys
import time
from argparse import ArgumentTypeError, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import CommandParser, UserError, atomic_file, check_output, existing, run_command, sha256_file
from data.accounts import OTHER_TOKENIZER, ByteAccount
from data.validation import ValidationText, check_tokenizer
from durable.seals import split_events
from eval.breakdown import Windows, as_facts, break_down, format_tables, get_costs
from eval.compare import check_same_documents, compare_documents, document_costs, format_comparison
from eval.domains import Domain, format_domains, parse_domains, read_domain, score_domains
from eval.logs import classify_bytes
from eval.runs import RECIPE_NAME, Target, find_target, newest_run
from formats.checkpoints import METRICS_NAME
from formats.curves import CURVES_NAME, draw_curves, event_curves
from formats.help import describe_section
from formats.recipe import config_fields, parse_overrides, with_values
from scoring.adaptive import Callbacks, plan_documents
from scoring.budget import BYTES, SCORING, Ledger, not_valid, overruns
from scoring.config import EVAL_MODES, EvalConfig
from scoring.modes import SCORERS, Scoring, deadline_note, scored_stride, scoring_limit
from scoring.sliding import Pace, ScoreOptions
from train_gpt import (
    GPT,
    Config,
    KeepingRanks,
    Score,
    check_config,
    code_digest,
    draw_ledgers,
    load_artifact,
    load_validation,
    open_tokenizer,
    read_environment,
    score_model,
    speak_once,
)

CONTEST_DOCUMENTS = 50_000


def say(text: str) -> None:
    """Write a line for people: standard error, so that --json leaves one object on standard output."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class ScoringProgress:
    """A bar on standard error and, once a percent is done, how long all of it will take."""

    def __init__(self, limit: float):
        self.started, self.limit, self.pace = time.perf_counter(), limit, Pace()
        self.bar, self.is_projected = None, False

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(desc="score", total=total, unit=" targets", unit_scale=True, mininterval=1.0)
        self.bar.update(done - self.bar.n)
        left = self.pace.seconds_left(done, total)
        if left is not None and not self.is_projected and total > done >= total / 100:
            seconds = time.perf_counter() - self.started + left
            over = ", over it" if 0 < self.limit < seconds else ""
            say(f"projected_seconds:{seconds:.1f} limit:{self.limit:.1f}{over}")
            self.is_projected = True
        if done >= total:
            self.bar.close()


class Scored(NamedTuple):
    """A score and what it was made from."""

    score: Score
    nats: np.ndarray  # (N,) float32
    text: ValidationText  # as scored; one token more than targets, or more where the tail was cut
    cfg: Config
    is_stored: bool  # whether settings, text and switch are those of the recorded score

    @property
    def tokens(self) -> np.ndarray:
        return self.text.tokens[: len(self.nats) + 1]


def changed_settings(args: Namespace) -> dict:
    """Return the settings that the command line changes: of [eval], or live ones by their full names."""
    named = {"mode": args.mode, "stride": args.stride, "context_len": args.context_len}
    changes = {f"eval.{name}": value for name, value in named.items()} | {"eval.tilt_online": args.tilt}
    fields = config_fields(Config)
    for name, value in parse_overrides(args.set).items():
        name = name if "." in name else f"eval.{name}"
        if name in fields and not name.startswith("eval.") and not fields[name].metadata["live"]:
            raise UserError(
                f"--set {name}: the artifact stores it. Expected a field of [eval] or a live one."
            )
        changes[name] = value
    if args.tokenizer:
        changes["data.tokenizer_path"] = args.tokenizer
    return {name: value for name, value in changes.items() if value is not None}


def take_documents(text: ValidationText, chosen: slice) -> ValidationText:
    """Cut a text to some of its documents, each with the BOS that ends it."""
    documents = plan_documents(text.tokens, text.bos_id)
    spans = documents[chosen]
    if not len(spans):
        raise UserError(f"--documents: expected some of 0:{len(documents)}, found none in the range.")
    lo, hi = spans[0, 0], spans[-1, 1]
    return text._replace(tokens=text.tokens[lo : hi + 1], target_bytes=text.target_bytes[lo:hi])


def warn_about_bytes(text: ValidationText) -> None:
    """Say what nobody has checked about the bytes that the score divides by."""
    num_bytes, num_documents = int(text.target_bytes.sum()), int((text.tokens == text.bos_id).sum())
    if not num_documents:
        say(f"warning: {text.pattern}: no BOS token: the text is scored as one document")
    if text.raw_bytes is None:
        say(f"warning: {text.pattern}: no manifest states these shards: {num_bytes:,} bytes, unchecked")
        verdict, remark = classify_bytes(num_bytes)
        if verdict == "PASS":
            say(f"bytes: {num_bytes:,} is right for the contest's 50,000 documents{remark}")
        elif remark.startswith(": ") or num_documents == CONTEST_DOCUMENTS:
            say(f"warning: {num_bytes:,} bytes are wrong for the contest's 50,000 documents{remark}")


@contextmanager
def event_writer(path: Path | None, rank: int):
    """Yield what writes events as JSON lines to a file, FILE.RANK beyond rank 0; None without one."""
    if path is None:
        yield None
        return
    check_output(path, [path.parent] if (path.parent / RECIPE_NAME).is_file() else [], "--event-log")
    with open(path if rank == 0 else f"{path}.{rank}", "w", encoding="utf-8") as file:
        yield lambda event: print(json.dumps(event), file=file)


def load_target(target: Target, ranks: KeepingRanks) -> tuple[GPT, Config, dict]:
    """Load an artifact as load_artifact does, to compute as its recorded score was computed."""
    dtype = target.recorded_dtype(ranks.device.type)
    return load_artifact(target.artifact, target.live, ranks.device, dtype)


def score_target(target: Target, args: Namespace, ranks: KeepingRanks, settings: dict) -> Scored:
    """Load an artifact and score it under changed settings; replays the switch of an unchanged score."""
    if ranks.is_main:
        say(f"loading {target.artifact}, then a first batch that is not timed")
    model, stored, header = load_target(target, ranks)
    cfg = with_values(stored, settings, "command line")
    check_config(cfg)
    text = load_validation(cfg.data, args.val, header["tokenizer_sha256"])
    if ranks.is_main:
        warn_about_bytes(text)
    if args.documents:
        text = take_documents(text, args.documents)
    same = cfg.eval == stored.eval and not args.val and not args.documents
    switch_at = target.switch_at if same else -1
    switch_at = args.switch_at if args.switch_at is not None else switch_at
    is_stored = same and switch_at == target.switch_at
    limit = scoring_limit(cfg.eval, int(text.target_bytes.sum()))
    with event_writer(args.event_log, ranks.rank) as on_event:
        progress = ScoringProgress(limit) if ranks.is_main else None
        score = score_model(model, cfg, text, ranks, Scoring(Callbacks(on_event, progress), switch_at))
    note = deadline_note(cfg.eval, score, "as replayed" if switch_at >= 0 else "by the clock")
    if note and ranks.is_main:
        say(note)
    return Scored(score, ranks.kept.numpy(), text, cfg, is_stored)


def find_ledgers(scored: Scored, target: Target) -> list[Ledger]:
    """Return every ledger that can be drawn up: of an artifact alone, its bytes and its scoring."""
    score, cfg = scored.score, scored.cfg
    if target.result:
        return draw_ledgers(cfg, target.result, score.seconds, score.num_bytes)
    parts = [("artifact (code not weighed)", target.artifact.stat().st_size)]
    limit = scoring_limit(cfg.eval, score.num_bytes)
    return [
        Ledger(BYTES, parts, cfg.quant.limit_bytes, "bytes"),
        Ledger(SCORING, [("scoring", score.seconds)], limit, "s"),
    ]


def implied_bytes(score: Score) -> float:
    """The bytes of text that the two printed scores divide by: the fingerprint of a byte count."""
    return score.val_loss / math.log(2) * score.num_tokens / score.val_bpb if score.val_bpb else math.nan


def get_order(settings: EvalConfig) -> str:
    """Say whether a probability depends on its prefix alone, or also on the lengths of documents."""
    in_turns = settings.mode == "phased" or settings.lora_warm_lanes or settings.lora_short_chunks
    return "by length" if SCORERS[settings.mode].plan is None and in_turns else "text"


def reservations(score: Score) -> list[tuple[str, str]]:
    """Return (title, reason) of what keeps a score from being part of a record."""
    found = (("INVALID", score.invalid), ("NOT COMPARABLE", score.not_comparable))
    return [row for row in found if row[1]]


def print_table(scored: Scored, target: Target) -> None:
    """Print the result table; a recorded run adds its training."""
    score, result = scored.score, target.result
    rows = [
        ("val_loss", f"{score.val_loss:.8f} nats a token"),
        ("val_bpb", f"{score.val_bpb:.8f} bits a byte"),
        ("scored", f"{score.num_tokens:,} tokens, {score.num_bytes:,} bytes in {score.seconds:.1f} s"),
        ("implied bytes", f"{implied_bytes(score):,.0f}"),
        ("byte account", scored.text.account),
        ("how", f"{score.mode}, context {score.context_len}, stride {score.stride}, tail {score.tail}"),
        ("artifact", f"{target.artifact}, {target.artifact.stat().st_size:,} bytes"),
    ]
    if result:
        rows.append(("trained", f"{result['steps']:,} steps, {result['tokens_per_second']:,.0f} tokens/s"))
    if score.num_units:
        rows.append(("adapted", f"{score.switch_at} of {score.num_units} units"))
    if get_order(scored.cfg.eval) != "text":
        reason = "lengths of documents decide who learns from whom (contest pull request 1536)"
        rows.append(("disputed", reason))
    if target.recorded_bpb is not None:
        rows.append(("recorded val_bpb", f"{target.recorded_bpb:.8f}"))
    print("\n".join(f"{name:<18}{value}" for name, value in [*reservations(score), *rows]))


def get_facts(scored: Scored, target: Target) -> dict:
    """Return what JSON says about one score."""
    facts = {"vocab_size": scored.cfg.data.vocab_size, "bos_id": scored.text.bos_id}
    facts |= {"implied_bytes": implied_bytes(scored.score), "tilt": scored.cfg.eval.tilt_online}
    facts |= {"order": get_order(scored.cfg.eval)}
    facts |= {"artifact": str(target.artifact), "artifact_sha256": sha256_file(target.artifact)}
    return scored.score._asdict() | facts | {"byte_account": scored.text.account.facts()}


def draw_losses(folder: Path) -> None:
    """Draw a run's losses into its folder; where that cannot be, a note says so: the score is what counts."""
    if not (folder / METRICS_NAME).is_file():
        return
    picture = folder / CURVES_NAME
    try:
        curves = event_curves(split_events(folder / METRICS_NAME)[0])
        title = f"{folder.resolve().name}: loss, nats a token"
        with atomic_file(picture) as file:
            file.write(draw_curves(title, curves).encode("ascii", "xmlcharrefreplace"))
    except (OSError, UserError, ValueError, LookupError, TypeError) as error:
        say(f"note: {picture}: no picture of the losses ({error})")


def said_of_code(target: Target) -> str:
    """Say whether a run was made by other code than this."""
    was = ((target.result or {}).get("origin") or {}).get("code")
    now = code_digest(Path(__file__).resolve().parents[1])
    return f" The run is by other code: {was}, here {now}" if was not in (None, now) else ""


def score_one(args: Namespace, open_ranks) -> int:
    """Score one artifact; returns 1 when its recorded score is not reproduced."""
    target = find_target(args.target or newest_run(), args.artifact)
    ranks = open_ranks(target)
    scored = score_target(target, args, ranks, changed_settings(args))
    ranks.close()
    if not ranks.is_main:
        return 0
    score = scored.score
    comparable = target.recorded_bpb is not None and scored.is_stored
    difference = score.val_bpb - target.recorded_bpb if comparable else None
    accounts = find_ledgers(scored, target) if args.budget else []
    broken = overruns(accounts)
    tables = {}
    if args.breakdown:
        costs, cfg = get_costs(scored.nats, scored.text.target_bytes), scored.cfg
        batch_tokens = cfg.run.val_batch_tokens // cfg.data.micro_batches
        how = Windows(cfg.eval, score.context_len, batch_tokens, score.switch_at)
        tables = break_down(costs, scored.tokens, open_tokenizer(cfg.data), how)
    if args.json:
        facts = get_facts(scored, target) | {"difference": difference, "breakdown": as_facts(tables)}
        facts |= {"ledgers": [row._asdict() for row in accounts], "over_limits": list(broken)}
        print(json.dumps(facts))
    else:
        print_table(scored, target)
        for row in accounts:
            print(row.format())
        if tables:
            print(format_tables(tables))
    if target.result:
        draw_losses(target.artifact.parent)
    tolerance = target.tolerance(score.mode)
    if difference is not None and not abs(difference) <= tolerance:
        say(f"error: not reproduced: val_bpb differs from the recorded one by {difference:+.3e}, more than "
            f"the tolerance of {tolerance:g}.{said_of_code(target)}")  # fmt: skip
        return 1
    if broken:
        say(not_valid(broken))
    return int(bool(broken))


def score_two(args: Namespace, open_ranks) -> int:
    """Score two artifacts on the same documents, tails included, and compare them."""
    targets = [find_target(path) for path in args.compare]
    ranks = open_ranks(targets[0])
    settings = changed_settings(args) | {"eval.keep_tail": True}
    sides = [score_target(target, args, ranks, settings) for target in targets]
    ranks.close()
    if not ranks.is_main:
        return 0
    codecs = [open_tokenizer(side.cfg.data) for side in sides]
    costs = [document_costs(s.nats, s.text.target_bytes, s.tokens, s.text.bos_id) for s in sides]
    check_same_documents(*costs, codecs)
    report = compare_documents(*costs, codecs[0])
    if args.json:
        print(json.dumps(report | {"sides": [get_facts(*pair) for pair in zip(sides, targets)]}))
    else:
        notes = ["".join(f" {title}: {text}" for title, text in reservations(side.score)) for side in sides]
        print(format_comparison(report, [f"{path}{note}" for path, note in zip(args.compare, notes)]))
    return 0


def score_by_domain(args: Namespace, open_ranks) -> int:
    """Score one artifact on files of text instead of the validation shards, a row a file."""
    target = find_target(args.target or newest_run(), args.artifact)
    ranks = open_ranks(target)
    model, stored, header = load_target(target, ranks)
    cfg = with_values(stored, changed_settings(args), "command line")
    check_config(cfg)
    codec = open_tokenizer(cfg.data)
    check_tokenizer(cfg.data, codec, header["tokenizer_sha256"])
    domains = [read_domain(name, path, codec) for name, path in parse_domains(args.domains).items()]
    check_domains(domains, cfg.data.allow_extra_bytes)
    context_len = cfg.eval.context_len or cfg.data.seq_len
    stride = scored_stride(cfg.eval)
    options = ScoreOptions(codec.bos_id, cfg.run.val_batch_tokens // cfg.data.micro_batches, ranks.device)
    rows = score_domains(domains, model, context_len, stride, options)
    ranks.close()
    if ranks.is_main:
        accounts = [domain.account for domain in domains]
        facts = [row._asdict() | label_domain(account) for row, account in zip(rows, accounts)]
        print(json.dumps(facts) if args.json else format_domains(rows))
        for domain in () if args.json else domains:
            print(f"{domain.name:<16}{domain.account}")
            for name, reason in label_domain(domain.account).items():
                if reason and name != "byte_account":
                    say(f"warning: {domain.name}: {name.replace('_', ' ')}: {reason}")
    return 0


def check_domains(domains: list[Domain], allows_extra_bytes: bool) -> None:
    """Refuse a domain that counts more bytes than it has, unless data.allow_extra_bytes says to score it."""
    for domain in domains:
        if domain.account.invalid and not allows_extra_bytes:
            raise UserError(f"{domain.name}: {domain.account.invalid}. {OTHER_TOKENIZER}")


def label_domain(account: ByteAccount) -> dict:
    """Return what JSON says of a domain's bytes and against its score."""
    labels = {"invalid": account.invalid, "not_comparable": account.not_comparable}
    return labels | {"byte_account": account.facts()}


def document_range(text: str) -> slice:
    """Read "A:B" or a count of documents."""
    low, colon, high = text.rpartition(":")
    try:
        chosen = slice(int(low or 0), int(high) if high else None)
    except ValueError as error:
        raise ArgumentTypeError(f"expected A:B or a count, found {text!r}") from error
    if chosen.start < 0 or (chosen.stop is not None and chosen.stop <= chosen.start) or text == colon:
        raise ArgumentTypeError(f"expected 0 <= A < B, found {text!r}")
    return chosen


def build_parser() -> CommandParser:
    """Declare the command line."""
    parser = CommandParser(
        prog="python -m eval",
        description=__doc__,
        epilog="fields for --set; an artifact has its own defaults\n\n" + describe_section(Config, "eval"),
    )
    add = parser.add_argument
    add("target", nargs="?", type=Path, help="run folder, record folder or artifact; default: the newest run")
    add("--artifact", type=existing, help="of a record folder that does not hold it")
    add("--compare", nargs=2, type=existing, metavar=("A", "B"), help="score two on the same documents")
    add("--breakdown", action="store_true", help="bits by context, document length and kind of byte")
    add("--domains", nargs="+", metavar="NAME=FILE", help="score files of text, a row a file; no adaptation")
    add("--val", default="", help="glob of validation shards; default: those of the run")
    add("--documents", type=document_range, metavar="A:B|N", help="of the text, from 0; default: all")
    add("--tokenizer", help="tokenizer file or folder; default: that of the run")
    add("--mode", choices=EVAL_MODES, help="default: the artifact's")
    add("--tilt", type=float, help="strength of online n-gram hints; default: the artifact's")
    add("--stride", type=int, help="targets a sliding window scores; default: the artifact's")
    add("--context-len", type=int, help="tokens a window may see; default: the artifact's")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other [eval] fields; run.KEY: live ones")
    add("--switch-at", type=int, help="units that adapt (-1: the clock decides); default: as recorded")
    add("--event-log", type=Path, help="write score and update events as JSON lines")
    add("--budget", action="store_true", help="add the ledgers of bytes and seconds")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Score or compare artifacts."""
    parser = build_parser()
    args = parser.parse_args(argv)
    single = ("target", "artifact", "breakdown", "budget", "event_log", "switch_at")
    if args.compare and any(vars(args)[name] != parser.get_default(name) for name in single):
        parser.error(f"--compare takes two artifacts and none of {', '.join(single)}")
    if args.switch_at is not None and args.switch_at < -1:
        parser.error(f"argument --switch-at: expected -1 or a number of units, found {args.switch_at}")
    environment = read_environment()._replace(overrides={})

    def open_ranks(target: Target) -> KeepingRanks:
        return KeepingRanks(environment, target.live.run.device)

    try:
        if args.domains:
            return score_by_domain(args, open_ranks)
        return score_two(args, open_ranks) if args.compare else score_one(args, open_ranks)
    except Exception as error:
        speak_once(error, environment)
        raise


if __name__ == "__main__":
    run_command(main)
