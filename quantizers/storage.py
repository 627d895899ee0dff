"""Tensors as an artifact's streams: which streams a tensor's elements lie in, written and read by one table.

A quantized matrix is codes, scales and, where columns have steps of their own, those; everything else is
float16 or float32. A matrix that a product of low rank repairs is followed by its two factors.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import UserError
from formats.artifact import ArtifactError, Stream, decompress
from formats.codes import decode_codes, decode_halves, largest_halves, largest_stream
from formats.codes_encode import encode_codes, encode_halves
from quantizers.grid import Quantized, dequantize

REPAIR_SIDES = ("/left", "/right")  # names of a repaired matrix's factors, after its own
# Elements that a file of so many bytes may hold: a lane of rANS, 4 bytes, codes 16,384 equal weights.
LARGEST_NUMEL, NUMEL_A_BYTE = 1 << 24, 4096

# Raw streams, in file order, and the numpy dtype of their elements.
STREAM_DTYPES = {
    "codes": np.dtype("i1"),
    "scales": np.dtype("<f2"),
    "columns": np.dtype("i1"),
    "halves": np.dtype("<f2"),
    "floats": np.dtype("<f4"),
}

# The parts of a tensor by storage: (stream, shape of its elements in it).
STORAGE_PARTS: dict[str, Callable[[list[int]], list[tuple[str, list[int]]]]] = {
    "rows": lambda shape: [("codes", shape), ("scales", shape[:1])],
    "steps": lambda shape: [("codes", shape), ("scales", shape[:1]), ("columns", shape[1:])],
    "float16": lambda shape: [("halves", shape)],
    "float32": lambda shape: [("floats", shape)],
}


class TensorRow(NamedTuple):
    """A row of the artifact's tensor table."""

    name: str
    shape: list[int]
    storage: str  # rows (codes and scales) | steps (column steps too) | float16 | float32


def frame_codec(codec: str) -> str:
    """Return the codec of the artifact's frame: what rans coded is stored as it is, the rest at its best."""
    return "best" if codec == "rans" else codec


def repair_rows(row: TensorRow, rank: int) -> list[TensorRow]:
    """Return the rows of a repaired matrix's factors: NAME/left (rank, rows), NAME/right (rank, cols)."""
    rank = min(rank, *row.shape)
    return [TensorRow(row.name + side, [rank, size], "rows") for side, size in zip(REPAIR_SIDES, row.shape)]


def with_factors(quantized: dict[str, Quantized]) -> dict[str, Quantized]:
    """Put the factors of repaired matrices beside them, under their names."""
    found = dict(quantized)
    for name, matrix in quantized.items():
        found |= {name + side: factor for side, factor in zip(REPAIR_SIDES, matrix.repair or ())}
    return found


def repaired_names(names: Collection[str]) -> tuple[str, ...]:
    """Name the matrices that have a factor beside them."""
    return tuple(name for name in names if name + REPAIR_SIDES[0] in names)


def pack_tensors(
    table: tuple[TensorRow, ...], quantized: dict[str, Quantized], weights: dict[str, Tensor], codec: str
) -> dict[str, bytes]:
    """Lay out a table's tensors as streams; refuses what is not finite as it is stored."""
    raw: dict[str, list[np.ndarray]] = {name: [] for name in STREAM_DTYPES}
    for row in table:
        if row.name in quantized:
            codes, scales, columns, _ = quantized[row.name]
            pieces = {"codes": codes, "scales": scales, "columns": columns}
        else:
            weight = weights[row.name].detach()
            pieces = {"halves": weight.half(), "floats": weight.float()}
        for stream, _ in STORAGE_PARTS[row.storage](row.shape):
            if not torch.isfinite(pieces[stream]).all():  # huge weights overflow in float16, their scales too
                raise UserError(
                    f"{row.name} is not finite as {stream} store it: the run diverged. Lower the learning "
                    "rates in a new run."
                )
            raw[stream].append(pieces[stream].cpu().numpy())
    streams = {
        name: b"".join(part.astype(dtype).tobytes() for part in raw[name])
        for name, dtype in STREAM_DTYPES.items()
    }
    if codec == "rans":
        streams["codes"] = encode_codes(raw["codes"])
        streams["scales"] = encode_halves([part.ravel() for part in raw["scales"]])
    return streams


