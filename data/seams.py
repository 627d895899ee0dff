"""Where a long text may be cut so that its parts have exactly the tokens of the whole.

Tokenizer libraries take 30 to 150 bytes of memory for each byte of one text, so a document of 50 MB is given
to them in parts. A seam is a pattern of one character after which a token surely ends and nothing of what
follows changes what was before:

    SentencePiece BPE     no piece holds the character and the next one side by side, so no merge joins them,
                          and no rule of the normalizer spans them
    byte-level BPE        the split rule ends a word there; known are the rules of GPT-2's family and SuperBPE
    BESE                  no merge joins the symbols on both sides
    bytes                 everywhere

Each part but the first starts with the last character of the part before it, so that models which trim or add
spaces at the start of a text do not do so at a seam; the tokens of that character are dropped again. For any
other tokenizer there is no seam: its documents are encoded whole.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from common import read_json
from data.accounts import ByteCounts, Encoded
from data.changes import inner_fields, normalizer_rules
from data.codecs import TokenCodec
from data.codecs.bese import BESE_TYPE, NUM_BASE, NUM_SPECIAL, base_table
from data.codecs.caseops import CASE_BEFORE_SPACE, CASE_OPERATORS
from data.codecs.ranks import FAMILIES
from data.codecs.spm import SPACE_SYMBOL

PART_CHARS = 1 << 18  # of a part, up to the next seam
NOTED_BYTES = 16 << 20  # without a seam: longer documents are named, because of the memory that they take
GRAPHIC = "".join(map(chr, range(0x21, 0x7F)))  # of ASCII
# Letters in every version of Unicode that a split rule may know.
LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f\u3041-\u3094"
LETTERS += "\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
AFTER_WORD = re.compile(rf"[0-9{LETTERS}](?=[ \n])")
AFTER_GRAPHIC = re.compile(rf"[!-~{LETTERS}\u3001\u3002](?=[ \n])")  # GPT-2: newlines join no sign
AFTER_DIGIT = re.compile(r"[0-9](?=[ \nA-Za-z])")
EVERYWHERE = re.compile(r"[^\ud800-\udfff]")
# Split rules of tokenizer.json, as written there.
SUPERWORD = r"| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"
SPLIT_RULES = {
    FAMILIES["r50k"].split: AFTER_GRAPHIC,
    FAMILIES["cl100k"].split: AFTER_WORD,
    FAMILIES["cl100k"].split.replace(r"\p{N}{1,3}", r"\p{N}"): AFTER_WORD,
    FAMILIES["o200k"].split: AFTER_WORD,
    r"\p{N}" + SUPERWORD: AFTER_DIGIT,
    r"\p{N}{1,3}" + SUPERWORD: AFTER_DIGIT,
}
MODEL_TYPE, BPE = 3, 2  # a field of SentencePiece's trainer_spec, and its value
SUFFIX_SPACE = 24  # another: spaces end pieces
TRAINER = 2  # a field of its model file


# ---- Cutting ----------------------------------------------------------------------------------------


def cut(text: str, seam: re.Pattern | None) -> Iterator[str]:
    """Yield the parts of a text, of PART_CHARS or more; each but the first repeats a character."""
    first = 0
    while seam and (found := seam.search(text, max(first, 1) + PART_CHARS)):
        yield text[max(first - 1, 0) : found.end()]
        first = found.end()
    if first < len(text) or not first:
        yield text[max(first - 1, 0) :]


def encode_parts(
    codec: TokenCodec, num_threads: int, with_bytes: bool, parts: list[str], is_start: bool
) -> Encoded:
    """Encode consecutive parts of a document, BOS before its first part; counts no document.

    with_bytes: by the codec's exact count, for its sidecar.
    """
    if with_bytes:
        encoded, counted = zip(*map(codec.encode_with_bytes, parts))
    else:
        encoded = codec.encode_batch(parts, num_threads)
        counted = map(codec.token_bytes, encoded)
    ids, sizes = ([[codec.bos_id]], [[0]]) if is_start else ([], [])
    raw = 0
    for index, (part, part_ids, part_sizes) in enumerate(zip(parts, encoded, counted)):
        repeated = "" if is_start and index == 0 else part[0]
        dropped = codec.encode(repeated).size
        ids.append(part_ids[dropped:])
        sizes.append(part_sizes[dropped:])
        raw += len(part.encode()) - len(repeated.encode())
    whole = np.concatenate(sizes, dtype=np.int32)
    counts = ByteCounts(raw, int(whole.sum()), 0, 0, 0)
    return Encoded(np.concatenate(ids, dtype=np.int32), whole, counts)


@cache
def note_long(place: str, kind: str) -> None:
    """Say once of a document that a very long part of it is encoded whole."""
    print(
        f"note: {place}: over {NOTED_BYTES:,} bytes of this document hold no place where they may be "
        f"cut without changing tokens of this {kind} tokenizer; encoding them takes 50 to 150 bytes of "
        "memory each. Cut the document if that is too much.",
        file=sys.stderr,
    )


# ---- Finding seams ----------------------------------------------------------------------------------


def find_seam(codec: TokenCodec) -> re.Pattern | None:
    """Return the pattern of characters after which texts may be cut for a tokenizer, or None."""
    return read_seam(codec.kind, codec.path, codec.digest)


@cache
def read_seam(kind: str, path: Path, digest: str) -> re.Pattern | None:
    """Find the seam of a tokenizer's file; its digest tells apart files that come to one place in turn."""
    if kind == "bytes":
        return EVERYWHERE
    if kind == "tiktoken":
        return SPLIT_RULES[FAMILIES[path.stem.partition("_")[0]].split]
    if kind == "bese":
        return find_bese_seam(read_json(path))
    if kind == "bytelevel":
        return AFTER_GRAPHIC if path.name == "vocab.json" else find_split_seam(read_json(path))
    return find_piece_seam(path, kind)


