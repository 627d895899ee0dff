"""Entropy coding of weight codes: round trips, size against the entropy, damage, stability of the bytes."""

import hashlib
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from formats import codes_encode
from formats.artifact import ArtifactError, compress
from formats.codes import (
    CENTER,
    CLASS_TABLES,
    ESCAPE,
    MAX_LEARN,
    MAX_TAIL,
    NUM_CLASSES,
    PARAMETER_CLASS,
    TABLE_BITS,
    Bell,
    CodeReader,
    LearningTables,
    bell_tables,
    decode_codes,
    decode_halves,
    element_tables,
    largest_halves,
    largest_stream,
    num_lanes,
    side_tables,
)
from formats.codes_encode import CodeWriter, choose_learning, encode_codes, encode_halves, fit_bell

GOLDEN = (
    "c59d140aff7f6ed215c63322ff3fd9c6ff3fcd9ecf6368edbec88ff7e2b93619"
    "f800478ca580b426f924da389be7539bfeae73905aeeddd92c01e5fff1ff81ff60001b00"
)
GOLDEN_SHA256 = "7dfa9e4b3c638cb5a4b8f6c70541cc99d1b372df76eaba5cd572e40437ed6c25"


def integer_bell(rows: int, cols: int, faces: int) -> np.ndarray:
    """Sum four dice of `faces` faces an element, around 0: the same on every platform."""
    seeds = np.arange(rows * cols * 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    seeds ^= seeds >> np.uint64(29)
    seeds *= np.uint64(0xBF58476D1CE4E5B9)
    seeds ^= seeds >> np.uint64(32)
    dice = (seeds % np.uint64(faces)).astype(np.int64).reshape(4, rows, cols)
    return dice.sum(0) - 2 * (faces - 1)


def golden_codes() -> list[np.ndarray]:
    """A bell with an escape, a row of zeros and a row like the one before it; a constant."""
    bell = integer_bell(12, 8, 4)
    bell[3, 4], bell[5], bell[8] = 300, 0, bell[7]
    return [bell, np.full((3, 5), -7)]


def gauss_codes(rows: int, cols: int, row_spread: float, column_spread: float) -> np.ndarray:
    """SDClip codes, clip_sigmas 12.85, of Gauss weights whose rows and columns differ in spread."""
    rng = np.random.default_rng(0)
    spreads = np.exp(rng.normal(0, row_spread, (rows, 1)) + rng.normal(0, column_spread, (1, cols)))
    return np.clip(np.rint(rng.normal(0, 31 / 12.85, (rows, cols)) * spreads), -31, 31).astype(np.int8)


def entropy_bytes(codes: np.ndarray) -> float:
    """Return the bytes that the codes' own histogram allows, its own cost left out."""
    counts = np.unique(codes, return_counts=True)[1]
    return (counts * np.log2(codes.size / counts)).sum() / 8


def assert_round_trip(matrices: list[np.ndarray]) -> bytes:
    shapes = [codes.shape for codes in matrices]
    blob = encode_codes(matrices)
    assert len(blob) <= largest_stream(shapes)
    back = decode_codes(blob, shapes)
    for codes, decoded in zip(matrices, back, strict=True):
        assert decoded.dtype == np.int16 and decoded.shape == codes.shape
        assert np.array_equal(decoded, codes)
    return blob


# Round trips


SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 9))
RANGES = st.sampled_from([(-1, 1), (0, 1), (-31, 31), (-128, 127), (-2000, -1990), (-32768, 32767)])


