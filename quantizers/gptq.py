"""GPTQ with any steps, water-filled steps for entropy-coded weights, and low-rank repair.

A Linear's output error for a weight error E is tr(E H E^T), H the mean of x x^T over its inputs x. GPTQ
(arXiv 2210.17323) rounds a column at a time and moves what was lost into the columns that are still free:
with U the upper Cholesky factor of H^-1, rounding errors e_j cost e_j^2 / U_jj^2 each, independently.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common import UserError
from kernels.machine import wide_dtype
from quantizers.grid import (
    SMALLEST_SCALE,
    Grid,
    Quantized,
    check_matrix,
    check_weight,
    column_factors,
    dequantize,
    element_steps,
    quantize,
    row_scales,
)

BLOCK_COLS = 128  # columns rounded before their errors are moved into the rest at once
LARGEST_CODE = 511  # of water-filled codes: the entropy coder pays for what occurs, not for the range
ROW_DAMPING = 0.05  # of the mean row weight


class CalibrationStats:
    """What calibration keeps of a matrix: the two sides of what an error of its weights does to the loss.

    An error E raises the loss by about sum_i row_weights_i e_i hessian e_i^T / 2 nats a token. For a Linear
    the hessian is the mean of x x^T over its inputs, row weights are the mean of g^2 over the loss's
    gradients at its outputs. An embedding is a Linear of one-hot inputs seen from the other side: the
    hessian is the mean of g g^T, row weights are how often a row is looked up.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}  # "gram" (cols, cols) and "rows" (rows,), flat, each with its count

    def add_gram(self, values: Tensor) -> None:
        """Add the Gram matrix of (..., cols) values, summed in float64 where the device has it."""
        values = values.detach().flatten(0, -2).float()
        self.add("gram", (values.mT @ values).to(wide_dtype(values.device)), len(values))

    def add_rows(self, totals: Tensor, count: int) -> None:
        """Add what `count` tokens add to the row weights (rows,)."""
        self.add("rows", totals.detach().to(wide_dtype(totals.device)), count)

    def add_squares(self, gradients: Tensor) -> None:
        """Add the squares of (..., rows) gradients to the row weights."""
        gradients = gradients.flatten(0, -2).to(wide_dtype(gradients.device))
        self.add_rows(gradients.square().sum(dim=0), len(gradients))

    def add(self, kind: str, total: Tensor, count: int) -> None:
        """Add to one of the sums and to its count."""
        packed = torch.cat([total.flatten(), total.new_full((1,), count)])
        self.sums[kind] = self.sums[kind] + packed if kind in self.sums else packed

    def merge(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of all ranks."""
        for kind in sorted(self.sums):
            self.sums[kind] = sum_over_ranks(self.sums[kind])

    @property
    def hessian(self) -> Tensor:
        """Return the mean Gram matrix, (cols, cols) float64."""
        mean = self.sums["gram"][:-1] / self.sums["gram"][-1]
        return mean.view(math.isqrt(len(mean)), -1)

    @property
    def row_weights(self) -> Tensor | None:
        """Return the mean row weights, (rows,) float64; None if there were no backward passes."""
        return self.sums["rows"][:-1] / self.sums["rows"][-1] if "rows" in self.sums else None


def attach_hooks(module: nn.Module, kept: CalibrationStats) -> RemovableHandle:
    """Hook a Linear or an embedding so that every visit is counted into its stats."""

    def visit(_, args: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            tokens = args[0].flatten()
            kept.add_rows(torch.bincount(tokens, minlength=module.num_embeddings), tokens.numel())
        else:
            kept.add_gram(args[0])
        if output.requires_grad:
            output.register_hook(kept.add_gram if isinstance(module, nn.Embedding) else kept.add_squares)

    return module.register_forward_hook(visit)


def collect_stats(modules: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, CalibrationStats]:
    """Watch modules while `run` makes forward and backward passes of losses that are sums over tokens.

    Without backward passes Linears have no row weights: all outputs will weigh the same.
    """
    stats = {name: CalibrationStats() for name in modules}
    handles = [attach_hooks(module, stats[name]) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return stats


def combine_roles(*roles: CalibrationStats) -> tuple[Tensor, Tensor]:
    """Return one hessian (cols, cols) and row weights (rows,) for a matrix with several uses.

    A tied embedding is looked up and multiplied by. sum_k r_k x H_k becomes the product of its two partial
    traces, which keeps each row's and each column pair's total.
    """
    hessian = sum(role.row_weights.sum() * role.hessian for role in roles)
    rows = sum(role.hessian.trace() * role.row_weights for role in roles)
    return hessian / hessian.trace(), rows


class Factor(NamedTuple):
    """A Hessian prepared once for any number of solves."""

    hessian: Tensor  # (cols, cols) float32, undamped
    order: Tensor  # (cols,) int64: columns in the order of rounding
    upper: Tensor  # (cols, cols) float32: upper Cholesky factor of the damped inverse, in that order
    dead: Tensor  # (cols,) bool: inputs that are always zero


def factorize(
    hessian: Tensor, damping: float = 0.01, act_order: bool = True, name: str = "hessian"
) -> Factor:
    """Damp a Hessian by a fraction of its mean diagonal and factor its inverse, in float64.

    act_order rounds the columns of the largest inputs first. A device without float64 lets the CPU do it.
    """
    check_matrix(hessian, name, "Calibrate with text on which the model's activations are finite.")
    exact = (hessian if wide_dtype(hessian.device) == torch.float64 else hessian.cpu()).double()
    diagonal = exact.diagonal()
    dead = diagonal == 0
    order = torch.arange(len(dead), device=exact.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damped = exact + torch.diag(damping * diagonal.mean() + dead.double())
    # With the order flipped, the lower factor of H is the upper one: H = V V^T, so H^-1 = U^T U, U = V^-1.
    flipped = damped[order][:, order].flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    if int(failed):
        raise UserError(
            f"{name}: expected a positive definite Hessian, found one that is not, with damping {damping}. "
            "Raise the damping or calibrate with more text."
        )
    identity = torch.eye(len(dead), dtype=torch.float64, device=exact.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Factor(*(part.to(hessian.device) for part in (exact.float(), order, upper.float(), dead)))


def output_error(error: Tensor, hessian: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Return e H e^T of each row e of a weight's error (rows, cols), times the row's weight, (rows,).

    With row weights, half the sum predicts the rise of the loss, in nats a token.
    """
    squares = ((error @ hessian) * error).sum(dim=1)
    return squares if row_weights is None else squares * row_weights


class CodeModel:
    """Code lengths in bits as an adaptive coder with a context per column spread would charge them.

    A column's class is its spread in half octaves of codes. A class starts as a Gaussian of that spread
    that weighs as much as one column; columns that have been rounded are counted in.
    """

    def __init__(self, spreads: Tensor, num_rows: int):
        kinds = torch.round(2 * torch.log2(spreads.clamp(0.1, LARGEST_CODE)))  # (cols,)
        kinds, self.classes = torch.unique(kinds, return_inverse=True)
        edges = torch.arange(-LARGEST_CODE - 0.5, LARGEST_CODE + 1.0, device=spreads.device)
        self.counts = num_rows * torch.special.ndtr(edges / torch.exp2(kinds / 2)[:, None]).diff() + 0.01

    def lengths(self) -> Tensor:
        """Return the bits of every code from -LARGEST_CODE to LARGEST_CODE in every class."""
        return torch.log2(self.counts.sum(dim=1, keepdim=True)) - torch.log2(self.counts)

    def savings(self) -> Tensor:
        """Return the bits that every code in every class is longer than the next one towards zero."""
        lengths = self.lengths()
        outwards = lengths.diff(dim=1)
        below, above = outwards.split(LARGEST_CODE, dim=1)
        return torch.cat([-below, torch.zeros_like(below[:, :1]), above], dim=1)

    def add(self, first: int, codes: Tensor) -> None:
        """Count the codes (n, rows) of the columns from `first` on."""
        starts = self.counts.shape[1] * self.classes[first : first + len(codes)]
        indices = starts[:, None] + LARGEST_CODE + codes.long()
        counts = torch.bincount(indices.flatten(), minlength=self.counts.numel())
        self.counts += counts.view_as(self.counts)


class RateDistortionRounding:
    """Choose the nearest code or the one next to it towards zero, whichever costs less.

    A code costs (value - code)^2 + price * bits.
    """

    def __init__(self, scaled: Tensor, prices: Tensor):
        self.prices = prices  # (cols, rows)
        self.model = CodeModel(scaled.square().mean(dim=1).sqrt(), scaled.shape[1])
        self.savings = self.model.savings()
        self.classes = self.model.classes.tolist()

    def __call__(self, column: int, scaled: Tensor, near: Tensor) -> Tensor:
        """Return the codes (rows,) of a column, given its values in codes and their nearest codes."""
        sign = near.sign()
        lost = 1 + 2 * sign * (scaled - near)  # (scaled - near + sign)^2 - (scaled - near)^2
        saved = self.savings[self.classes[column]][near.long() + LARGEST_CODE]
        return near - sign * (lost < self.prices[column] * saved)

    def learn(self, first: int, codes: Tensor) -> None:
        """Count the codes (n, rows) of the columns from `first` on."""
        self.model.add(first, codes)
        self.savings = self.model.savings()


def solve_codes(
    weight: Tensor, factor: Factor, steps: Tensor, limits: Tensor, prices: Tensor | None
) -> Tensor:
    """Round (rows, cols) weights column by column with error feedback; returns float32 codes.

    steps are (rows, cols), limits (cols,) the largest codes. With prices (rows, cols), in squared codes a
    bit, codes are chosen by their lengths too.
    """
    order = factor.order
    left = weight.mT[order].contiguous()  # (cols, rows): a column's values are neighbours in memory
    steps = steps.mT[order].contiguous()
    limits = limits[order].tolist()
    codes = torch.empty_like(left)
    rounding = (
        RateDistortionRounding(left / steps, prices.mT[order].contiguous()) if prices is not None else None
    )
    for first in range(0, len(left), BLOCK_COLS):
        last = min(first + BLOCK_COLS, len(left))
        upper = factor.upper[first:last]
        errors = left.new_zeros(last - first, left.shape[1])
        for j in range(first, last):
            column = left[j] - upper[: j - first, j] @ errors[: j - first]
            scaled = column / steps[j]
            code = torch.round(scaled).clamp_(-limits[j], limits[j])
            if rounding:
                code = rounding(j, scaled, code)
            codes[j] = code
            errors[j - first] = (column - code * steps[j]) / upper[j - first, j]
        left[last:] -= upper[:, last:].mT @ errors
        if rounding:
            rounding.learn(first, codes[first:last])
    return torch.empty_like(codes).index_copy_(0, order, codes).mT.contiguous()


def solve_or_round(weight: Tensor, factor: Factor, steps: Tensor, limits: Tensor) -> Tensor:
    """Solve without prices; a row that plain rounding serves better (clipping can do that) is rounded."""
    weight = weight.masked_fill(factor.dead, 0.0)
    solved = solve_codes(weight, factor, steps, limits, None)
    nearest = torch.minimum(torch.maximum(torch.round(weight / steps), -limits), limits)
    errors = [output_error(weight - codes * steps, factor.hessian) for codes in (solved, nearest)]
    return torch.where((errors[0] <= errors[1])[:, None], solved, nearest)


def as_codes(codes: Tensor) -> Tensor:
    """Return float codes as int8, or as int16 where they need it."""
    return codes.to(torch.int8 if codes.numel() == 0 or codes.abs().max() <= 127 else torch.int16)


def gptq(weight: Tensor, factor: Factor, grid: Grid, column_steps: Tensor | None = None) -> Quantized:
    """Quantize (rows, cols) weights to a grid with error feedback: the contest's SDClip form and its kin.

    Columns with finer steps get as many more codes, up to 127. Binary grids have no zero to leave: use
    quantize.
    """
    assert grid.bits > 1, "binary codes are signs, not roundings"
    weight = weight.detach().float()
    scales = row_scales(weight, grid)
    limits = torch.full((weight.shape[1],), float(grid.largest), device=weight.device)
    if column_steps is not None:
        limits = torch.floor(limits / column_factors(column_steps)).clamp_(1, 127)
    steps = element_steps(scales, column_steps, weight.shape[1])
    return Quantized(as_codes(solve_or_round(weight, factor, steps, limits)), scales, column_steps)


def awq_column_steps(weight: Tensor, factor: Factor, group_cols: int = 64) -> Tensor:
    """Give the aligned group of columns that matters most steps a quarter as large: int8 among int6.

    Its columns have the largest sum of input deviation times mean weight size (contest pull request 1908).
    """
    scores = factor.hessian.diagonal().sqrt() * weight.abs().mean(dim=0)
    groups = scores.split(group_cols)
    best = max(range(len(groups)), key=lambda i: float(groups[i].sum()))
    steps = torch.zeros(weight.shape[1], dtype=torch.int8, device=weight.device)
    steps[best * group_cols : (best + 1) * group_cols] = -16
    return steps


class Calibrated(NamedTuple):
    """A matrix and what calibration knows of it."""

    weight: Tensor  # (rows, cols) float32
    factor: Factor | None = None  # of its inputs
    row_weights: Tensor | None = None  # (rows,) what an error of each row weighs, see CalibrationStats


def calibrate(
    name: str, weight: Tensor, hessian: Tensor, row_weights: Tensor | None, damping: float = 0.01
) -> Calibrated:
    """Check and prepare a matrix; without row weights all rows weigh the same."""
    weight = weight.detach().float()
    check_weight(weight, name)
    if row_weights is None:
        row_weights = torch.ones_like(weight[:, 0])
    check_matrix(row_weights[None], name, "Lower the learning rates: the loss's gradients are not finite.")
    return Calibrated(weight, factorize(hessian, damping, name=name), row_weights.float())


def damp_rows(row_weights: Tensor) -> Tensor:
    """Add a little to all row weights: rows that calibration did not move are not free."""
    return (row_weights + ROW_DAMPING * row_weights.mean()).clamp_min(1e-30)


class Powers(NamedTuple):
    """How far steps follow the water-filling optimum; 0: not at all, 1: as if the model of it were exact."""

    column: float = 0.85
    row: float = 0.5
    matrix: float = 0.75


POWERS = Powers()


class RelativeSteps(NamedTuple):
    """The steps of a matrix up to a factor that all matrices of a model share."""

    log_rows: Tensor  # (rows,) float32, base 2, multiples of row_step_unit: few values, which cost little
    column_steps: Tensor  # (cols,) int8


def row_step_unit(num_cols: int) -> float:
    """Return the octaves, a power of two, between the steps that rows of so many columns may have.

    Steps off by up to u / 2 octaves waste about 0.058 u^2 bits a weight; naming them takes log2(1 / u) bits
    a row more. Both together are least at u = 3.5 / sqrt(num_cols).
    """
    return 2.0 ** -round(math.log2(math.sqrt(max(num_cols, 1)) / 3.5))


def water_fill(matrices: dict[str, Calibrated], powers: Powers = POWERS) -> dict[str, RelativeSteps]:
    """Lay out the steps of a whole model for entropy-coded weights.

    The loss rises by about sum_ij step_ij^2 g_i d_j / 24, with g_i = row_weights and d_j = 1 / U_jj^2, and
    bits fall by log2 of the steps. At equal bits the least loss has step_ij ~ (g_i d_j)^(-1/2), over all
    rows, columns and matrices at once. matrix=0 keeps a matrix's mean step in proportion to its deviation,
    as the contest's SDClip does. In the median matrix step and deviation have the same geometric mean.
    Measured in dev/LOG.md, "water-filled steps".
    """
    steps, levels = {}, []
    for name, (weight, factor, row_weights) in matrices.items():
        log_columns = torch.empty_like(factor.upper[0])
        log_columns[factor.order] = torch.log2(factor.upper.diagonal())
        level = log_columns[~factor.dead].mean().nan_to_num(0.0)
        log_columns = torch.where(factor.dead, level, log_columns)
        log_rows = -0.5 * torch.log2(damp_rows(row_weights))
        deviation = torch.log2(weight.std().nan_to_num(0.0).clamp_min(SMALLEST_SCALE))
        sensitivity = level + log_rows.mean()
        mean = powers.matrix * sensitivity + (1 - powers.matrix) * deviation
        column_steps = torch.round(8 * powers.column * (log_columns - level)).clamp_(-128, 127)
        log_rows = mean + powers.row * (log_rows - log_rows.mean())
        steps[name] = RelativeSteps(log_rows, column_steps.to(torch.int8))
        levels.append(float(mean - deviation))
    middle = statistics.median(levels)
    for name, (log_rows, column_steps) in steps.items():
        unit = row_step_unit(len(column_steps))
        steps[name] = RelativeSteps(torch.round((log_rows - middle) / unit) * unit, column_steps)
    return steps


def rd_gptq(matrix: Calibrated, relative: RelativeSteps, step: float, rate_weight: float = 0.0) -> Quantized:
    """Quantize a matrix with water-filled steps times `step`, the one knob of a model's rate.

    rate_weight times the slope of error against rate, ln(2) / 6 * (step^2 g d), is the price of a bit in
    rounding; 0 rounds to the nearest code, which measured best (dev/LOG.md, "rate-aware rounding").
    """
    weight, factor, row_weights = matrix
    scales = (step * torch.exp2(relative.log_rows)).clamp(SMALLEST_SCALE, 65504.0).half()[:, None]
    steps = element_steps(scales, relative.column_steps, weight.shape[1])
    limits = torch.full((weight.shape[1],), float(LARGEST_CODE), device=weight.device)
    if not rate_weight:
        codes = solve_or_round(weight, factor, steps, limits)
    else:
        stakes = torch.empty_like(factor.upper[0])
        stakes[factor.order] = factor.upper.diagonal() ** -2
        stakes = steps.square() * stakes * damp_rows(row_weights)[:, None]
        prices = rate_weight * math.log(2) / 6 * stakes.mean() / stakes
        codes = solve_codes(weight.masked_fill(factor.dead, 0.0), factor, steps, limits, prices)
    return Quantized(as_codes(codes), scales, relative.column_steps)


def lowrank_repair(
    weight: Tensor, quantized: Quantized, rank: int, bits: int = 4, factor: Factor | None = None
) -> Quantized:
    """Add the best product of (rows, rank) and (rank, cols) to what quantized stands for (LQER, PR 1797).

    Best for the weights, or with a factor for the outputs: the singular vectors of E L with H = L L^T. Both
    sides are stored at `bits`; the right one is fitted to the left one's stored values.
    """
    error = weight.detach().float() - dequantize(quantized)
    if factor is None:
        left, values, _ = torch.linalg.svd(error, full_matrices=False)
    else:
        # U^T U = H^-1 makes L = U^-1 a root of H; the order of columns does not change left vectors.
        rooted = torch.linalg.solve_triangular(factor.upper, error[:, factor.order], upper=True, left=False)
        left, values, _ = torch.linalg.svd(rooted, full_matrices=False)
    grid = Grid(bits, "max", 1.0)
    stored_left = quantize((left * values)[:, :rank].mT, grid)
    right = torch.linalg.pinv(dequantize(stored_left).mT) @ error
    return quantized._replace(repair=(stored_left, quantize(right, grid)))
