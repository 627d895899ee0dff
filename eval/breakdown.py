"""Where the bits go: bits per byte by context, by place in the document, by its length, by kind of byte."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from scoring.adaptive import choose_chunk_tokens, plan_doc_batches, plan_document_windows, plan_documents
from scoring.config import EvalConfig
from scoring.modes import SCORERS

BYTE_CLASSES = ("letters", "digits", "whitespace", "punctuation", "non-ASCII", "no bytes")
LENGTH_CLASSES = (256, 1024, 4096, 16_384, 65_536)  # bytes of a document


class BreakdownRow(NamedTuple):
    """One class of targets. A class without bytes has no bpb; its bits still count in the total."""

    name: str
    targets: float
    bits: float
    num_bytes: float

    @property
    def bpb(self) -> float | None:
        return self.bits / self.num_bytes if self.num_bytes else None


class Costs(NamedTuple):
    """What N targets cost and stand for."""

    bits: np.ndarray  # (N,) float64
    num_bytes: np.ndarray  # (N,)


def get_costs(nats: np.ndarray, target_bytes: np.ndarray) -> Costs:
    """Convert (N,) nats and the byte counts of those targets, of which there may be more."""
    return Costs(nats.astype(np.float64) / np.log(2.0), target_bytes[: len(nats)].astype(np.float64))


def add_up(labels: np.ndarray, names: list[str], costs: Costs) -> list[BreakdownRow]:
    """Add up the targets of each (N,) label, a number of `names`; classes without targets are left out."""
    sums = [np.bincount(labels, values, len(names)) for values in (np.ones(len(labels)), *costs)]
    return [BreakdownRow(name, *map(float, row)) for name, *row in zip(names, *sums) if row[0]]


def octave_rows(seen: np.ndarray, costs: Costs) -> list[BreakdownRow]:
    """Group targets by how many tokens come before them (1 or more), in powers of two."""
    labels, most = np.frexp(seen)[1] - 1, int(seen.max())  # floor of log2, exact
    lows = [1 << power for power in range(most.bit_length())]
    ends = [min(2 * low - 1, most) for low in lows]
    names = [f"{low:,}" if low == end else f"{low:,}-{end:,}" for low, end in zip(lows, ends)]
    return add_up(labels, names, costs)


class Windows(NamedTuple):
    """What decided which tokens a scored target saw."""

    settings: EvalConfig
    context_len: int
    batch_tokens: int
    switch_at: int  # batches of documents that adapted


def adapted_windows(documents: np.ndarray, how: Windows) -> np.ndarray:
    """Plan the windows in which documents (D, 2) with adapters are scored; (W, 3) as plan_windows makes them.

    Those of the batches past the switch are scored plainly.
    """
    cfg, windows = how.settings, []
    batches = plan_doc_batches(np.diff(documents).ravel(), cfg, how.context_len, how.batch_tokens)
    plain = {doc for batch in batches[how.switch_at :] for doc in batch.tolist()}
    for doc, (lo, hi) in enumerate(documents.tolist()):
        if doc in plain:
            one = documents[doc : doc + 1]
            windows.append(plan_document_windows(one, how.context_len, cfg.stride))
            continue
        chunk = choose_chunk_tokens(hi - lo, cfg)
        starts = np.arange(lo, hi, chunk)
        begins = np.maximum(starts + chunk - how.context_len, lo)
        windows.append(np.stack([begins, np.minimum(starts + chunk, hi), starts - begins], axis=1))
    return np.concatenate(windows)


def visible_tokens(tokens: np.ndarray, bos_id: int, how: Windows) -> np.ndarray:
    """Count the tokens that each of the N targets of N + 1 tokens sees in its window: (N,)."""
    settings, num_targets = how.settings, len(tokens) - 1
    if SCORERS[settings.mode].plan is None:
        windows = adapted_windows(plan_documents(tokens, bos_id, settings.lora_max_doc_tokens), how)
    else:
        windows = SCORERS[settings.mode].plan(settings, how.context_len, tokens, bos_id)
    scored = windows[:, 1] - windows[:, 0] - windows[:, 2]
    return np.arange(num_targets) - np.repeat(windows[:, 0], scored) + 1


def length_rows(documents: np.ndarray, costs: Costs) -> list[BreakdownRow]:
    """Group targets by the bytes of their document."""
    sizes = np.add.reduceat(costs.num_bytes, documents[:, 0])
    labels = np.repeat(np.searchsorted(LENGTH_CLASSES, sizes, side="right"), np.diff(documents).ravel())
    bounds = [0, *LENGTH_CLASSES]
    names = [f"{low:,}-{high - 1:,}" for low, high in pairwise(bounds)] + [f"{bounds[-1]:,}+"]
    return add_up(labels, names, costs)


def get_class(byte: int) -> int:
    """Name the class of a byte by its number in BYTE_CLASSES."""
    char = chr(byte)
    if byte >= 0x80:
        return 4
    return 0 if char.isalpha() else 1 if char.isdigit() else 2 if char.isspace() else 3


CLASS_OF_BYTE = np.array([get_class(byte) for byte in range(256)])


def byte_shares(codec) -> np.ndarray:
    """Say which share of each token's bytes is of which class: (V, 6) rows that add up to 1.

    A token is written after a letter, so that nothing at the start of a text is trimmed from it.
    """
    letter = codec.encode("a")
    written = len(codec.decode(letter))
    shares = np.zeros((codec.vocab_size, len(BYTE_CLASSES)))
    for token in range(codec.vocab_size):
        piece = np.frombuffer(codec.decode([*letter, token])[written:], np.uint8)
        counts = np.bincount(CLASS_OF_BYTE[piece], minlength=len(BYTE_CLASSES))
        shares[token] = counts / max(piece.size, 1)
    shares[shares.sum(1) == 0, -1] = 1
    return shares


def byte_rows(codec, targets: np.ndarray, costs: Costs) -> list[BreakdownRow]:
    """Group (N,) target ids by kind of byte: a target's bits are spread evenly over its bytes."""
    nothing = costs.num_bytes == 0
    shares = byte_shares(codec)
    counts = np.stack([np.bincount(targets[~nothing], column[~nothing], codec.vocab_size)
                       for column in (np.ones(len(targets)), *costs)])  # fmt: skip
    sums = counts @ shares
    sums[:, -1] += nothing.sum(), costs.bits[nothing].sum(), 0
    return [BreakdownRow(name, *map(float, row)) for name, row in zip(BYTE_CLASSES, sums.T) if row[0]]