@given(st.lists(st.tuples(SHAPES, RANGES), max_size=3), st.data())
@settings(max_examples=15, deadline=None)
def test_any_matrices_come_back(kinds, data):
    """Empty ones, single elements, offsets, the whole range of int16, all in one stream."""
    assert_round_trip(
        [data.draw(arrays(np.int16, shape, elements=st.integers(*limits))) for shape, limits in kinds]
    )


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((0, 5), np.int8),
        np.zeros((0, 0), np.int8),
        np.array([[-32768]], np.int16),
        np.array([[-32768, 32767]] * 3, np.int16),
        np.random.default_rng(0).integers(-32768, 32768, (70, 80)),
        np.tile(np.array([-1, 1], np.int8), (40, 20)),
        gauss_codes(300, 130, 0.3, 0.3),
        gauss_codes(300, 130, 0.3, 0.3).T,
        gauss_codes(30, 40, 0.3, 0.3).astype(np.int64) * 500,
    ],
    ids=["no rows", "nothing", "one", "extremes", "int16", "binary", "gauss", "transposed", "wide"],
)
def test_a_matrix_comes_back(codes):
    """The corners of shape and range, and several lanes."""
    assert_round_trip([codes])


def test_no_matrices_are_a_stream_too():
    """A model may keep all its tensors as floats."""
    assert decode_codes(encode_codes([]), []) == []


# Tables and decoder against slow, obvious ones


