"""Hostile artifacts: whatever the bytes, an error that says so or a model, in 2 seconds and 1 GB."""

import copy
import json
import resource
import time

import pytest
import torch
from fixtures_model import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_artifact import put_together, sign, take_apart

from data.errors import UserError
from formats.artifact import CHECKSUM_BYTES, STREAM_CODECS, compress
from formats.recipe import recipe_of, with_values
from train_gpt import (
    LARGEST_DEPTH,
    LARGEST_FILE,
    STREAM_DTYPES,
    Config,
    build_model,
    load_artifact,
    pack_model,
    quantize_model,
    tensor_table,
)

SECONDS, GROWTH_MIB = 2.0, 1000
LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
CODINGS = {
    "libraries": {"quant.codec": "zlib", "quant.float16_numel": 100, "model.smear": "gated"},
    "ours": {"quant.codec": "rans", "schedule.stages": "0:16:128:4:1:0,0.5:16:128:4:1:0"},
}


@pytest.fixture(scope="module")
def artifacts() -> list[bytes]:
    """Two small artifacts with every storage that rounding has."""
    blobs = []
    for values in CODINGS.values():
        cfg = with_values(Config(), TINY | {"model.num_layers": 2} | values, "test")
        model = build_model(cfg, torch.device("cpu"))
        blobs.append(pack_model(model, cfg, quantize_model(model, cfg, {}, len), "f" * 64)[0])
    return blobs


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
            assert 20 < len(str(error))
            model = None
        assert time.process_time() - started < SECONDS
        assert peak_mib() - before < GROWTH_MIB
        return model.state_dict() if model else None

    return load


# Bytes


@st.composite
def cuts(draw, size: int):
    """A piece of so many bytes: where it starts and ends."""
    first = draw(st.integers(0, size))
    return first, draw(st.integers(first, min(size, first + draw(st.sampled_from([1, 8, 300, size])))))


@st.composite
def damaged_bytes(draw, blob: bytes):
    """Bytes flipped, cut off, cut out, doubled, reversed, replaced, exchanged; the checksum made right or not."""
    body = blob[:-CHECKSUM_BYTES]
    for _ in range(draw(st.integers(1, 3))):
        first, last = draw(cuts(len(body)))
        piece, kind = body[first:last], draw(st.integers(0, 7))
        if kind == 0 and body:
            at = min(first, len(body) - 1)
            body = body[:at] + bytes([body[at] ^ 1 << draw(st.integers(0, 7))]) + body[at + 1 :]
        elif kind == 1:
            body = body[:first]
        else:
            others = [b"", piece * 2, piece[::-1], draw(st.binary(max_size=40)), bytes(len(piece)), b"\xff" * 8]
            body = body[:first] + others[kind - 2] + body[last:]
    return sign(body) if draw(st.booleans()) else body + blob[-CHECKSUM_BYTES:]


# Meaning

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 1000, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 10**30]
FLOATS = [0.5, -0.5, 1e-9, 1e19, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", "x", "true", "1:2:3:4:5:6", "0:0:0:0:0:0", "none", "rans", "../../x", "\ud800", "9" * 5000]
LEAVES = st.sampled_from([None, True, False, *NUMBERS, *FLOATS, *TEXTS, [], [0], [[]], [[0] * 6], {}, {"a": 1}])


def places(tree, path=()) -> list[tuple]:
    """List the path of every value in a header."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((*path, key), *places(tree[key], (*path, key)))]


@st.composite
def damaged_meaning(draw, blob: bytes):
    """A header with values changed, removed, doubled, renamed or exchanged; lengths and checksum right."""
    header, streams = take_apart(blob)
    for _ in range(draw(st.integers(1, 3))):
        found = places(header)
        path = draw(st.sampled_from(found))
        parent = header
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(parent[path[-1]]))
        elif kind == 1:
            parent[draw(st.sampled_from(TEXTS[:5]))] = parent.pop(path[-1])
        elif kind == 2 and isinstance(parent[path[-1]], int):
            parent[path[-1]] += draw(st.sampled_from([-1, 1, 16, 1 << 33]))
        elif kind == 3 and isinstance(parent, list):
            parent.append(parent.pop(path[-1]))
        else:
            parent[path[-1]] = draw(LEAVES)
    return put_together(header, streams)


@st.composite
def consistent_lies(draw, blob: bytes):
    """A recipe of another model with the tensor table and the lengths that belong to it."""
    header, streams = take_apart(blob)
    sections = {"model": header["recipe"]["model"], "quant": header["recipe"]["quant"]}
    for _ in range(draw(st.integers(1, 3))):
        section = sections[draw(st.sampled_from(["model", "model", "quant"]))]
        section[draw(st.sampled_from(sorted(section)))] = draw(LEAVES | st.integers(1, 64))
    try:
        values = {f"{name}.{key}": value for name, keys in header["recipe"].items() for key, value in keys.items()}
        cfg = with_values(Config(), values, "lie")
        assert cfg.model.num_layers < 2 * LARGEST_DEPTH and cfg.model.recur_passes < 2 * LARGEST_DEPTH
        header["tensors"] = tensor_table(cfg)
        header["recipe"] = recipe_of(cfg)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
        pass  # a model that cannot even be described: the table stays that of another
    for row in header["streams"]:
        row[2] = draw(st.sampled_from([row[2], row[2] + 4, 2 * row[2], 1 << 31, 1 << 32, 1 << 41]))
    return put_together(header, streams)


def judge(data, artifacts: list[bytes], outcome) -> None:
    """Draw one hostile artifact and hold the loader to its promise."""
    blob = data.draw(st.sampled_from(artifacts))
    kind = data.draw(st.sampled_from([damaged_bytes, damaged_meaning, damaged_meaning, consistent_lies]))
    hostile = data.draw(kind(blob))
    weights = outcome(hostile)
    if weights is not None:
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        if take_apart(hostile)[1] == take_apart(blob)[1]:
            original = outcome(blob)
            shared = original.keys() & weights.keys()
            assert shared and sum(torch.equal(weights[name], original[name]) for name in shared) > 0


@given(data=st.data())
@settings(max_examples=300, derandomize=True, **LIMITS)
def test_hostile_artifacts_are_refused_or_load(artifacts, outcome, data):
    """No crash, no hang, no other exception, whatever is in the file."""
    judge(data, artifacts, outcome)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=10_000, **LIMITS)
def test_ten_thousand_hostile_artifacts_are_refused_or_load(artifacts, outcome, data):
    """The same, at the length that finds what 300 miss."""
    judge(data, artifacts, outcome)
