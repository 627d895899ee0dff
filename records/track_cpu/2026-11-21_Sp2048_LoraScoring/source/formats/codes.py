"""Entropy coding of integer weight codes: interleaved rANS over tables that follow from a few integers.

A code of row i and column j is coded with the table of spread class base + row class i + column class j; a
class is an eighth of an octave. The encoder chooses the classes by total bytes, and they are coded too. No
table is stored: it is a symmetric bell around a center, with a tail and a zero of the matrix's own, computed
in integers only; where it pays, tables count the codes that they coded and are drawn anew in between. A row
with a lag is the difference from the row so far above it: embeddings of tokens that never occur are alike.
All matrices share one stream and its lanes; each may be of another kind.

Layout, little-endian 16-bit words: the lanes' states, two words each; the words that refill them; from the
end backwards, the codes without a symbol. In coding order: a row of parameters for each matrix, as
differences from the one before; then for each matrix its column classes, row classes, lags and codes. The
reader knows the shapes, so nothing in the file is a length. rANS: arXiv 1311.2540; lanes: arXiv 1402.3392.
"""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np

from formats.artifact import ArtifactError

TABLE_BITS = 14  # the frequencies of a table add up to 2^14: more would waste states of 32 bits
STATE_FLOOR = 1 << 16  # states live in [2^16, 2^32)
CODES_A_LANE = 16384  # a lane costs two bytes and shortens the loop
CENTER, ESCAPE, NUM_SYMBOLS = 127, 255, 256  # symbols stand for -127 .. 127 from the center, and the escape
NUM_CLASSES = 88  # class k has spread 2^((k - 20) / 8): 0.18 to 330 codes
MAX_TAIL, MAX_LEARN = 7, 16
FIRST_PART, MOST_PART = 1024, 1 << 15  # codes between two drawings of tables that learn
CLASS_BELL = 2  # tail of the tables of classes and parameters
PARAMETER_CLASS = 28
LOW_BITS = 6  # of a float16: the last bits of the fraction, as good as noise


class Bell(NamedTuple):
    """What the tables of one matrix have in common, and its classes' own spread."""

    center: int = 0
    step: int = 1  # codes are center + step * symbol, modulo 2^16
    low: int = -31  # symbols low .. high have a place in the tables
    high: int = 31
    tail: int = 5  # weight of k: (1 + k^2 / (2 spread^2 2^tail))^-(2^tail); MAX_TAIL is nearly Gauss's
    zero: int = 8  # weight of the center in eighths
    base: int = 30
    column_class: int = 0  # class whose table codes the column classes
    row_class: int = 0  # of the row classes
    lag_class: int = 0  # of the lags
    learn: int = 0  # tables learn from what they coded: the bell weighs 2^learn codes; 0: they stay


CLASS_TABLES = Bell(low=-127, high=127, tail=CLASS_BELL)


def bell_tables(bell: Bell, classes: np.ndarray) -> np.ndarray:
    """Return the frequencies (classes, NUM_SYMBOLS) uint32 of a bell at some spread classes."""
    steps = np.arange(-CENTER, CENTER + 2)
    # 64 * 2 spread^2 2^tail = 2^(class / 4 + 2 + tail): two integer square roots of a power of two.
    scale = np.array([isqrt(isqrt(1 << (int(k) + 8 + 4 * bell.tail))) for k in classes], np.uint64)[:, None]
    weights = (scale << np.uint64(32)) // (scale + (64 * steps * steps).astype(np.uint64))
    for _ in range(bell.tail):
        weights = np.minimum(weights, np.uint64(0xFFFFFFFF)) ** 2 >> np.uint64(32)
    weights[:, CENTER] = bell.zero << 29
    weights[:, (steps < bell.low) | (steps > bell.high)] = 0
    return as_frequencies(weights)


