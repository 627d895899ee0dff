"""Score a model on several kinds of text: loss, perplexity, bits a byte and surprise of each domain.

A domain is a file of documents. Each document is read by itself from its BOS, in windows of equal length
or alone in its batch: there is no padding, so none can be counted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, format_table
from data.accounts import ByteAccount, add_counts, open_account
from data.codecs import TokenCodec
from data.documents import Document, check_inputs, read_documents, read_jsonl, require_utf8
from data.prepare import encode_ahead
from scoring.adaptive import plan_document_windows, plan_documents
from scoring.bpb import BpbMeter
from scoring.sliding import Logits, ScoreOptions, score_windows

COLUMNS = {"domain": "<16", "documents": ">10,", "tokens": ">12,", "bytes": ">12,", "loss": ">9.4f"}
COLUMNS |= {"perplexity": ">12.2f", "bpb": ">9.4f", "surprise": ">10.3f"}
# Keys of a JSON line -> its text: plain documents; GSM8K and HumanEval as system E writes them.
LAYOUTS = {
    ("text",): "{text}",
    ("question", "answer"): "Question: {question}\nAnswer: {answer}",
    ("prompt", "canonical_solution"): "{prompt}{canonical_solution}",
}


class Domain(NamedTuple):
    """The tokens of a file, BOS before each document and after the last, and what they stand for."""

    name: str
    num_documents: int
    tokens: np.ndarray  # (N + 1,) int32
    target_bytes: np.ndarray  # (N,) original UTF-8 bytes of each target
    account: ByteAccount


class DomainScore(NamedTuple):
    """What a model pays for a domain; surprise_ratio is its perplexity over the domains' mean."""

    domain: str
    documents: int
    tokens: int
    bytes: int
    val_loss: float
    perplexity: float
    val_bpb: float
    surprise_ratio: float


def parse_domains(choices: list[str]) -> dict[str, Path]:
    """Read NAME=FILE choices; the files must exist and have a known suffix."""
    named = dict(choice.partition("=")[::2] for choice in choices)
    if len(named) < len(choices) or not all(name and file for name, file in named.items()):
        raise UserError(f"--domains: expected NAME=FILE with different names, found {' '.join(choices)}.")
    check_inputs(named.values())
    return {name: Path(file) for name, file in named.items()}


def domain_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file; JSON lines may have the keys of any of LAYOUTS."""
    if ".jsonl" in path.suffixes:
        yield from read_jsonl(path, layout_text)
    else:
        yield from read_documents([path])


def layout_text(value: dict, place: str) -> str:
    """Write one object as text by the layout whose keys it has."""
    for keys, layout in LAYOUTS.items():
        if all(isinstance(value.get(key), str) for key in keys):
            return require_utf8(layout.format_map(value), place)
    expected = " or ".join(" and ".join(keys) for keys in LAYOUTS)
    raise UserError(f"{place}: expected a JSON object with strings under {expected}, found {sorted(value)}.")


def read_domain(name: str, path: Path, codec: TokenCodec) -> Domain:
    """Encode a domain's file with a model's tokenizer."""
    parts = list(encode_ahead(codec, domain_documents(path), 1, codec.needs_sidecar))
    if not parts:
        raise UserError(f"{path}: expected documents, found none.")
    ids, sizes = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    account = open_account(codec, add_counts(part.counts for part in parts))
    ends = np.append(ids, codec.bos_id), np.append(sizes, 0)[1:]
    return Domain(name, account.counts.documents, *ends, account)


def score_domains(
    domains: list[Domain], logits: Logits, context_len: int, stride: int, options: ScoreOptions
) -> list[DomainScore]:
    """Score every target of every domain once; each document sees up to context_len of its own tokens.

    stride 0 cuts documents into chunks. A document's end, the BOS after it, is a target of no bytes.
    """
    scored = []
    for domain in domains:
        documents = plan_documents(domain.tokens, options.bos_id)
        windows = plan_document_windows(documents, context_len, stride)
        meter = BpbMeter()
        meter.add(score_windows(logits, domain.tokens, windows, options).numpy(), domain.target_bytes)
        scored.append((domain, meter))
    perplexities = np.exp([meter.val_loss for _, meter in scored])
    rows = []
    for (domain, meter), perplexity, ratio in zip(scored, perplexities, perplexities / perplexities.mean()):
        counts = (domain.num_documents, meter.num_tokens, meter.num_bytes)
        scores = (meter.val_loss, float(perplexity), meter.val_bpb, float(ratio))
        rows.append(DomainScore(domain.name, *counts, *scores))
    return rows


def format_domains(scores: list[DomainScore]) -> str:
    """Draw the table, one row a domain."""
    return format_table(COLUMNS, list(scores))
