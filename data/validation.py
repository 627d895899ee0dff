"""Validation text as tokens, and how many bytes of the original text each of them stands for.

`settings` is the data section of a recipe, or any object with its data_path, tokenizer_path, vocab_size and
allow_extra_bytes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, sha256_file
from data.accounts import (
    CONTEST_EXCESS,
    OTHER_TOKENIZER,
    ByteAccount,
    ByteCounts,
    open_account,
    stated_counts,
)
from data.codecs import TokenCodec
from data.shards import (
    VAL_GLOB,
    check_token_ids,
    find_shards,
    hash_fault,
    read_manifest,
    read_shard,
    stated_hashes,
)


class ValidationText(NamedTuple):
    """The validation tokens and what they stand for."""

    tokens: np.ndarray  # (N + 1,) uint16
    target_bytes: np.ndarray  # (N,) original UTF-8 bytes of each target
    bos_id: int
    pattern: str
    tokenizer_kind: str
    tokenizer_sha256: str
    raw_bytes: int | None  # of the text itself, where a manifest states it
    not_comparable: str = ""  # why its scores compare with none of another tokenizer
    invalid: str = ""  # why they are below the truth
    account: ByteAccount | None = None  # of all the shards, tail included; packed programs have none


def read_intact(path: Path) -> np.ndarray:
    """Read a shard, (N,), that must be the stated one where its sha256 is stated."""
    tokens = np.array(read_shard(path))
    stated = stated_hashes(path.parent)
    if path.name in stated and (fault := hash_fault(path, stated[path.name], sha256_file(path))):
        raise UserError(fault)
    return tokens


def read_sidecar(path: Path, num_tokens: int) -> np.ndarray:
    """Read the original bytes of each of a shard's tokens, (N,), from the file beside it."""
    path = path.with_name(path.name.replace("val_", "val_bytes_"))
    sizes = read_intact(path)
    if sizes.size != num_tokens:
        raise UserError(
            f"{path}: expected the bytes of {num_tokens:,} tokens, found {sizes.size:,}. It belongs to "
            "another shard; make the data again."
        )
    return sizes


def check_tokenizer(settings, codec: TokenCodec, expected_sha256: str) -> None:
    """Refuse a tokenizer that is not the one which data or model were made with."""
    if expected_sha256 != codec.digest:
        raise UserError(
            f"{settings.tokenizer_path}: expected the tokenizer with sha256 {expected_sha256[:16]}, "
            f"found {codec.digest[:16]}. Set TOKENIZER_PATH to it or make the data again."
        )


def read_validation(settings, codec: TokenCodec, chosen: str, tokenizer_sha256: str) -> ValidationText:
    """Read all validation shards, or the chosen ones, with the byte count of every target.

    Refuses shards whose bytes are not the stated ones, a byte total, or without a choice a list of shards,
    that are not the manifest's. tokenizer_sha256: of the model's own tokenizer, where one is known.
    """
    pattern = chosen or str(Path(settings.data_path) / VAL_GLOB)
    files = find_shards(pattern)
    manifest = read_manifest(files[0].parent) or {}
    made_with = tokenizer_sha256 or manifest.get("tokenizer", {}).get("sha256", codec.digest)
    check_tokenizer(settings, codec, made_with)
    shards = [read_intact(path) for path in files]
    for path, shard in zip(files, shards):
        check_token_ids(shard, settings.vocab_size, path)
    tokens = np.concatenate(shards)
    if tokens.size < 2:
        raise UserError(
            f"{pattern}: expected 2 or more validation tokens, found {tokens.size}. Make the data again."
        )
    if codec.needs_sidecar:  # the text's own sizes, which the tokens cannot tell
        sidecars = [read_sidecar(path, shard.size) for path, shard in zip(files, shards)]
        token_bytes = np.concatenate(sidecars).astype(np.int32)
    else:
        token_bytes = codec.token_bytes(tokens)
    if not token_bytes[1:].any():
        raise UserError(
            f"{pattern}: expected tokens that stand for text, found {tokens.size:,} of no bytes, as BOS is. "
            "A score in bits per byte needs bytes; make the data again."
        )
    stated = manifest.get("val", {})
    expected = [shard["file"] for shard in stated.get("shards", [])]
    is_whole = expected == [path.name for path in files]
    if expected and not is_whole and not chosen:
        odd = min({*expected} ^ {path.name for path in files})
        raise UserError(
            f"{pattern}: expected the manifest's {len(expected)} shards, found {len(files)}; {odd} "
            "is in one list only. Make the data again, or name the shards: python -m eval --val."
        )
    expected_bytes = stated.get("expected_token_bytes", 0)
    if is_whole and expected_bytes != token_bytes.sum():
        raise UserError(
            f"{pattern}: the manifest expects {expected_bytes:,} bytes, the tokens have "
            f"{token_bytes.sum():,}. A bits-per-byte figure from them would be wrong; make the data again."
        )
    raw_bytes = stated.get("raw_bytes") if is_whole else None
    if (
        raw_bytes is not None
        and expected_bytes > raw_bytes * (1 + CONTEST_EXCESS)
        and not settings.allow_extra_bytes
    ):
        raise UserError(
            f"{pattern}: counts {expected_bytes:,} bytes of a text of {raw_bytes:,}: scores would be below "
            "the truth. Make the data again with another tokenizer."
        )
    proven = manifest.get("tokenizer", {})  # by more than the codec's own probes
    is_exact = codec.lossless and proven.get("lossless", True)
    by_contest_rule = codec.by_contest_rule and proven.get("by_contest_rule", True)
    made_by = (codec.bos_id, pattern, codec.kind, codec.digest)
    label = "" if is_exact or by_contest_rule else "the tokenizer changes text"
    return ValidationText(tokens, token_bytes[1:], *made_by, raw_bytes, label)


def account_validation(settings, codec: TokenCodec, chosen: str, tokenizer_sha256: str) -> ValidationText:
    """Do as read_validation and add the byte account, and the labels of scores that follow from it.

    Raises where scores would be below the truth, unless settings.allow_extra_bytes.
    """
    text = read_validation(settings, codec, chosen, tokenizer_sha256)
    counts = ByteCounts(None, int(text.target_bytes.sum()))
    if text.raw_bytes is not None:
        manifest = read_manifest(find_shards(text.pattern)[0].parent)
        counts = stated_counts(manifest["val"], counts.token_bytes)
    account = open_account(codec, counts)
    if account.invalid and not settings.allow_extra_bytes:
        raise UserError(f"{text.pattern}: {account.invalid}. {OTHER_TOKENIZER}")
    labels = {"not_comparable": account.not_comparable, "invalid": account.invalid}
    return text._replace(account=account, **labels)


def scored_tokens(text: ValidationText, context_len: int, keep_tail: bool) -> np.ndarray:
    """Return the tokens to score, whole windows only unless the tail is kept; at least one window."""
    num_targets = len(text.tokens) - 1
    if not keep_tail:
        num_targets -= num_targets % context_len
    if num_targets < 1:
        raise UserError(
            f"{text.pattern}: expected at least one window of {context_len} + 1 validation tokens, found "
            f"{len(text.tokens):,}. Make the validation set larger or eval.context_len smaller."
        )
    return text.tokens[: num_targets + 1]