def slow_table(bell: Bell, spread_class: int) -> list[int]:
    """Follow the definition of a table, with Python's integers and fractions."""
    scale = int(2 ** (spread_class // 4) * Fraction(2) ** (2 + bell.tail)) * 2.0 ** (spread_class % 4 / 4)
    scale, weights = int(scale), {}
    for step in range(bell.low, bell.high + 1):
        weight = (scale << 32) // (scale + 64 * step * step)
        for _ in range(bell.tail):
            weight = min(weight, 2**32 - 1) ** 2 >> 32
        weights[step] = weight
    weights[0] = bell.zero << 29
    table = [0] * 256
    for step, weight in weights.items():
        table[step + CENTER] = weight * (2**TABLE_BITS - 1) // sum(weights.values())
    table[ESCAPE] = 1
    table[table.index(max(table))] += 2**TABLE_BITS - sum(table)
    return table


@pytest.mark.parametrize("tail", range(1, MAX_TAIL + 1))
def test_tables_follow_their_definition(tail):
    """Every frequency is an integer that any machine computes alike, and a table is full."""
    classes = np.arange(NUM_CLASSES)
    for bell in (Bell(tail=tail), Bell(0, 1, -127, 127, tail, zero=255), Bell(0, 1, -1, 1, tail, 0)):
        tables = bell_tables(bell, classes)
        assert (tables.sum(1) == 1 << TABLE_BITS).all()
        assert tables.tolist() == [slow_table(bell, k) for k in classes]


def slow_read(blob: bytes, lanes: int, table: list[int], count: int) -> list[int]:
    """Decode with one Python integer a lane."""
    words = [int.from_bytes(blob[k : k + 2], "little") for k in range(0, len(blob), 2)]
    states = [words[2 * lane] | words[2 * lane + 1] << 16 for lane in range(lanes)]
    words, values = words[2 * lanes :], []
    for position in range(count):
        state = states[position % lanes]
        slot, symbol = state % 2**TABLE_BITS, 0
        while slot >= table[symbol]:
            slot -= table[symbol]
            symbol += 1
        state = table[symbol] * (state >> TABLE_BITS) + slot
        if state < 2**16:
            state = state << 16 | words.pop(0)
        states[position % lanes] = state
        values.append(words.pop() if symbol == ESCAPE else symbol - CENTER)
    assert not words and set(states) == {2**16}
    return values


def test_the_reader_agrees_with_a_slow_one():
    """Lanes are only a faster order of the same integers."""
    table = bell_tables(Bell(), np.array([31]))
    values = integer_bell(1, 1003, 5)[0].astype(np.int16)
    values[[1, 500]] = 77, 1000
    zeros = np.zeros(len(values), np.uint8)
    writer = CodeWriter()
    writer.write(table, zeros, values)
    blob = writer.finish(7)
    assert slow_read(blob, 7, table[0].tolist(), len(values)) == values.tolist()
    reader = CodeReader(blob, 7)
    assert reader.read(table, zeros).tolist() == values.tolist()
    reader.finish()


# Size


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("row_spread", "column_spread", "ratio"),
    [(0.0, 0.0, 1.003), (0.35, 0.25, 0.957), (0.35, 0.0, 0.973), (0.0, 0.35, 0.973)],
    ids=["alike", "both", "rows", "columns"],
)
def test_size_against_the_entropy(row_spread, column_spread, ratio):
    """All side information counted; where rows or columns differ, less than the histogram's entropy."""
    codes = gauss_codes(512, 512, row_spread, column_spread)
    assert len(assert_round_trip([codes])) <= ratio * entropy_bytes(codes)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("values", [(0, -1, 1), (0, 1), (-1, 1)], ids=str)
def test_few_values_cost_their_entropy(values, share):
    """Ternary and binary codes, of many zeros or few: no place in the tables for what cannot occur."""
    rng = np.random.default_rng(1)
    codes = np.where(rng.random((300, 300)) < share, values[0], rng.choice(values[1:], (300, 300)))
    assert len(assert_round_trip([codes])) <= 1.005 * entropy_bytes(codes) + 4 * num_lanes([(300, 300)]) + 8


def test_a_constant_costs_nothing():
    """Dead matrices, whatever their value: states and parameters only."""
    for value in (0, 5, -3000):
        codes = np.full((90, 60), value, np.int16)
        assert len(assert_round_trip([codes])) < 4 * num_lanes([codes.shape]) + 60


def test_rare_outliers_cost_little():
    """A code beyond the tables is an escape, not a reason for a wider table."""
    codes = gauss_codes(200, 200, 0.0, 0.0).astype(np.int16)
    plain = len(encode_codes([codes]))
    codes[::50, ::50] = 3000
    assert len(assert_round_trip([codes])) < plain + 16 * 5


@pytest.mark.numeric
def test_tables_learn_what_no_bell_has(monkeypatch):
    """Weights that lie on another grid leave combs: only even codes beyond two, in rows of one spread."""
    codes = gauss_codes(300, 300, 0.3, 0.0)
    codes[np.abs(codes) > 2] &= ~1
    assert len(assert_round_trip([codes])) < 0.99 * entropy_bytes(codes)
    monkeypatch.setattr(codes_encode, "LEARNS", (0,))
    assert len(assert_round_trip([codes])) > 1.09 * entropy_bytes(codes)


@pytest.mark.numeric
def test_bells_that_fit_do_not_learn():
    """Counting costs time and, where nothing is to be learned, bytes."""
    rng = np.random.default_rng(2)
    values = np.rint(rng.normal(0, 2.4, (100, 100))).astype(np.int16)
    bell, rows, cols = fit_bell(values, Bell())
    assert choose_learning(*element_tables(bell, rows, cols), values.ravel()) == 0


@pytest.mark.parametrize("learn", [0, 1, MAX_LEARN])
@pytest.mark.parametrize("size", [0, 1, 1023, 1025, 2048, 70_000, 200_000])
def test_parts_of_learning_cover_all_codes_once(learn, size):
    """Reader and writer draw tables anew at the same places, and soon enough."""
    parts = LearningTables(bell_tables(Bell(), np.array([30])), learn).parts(size)
    assert [i for part in parts for i in (part.start, part.stop)][1:-1:2] == [
        part.start for part in parts[1:]
    ]
    assert (parts[0].start, parts[-1].stop) == (0, size)
    assert len(parts) == 1 if not learn else all(part.stop - part.start <= 1 << 15 for part in parts)


@pytest.mark.parametrize("learn", [1, 6, MAX_LEARN])
def test_learned_tables_keep_their_sum_and_the_escape(learn):
    """Whatever was counted: frequencies that add up, and a way out for what has none."""
    tables = LearningTables(bell_tables(Bell(), np.arange(NUM_CLASSES)), learn)
    assert np.array_equal(tables.draw().sum(1), np.full(NUM_CLASSES, 1 << TABLE_BITS))
    tables.counts[:, 3] = 10**6
    drawn = tables.draw()
    assert np.array_equal(drawn.sum(1), np.full(NUM_CLASSES, 1 << TABLE_BITS))
    assert (drawn[:, 3] > 8000).all() and (drawn[:, ESCAPE] == 1).all()


def test_rows_like_an_earlier_one_cost_their_difference():
    """Tokens that never occur have embeddings that are nearly one; classes cannot see it."""
    codes = gauss_codes(256, 128, 0.0, 0.0)
    alone = len(encode_codes([codes]))
    codes[128:] = codes[127]
    codes[130::7, ::50] += 1
    assert len(assert_round_trip([codes])) < 0.54 * alone


# Damage


def test_every_truncation_is_refused():
    """Half a stream is no matrix."""
    codes = golden_codes()
    blob = encode_codes(codes)
    for keep in range(len(blob)):
        with pytest.raises(ArtifactError):
            decode_codes(blob[:keep], [matrix.shape for matrix in codes])


@pytest.mark.parametrize("shapes", [[], [(12, 8)], [(12, 9), (3, 5)], [(3, 5), (12, 8)], [(900, 900)]])
def test_other_shapes_are_refused(shapes):
    """The shapes come from the recipe, the stream from the file: they may contradict each other."""
    with pytest.raises(ArtifactError):
        decode_codes(encode_codes(golden_codes()), shapes)


@given(st.binary(max_size=400), SHAPES)
@settings(max_examples=60, deadline=None)
def test_noise_is_refused_or_gives_the_shapes(blob, shape):
    """No other exception, no hang, nothing larger than the shapes."""
    try:
        (codes,) = decode_codes(blob, [shape])
    except ArtifactError:
        return
    assert codes.shape == shape


def flipped(blob: bytes, bit: int) -> bytes:
    damaged = bytearray(blob)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_flipped_bits_are_refused_where_states_can_tell():
    """The states end where they began, or the stream is damaged; an escape's own bits have no check."""
    codes = golden_codes()
    blob = encode_codes(codes)
    shapes = [matrix.shape for matrix in codes]
    missed = []
    for bit in range(0, 8 * len(blob), 3):
        try:
            decode_codes(flipped(blob, bit), shapes)
        except ArtifactError:
            continue
        missed.append(bit // 16 - len(blob) // 2)
    escapes = 6  # words at the end: one code, five parameters
    assert all(word >= -escapes for word in missed)


@pytest.mark.slow
def test_ten_thousand_mutations_are_refused_or_bounded():
    """Bytes changed, cut out, doubled and swapped: one exception or matrices of the asked shapes."""
    dice = random.Random(0)
    codes = golden_codes()
    shapes = [matrix.shape for matrix in codes]
    blob = encode_codes(codes)
    refused = 0
    for _ in range(10_000):
        first, last = sorted(dice.sample(range(len(blob) + 1), 2))
        piece = blob[first:last]
        piece = dice.choice([b"", piece * 2, piece[::-1], dice.randbytes(len(piece)), bytes(len(piece))])
        try:
            decoded = decode_codes(blob[:first] + piece + blob[last:], shapes)
        except ArtifactError:
            refused += 1
        else:
            assert [matrix.shape for matrix in decoded] == shapes
    assert refused > 9_700


@pytest.mark.parametrize(
    "bell",
    [
        Bell(base=NUM_CLASSES),
        Bell(base=-1),
        Bell(tail=MAX_TAIL + 1),
        Bell(tail=-1),
        Bell(zero=-1),
        Bell(zero=256),
        Bell(low=1),
        Bell(high=-1),
        Bell(column_class=NUM_CLASSES),
        Bell(row_class=-1),
        Bell(lag_class=NUM_CLASSES),
        Bell(learn=MAX_LEARN + 1),
        Bell(learn=-1),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused(bell):
    """A stream can be whole and its tables nonsense."""
    writer = CodeWriter()
    changes = np.array(bell, np.int16) - np.array(Bell(), np.int16)
    writer.write(
        bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS])), np.zeros(len(changes), np.uint8), changes
    )
    with pytest.raises(ArtifactError, match="describes no table"):
        decode_codes(writer.finish(1), [(0, 0)])


@pytest.mark.parametrize("lags", [(0, 2), (1, 0), (0, -1)], ids=str)
def test_a_row_cannot_build_on_what_does_not_come_before_it(lags):
    """A lag comes from the file: it must point into the matrix, upwards."""
    writer = CodeWriter()
    bell = Bell(lag_class=20)
    table = bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS]))
    changes = np.array(bell, np.int16) - np.array(Bell(), np.int16)
    writer.write(table, np.zeros(len(changes), np.uint8), changes)
    writer.write(*side_tables(bell, 2, 1), np.array([0, 0, 0, *lags], np.int16))
    writer.write(bell_tables(bell, np.array([bell.base])), np.zeros(2, np.uint8), np.zeros(2, np.int16))
    with pytest.raises(ArtifactError, match="does not come before"):
        decode_codes(writer.finish(1), [(2, 1)])


