"""Tokenizer files that change text, made with the libraries, and the text that shows it."""

import base64
import json
from pathlib import Path

from fixtures_data import small_texts, train_small_kind, train_small_tokenizer

from data.codecs.caseops import CASE_OPERATORS, to_case_operators
from data.codecs.ranks import FAMILIES
from data.train_tokenizer import CONTEST_OPTIONS, LOSSLESS_OPTIONS, train_sentencepiece

PLAIN = small_texts(12, seed=9)
CL100K = FAMILIES["cl100k"].split
EXPANDING = ["\ufdfa" * 3, "\ufdfa \ufb03", "\u3300"]  # U+FDFA becomes 18 letters
HOSTILE = [
    *("fi \ufb01 \ufb03", "\uff26\uff55\uff4c\uff4c \u212a", "e\u0301 \u00e9 \u1e9b\u0323", "   three   "),
    *("a" + " " * 40, "UPPER Case", "\u2581 \u2581a", "nul\0nul", "a\r\nb\r\n", "\u200b", " ", "\ufeff"),
    *("<s></s><unk><0x41><|endoftext|><tag> <tag> x", "tab\tTag tag <tag>", "\u4e2d\u6587 the model"),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]  # fmt: skip
EMPTY_TO_SOME = ("\u200b", " ", "\ufeff")  # nothing is left of them by NFKC and trimming
DOCUMENTS = [text for text in HOSTILE if text not in EMPTY_TO_SOME] + PLAIN


# ---- Hugging Face tokenizers ------------------------------------------------------------------------


def hugging_face(change):
    """Make what writes a small byte-level BPE after `change` has worked on it."""

    def make(folder: Path) -> Path:
        import tokenizers as tk

        tokenizer = tk.Tokenizer.from_file(str(train_small_kind("bytelevel", folder)))
        tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        change(tokenizer, tk)
        path = folder / "tokenizer.json"
        tokenizer.save(str(path))
        return path

    return make


def tk_regex(rule: str):
    """Spell a rule as the library's own kind of pattern."""
    from tokenizers import Regex

    return Regex(rule)


def normalizer(build):
    """Make a file with one normalizer."""
    return hugging_face(lambda tokenizer, tk: setattr(tokenizer, "normalizer", build(tk.normalizers)))


def pre_tokenizer(build):
    """Make a file with other pre-tokenizers."""
    return hugging_face(lambda tokenizer, tk: setattr(tokenizer, "pre_tokenizer", build(tk.pre_tokenizers)))


def added(*names, **flags):
    """Make a file with ordinary added tokens."""
    return hugging_face(lambda one, tk: one.add_tokens([tk.AddedToken(name, **flags) for name in names]))


def add_folded(tokenizer, tk) -> None:
    """Add a token that is looked for in folded text."""
    tokenizer.normalizer = tk.normalizers.Lowercase()
    tokenizer.add_tokens([tk.AddedToken("Tag", normalized=True)])


