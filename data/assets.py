"""The project's own tokenizers: trained on the built-in corpus, verified, each in a folder of its own.

The same corpus gives the same bytes; another Python or other packages give another corpus.
"""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from common import atomic_file, write_json
from data.builtin import Module, collect_documents, find_modules, hash_texts, package_versions
from data.codecs import TokenCodec, load_codec
from data.documents import Document
from data.train_tokenizer import TRAINERS, train_tokenizer
from data.verify import compare_codec, verify_codec
from durable.lock import lock_folder

FOLDER = "tokenizers"
REPORT, README = "report.json", "README.md"
MODEL_DIM, BITS = 512, 8  # the defaults of `data.tokenizer report`
TIMED = ("tokens_per_second", "megabytes_per_second")  # differ from run to run: not in the report


class Asset(NamedTuple):
    """How one tokenizer is trained, and what it is."""

    kind: str  # of TRAINERS
    vocab_size: int
    meaning: str


PIECES = "SentencePiece BPE that keeps every byte"
CASES = "SentencePiece BPE of lower-case text, capitals as operators before their word (CaseOps)"
BYTES = "GPT-2's BPE of bytes, one digit a token"
WORDS = "BPE of bytes: within words up to 0.4 of the entries, then across words (SuperBPE)"
ASSETS = {
    "sp1024": Asset("sentencepiece", 1024, PIECES),
    "sp2048": Asset("sentencepiece", 2048, PIECES),
    "sp4096": Asset("sentencepiece", 4096, PIECES),
    "caseops2048": Asset("caseops", 2048, CASES),
    "bytelevel2048": Asset("bytelevel", 2048, BYTES),
    "superbpe2048": Asset("superbpe", 2048, WORDS),
}
# Of each part of the corpus, as its authors state it; torch and numpy hold files of others.
LICENCES = {
    "python": "PSF-2.0",
    "torch": "BSD-3-Clause AND Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause AND BSL-1.0 "
    "AND MIT",
    "numpy": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
    "sympy": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "fsspec": "BSD-3-Clause",
    "filelock": "MIT",
    "typing_extensions": "PSF-2.0",
}
PAGE = """# {name}

{meaning} (kind `{kind}`): {entries:,} entries in {size:,} bytes.

| | |
|---|---|
| file | [{file}]({file}), sha256 `{sha256}` |
| bytes a token | {ratio:.4f} on the {val_bytes:,} bytes of the built-in corpus's validation text |
| lossless | yes: `data.tokenizer verify` passed on that text ([{report}]({report})) |
| trained on | the built-in corpus's training text, {train_bytes:,} bytes, sha256 `{train_sha256}` |
| made by | `python -m data.tokenizer build {name}` |

The text is the help topics and docstrings of what follows, with the licence of each; the text itself is not
here. Another version of one of them gives another text, and so another tokenizer: this file is the reference.
The sha256 of the text is that of its documents in order, a zero byte after each.

{parts}
"""


class Corpus(NamedTuple):
    """Both splits of the built-in corpus."""

    train: list[Document]
    val: list[Document]


def list_parts() -> str:
    """Write the parts of the corpus with version and licence, a line each."""
    versions = {"python": platform.python_version()} | package_versions()
    names = {"python": "the standard library of CPython"}
    return "\n".join(
        f"- {names.get(part, part)} {version}: {LICENCES[part]}" for part, version in versions.items()
    )


def write_page(path: Path, asset: Asset, codec: TokenCodec, report: dict, train: list[Document]) -> None:
    """Write what a reader must know to use the tokenizer and to pass it on."""
    train_sha256, train_bytes = hash_texts(train)
    page = PAGE.format(
        name=path.parent.name,
        meaning=asset.meaning,
        kind=codec.kind,
        entries=codec.vocab_size,
        size=codec.path.stat().st_size,
        file=codec.path.name,
        sha256=codec.digest,
        ratio=report["report"]["bytes_per_token"],
        report=REPORT,
        train_bytes=train_bytes,
        train_sha256=train_sha256,
        val_bytes=report["verify"]["raw_bytes"],
        parts=list_parts(),
    )
    with atomic_file(path) as file:
        file.write(page.encode())


def build_asset(folder: Path, asset: Asset, corpus: Corpus) -> dict:
    """Train one tokenizer, verify it and write its folder, which is empty; returns its comparison row."""
    model = folder / f"tokenizer{TRAINERS[asset.kind].suffix}"
    train_tokenizer((document.text for document in corpus.train), asset.vocab_size, model, asset.kind)
    codec = load_codec(model)
    row = compare_codec(codec, [document.text for document in corpus.val], MODEL_DIM, BITS)
    kept = {key: value for key, value in row.items() if key not in TIMED}
    report = {"verify": verify_codec(codec, corpus.val), "report": kept}
    if not report["verify"]["passed"]:
        raise RuntimeError(f"{folder}: the trained model does not verify: {report['verify']}")
    write_json(folder / REPORT, report)
    write_page(folder / README, asset, codec, report, corpus.train)
    return row


def write_texts(folder: Path, corpus: Corpus) -> None:
    """Write both splits as .jsonl files for the other commands."""
    for split, documents in corpus._asdict().items():
        with atomic_file(folder / f"{split}.jsonl") as file:
            for document in documents:
                file.write(json.dumps({"text": document.text}).encode() + b"\n")


def build_assets(
    names: list[str],
    out: str | Path,
    text: str | Path | None = None,
    list_modules: Callable[[], list[Module]] = find_modules,
) -> list[dict]:
    """Make the named tokenizers in folders of `out`, and the corpus in `text`; returns their rows."""
    corpus = Corpus(*collect_documents(list_modules()))
    if text:
        write_texts(Path(text), corpus)
    rows = []
    with lock_folder(out), TemporaryDirectory() as scratch:
        for name in names:
            rows.append(build_asset(Path(scratch, name), ASSETS[name], corpus))
            for path in sorted(Path(scratch, name).iterdir(), reverse=True):  # the page, README.md, last
                with atomic_file(Path(out, name, path.name)) as file:
                    file.write(path.read_bytes())
    return rows