def find_split_seam(content: dict) -> re.Pattern | None:
    """Find the seam of a tokenizer.json: all that it does before merging must be known."""
    pre = content.get("pre_tokenizer") or {}
    seams = [split_rule(part) for part in pre.get("pretokenizers", [pre])]
    is_plain = content.get("normalizer") is None and None not in seams
    if not is_plain or not all(token.get("special") for token in content.get("added_tokens", [])):
        return None
    return next((seam for seam in seams if seam), None)


def split_rule(part: dict) -> re.Pattern | str | None:
    """Return the seam that one pre-tokenizer makes, "" where it makes none, None for an unknown one."""
    match part:
        case {"type": "Digits"}:
            return ""
        case {"type": "ByteLevel", "use_regex": use_regex}:
            return AFTER_GRAPHIC if use_regex else ""
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return SPLIT_RULES.get(rule)
    return None


def find_bese_seam(content: dict) -> re.Pattern:
    """Find the pairs of ASCII characters whose symbols no merge joins."""
    assert content["tokenizer_type"] == BESE_TYPE
    table = base_table(content["single_letters"], content["groups"])
    ends = {token: (token, token) for token in range(NUM_BASE)}
    joined = set()
    for (left, right), new in content["merges"]:
        joined.add((ends[left][1], ends[right][0]))
        ends[new] = ends[left][0], ends[right][1]
    symbols = {
        char: [int(symbol) for symbol in table[ord(char)] if symbol >= NUM_SPECIAL and symbol != 255]
        for char in GRAPHIC + " \n"
    }
    pairs = []
    for left, own in symbols.items():
        free = [char for char, other in symbols.items() if (own[-1], other[0]) not in joined]
        if free:
            pairs.append(f"{re.escape(left)}(?=[{re.escape(''.join(free))}])")
    return re.compile("|".join(pairs) or r"(?!)")


