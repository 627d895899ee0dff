"""What a tokenizer changes of a text: by probes, and by what its file says that no probe could show.

A codec's `lossless` says how it counts bytes. This is the proof: its words stand in every byte account.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BytesIO

from common import read_json
from data.codecs import TokenCodec
from data.codecs.bese import BESE_LOSES
from data.codecs.ranks import FAMILIES

PROBES = {
    "case": "aA \u00e9\u00c9",
    "spaces": " a  b ",
    "control characters": "\n\t\r\0 \r\n\r\n  \t x",
    "compatibility characters": "\ufb01 \u212a \uff21\ufdfa \u3000x\u00a0",
    "combining marks": "e\u0301",
    "rare characters": "\U0001f600 \u4e2d\u00df \x7f\ufeff\ufffd\u0120\ue001",
    "the space symbol": "\u2581 \u2581",
    "spelled special tokens": "it's 'LL 12345 <s></s><unk><0x41><|endoftext|>",
}
NORMALIZER, RULES = 3, 2  # fields of a SentencePiece model file, and of its normalizer
CONTEST_RULES = {  # SHA-256 of the tables of nmt_nfkc in the contest's models
    "79372c41389c2b9b29bc171017ab5400e352debd686b02670a42bec709015074",
    "51d3684747b35ef99cd4802f37cc1ee0c6bec4d060814f774efb1066d3c167f2",
}


@lru_cache(maxsize=64)
def find_changes(codec: TokenCodec) -> str:
    """Say what of a text does not come back from its tokens; "" for a tokenizer that keeps every byte."""
    if codec.kind == "bese":
        return BESE_LOSES
    stated, own = FILE_READERS[codec.kind](codec) if codec.kind in FILE_READERS else ([], [])
    own_probe = "".join(f"x{token}  {token} {token}\n\n{token}" for token in own)
    probes = PROBES | {"its own added tokens": own_probe}
    changed = [name for name, text in probes.items() if codec.decode(codec.encode(text)) != text.encode()]
    changed += stated or ([] if changed or codec.lossless else ["what no probe holds"])
    return f"the tokenizer ({codec.kind}) changes {', '.join(changed)}" if changed else ""


# ---- SentencePiece ----------------------------------------------------------------------------------


def read_number(file: BytesIO) -> int:
    """Read a number of a protocol buffer: seven bits a byte, the lowest first."""
    value = shift = 0
    while (byte := file.read(1)[0]) > 127:
        value |= (byte & 127) << shift
        shift += 7
    return value | byte << shift


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of a protocol buffer's fields."""
    file = BytesIO(data)
    while file.tell() < len(data):
        number, wire = divmod(read_number(file), 8)
        size = {1: 8, 2: None, 5: 4}.get(wire, 0)
        yield number, file.read(read_number(file) if size is None else size) if wire else read_number(file)


def inner_fields(data: bytes, number: int) -> dict[int, int | bytes]:
    """Return the fields of a message within a message; of one that comes in parts, as readers merge them."""
    return dict(proto_fields(b"".join(value for field, value in proto_fields(data) if field == number)))


def normalizer_rules(model: bytes) -> bytes:
    """Return the table of rules that a model file normalises by; none for "identity"."""
    return inner_fields(model, NORMALIZER).get(RULES, b"")


def read_model(codec: TokenCodec) -> tuple[list[str], list[str]]:
    """Name rules that replace characters in a model file of which the probes come back."""
    if not codec.lossless or not normalizer_rules(codec.path.read_bytes()):
        return [], []
    return ["what its normalisation rules name"], []


@lru_cache(maxsize=64)
def follows_contest(codec: TokenCodec) -> bool:
    """Tell whether a codec changes and counts text as the contest's own models: by their table of rules."""
    if not codec.by_contest_rule:
        return False
    found = hashlib.sha256(normalizer_rules(codec.path.read_bytes())).hexdigest()
    return found in CONTEST_RULES or found == installed_rules()


def installed_rules() -> str:
    """Hash the table of nmt_nfkc that the installed library trains with; "" where it does not tell."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    except (AttributeError, TypeError):  # an older library
        return ""
    return hashlib.sha256(normalizer_rules(model)).hexdigest()


# ---- Hugging Face -----------------------------------------------------------------------------------


def read_parts(codec: TokenCodec) -> tuple[list[str], list[str]]:
    """Name the parts of a tokenizer.json that change text; return also the tokens that it looks for."""
    if codec.path.name == "vocab.json":
        return [], []
    content = read_json(codec.path)
    roles = ("normalizer", "pre_tokenizer")
    found = [(role.replace("_", "-"), part) for role in roles for part in flat_parts(content.get(role))]
    changed = [f"what its {role} {part.get('type')} does" for role, part in found if not keeps_text(part)]
    return changed, [token["content"] for token in content.get("added_tokens", [])]


def flat_parts(part: dict | None) -> list[dict]:
    """List the parts of a Sequence, at any depth."""
    inner = part and (part.get("normalizers") or part.get("pretokenizers"))
    return [one for each in inner for one in flat_parts(each)] if inner else [part] if part else []


def keeps_text(part: dict) -> bool:
    """Tell whether a part only splits text, or writes its bytes as characters."""
    match part:
        case {"type": "ByteLevel", **others}:
            return not others.get("add_prefix_space", False)
        case {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": rule}}:
            return any(rule == family.split for family in FAMILIES.values())  # which match every character
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return behavior != "Removed"
    return part.get("type") in ("Digits", "UnicodeScripts", "FixedLength", "Sequence")


FILE_READERS: dict[str, Callable] = {
    "sentencepiece": read_model,
    "caseops": read_model,
    "bytelevel": read_parts,
}
