"""Train, verify, compare and build tokenizers: `python -m data.tokenizer --help`."""

import argparse
import json
import os
import sys

from common import CommandParser, UserError, at_least_one, check_output, run_command, write_json
from data.assets import ASSETS, FOLDER, build_assets
from data.changes import find_changes
from data.codecs import load_codec
from data.documents import INPUT_HELP, check_inputs, read_documents
from data.selection import add_selection_options, build_selection
from data.train_tokenizer import TRAINERS, train_tokenizer
from data.verify import compare_codec, verify_codec

TOKENIZER_HELP = (
    "a .model, tokenizer.json, vocab.json beside merges.txt, a .tiktoken, a BESE or byte .json, or a folder "
    "such as tokenizers/sp1024"
)


COLUMNS = (  # title, key of a row, format
    ("tokenizer", "tokenizer", ""),
    ("kind", "kind", ""),
    ("entries", "vocab_size", ","),
    ("lossless", "lossless", ""),
    ("bytes/token", "bytes_per_token", ".4f"),
    ("bits/token", "entropy_bits_per_token", ".4f"),
    ("bits/byte", "entropy_bits_per_byte", ".4f"),
    ("unused", "unused_entries", ","),
    ("embedding bytes", "embedding_bytes", ","),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("MB/s", "megabytes_per_second", ".2f"),
)


def run_train(options: argparse.Namespace) -> int:
    """Train a tokenizer and print its name, size and digest."""
    selected = build_selection(options).apply(read_documents(options.input))
    texts = (document.text for document in selected)
    vocab_size = options.vocab_size or TRAINERS[options.kind].vocab_size
    train_tokenizer(texts, vocab_size, options.out, options.kind, options.transition)
    codec = load_codec(options.out)
    print(f"{options.out}: {codec.vocab_size} entries, sha256 {codec.digest}")
    if changes := find_changes(codec):
        print(f"note: {changes}", file=sys.stderr)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Verify a tokenizer; status 0 only if every check holds."""
    codec = load_codec(options.tokenizer)
    report = verify_codec(codec, read_documents(options.input), options.num_threads)
    if options.out:
        write_json(options.out, report)
    if options.json:
        print(json.dumps(report))
    else:
        for key, value in (report | {"byte_account": report["byte_account"]["said"]}).items():
            print(f"{key:<22}{value if isinstance(value, str | int) else json.dumps(value)}")
    return 0 if report["passed"] else 1


def run_report(options: argparse.Namespace) -> int:
    """Compare tokenizers on the same text, one row each."""
    texts = [document.text for document in read_documents(options.input)]
    codecs = [load_codec(path) for path in options.tokenizer]
    rows = [compare_codec(codec, texts, options.model_dim, options.bits) for codec in codecs]
    if options.json:
        print(json.dumps({"raw_bytes": sum(len(text.encode()) for text in texts), "tokenizers": rows}))
        return 0
    print(format_rows(rows))
    return 0


def run_build(options: argparse.Namespace) -> int:
    """Make the project's own tokenizers again and print their comparison."""
    unknown = [name for name in options.names if name not in ASSETS]
    if unknown:
        raise UserError(f"{unknown[0]}: expected some of {', '.join(ASSETS)}.")
    rows = build_assets(options.names or list(ASSETS), options.out, options.text)
    print(format_rows(rows))
    return 0


def format_rows(rows: list[dict]) -> str:
    """Draw the comparison as a Markdown table with aligned columns, one row a tokenizer."""
    table = [[title for title, _, _ in COLUMNS], ["---"] * len(COLUMNS)]
    for row in rows:
        shown = row | {"lossless": "yes" if row["lossless"] else "no"}
        table.append([format(shown[key], spec) for _, key, spec in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) for cells in table)
    return "\n".join(f"| {line} |" for line in lines)


def add_action(actions, name: str, run, help_text: str, reads: bool = True) -> argparse.ArgumentParser:
    """Add one action with the option that all share who read text files."""
    action = actions.add_parser(name, help=help_text, description=f"{help_text.capitalize()}.")
    action.set_defaults(run=run, input=[])
    if reads:
        action.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    return action


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m data.tokenizer",
        description=__doc__.partition(":")[0] + ".",
        epilog="Then make shards: python -m data.prepare --tokenizer FILE --input FILES --out DIR",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = add_action(actions, "train", run_train, "train a tokenizer on training text")
    add, below = train.add_argument, "one of those below (default: %(default)s)"
    add("--kind", choices=TRAINERS, default="sentencepiece", metavar="KIND", help=below)
    add("--vocab-size", type=at_least_one, metavar="N", help="entries (default: 1024; bese 288, bytes 260)")
    words = "superbpe: entries before merges span words (default: 0.4 of them)"
    add("--transition", type=at_least_one, metavar="N", help=words)
    add_selection_options(train)
    losses = {kind: "" if trainer.is_lossless else " (loses text)" for kind, trainer in TRAINERS.items()}
    rows = (f"  {kind:<16}{TRAINERS[kind].meaning}{loss}" for kind, loss in losses.items())
    train.epilog = "kinds:\n" + "\n".join(rows)
    add("--out", required=True, metavar="FILE", help="the .model or .json file to write")
    verify = add_action(actions, "verify", run_verify, "prove what a tokenizer keeps and counts")
    add, cores = verify.add_argument, os.cpu_count()
    add("--tokenizer", required=True, metavar="FILE", help=TOKENIZER_HELP)
    add("--out", metavar="FILE", help="write the report, with its own digest, as JSON")
    add("--num-threads", type=at_least_one, default=cores, metavar="N", help="default: all cores")
    report = add_action(actions, "report", run_report, "compare tokenizers on the same text")
    add = report.add_argument
    add("--tokenizer", nargs="+", required=True, metavar="FILE", help=TOKENIZER_HELP)
    add("--model-dim", type=at_least_one, default=512, metavar="N", help="width (default: %(default)s)")
    add("--bits", type=float, default=8, metavar="N", help="a weight (default: %(default)s)")
    build = add_action(
        actions, "build", run_build, "make the project's own tokenizers from the built-in corpus", reads=False
    )
    build.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ASSETS)} (default: all)")
    build.add_argument("--out", default=FOLDER, metavar="DIR", help="parent folder (default: %(default)s)")
    build.add_argument("--text", metavar="DIR", help="also write the corpus there: train.jsonl, val.jsonl")
    for action in (verify, report):
        action.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = make_parser().parse_args(argv)
    check_inputs(options.input)
    if out := vars(options).get("out"):
        named = vars(options).get("tokenizer", [])
        check_output(out, [*options.input, *([named] if isinstance(named, str) else named)])
    return options.run(options)


if __name__ == "__main__":
    run_command(main)
