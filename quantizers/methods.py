"""Whole models to codes: which quantizer, what it may cost, and what is done to the worst matrices.

A quantizer is a row of QUANTIZERS. It gets the matrices by name and, by name too, as what each is stored
(matrix, mlp or embed); size_of weighs a result where there is a target of bytes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from quantizers.config import QuantConfig
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

ALLOCATED_BITS = (2, 3, 4, 5, 6, 7, 8)

Weigh = Callable[[dict[str, Quantized]], int]  # bytes of the code and the artifact of a result


def build_grid(storage: str, quant: QuantConfig) -> Grid:
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


def build_grids(storages: dict[str, str], quant: QuantConfig) -> dict[str, Grid]:
    """Return the grid of every matrix."""
    return {name: build_grid(storage, quant) for name, storage in storages.items()}


def round_matrices(
    matrices: dict[str, Calibrated], storages: dict[str, str], quant: QuantConfig, size_of: Weigh
) -> dict[str, Quantized]:
    """Round every weight to the nearest code."""
    grids = build_grids(storages, quant)
    quantized = {name: quantize(matrix.weight, grids[name]) for name, matrix in matrices.items()}
    return repair_worst(quantized, matrices, quant)


def solve_matrices(
    matrices: dict[str, Calibrated], storages: dict[str, str], quant: QuantConfig, size_of: Weigh
) -> dict[str, Quantized]:
    """Solve for the codes of every matrix (GPTQ), with bits by matrix where there is a target of bytes."""
    grids = build_grids(storages, quant)
    if quant.target_bytes:
        return allocate_bits(matrices, grids, quant, size_of)
    quantized = {name: solve(matrix, grids[name], quant) for name, matrix in matrices.items()}
    return repair_worst(quantized, matrices, quant)


def solve(matrix: Calibrated, grid: Grid, quant: QuantConfig) -> Quantized:
    """Solve for a matrix's codes on a grid with the statistics of its inputs."""
    columns = None
    if quant.awq_group_cols:
        columns = awq_column_steps(matrix.weight, matrix.factor, quant.awq_group_cols)
    return gptq(matrix.weight, matrix.factor, grid, columns)


def repair_worst(
    quantized: dict[str, Quantized], matrices: dict[str, Calibrated], quant: QuantConfig
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
    matrices: dict[str, Calibrated], storages: dict[str, str], quant: QuantConfig, size_of: Weigh
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


def evaluate(matrix: Calibrated, quantized: Quantized) -> StorageChoice:
    """Estimate the bytes of a quantized matrix and the loss that it costs."""
    size = class_entropy_bits(quantized.codes) / 8 + 2 * len(quantized.scales)
    error = output_error(matrix.weight - dequantize(quantized), matrix.factor.hessian)
    return StorageChoice(round(size), float(error @ matrix.row_weights))


def allocate_bits(
    matrices: dict[str, Calibrated], grids: dict[str, Grid], quant: QuantConfig, size_of: Weigh
) -> dict[str, Quantized]:
    """Choose the bits of each matrix by what they save: the least predicted loss within the byte target."""
    candidates, choices = {}, {}
    for name, matrix in matrices.items():
        candidates[name] = [solve(matrix, grids[name]._replace(bits=bits), quant) for bits in ALLOCATED_BITS]
        choices[name] = [evaluate(matrix, quantized) for quantized in candidates[name]]
    least = sum(min(rows).size_bytes for rows in choices.values())
    most = sum(max(rows).size_bytes for rows in choices.values())

    def allocated(shrink: float) -> dict[str, Quantized]:
        chosen = allocate(choices, max(round(most / shrink), least))
        quantized = {name: candidates[name][index] for name, index in chosen.items()}
        return repair_worst(quantized, matrices, quant)

    fit = fit_rate(lambda shrink: size_of(allocated(shrink)), quant.target_bytes, 1.0, most / max(least, 1))
    return allocated(fit.parameter)


def solved_storage(quant: QuantConfig) -> str:
    """Say how gptq's codes are stored: some columns may have steps of their own."""
    return "steps" if quant.awq_group_cols else "rows"


def check_codes(quantized: dict[str, Quantized], coded: str) -> None:
    """Raise where a quantizer's codes do not fit how they are stored: rows of a grid are a byte a code."""
    for name, matrix in quantized.items():
        kinds = (torch.int8,) if coded == "rows" else (torch.int8, torch.int16)
        if matrix.codes.dtype not in kinds:
            found = f"expected {' or '.join(map(str, kinds))}, found {matrix.codes.dtype}"
            raise ValueError(f"codes of {name}: {found}; change the quantizer")


def grid_bits(storage: str, quant: QuantConfig) -> float:
    """Return the bits of a code on its grid."""
    return float(build_grid(storage, quant).bits)


def filled_bits(storage: str, quant: QuantConfig) -> float:
    """Estimate the bits of a water-filled code: the entropy of a normal variable in steps of quant.step."""
    return 0.5 * math.log2(2 * math.pi * math.e) - math.log2(quant.step)


def rounding_rules(quant: QuantConfig) -> list[tuple]:
    """Return rows (field, whether the rule holds, what must hold) for round."""
    return [
        ("quant.target_bytes", quant.target_bytes == 0, "needs another method"),
        ("quant.awq_group_cols", quant.awq_group_cols == 0, "needs quant.method=gptq"),
    ]


def solving_rules(quant: QuantConfig) -> list[tuple]:
    """Return such rows for gptq."""
    return [("quant.matrix_bits", quant.matrix_bits > 1, "needs quant.method=round")]


def filling_rules(quant: QuantConfig) -> list[tuple]:
    """Return such rows for water_fill."""
    return [
        ("quant.codec", quant.codec == "rans", "must be rans for quant.method=water_fill"),
        ("quant.qat_start", quant.qat_start == 1, "needs quant.method=round or gptq"),
        ("quant.repair_rank", quant.repair_rank == 0, "needs quant.method=round or gptq"),
        ("quant.awq_group_cols", quant.awq_group_cols == 0, "needs quant.method=gptq"),
        *solving_rules(quant),
    ]


class Quantizer(NamedTuple):
    """How a method quantizes."""

    quantize: Callable  # (matrices, storages, quant, size_of) -> {name: Quantized}
    needs_calibration: bool  # statistics of the matrices' inputs
    coded: Callable[[QuantConfig], str]  # how codes are stored: "rows" of a grid, or "steps" a column too
    estimate_bits: Callable[[str, QuantConfig], float]  # of a code
    rules: Callable[[QuantConfig], list[tuple]]  # what cannot stand together with it


QUANTIZERS = {
    "round": Quantizer(round_matrices, False, lambda quant: "rows", grid_bits, rounding_rules),
    "gptq": Quantizer(solve_matrices, True, solved_storage, grid_bits, solving_rules),
    "water_fill": Quantizer(fill_matrices, True, lambda quant: "steps", filled_bits, filling_rules),
}