def add_ids_at_the_ends(tokenizer, tk) -> None:
    """Let a post-processor put special tokens around every text."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = tk.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)


def rewritten(change):
    """Make what writes a small byte-level BPE whose parsed file `change` has worked on."""

    def make(folder: Path) -> Path:
        path = train_small_kind("bytelevel", folder)
        content = json.loads(path.read_text())
        change(content["model"])
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(content))
        return path

    return make


def drop_bytes(model: dict) -> None:
    """Take most bytes above 0x7F and all merges out."""
    dropped = [name for name in model["vocab"] if len(name) > 1 or ord(name) >= 0xA1]
    kept = [name for name in sorted(model["vocab"], key=model["vocab"].get) if name not in dropped]
    model["merges"], model["vocab"] = [], {name: i for i, name in enumerate(kept)}


def end_words(model: dict) -> None:
    """Mark the last piece of each word."""
    model["end_of_word_suffix"] = "</w>"
    for char in "abcdefghijklmnopqrstuvwxyz":
        model["vocab"][f"{char}</w>"] = len(model["vocab"]) + 1


# ---- SentencePiece and others -----------------------------------------------------------------------


def sentence_piece(base: dict, texts: list[str] = PLAIN, size: int = 400, **options):
    """Make what trains a SentencePiece model with other options."""

    def make(folder: Path) -> Path:
        path = folder / "tokenizer.model"
        path.write_bytes(train_sentencepiece(texts, size, base | options))
        return path

    return make


def own_rules(folder: Path) -> Path:
    """Train a model that keeps every probe, but for one word, which its rules replace."""
    (folder / "rules.tsv").write_text("62 75 64 67 65 74\t62 75 64 67 69 65\n")  # budget -> budgie
    options = LOSSLESS_OPTIONS | {"normalization_rule_tsv": str(folder / "rules.tsv")}
    options = {key: value for key, value in options.items() if key != "normalization_rule_name"}
    return sentence_piece(options)(folder)


def rules_of(rows: dict[str, str]):
    """Make what trains a model whose rules are the contest's on the codec's probe, and these besides."""

    def make(folder: Path) -> Path:
        rows_of_probe = {"\ufb01": "fi", "\n": " ", "\u200b": " "}
        spelled = [" ".join(f"{ord(char):X}" for char in text) for text in [*rows_of_probe, *rows]]
        texts = [*rows_of_probe.values(), *rows.values()]
        becomes = [" ".join(f"{ord(char):X}" for char in text) for text in texts]
        lines = "".join(f"{source}\t{target}\n" for source, target in zip(spelled, becomes))
        (folder / "rules.tsv").write_text(lines)
        options = {key: value for key, value in CONTEST_OPTIONS.items() if key != "normalization_rule_name"}
        return sentence_piece(options, normalization_rule_tsv=str(folder / "rules.tsv"))(folder)

    return make


def hidden_rules(folder: Path) -> Path:
    """Append an empty normalizer, which readers merge with the one before, to a model with rules."""
    path = own_rules(folder)
    path.write_bytes(path.read_bytes() + b"\x1a\x00")
    return path


def share_ids(model: dict) -> None:
    """Give two entries of one length one id."""
    names = sorted(name for name in model["vocab"] if len(name) == 3)[:2]
    model["vocab"][names[0]] = model["vocab"][names[1]]


def case_ops(**options):
    """Make what trains a CaseOps model that normalises."""
    texts = [to_case_operators(text.title() + text) for text in PLAIN]
    return sentence_piece(CONTEST_OPTIONS, texts, user_defined_symbols=list(CASE_OPERATORS), **options)


def ranks(values):
    """Make what writes a .tiktoken file of single bytes."""

    def make(folder: Path) -> Path:
        lines = (f"{base64.b64encode(bytes([value])).decode()} {i}" for i, value in enumerate(values))
        path = folder / "r50k_base.tiktoken"
        path.write_text("\n".join(lines))
        return path

    return make


MAKERS = {
    "nfkc": normalizer(lambda n: n.NFKC()),
    "accents": normalizer(lambda n: n.Sequence([n.NFKD(), n.StripAccents()])),
    "lowercase": normalizer(lambda n: n.Lowercase()),
    "replace": normalizer(lambda n: n.Replace("budget", "budgie")),
    "prepend": normalizer(lambda n: n.Prepend(" ")),
    "swallow": added("<tag>", lstrip=True, rstrip=True),
    "folded_token": hugging_face(add_folded),
    "post_processor": hugging_face(add_ids_at_the_ends),
    "few_bytes": rewritten(drop_bytes),
    "word_ends": rewritten(end_words),
    "prefix_space": pre_tokenizer(lambda p: p.ByteLevel(add_prefix_space=True)),
    "removed": pre_tokenizer(lambda p: p.Sequence([p.Split("budget", "removed"), p.ByteLevel(False)])),
    "inverted_split": pre_tokenizer(
        lambda p: p.Sequence(
            [p.Split(tk_regex(CL100K), "removed", invert=True), p.ByteLevel(False, use_regex=False)]
        )
    ),
    "added_token": added("<tag>", "model reads"),
    "contest": sentence_piece(CONTEST_OPTIONS),
    "nmt_nfkc_cf": sentence_piece(CONTEST_OPTIONS, normalization_rule_name="nmt_nfkc_cf"),
    "nfkc_cf": sentence_piece(CONTEST_OPTIONS, normalization_rule_name="nfkc_cf"),
    "nfkc_dummy": sentence_piece(CONTEST_OPTIONS, add_dummy_prefix=True),
    "dummy_prefix": sentence_piece(LOSSLESS_OPTIONS, add_dummy_prefix=True),
    "trimmed": sentence_piece(LOSSLESS_OPTIONS, remove_extra_whitespaces=True),
    "symbols": sentence_piece(LOSSLESS_OPTIONS, user_defined_symbols=["a  b", " the model "]),
    "nfkc_symbols": sentence_piece(CONTEST_OPTIONS, user_defined_symbols=["the model", " three "]),
    "no_space": sentence_piece(CONTEST_OPTIONS, ["abcdefgh" * 50], 270),
    "no_fallback": sentence_piece(LOSSLESS_OPTIONS, size=140, byte_fallback=False),
    "own_rules": own_rules,
    "hidden_rules": hidden_rules,
    "folded_letters": rules_of(dict.fromkeys("bdfghjklmpqrstuvwz", "c")),
    "dropped_vowels": rules_of(dict.fromkeys("aou", "")),
    "case_ops_nfkc": case_ops(),
    "case_ops_folded": case_ops(normalization_rule_name="nmt_nfkc_cf"),
    "bese": lambda folder: train_small_kind("bese", folder),
    "ranks": ranks(range(256)),
    "few_ranks": ranks(range(128)),
    "bytes": lambda folder: train_small_kind("bytes", folder),
    "lossless": train_small_tokenizer,
}
