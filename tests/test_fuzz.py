"""Hostile artifacts: whatever the bytes, an error that says so or a model, in 2 seconds and 1 GB."""

import functools
import math
import random
import time

import numpy as np
import pytest
import torch
from fixtures_artifact import put_together, sign, take_apart
from fixtures_model import TINY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common import UserError
from dev.soak.mutations import LEAVES, NUMBERS, mutate_bytes, mutate_tree, peak_mib
from formats.artifact import CHECKSUM_BYTES, LARGEST_FILE, PLAIN_CODECS, ArtifactError, compress
from formats.recipe import flatten_recipe, get_recipe, with_values
from formats.rules import LARGEST_DEPTH
from quantizers.storage import STORAGE_PARTS, STREAM_DTYPES, TensorRow
from train_gpt import (
    Config,
    build_model,
    load_artifact,
    pack_model,
    quantize_model,
    tensor_table,
)

SECONDS, GROWTH_MIB = 60.0, 1000  # of a slow machine; a bomb takes hours, gigabytes
MOST_ZEROS = 1 << 24
LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
SMALLEST = {"model.num_layers": 1, "model.model_dim": 16, "data.vocab_size": 64}
CODINGS = {
    "libraries": {"quant.codec": "zlib", "quant.float16_numel": 100, "model.smear": "gated"},
    "ours": {"quant.codec": "rans", "schedule.stages": "0:16:128:4:1:0,0.5:16:128:4:1:0"},
}


@pytest.fixture(scope="module")
def artifacts() -> list[bytes]:
    """Two small artifacts with every storage that rounding has."""
    blobs = []
    for values in CODINGS.values():
        cfg = with_values(Config(), TINY | SMALLEST | values, "test")
        model = build_model(cfg, torch.device("cpu"))
        blobs.append(pack_model(model, cfg, quantize_model(model, cfg, {}, len), "f" * 64)[0])
    return blobs


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A judge of bytes: load them, hold clock and memory to the limits; returns the weights or None."""
    path = tmp_path_factory.mktemp("fuzz") / "artifact.bin"
    live, device = with_values(Config(), {"run.compile": "off"}, "test"), torch.device("cpu")
    before = peak_mib()

    def load(blob: bytes) -> dict | None:
        path.write_bytes(blob)
        started = time.process_time()
        try:
            model, _, _ = load_artifact(path, live, device)
        except UserError as error:
            assert len(str(error)) > 20
            model = None
        assert time.process_time() - started < SECONDS
        assert peak_mib() - before < GROWTH_MIB
        return model.state_dict() if model else None

    return load


# Bytes


def damage_bytes(blob: bytes, dice: random.Random) -> bytes:
    """Mutate bytes; half the time the checksum is made right."""
    body = mutate_bytes(blob[:-CHECKSUM_BYTES], dice)
    return sign(body) if dice.random() < 0.5 else body + blob[-CHECKSUM_BYTES:]


# Meaning


def damage_meaning(blob: bytes, dice: random.Random) -> bytes:
    """Mutate values of the header; lengths and checksum are right."""
    header, streams = take_apart(blob)
    mutate_tree(header, dice)
    return put_together(header, streams)


def lie(blob: bytes, dice: random.Random) -> bytes:
    """Tell of another model: its tensor table, its lengths, streams that unpack to zeros of such lengths."""
    header, streams = take_apart(blob)
    recipe = get_recipe(with_values(Config(), flatten_recipe(header["recipe"], "the truth"), "the truth"))
    for _ in range(dice.randint(1, 3)):
        section = recipe[dice.choice(["model", "model", "model", "quant", "data"])]
        section[dice.choice(sorted(section))] = dice.choice([*NUMBERS[:10], *LEAVES, *range(1, 40)])
    try:
        cfg = with_values(Config(), flatten_recipe(recipe, "a lie"), "a lie")
        if cfg.model.num_layers * cfg.model.recur_passes > 2 * LARGEST_DEPTH:
            return put_together(header, streams)
        table = tensor_table(cfg)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return put_together(header, streams)  # a model that cannot be described: the table is another's
    header |= {"recipe": get_recipe(cfg), "tensors": table}
    return put_together(*with_zeros(header, table, dice.choice([0, 0, 0, 1, 1 << 33])))


def with_zeros(header: dict, table: list[TensorRow], more: int) -> tuple[dict, bytes]:
    """Give a header streams of zeros, whose declared lengths are the table's and so much more."""
    wanted = header["recipe"]["quant"]["codec"]
    codec = wanted if wanted in PLAIN_CODECS else "best"
    lengths = dict.fromkeys(STREAM_DTYPES, 0)
    for row in table:
        for stream, shape in STORAGE_PARTS[row.storage](row.shape):
            lengths[stream] += math.prod(shape) * STREAM_DTYPES[stream].itemsize
    stored = {name: pack_zeros(min(length, MOST_ZEROS), codec) for name, length in lengths.items()}
    header["streams"] = [[name, len(stored[name]), length + more] for name, length in lengths.items()]
    return header, b"".join(stored.values())