def as_frequencies(weights: np.ndarray) -> np.ndarray:
    """Return frequencies (classes, NUM_SYMBOLS) uint32 in proportion to uint64 weights; 1 is the escape's."""
    weights[:, ESCAPE] = 0
    room = np.uint64((1 << TABLE_BITS) - 1)
    tables = (weights * room // np.maximum(weights.sum(1, keepdims=True), 1)).astype(np.uint32)
    tables[:, ESCAPE] = 1
    rest = np.uint32(1 << TABLE_BITS) - tables.sum(1, dtype=np.uint32)
    tables[np.arange(len(tables)), tables.argmax(1)] += rest
    return tables


def symbols_of(values: np.ndarray) -> np.ndarray:
    """Map int16 values to symbols; what lies beyond them all is an escape."""
    return np.where(np.abs(values.astype(np.int32)) <= CENTER, values + CENTER, ESCAPE).astype(np.uint8)


class LearningTables:
    """The tables of a matrix: bells that count the codes which they have coded."""

    def __init__(self, bells: np.ndarray, learn: int):
        self.bells, self.learn = bells, learn
        self.counts = np.zeros(bells.shape, np.uint64)

    def parts(self, size: int) -> list[slice]:
        """Cut so many codes where the tables are drawn anew: at powers of two, then at equal distances."""
        if not self.learn:
            return [slice(0, size)]
        powers = (FIRST_PART << k for k in range((MOST_PART // FIRST_PART).bit_length() - 1))
        ends = [end for end in (*powers, *range(MOST_PART, size, MOST_PART)) if end < size]
        return [slice(first, last) for first, last in zip([0, *ends], [*ends, size])]

    def draw(self) -> np.ndarray:
        """Return the frequencies (classes, NUM_SYMBOLS) for the next part."""
        if not self.learn:
            return self.bells
        bells = self.bells.astype(np.uint64) << np.uint64(self.learn)
        return as_frequencies(bells + (self.counts << np.uint64(TABLE_BITS)))

    def count(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Count values int16 and the tables that coded them, (classes, NUM_SYMBOLS) uint64."""
        entries = rows.astype(np.intp) * NUM_SYMBOLS + symbols_of(values)
        counts = np.bincount(entries, minlength=self.counts.size)
        return counts.reshape(self.counts.shape).astype(np.uint64)


def num_lanes(shapes: Sequence[tuple[int, int]]) -> int:
    """Return how many states take turns over all codes of these matrices."""
    return 1 + sum(rows * cols for rows, cols in shapes) // CODES_A_LANE


def largest_stream(shapes: Sequence[tuple[int, int]]) -> int:
    """Return the bytes that no stream of these matrices exceeds: to check before it is decompressed."""
    symbols = sum(rows * cols + cols + 2 * rows + len(Bell._fields) for rows, cols in shapes)
    return 4 * (symbols + num_lanes(shapes))  # an escape costs at most 14 bits and a word


class CodeReader:
    """Decode symbols from a stream, step by step over all lanes."""

    def __init__(self, blob: bytes, lanes: int):
        if len(blob) % 2 or len(blob) < 4 * lanes:
            raise ArtifactError(f"artifact: expected codes in {lanes} lanes, found {len(blob)} bytes.")
        self.words = np.frombuffer(blob, "<u2")
        self.states = np.frombuffer(blob, "<u4", lanes).astype(np.uint32)
        self.first, self.last = 2 * lanes, len(self.words)

    def take(self, count: int) -> slice:
        """Claim words from the front, or from the back where `count` is negative."""
        self.first, self.last = self.first + max(count, 0), self.last + min(count, 0)
        if self.first > self.last:
            raise ArtifactError("artifact: the codes end too early.")
        return slice(self.first - count, self.first) if count >= 0 else slice(self.last, self.last - count)

    def read(self, tables: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the values int16, as many as there are `rows`: which table codes each."""
        starts = (np.cumsum(tables, 1, dtype=np.uint32) - tables).ravel()
        symbol_of = np.repeat(np.tile(np.arange(NUM_SYMBOLS, dtype=np.uint8), len(tables)), tables.ravel())
        frequency_of, lanes = tables.ravel(), len(self.states)
        symbols = np.empty(len(rows), np.uint8)
        for begin in range(0, len(rows), lanes):
            row = rows[begin : begin + lanes].astype(np.intp)
            states = self.states[: len(row)]
            slots = states & ((1 << TABLE_BITS) - 1)
            symbol = symbol_of[(row << TABLE_BITS) + slots]
            symbols[begin : begin + lanes] = symbol
            entry = row * NUM_SYMBOLS + symbol
            states = frequency_of[entry] * (states >> TABLE_BITS) + slots - starts[entry]
            hungry = np.flatnonzero(states < STATE_FLOOR)
            states[hungry] = states[hungry] << 16 | self.words[self.take(len(hungry))]
            self.states[: len(row)] = states
        values = symbols.astype(np.int16) - CENTER
        escaped = np.flatnonzero(symbols == ESCAPE)
        if len(escaped):
            values[escaped] = self.words[self.take(-len(escaped))][::-1].astype(np.int16)
        return values

    def read_learning(self, rows: np.ndarray, bells: np.ndarray, learn: int) -> np.ndarray:
        """Return the values int16, as many as there are `rows`, of bells that learn."""
        tables, values = LearningTables(bells, learn), np.empty(len(rows), np.int16)
        for part in tables.parts(len(rows)):
            values[part] = self.read(tables.draw(), rows[part])
            tables.counts += tables.count(rows[part], values[part])
        return values

    def finish(self) -> None:
        """Check that the stream ends where the codes do: the states are as the encoder found them."""
        if self.first != self.last or (self.states != STATE_FLOOR).any():
            raise ArtifactError("artifact: the codes do not end where their stream does; it is damaged.")


def decode_codes(blob: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return the int16 matrices that encode_codes was given; the caller vouches for the shapes.

    Raises ArtifactError where the stream does not fit them. The stream has no checksum of its own: damage
    that the final states miss gives other codes of the same shapes.
    """
    reader = CodeReader(blob, num_lanes(shapes))
    count = len(shapes) * len(Bell._fields)
    table = bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS]))
    changes = reader.read(table, np.zeros(count, np.uint8)).reshape(-1, len(Bell._fields))
    matrices = []
    for (rows, cols), fields in zip(shapes, np.cumsum([Bell(), *changes], 0, np.int16)[1:], strict=True):
        bell = check_bell(Bell(*fields.tolist()))
        sides = reader.read(*side_tables(bell, rows, cols))
        column_classes, row_classes, lags = np.split(sides, [cols, cols + rows])
        values = reader.read_learning(*element_tables(bell, row_classes, column_classes), bell.learn)
        values = add_lagged(values.reshape(rows, cols), lags)
        matrices.append(values * np.int16(bell.step) + np.int16(bell.center))
    reader.finish()
    return matrices


def check_bell(bell: Bell) -> Bell:
    """Raise ArtifactError unless the parameters are within what the tables allow."""
    classes = (bell.base, bell.column_class, bell.row_class, bell.lag_class)
    spread = (
        bell.low <= 0 <= bell.high
        and 0 <= bell.tail <= MAX_TAIL
        and 0 <= bell.zero <= 255
        and 0 <= bell.learn <= MAX_LEARN
    )
    if not spread or not all(0 <= k < NUM_CLASSES for k in classes):
        raise ArtifactError(f"artifact: {bell} describes no table of codes.")
    return bell


def add_lagged(values: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """Add to each row, in place and from the top, the row that is its lag above; lag 0 is none."""
    if ((lags < 0) | (lags > np.arange(len(lags)))).any():
        raise ArtifactError("artifact: a row of codes builds on a row that does not come before it.")
    for row in np.flatnonzero(lags):
        values[row] += values[row - lags[row]]
    return values


def side_tables(bell: Bell, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of column classes, row classes and lags, and which one codes each of them."""
    tables = bell_tables(CLASS_TABLES, np.array([bell.column_class, bell.row_class, bell.lag_class]))
    return tables, np.repeat(np.arange(3, dtype=np.uint8), [cols, rows, rows])


def element_tables(bell: Bell, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which table codes each element, flat uint8, and the tables of all classes in use."""
    classes = np.clip(bell.base + rows[:, None].astype(np.int32) + cols, 0, NUM_CLASSES - 1).astype(np.uint8)
    used = np.flatnonzero(np.bincount(classes.ravel(), minlength=NUM_CLASSES))
    index = np.zeros(NUM_CLASSES, np.uint8)
    index[used] = np.arange(len(used))
    return index[classes.ravel()], bell_tables(bell, used)


def largest_halves(sizes: Sequence[int]) -> int:
    """Return the bytes that no stream of these vectors exceeds."""
    return 2 + largest_stream([(1, size) for size in (*sizes, sum(sizes))])


def decode_halves(blob: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the float16 vectors that encode_halves was given, as many elements as `sizes` says.

    The first two bytes say how many different values there are: then follow, as codes, the rank of each
    element and the differences of the sorted values; or 0: then the high bits by vector and all low bits.
    Raises ArtifactError like decode_codes.
    """
    known = int.from_bytes(blob[:2], "little")
    if known > sum(sizes):
        raise ArtifactError(f"artifact: expected at most {sum(sizes)} different scales, found {known}.")
    *vectors, rest = decode_codes(blob[2:], [(1, size) for size in (*sizes, known or sum(sizes))])
    whole = np.concatenate([np.empty((1, 0), np.int16), *vectors], 1)[0]
    if known and whole.size and not 0 <= whole.min() <= whole.max() < known:
        raise ArtifactError(f"artifact: a scale's rank lies outside its list of {known}.")
    halves = np.cumsum(rest[0], dtype=np.int16)[whole] if known else whole << LOW_BITS | rest[0]
    return np.split(halves.view(np.float16), np.cumsum(sizes)[:-1]) if sizes else []
