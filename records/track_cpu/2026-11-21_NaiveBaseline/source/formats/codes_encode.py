"""The encoder of formats/codes.py: chooses classes and bells by total bits, then writes the stream."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from formats.codes import (
    CENTER,
    CLASS_TABLES,
    ESCAPE,
    LOW_BITS,
    MAX_LEARN,
    MAX_TAIL,
    NUM_CLASSES,
    NUM_SYMBOLS,
    PARAMETER_CLASS,
    STATE_FLOOR,
    TABLE_BITS,
    Bell,
    LearningTables,
    bell_tables,
    element_tables,
    num_lanes,
    side_tables,
    symbols_of,
)

ALL_CLASSES = np.arange(NUM_CLASSES)
TAILS = range(1, MAX_TAIL + 1)
ZEROS = (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 48, 128)
FIT_ROUNDS = 2
LEARNS = (0, 4, 6, 8, 10, 12)
MAX_LAG = 8
ALIKE = 0.7  # of its size; rows that share no part differ by 1.0 (binary) to 1.4 (bell) of it
OFFSETS = np.arange(-40, 41)
FIRST_SIDE = 12
BIT = 256  # costs are whole numbers of 1/256 bit: sums are exact on every platform
ESCAPE_BITS = 16


def table_costs(tables: np.ndarray) -> np.ndarray:
    """Return what each symbol costs, (tables, NUM_SYMBOLS) float64 holding whole 1/BIT bits."""
    bits = TABLE_BITS - np.log2(np.maximum(tables, 1))
    bits = np.where(tables > 0, bits, bits[:, ESCAPE:] + ESCAPE_BITS)
    bits[:, ESCAPE] += ESCAPE_BITS
    return np.rint(BIT * bits)


class CodeWriter:
    """Collect symbols in reading order; rANS writes them last to first."""

    def __init__(self):
        self.chunks: list[tuple[np.ndarray, np.ndarray]] = []  # frequency and start of each symbol, uint16
        self.escapes: list[np.ndarray] = []

    def write(self, tables: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
        """Add int16 values, `rows` naming the table of each."""
        entry = rows.astype(np.intp) * NUM_SYMBOLS
        plain = symbols_of(values)
        symbols = np.where(tables.ravel()[entry + plain] > 0, plain, ESCAPE)
        self.escapes.append(values[symbols == ESCAPE])
        starts = np.cumsum(tables, 1, dtype=np.uint32) - tables
        self.chunks.append(
            tuple(part.ravel().astype(np.uint16)[entry + symbols] for part in (tables, starts))
        )

    def write_learning(self, rows: np.ndarray, bells: np.ndarray, values: np.ndarray, learn: int) -> None:
        """Add values of bells that learn; CodeReader.read_learning reads them."""
        tables = LearningTables(bells, learn)
        for part in tables.parts(len(rows)):
            self.write(tables.draw(), rows[part], values[part])
            tables.counts += tables.count(rows[part], values[part])

    def finish(self, lanes: int) -> bytes:
        """Return the stream."""
        states = np.full(lanes, STATE_FLOOR, np.uint64)
        words = []
        for frequencies, starts in reversed(self.chunks):
            for begin in range((len(starts) - 1) // lanes * lanes, -1, -lanes):
                frequency = frequencies[begin : begin + lanes].astype(np.uint64)
                state = states[: len(frequency)]
                full = np.flatnonzero(state >= frequency << np.uint64(32 - TABLE_BITS))
                words.append(state[full].astype("<u2"))
                state[full] >>= np.uint64(16)
                quotient, rest = np.divmod(state, frequency)
                state[:] = (quotient << np.uint64(TABLE_BITS)) + rest + starts[begin : begin + lanes]
        escapes = np.concatenate([np.empty(0, np.int16), *self.escapes])[::-1].astype("<i2")
        return b"".join([states.astype("<u4").tobytes(), *map(bytes, reversed(words)), escapes.tobytes()])


@cache
def class_costs() -> np.ndarray:
    """Return what each symbol costs in the tables that code classes, (NUM_CLASSES, NUM_SYMBOLS)."""
    return table_costs(bell_tables(CLASS_TABLES, ALL_CLASSES))


def side_class(offsets: np.ndarray) -> int:
    """Return the class whose table codes these class offsets in the fewest bits."""
    return int((class_costs() @ np.bincount(symbols_of(offsets), minlength=NUM_SYMBOLS)).argmin())


def choose_offsets(symbols: np.ndarray, crossing: np.ndarray, costs: np.ndarray, side: int) -> np.ndarray:
    """Return the class offset of each row of `symbols` that costs least, its own name included.

    crossing: the class of each column; costs: (NUM_CLASSES, NUM_SYMBOLS); side: the class of offsets.
    """
    classes, index = np.unique(crossing, return_inverse=True)
    total = np.repeat(class_costs()[[side]][:, symbols_of(OFFSETS)], len(symbols), 0)
    low, high = int(symbols.min()), int(symbols.max()) + 1
    lines = np.arange(len(symbols))[:, None] * (high - low)
    for position, crossed in enumerate(classes):
        found = symbols[:, index == position]
        counts = np.bincount((lines + (found - low)).ravel(), minlength=len(symbols) * (high - low))
        here = costs[np.clip(crossed + OFFSETS, 0, NUM_CLASSES - 1), low:high]
        total += counts.reshape(len(symbols), -1).astype(np.float64) @ here.T
    return OFFSETS[total.argmin(1)]


def choose_shape(symbols: np.ndarray, classes: np.ndarray, bell: Bell) -> Bell:
    """Return the bell with the tail, then the zero, that costs these symbols least."""
    index = classes.astype(np.intp) * NUM_SYMBOLS + symbols
    counts = np.bincount(index.ravel(), minlength=NUM_CLASSES * NUM_SYMBOLS).reshape(NUM_CLASSES, -1)
    used = np.flatnonzero(counts.any(1))

    def cost(trial: Bell) -> float:
        return (table_costs(bell_tables(trial, used)) * counts[used]).sum()

    bell = min((bell._replace(tail=tail) for tail in TAILS), key=cost)
    return min((bell._replace(zero=zero) for zero in ZEROS), key=cost)


def fit_bell(values: np.ndarray, bell: Bell) -> tuple[Bell, np.ndarray, np.ndarray]:
    """Return the bell completed, row offsets and column offsets for a matrix of int16 values around 0."""
    rows, cols = np.zeros(len(values), np.int16), np.zeros(values.shape[1], np.int16)
    if not values.size:
        return bell, rows, cols
    within = np.clip(values, -CENTER, CENTER)
    bell = bell._replace(low=min(int(within.min()), 0), high=max(int(within.max()), 0))
    symbols = symbols_of(values)
    costs = table_costs(bell_tables(bell, ALL_CLASSES))
    counts = np.bincount(symbols.ravel(), minlength=NUM_SYMBOLS)
    bell = bell._replace(base=int((costs @ counts).argmin()), column_class=FIRST_SIDE, row_class=FIRST_SIDE)
    for _ in range(FIT_ROUNDS):
        cols = choose_offsets(symbols.T, bell.base + rows, costs, bell.column_class)
        rows = choose_offsets(symbols, bell.base + cols, costs, bell.row_class)
        middles = int(np.median(cols)), int(np.median(rows))
        rows, cols = (rows - middles[1]).astype(np.int16), (cols - middles[0]).astype(np.int16)
        bell = bell._replace(base=int(np.clip(bell.base + sum(middles), 0, NUM_CLASSES - 1)))
        bell = bell._replace(column_class=side_class(cols), row_class=side_class(rows))
        classes = np.clip(bell.base + rows[:, None].astype(int) + cols, 0, NUM_CLASSES - 1)
        bell = choose_shape(symbols, classes, bell)
        costs = table_costs(bell_tables(bell, ALL_CLASSES))
    return bell, rows, cols


def choose_learning(rows: np.ndarray, bells: np.ndarray, values: np.ndarray) -> int:
    """Return how much the bells should weigh against what they coded, by the bits of these values."""
    tables = LearningTables(bells, MAX_LEARN)
    found = [tables.count(rows[part], values[part]) for part in tables.parts(len(rows))]
    bits = []
    for learn in LEARNS:
        tables = LearningTables(bells, learn)
        bits.append(0.0)
        for counts in found:
            bits[-1] += (table_costs(tables.draw()) * counts).sum()
            tables.counts += counts
    return LEARNS[int(np.argmin(bits))]


def choose_lags(values: np.ndarray) -> np.ndarray:
    """Return for each row how far above it the row is from which it differs least; 0 if none is like it."""
    size = np.abs(values.astype(np.int32)).sum(1)
    least, lags = ALIKE * size, np.zeros(len(values), np.int16)
    for lag in range(1, min(MAX_LAG, len(values) - 1) + 1):
        away = np.abs(values[lag:].astype(np.int32) - values[:-lag]).sum(1)
        nearer = np.flatnonzero(away < least[lag:]) + lag
        least[nearer], lags[nearer] = away[nearer - lag], lag
    return lags


def encode_codes(matrices: Sequence[np.ndarray]) -> bytes:
    """Code matrices of integers that fit int16 into one stream; decode_codes needs their shapes."""
    fitted = []
    for codes in matrices:
        center = int(np.median(codes)) if codes.size else 0
        values = codes.astype(np.int64) - center
        step = max(1, int(np.gcd.reduce(values, axis=None)))
        values = (values // step).astype(np.int16)  # modulo 2^16, like the reader
        lags = choose_lags(values)
        values[lags > 0] -= values[np.flatnonzero(lags) - lags[lags > 0]]
        bell, rows, cols = fit_bell(values, Bell(center, step, lag_class=side_class(lags)))
        learn = choose_learning(*element_tables(bell, rows, cols), values.ravel())
        fitted.append((values, lags, bell._replace(learn=learn), rows, cols))
    fields = np.array([Bell(), *(bell for _, _, bell, _, _ in fitted)], np.int64)
    writer = CodeWriter()
    changes = np.diff(fields, axis=0).astype(np.int16).ravel()
    table = bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS]))
    writer.write(table, np.zeros(len(changes), np.uint8), changes)
    for values, lags, bell, rows, cols in fitted:
        writer.write(*side_tables(bell, *values.shape), np.concatenate([cols, rows, lags]))
        writer.write_learning(*element_tables(bell, rows, cols), values.ravel(), bell.learn)
    return writer.finish(num_lanes([codes.shape for codes in matrices]))


def encode_halves(vectors: Sequence[np.ndarray]) -> bytes:
    """Code float16 vectors, such as scales, as decode_halves says, in the way of the fewest bytes."""
    bits = [vector.view(np.int16)[None] for vector in vectors]
    whole = np.concatenate([np.empty((1, 0), np.int16), *bits], 1)
    lows = whole & ((1 << LOW_BITS) - 1)
    blob = b"\0\0" + encode_codes([*(part >> LOW_BITS for part in bits), lows])
    known = np.unique(whole)
    if 0 < 2 * len(known) < whole.size:
        ranks = [np.searchsorted(known, part).astype(np.int16) for part in bits]
        steps = np.diff(known, prepend=np.int16(0))[None]
        listed = len(known).to_bytes(2, "little") + encode_codes([*ranks, steps])
        blob = min(blob, listed, key=len)
    return blob
