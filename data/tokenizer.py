"""Train a lossless SentencePiece tokenizer: `python -m data.tokenizer train --help`."""

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.codecs import load_codec
from data.errors import UserError, run_command
from data.prepare import check_inputs, read_documents
from data.shards import atomic_file

# Merges settle long before this; all training text is held in memory.
MAX_TRAINING_BYTES = 1 << 30
# The ids, digit splitting and byte fallback are the contest's. What differs keeps text exact: identity
# normalisation, every space kept, no dummy prefix.
TRAINER_OPTIONS = {
    "model_type": "bpe",
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": 0.999,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "required_chars": "\u2581\n",  # a space and a newline always have a token of their own
    "max_sentence_length": 1 << 30,  # a "sentence" is a whole document here; longer ones are skipped
    "minloglevel": 2,  # errors only; they also raise
}
# Texts that normalising or space-trimming models change, beside the codec's own LOSSLESS_PROBES.
HOSTILE_TEXTS = (
    "  a  ",
    "\ta\n\n\n b\r\n",
    "\u2581 \u2581",
    "\0\x7f\ufeff\ufffd",
    "1234 \u0661",
    "<s></s><unk><0x41>",
)


def training_texts(documents: Iterable[str]) -> Iterator[str]:
    """Pass texts through until MAX_TRAINING_BYTES characters are reached."""
    remaining = MAX_TRAINING_BYTES
    for text in documents:
        if remaining <= 0:
            return
        remaining -= len(text)
        yield text


def train_tokenizer(documents: Iterable[str], vocab_size: int, out: str | Path) -> None:
    """Train a BPE model of `vocab_size` entries and write it to `out`, only if it is lossless.

    The same documents in the same order give the same file, byte for byte.
    """
    import sentencepiece

    out = Path(out)
    if out.suffix != ".model":
        raise UserError(f"{out}: expected a name that ends in .model.")
    # A list, not a stream: SentencePiece would wrap an error of the reader in one of its own.
    texts = list(training_texts(documents))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            **TRAINER_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"SentencePiece cannot train {vocab_size} entries on this text ({error}). A vocabulary needs 4 "
            "special and 256 byte entries, one for each character, and text enough for the merges: change "
            "--vocab-size or give more text."
        ) from error
    with atomic_file(out) as file:
        file.write(model.getvalue())
    try:
        check_lossless(out)
    except BaseException:
        out.unlink()
        raise


def check_lossless(path: Path) -> None:
    """Raise unless the model gives every hostile text back, byte for byte."""
    codec = load_codec(path)
    broken = [text for text in HOSTILE_TEXTS if codec.decode(codec.encode(text)) != text.encode()]
    if not codec.lossless or broken:  # a fault of the options above, not of the text
        raise RuntimeError(f"{path}: the trained model is not lossless, broken: {broken!r}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m data.tokenizer",
        description="Train a SentencePiece BPE tokenizer that gives every text back byte for byte.",
        epilog="Then make shards with it: python -m data.prepare --tokenizer MODEL --input FILES --out DIR",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train", help="train a tokenizer on text files", description=parser.description
    )
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="training text only, never validation text: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet",
    )
    train.add_argument(
        "--vocab-size", type=int, default=1024, metavar="N", help="entries (default: %(default)s)"
    )
    train.add_argument("--out", required=True, metavar="MODEL", help="the .model file to write")
    options = parser.parse_args(argv)
    check_inputs(options.input)
    train_tokenizer(
        (document.text for document in read_documents(options.input)), options.vocab_size, options.out
    )
    codec = load_codec(options.out)
    print(f"{options.out}: {codec.vocab_size} entries, sha256 {codec.digest}")


if __name__ == "__main__":
    run_command(main)