def break_down(costs: Costs, tokens: np.ndarray, codec, how: Windows) -> dict[str, list[BreakdownRow]]:
    """Make all tables of the N targets of N + 1 tokens."""
    documents = plan_documents(tokens, codec.bos_id)
    place = np.arange(len(tokens) - 1) - np.repeat(documents[:, 0], np.diff(documents).ravel()) + 1
    return {
        "tokens in the window": octave_rows(visible_tokens(tokens, codec.bos_id, how), costs),
        "tokens of the document": octave_rows(place, costs),
        "bytes of the document": length_rows(documents, costs),
        "bytes of the target": byte_rows(codec, tokens[1:].astype(np.int64), costs),
    }


def as_facts(tables: dict[str, list[BreakdownRow]]) -> dict[str, list[dict]]:
    """Lay tables out for JSON."""
    return {title: [row._asdict() | {"bpb": row.bpb} for row in rows] for title, rows in tables.items()}


def format_tables(tables: dict[str, list[BreakdownRow]]) -> str:
    """Lay tables out for a terminal."""
    lines = []
    for title, rows in tables.items():
        lines.append(f"{title:<24}{'targets':>12}{'of bytes':>10}{'of bits':>10}{'bpb':>10}")
        total_bits, total_bytes = (sum(row[field] for row in rows) for field in (2, 3))
        for row in rows:
            bpb = f"{row.bpb:.4f}" if row.num_bytes else "-"
            shares = f"{row.num_bytes / total_bytes:>10.2%}{row.bits / total_bits:>10.2%}"
            lines.append(f"  {row.name:<22}{row.targets:>12,.0f}{shares}{bpb:>10}")
    return "\n".join(lines)