# Stability


@pytest.mark.numeric
def test_the_bytes_are_the_same_everywhere():
    """An artifact written by one machine is read by another; a changed format must change its version."""
    codes = golden_codes()
    assert encode_codes(codes).hex() == GOLDEN
    for matrix, decoded in zip(codes, decode_codes(bytes.fromhex(GOLDEN), [(12, 8), (3, 5)]), strict=True):
        assert np.array_equal(matrix, decoded)
    spreads = np.concatenate([integer_bell(40, 600, faces) for faces in (3, 9, 30)])
    assert hashlib.sha256(encode_codes([spreads])).hexdigest() == GOLDEN_SHA256


# Halves


@given(st.lists(arrays(np.uint16, st.integers(0, 20), elements=st.integers(0, 65535)), max_size=3))
@settings(max_examples=20, deadline=None)
def test_halves_come_back_bit_for_bit(patterns):
    """Any bits: signs, infinities, NaN with a payload, no vectors at all."""
    vectors = [pattern.view(np.float16) for pattern in patterns]
    for doubled in (vectors, [np.repeat(vector, 9) for vector in vectors]):
        blob = encode_halves(doubled)
        back = decode_halves(blob, [len(vector) for vector in doubled])
        assert [vector.tobytes() for vector in back] == [vector.tobytes() for vector in doubled]
        assert len(blob) <= largest_halves([len(vector) for vector in doubled])


def test_scales_on_a_grid_cost_their_ranks():
    """65,536 rows with 16 different scales: four bits each at most, and a short list."""
    scales = np.exp2(np.arange(65536) * 40503 % 65536 // 4096 / 8).astype(np.float16)
    assert len(encode_halves([scales])) < 1.01 * 65536 * 4 / 8


@pytest.mark.parametrize("known", [2, 5, 65535])
def test_a_list_of_scales_that_does_not_fit_is_refused(known):
    """Ranks beyond the list, and lists longer than the scales, come from a damaged file."""
    blob = encode_halves([np.repeat(np.arange(4, dtype=np.float16), 9)])
    assert blob[:2] == b"\4\0"
    with pytest.raises(ArtifactError):
        decode_halves(known.to_bytes(2, "little") + blob[2:], [36])


def test_scales_cost_less_than_with_general_compressors():
    """Row scales of a matrix lie within a few eighths of an octave."""
    rng = np.random.default_rng(0)
    scales = [(0.02 * k * np.exp(rng.normal(0, 0.1, 512))).astype(np.float16) for k in (1, 2, 3, 5)]
    raw = b"".join(vector.tobytes() for vector in scales)
    assert len(encode_halves(scales)) < 0.97 * len(compress(raw, "best"))
