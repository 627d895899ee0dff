"""How the bytes of an artifact divide over its tensors."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from formats.artifact import Stream, decompress, read_artifact
from formats.codes import (
    CLASS_TABLES,
    PARAMETER_CLASS,
    Bell,
    CodeReader,
    bell_tables,
    check_bell,
    element_tables,
    num_lanes,
    side_tables,
)
from formats.recipe import flatten_recipe
from quantizers.config import QuantConfig
from quantizers.rate import entropy_bits
from quantizers.storage import STORAGE_PARTS, STREAM_DTYPES, frame_codec


class TensorSize(NamedTuple):
    """What a tensor takes of an artifact."""

    name: str
    shape: list[int]
    num_bytes: float  # of all its parts
    code_bytes: float  # of its codes alone; 0 where it is stored as numbers

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.num_bytes / max(math.prod(self.shape), 1)


def tensor_sizes(path: Path) -> list[TensorSize]:
    """Divide an artifact's streams among its tensors; raises a UserError for a file that is none.

    What one stream holds of several is divided by counted words where it is entropy coded here, by the
    entropy of the codes where a general compressor stored them, and otherwise by the number of elements.
    """
    header, streams = read_artifact(path)
    recipe = flatten_recipe(header["recipe"], str(path))
    codec = recipe.get("quant.codec", QuantConfig.codec)
    sizes = {str(row[0]): dict.fromkeys(STREAM_DTYPES, 0.0) for row in header["tensors"]}
    shapes = {str(row[0]): list(row[1]) for row in header["tensors"]}
    for name in STREAM_DTYPES:
        parts = [
            (row[0], shape)
            for row in header["tensors"]
            for stream, shape in STORAGE_PARTS[row[2]](row[1])
            if stream == name
        ]
        if parts and name in streams:
            for (tensor, _), share in zip(parts, shares(name, streams[name], [p[1] for p in parts], codec)):
                sizes[tensor][name] += share * len(streams[name].stored)
    return [TensorSize(name, shapes[name], sum(row.values()), row["codes"]) for name, row in sizes.items()]


def shares(name: str, stream: Stream, shapes: list, codec: str) -> np.ndarray:
    """Return which share of a stream each of its pieces takes; they add up to 1."""
    counts = np.array([math.prod(shape) for shape in shapes], float)
    if name == "codes" and codec == "rans":
        counts = count_words(decompress(stream, frame_codec(codec)), shapes)
    elif name == "codes":
        codes = np.frombuffer(decompress(stream, frame_codec(codec)), STREAM_DTYPES[name])
        pieces = np.split(codes, np.cumsum(counts)[:-1].astype(int))
        counts = np.array([entropy_bits(torch.tensor(piece)) for piece in pieces])
    return counts / max(counts.sum(), 1e-9)


def count_words(blob: bytes, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Read codes as formats.codes.decode_codes does and count the words that each matrix consumes."""
    reader = CodeReader(blob, num_lanes(shapes))
    table = bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS]))
    changes = reader.read(table, np.zeros(len(shapes) * len(Bell._fields), np.uint8))
    bells = np.cumsum([Bell(), *changes.reshape(-1, len(Bell._fields))], 0, np.int16)[1:]
    counts = []
    for (rows, cols), fields in zip(shapes, bells, strict=True):
        before, bell = reader.first - reader.last, check_bell(Bell(*fields.tolist()))
        column_classes, row_classes, _ = np.split(
            reader.read(*side_tables(bell, rows, cols)), [cols, cols + rows]
        )
        reader.read_learning(*element_tables(bell, row_classes, column_classes), bell.learn)
        counts.append(reader.first - reader.last - before)
    return np.array(counts, float)