def take_streams(streams: dict[str, Stream], limits: dict[str, int], codec: str) -> dict[str, bytes]:
    """Take out and decompress the streams that have limits; longer ones are refused before that."""
    found = {name: stream.raw_bytes for name, stream in streams.items() if name in limits}
    if len(found) != len(limits) or any(found[name] > limits[name] for name in limits):
        raise ArtifactError(f"artifact: expected streams of at most {limits} bytes, found {found}.")
    return {name: decompress(streams.pop(name), frame_codec(codec)) for name in limits}


def read_pieces(streams: dict[str, Stream], shapes: dict[str, list], codec: str) -> dict[str, list]:
    """Decompress the streams and cut them into arrays of so many elements; refuses other lengths."""
    sizes = {name: [math.prod(shape) for shape in shapes[name]] for name in STREAM_DTYPES}
    pieces = {}
    if codec == "rans":
        limits = {"codes": largest_stream(shapes["codes"]), "scales": largest_halves(sizes["scales"])}
        raw = take_streams(streams, limits, codec)
        pieces["codes"] = decode_codes(raw["codes"], shapes["codes"])
        pieces["scales"] = decode_halves(raw["scales"], sizes["scales"])
    lengths = {
        name: sum(sizes[name]) * dtype.itemsize for name, dtype in STREAM_DTYPES.items() if name not in pieces
    }
    raw = take_streams(streams, lengths, codec)
    if streams or any(len(raw[name]) < lengths[name] for name in raw):
        raise ArtifactError(f"artifact: expected streams of {lengths} bytes, found others.")
    for name, elements in raw.items():
        pieces[name] = np.split(np.frombuffer(elements, STREAM_DTYPES[name]), np.cumsum(sizes[name])[:-1])
    return pieces


def unpack_tensors(
    streams: dict[str, Stream], table: tuple[TensorRow, ...], codec: str, has_repairs: bool
) -> dict[str, Tensor]:
    """Cut a table's tensors out of their streams, put them together and dequantize them."""
    parts = [(row.name, STORAGE_PARTS[row.storage](row.shape)) for row in table]
    shapes = {
        name: [shape for _, places in parts for stream, shape in places if stream == name]
        for name in STREAM_DTYPES
    }
    left = {name: iter(pieces) for name, pieces in read_pieces(streams, shapes, codec).items()}
    found = {}
    for name, places in parts:
        pieces = {stream: torch.from_numpy(next(left[stream]).copy()).view(shape) for stream, shape in places}
        found[name] = restore_tensor(**pieces)
    for name in repaired_names(found) if has_repairs else ():
        found[name] = found[name]._replace(repair=tuple(found.pop(name + side) for side in REPAIR_SIDES))
    return {
        name: dequantize(part) if isinstance(part, Quantized) else part.float()
        for name, part in found.items()
    }


def restore_tensor(codes=None, scales=None, columns=None, halves=None, floats=None) -> Quantized | Tensor:
    """Put together one tensor from the pieces that its storage keeps."""
    if codes is not None:
        return Quantized(codes, scales[:, None], columns)
    return halves if halves is not None else floats


def check_numel(table: tuple[TensorRow, ...], num_bytes: int, path: Path) -> None:
    """Refuse a table of more elements than a file of so many bytes can hold."""
    numel = sum(math.prod(row.shape) for row in table)
    if numel > LARGEST_NUMEL + NUMEL_A_BYTE * num_bytes:
        raise ArtifactError(
            f"{path}: its {num_bytes:,} bytes cannot hold the {numel:,} weights of its recipe."
        )


def estimate_bytes(table: tuple[TensorRow, ...], code_bits: dict[str, float]) -> int:
    """Estimate a table's bytes from the bits of each matrix's codes; all else is as it lies in streams."""
    total = 0.0
    for row in table:
        for stream, shape in STORAGE_PARTS[row.storage](row.shape):
            bits = code_bits[row.name] if stream == "codes" else 8.0 * STREAM_DTYPES[stream].itemsize
            total += bits * math.prod(shape) / 8
    return round(total)
