"""Whole models to codes: which quantizer, what it may cost, and what is done to the worst matrices.

`quant` is the quant section of a recipe (QuantConfig in train_gpt.py); matrices and grids are by name.
"""

from collections.abc import Callable

from quantizers.gptq import (
    Calibrated,
    awq_column_steps,
    gptq,
    lowrank_repair,
    output_error,
    rd_gptq,
    water_fill,
)
from quantizers.grid import Grid, Quantized, dequantize, quantize
from quantizers.rate import StorageChoice, allocate, class_entropy_bits, fit_rate

METHODS = ("round", "gptq", "water_fill")
ALLOCATED_BITS = (2, 3, 4, 5, 6, 7, 8)


def build_grid(storage: str, quant) -> Grid:
    """Return the grid of tensors stored as `matrix`, `mlp` or `embed`."""
    bits = {
        "matrix": quant.matrix_bits,
        "mlp": quant.mlp_bits or quant.matrix_bits,
        "embed": quant.embed_bits,
    }
    clip = {
        "matrix": quant.matrix_clip,
        "mlp": quant.mlp_clip or quant.matrix_clip,
        "embed": quant.embed_clip,
    }
    return Grid(bits[storage], quant.clip_rule, clip[storage], scale_floor=quant.scale_floor)


def quantize_matrices(
    matrices: dict[str, Calibrated], grids: dict[str, Grid], quant, size_of: Callable[[dict], int]
) -> dict[str, Quantized]:
    """Quantize every matrix by quant.method; size_of weighs a result where there is a target of bytes."""
    if quant.method == "water_fill":
        return fill_matrices(matrices, quant, size_of)
    if quant.method == "gptq" and quant.target_bytes:
        return allocate_bits(matrices, grids, quant, size_of)
    quantized = {name: to_grid(matrix, grids[name], quant) for name, matrix in matrices.items()}
    return repair_worst(quantized, matrices, quant)


def to_grid(matrix: Calibrated, grid: Grid, quant) -> Quantized:
    """Round a matrix to a grid, or with statistics of its inputs solve for it."""
    if quant.method == "round":
        return quantize(matrix.weight, grid)
    columns = None
    if quant.awq_group_cols:
        columns = awq_column_steps(matrix.weight, matrix.factor, quant.awq_group_cols)
    return gptq(matrix.weight, matrix.factor, grid, columns)


def repair_worst(
    quantized: dict[str, Quantized], matrices: dict[str, Calibrated], quant
) -> dict[str, Quantized]:
    """Add products of low rank to the matrices that lose most (LQER, contest pull request 1797)."""
    if not quant.repair_rank:
        return quantized
    factors = {name: matrix.factor if quant.repair_outputs else None for name, matrix in matrices.items()}

    def lost(name: str) -> float:
        error = matrices[name].weight - dequantize(quantized[name])
        factor = factors[name]
        return float(output_error(error, factor.hessian).sum() if factor else error.square().sum())

    worst = sorted(quantized, key=lost, reverse=True)[: quant.repair_top]
    shape = quant.repair_rank, quant.repair_bits
    return quantized | {
        name: lowrank_repair(matrices[name].weight, quantized[name], *shape, factors[name]) for name in worst
    }


def fill_matrices(
    matrices: dict[str, Calibrated], quant, size_of: Callable[[dict], int]
) -> dict[str, Quantized]:
    """Quantize with water-filled steps, as fine as the byte target allows."""
    steps = water_fill(matrices)

    def filled(step: float) -> dict[str, Quantized]:
        return {
            name: rd_gptq(matrix, steps[name], step, quant.rate_weight) for name, matrix in matrices.items()
        }

    if not quant.target_bytes:
        return filled(quant.step)
    return filled(fit_rate(lambda step: size_of(filled(step)), quant.target_bytes, 0.1, 8.0).parameter)


def weigh(matrix: Calibrated, way: Quantized) -> StorageChoice:
    """Estimate the bytes of a quantized matrix and the loss that it costs."""
    size = class_entropy_bits(way.codes) / 8 + 2 * len(way.scales)
    error = output_error(matrix.weight - dequantize(way), matrix.factor.hessian)
    return StorageChoice(round(size), float(error @ matrix.row_weights))


def allocate_bits(
    matrices: dict[str, Calibrated], grids: dict[str, Grid], quant, size_of: Callable[[dict], int]
) -> dict[str, Quantized]:
    """Choose the bits of each matrix by what they save: the least predicted loss within the byte target."""
    ways, choices = {}, {}
    for name, matrix in matrices.items():
        ways[name] = [to_grid(matrix, grids[name]._replace(bits=bits), quant) for bits in ALLOCATED_BITS]
        choices[name] = [weigh(matrix, way) for way in ways[name]]
    least = sum(min(rows).size_bytes for rows in choices.values())
    most = sum(max(rows).size_bytes for rows in choices.values())

    def allocated(shrink: float) -> dict[str, Quantized]:
        chosen = allocate(choices, max(round(most / shrink), least))
        return repair_worst({name: ways[name][index] for name, index in chosen.items()}, matrices, quant)

    fit = fit_rate(lambda shrink: size_of(allocated(shrink)), quant.target_bytes, 1.0, most / max(least, 1))
    return allocated(fit.parameter)