@functools.cache
def pack_zeros(length: int, codec: str) -> bytes:
    """Compress zeros; brotli stands for "best", which would try all codecs."""
    names = list(PLAIN_CODECS)
    best = bytes([names.index("brotli")]) + compress(bytes(length), "brotli")
    return best if codec == "best" else compress(bytes(length), codec)


@pytest.fixture(scope="module")
def judge(artifacts, outcome):
    """A maker of one hostile artifact that holds the loader to its promise."""

    def hold(dice: random.Random) -> None:
        blob = dice.choice(artifacts)
        hostile = dice.choice([damage_bytes, damage_meaning, lie])(blob, dice)
        weights = outcome(hostile)
        if weights is not None:
            assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        if weights is not None and hostile[-CHECKSUM_BYTES:] == blob[-CHECKSUM_BYTES:]:
            original = outcome(blob)
            assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items())

    return hold


@given(dice=st.randoms(use_true_random=True))
@settings(max_examples=300, derandomize=True, **LIMITS)
def test_hostile_artifacts_are_refused_or_load(judge, dice):
    """No crash, no hang, no other exception, whatever is in the file."""
    judge(dice)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@given(dice=st.randoms(use_true_random=True))
@settings(max_examples=10_000, derandomize=False, **LIMITS)
def test_ten_thousand_hostile_artifacts_are_refused_or_load(judge, dice):
    """The same, at the length that finds what 300 miss."""
    judge(dice)


BOMBS = {
    "wide": {"model.model_dim": 1 << 20, "data.vocab_size": 1 << 20},
    "long": {"model.bigram_buckets": 1 << 15, "model.bigram_dim": 1 << 11},
    "many": {"model.num_layers": 100_000},
    "again": {"model.recur_layers": "0,1", "model.recur_passes": 1 << 30},
    "huge": {"model.model_dim": 1 << 62},
}
LARGEST_ALLOWED = {
    "deep": {"model.num_layers": LARGEST_DEPTH},
    "long": {"model.bigram_buckets": 1 << 13, "model.bigram_dim": 2000},
}


def forge_zeros(values: dict, described: bool) -> bytes:
    """An artifact of a model of zeros."""
    heads = {"model.num_heads": 1, "model.num_kv_heads": 1, "quant.codec": "brotli"}
    cfg = with_values(Config(), TINY | heads | values, "test")
    header = {"recipe": get_recipe(cfg), "tokenizer_sha256": "f" * 64}
    header["tensors"] = tensor_table(cfg) if described else []
    return put_together(*with_zeros(header, header["tensors"], 0))


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_do_not_ask_for_gigabytes(outcome, name):
    """Table and lengths agree with the recipe: the recipe itself asks for too much."""
    assert outcome(forge_zeros(BOMBS[name], name in ("wide", "long"))) is None


@pytest.mark.parametrize("name", LARGEST_ALLOWED)
def test_the_largest_model_of_zeros_loads_within_the_limits(outcome, name):
    """What is just not refused must still end, and be small."""
    assert not any(tensor.any() for tensor in outcome(forge_zeros(LARGEST_ALLOWED[name], True)).values())


def test_a_file_beyond_any_model_is_not_read(tmp_path):
    """A sparse file of terabytes costs its maker nothing."""
    path = tmp_path / "artifact.bin"
    with open(path, "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(ArtifactError, match=f"at most {LARGEST_FILE:,} bytes"):
        load_artifact(path, Config(), torch.device("cpu"))


def test_weights_that_are_not_finite_are_refused(artifacts, tmp_path):
    """A scale of infinity is damage that no length shows."""
    header, streams = take_apart(artifacts[0])
    first = header["streams"][0][1]
    stored, raw = header["streams"][1][1:]
    wild = compress(np.full(raw // 2, np.inf, np.float16).tobytes(), "zlib")
    header["streams"][1][1] = len(wild)
    path = tmp_path / "artifact.bin"
    path.write_bytes(put_together(header, streams[:first] + wild + streams[first + stored :]))
    with pytest.raises(ArtifactError, match="not finite"):
        load_artifact(path, Config(), torch.device("cpu"))
