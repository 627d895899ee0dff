"""Two scores of the same documents: the difference, its interval, and the documents that make it."""

import re
import unicodedata
from typing import NamedTuple

import numpy as np

from common import UserError
from eval.breakdown import get_costs
from eval.stats import bootstrap_difference
from scoring.adaptive import plan_documents

OTHER_CHARACTERS = re.compile("[^0-9a-z]+")
SAME_TEXT = "Name the same validation documents: --val, --documents."
PASSAGE = 12  # characters
NUM_SHOWN = 5  # documents at each end of the table


class DocumentCosts(NamedTuple):
    """What each of D documents cost, under one tokenizer."""

    bits: np.ndarray  # (D,) float64
    num_bytes: np.ndarray  # (D,)
    tokens: list[np.ndarray]  # ids of each


def document_costs(
    nats: np.ndarray, target_bytes: np.ndarray, tokens: np.ndarray, bos_id: int
) -> DocumentCosts:
    """Add up the N targets of N + 1 tokens by document; the next document's BOS counts to the one it ends."""
    spans = plan_documents(tokens, bos_id)
    bits, sizes = (np.add.reduceat(column, spans[:, 0]) for column in get_costs(nats, target_bytes))
    return DocumentCosts(bits, sizes, [tokens[lo + (tokens[lo] == bos_id) : hi] for lo, hi in spans])


def spelling(codec, ids: np.ndarray) -> str:
    """Keep of a document what most tokenizers keep: its ASCII letters, without case, and digits."""
    text = unicodedata.normalize("NFKC", codec.decode(ids).decode("utf-8", "replace")).casefold()
    return OTHER_CHARACTERS.sub("", text)


def are_alike(a: str, b: str) -> bool:
    """Tell one document under two tokenizers from two documents.

    A normalising tokenizer spells out a trademark sign, a lossy one drops it: half of all passages must be
    in both. Different documents share next to none.
    """
    if min(len(a), len(b)) < PASSAGE:
        return max(len(a), len(b)) < 2 * PASSAGE
    passages = [{text[i : i + PASSAGE] for i in range(len(text) - PASSAGE + 1)} for text in (a, b)]
    return 2 * len(passages[0] & passages[1]) >= max(map(len, passages))


def check_same_documents(new: DocumentCosts, old: DocumentCosts, codecs: tuple) -> None:
    """Raise unless both sides scored the same documents in the same order."""
    same_codec = codecs[0].digest == codecs[1].digest
    for i, pair in enumerate(zip(new.tokens, old.tokens)):
        if not (np.array_equal(*pair) if same_codec else are_alike(*map(spelling, codecs, pair))):
            raise UserError(f"document {i}: expected the same text on both sides, found two. {SAME_TEXT}")
    if len(new.tokens) != len(old.tokens):
        found = f"{len(new.tokens):,} and {len(old.tokens):,}"
        raise UserError(f"expected as many documents on both sides, found {found}. {SAME_TEXT}")


def compare_documents(new: DocumentCosts, old: DocumentCosts, codec) -> dict:
    """Compare two sides document by document; returns a JSON object. Negative differences favour `new`.

    The interval is that of the difference of the two totals when documents are drawn again. Sides with
    different tokenizers may count different bytes for a document; each is divided by its own.
    """
    sides = [np.stack([side.bits, side.num_bytes], axis=1) for side in (new, old)]
    totals = [side[:, 0].sum() / side[:, 1].sum() for side in sides]
    interval = bootstrap_difference(*sides)
    rows = [
        {
            "document": i,
            "bytes": [int(new.num_bytes[i]), int(old.num_bytes[i])],
            "bpb": [side.bits[i] / side.num_bytes[i] if side.num_bytes[i] else None for side in (new, old)],
            "bits_saved": float(old.bits[i] - new.bits[i]),
            "starts": codec.decode(ids[:24]).decode("utf-8", "replace")[:40],
        }
        for i, ids in enumerate(new.tokens)
    ]
    return {
        "val_bpb": totals,
        "difference": totals[0] - totals[1],
        "interval": interval._asdict(),
        "documents_better": sum(row["bits_saved"] > 0 for row in rows),
        "documents": rows,
    }


def format_comparison(report: dict, names: tuple[str, str]) -> str:
    """Lay a comparison out for a terminal: totals, interval, and the documents at both ends."""
    interval, rows = report["interval"], report["documents"]
    lines = [f"{'AB'[i]}  {report['val_bpb'][i]:.8f} bpb  {name}" for i, name in enumerate(names)]
    lines.append(
        f"A - B  {report['difference']:+.8f} bpb, {interval['level']:.0%} of {interval['resamples']:,} "
        f"resamples of {len(rows):,} documents in [{interval['low']:+.8f}, {interval['high']:+.8f}]"
    )
    if any(row["bits_saved"] for row in rows):
        share = f"A is not better in {interval['p']:.4f} of resampled documents (one pair of seeds)"
        lines.append(f"A is better on {report['documents_better']:,} documents; {share}")
    else:
        lines.append("A and B cost the same on every document")
    order = sorted(rows, key=lambda row: -row["bits_saved"])
    ends = {"documents that A gains most on": order[:NUM_SHOWN], "that it loses most on": order[-NUM_SHOWN:]}
    for title, shown in ends.items():
        lines.append(f"{title:<32}{'bytes':>10}{'bpb of A':>10}{'bpb of B':>10}{'bits saved':>12}")
        for row in shown:
            scores = "".join(f"{'-' if bpb is None else format(bpb, '.4f'):>10}" for bpb in row["bpb"])
            number = f"{row['bytes'][0]:>10,}{scores}{row['bits_saved']:>12,.1f}"
            lines.append(f"  {row['document']:>6,} {ascii(row['starts'])[1:23]:<23}{number}")
    return "\n".join(lines)