def find_piece_seam(path: Path, kind: str) -> re.Pattern | None:
    """Find the characters after which a SentencePiece BPE model joins nothing.

    These are characters before a space, and those of no piece at all, which become byte tokens one by one.
    Where the normalizer has rules, only ASCII letters and digits that it keeps, before a space and a sign or
    letter of ASCII: a rule that changed this would have to hold them side by side.
    """
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(path))
    model = sp.serialized_model_proto()
    trainer, rules = inner_fields(model, TRAINER), normalizer_rules(model)
    tokens = [token for token in range(sp.vocab_size()) if not (sp.is_control(token) or sp.is_byte(token))]
    pieces = [sp.id_to_piece(token) for token in tokens]
    if trainer.get(MODEL_TYPE) != BPE or trainer.get(SUFFIX_SPACE) or SPACE_SYMBOL not in pieces:
        return None
    if not is_kept(sp, f"x{SPACE_SYMBOL}x"):
        return None
    marks = {" ", SPACE_SYMBOL, *CASE_OPERATORS, CASE_BEFORE_SPACE}  # a user's symbol may hold a plain space
    joined = {before for piece in pieces for before, char in pairwise(piece) if char in marks}
    known = {piece for piece in pieces if len(piece) == 1 and not piece.isspace()} - marks - joined
    if kind == "caseops":
        known -= {char for char in known if char.isupper()}  # written as an operator and a small letter
    if rules:
        befores, afters = beside_spaces(rules)
        kept = {char for char in known if char.isascii() and char.isalnum() and is_kept(sp, char)}
        return re.compile(f"{any_of(kept - befores)}(?= {any_of(set(GRAPHIC) - afters)})")
    seam = f"{any_of(known)}(?= )"
    if sum(map(sp.is_byte, range(sp.vocab_size()))) == 256:
        others = {char for piece in pieces for char in piece} | marks | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        seam += f"|[^\\s{re.escape(''.join(sorted(others)))}]"
    return re.compile(seam)


def any_of(chars: set[str]) -> str:
    """Write the pattern of one of these characters."""
    return f"[{re.escape(''.join(sorted(chars)))}]" if chars else "(?!)"


def is_kept(sp, written: str) -> bool:
    """Tell whether a normalizer leaves a text alone, but for a space that it may put before it."""
    return sp.normalize(written.replace(SPACE_SYMBOL, " ")).removeprefix(SPACE_SYMBOL) == written


def beside_spaces(rules: bytes) -> tuple[set[str], set[str]]:
    """Return the ASCII characters before and after spaces in what the rules of a normalizer replace.

    They are the keys of a double array of Darts-clone: a node's child by byte b is the node's number ^ its
    offset ^ b, and has the label b. So number ^ label finds all children of a node at once.
    """
    size = int.from_bytes(rules[:4], "little")
    units = np.frombuffer(rules[4 : 4 + size], "<u4").astype(np.int64)
    labels, offsets = units & (1 << 31 | 0xFF), units >> 10 << ((units & 1 << 9) >> 6)
    children = np.flatnonzero((labels > 0) & (labels < 256))
    children = children[np.argsort(children ^ labels[children], kind="stable")]
    starts = children ^ labels[children]
    befores, afters = set(), set()
    nodes = last = np.zeros(1, np.int64)  # nodes of one depth, and the bytes that lead to them
    while nodes.size:
        bases = nodes ^ offsets[nodes]
        first = np.searchsorted(starts, bases)
        counts = np.searchsorted(starts, bases, "right") - first
        places = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        before, nodes = np.repeat(last, counts), children[places]
        last = labels[nodes]
        befores |= {chr(byte) for byte in np.unique(before[last == ord(" ")]) if 0 < byte < 0x80}
        afters |= {chr(byte) for byte in np.unique(last[before == ord(" ")]) if byte < 0x80}
    return befores, afters
