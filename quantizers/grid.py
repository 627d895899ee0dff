"""Integer grids for weights: scale rules, rounding, the one dequantizer, and its training-time twin.

A weight (rows, cols) is stored as codes times steps. The step of an element is its row's float16 scale,
one for the whole row or one a group of columns, times its column's step where columns have their own.
Writer and reader take steps from what is stored, so both see the same float32 weights bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import UserError

SMALLEST_SCALE = 2.0**-20  # keeps the scale of an all-zero row positive in float16
# 2^(n / 8) for n in 0 .. 7: written out, because a computed power's last bit differs between platforms.
EIGHTH_OCTAVES = (1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081)
COLUMN_FACTORS = tuple(EIGHTH_OCTAVES[n % 8] * 2.0 ** (n // 8) for n in range(-128, 128))


class Grid(NamedTuple):
    """Symmetric integer codes whose scales follow a rule of CLIP_RULES."""

    bits: int = 8  # 2 to 8: codes up to 2^(bits - 1) - 1, so 2 is ternary; 1 is binary: the signs
    rule: str = "quantile"
    clip: float = 0.9999984  # the rule's own number
    group_cols: int = 0  # columns that share a scale; 0: all
    scale_floor: bool = False  # scales are at least 1 / largest code (the contest until April 2026)

    @property
    def largest(self) -> int:
        """Return the largest code."""
        return max(1, 2 ** (self.bits - 1) - 1)


class Quantized(NamedTuple):
    """A stored matrix: all that dequantize needs."""

    codes: Tensor  # (rows, cols) int8 or int16
    scales: Tensor  # (rows, groups) float16
    column_steps: Tensor | None = None  # (cols,) int8: a column's factor in eighths of an octave
    repair: "tuple[Quantized, Quantized] | None" = None  # (rank, rows) and (rank, cols): their product


# What the largest code stands for, from weights (rows, groups, columns of a group) and the rule's number.
# quantile, max: the contest's baseline. sigmas: SDClip, contest pull request 1394. mean: ternary and binary
# weights, arXiv 1605.04711.
CLIP_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "quantile": lambda weight, clip: torch.quantile(weight.abs(), clip, dim=2),
    "max": lambda weight, clip: clip * weight.abs().amax(dim=2),
    "sigmas": lambda weight, clip: clip * weight.std(dim=2, correction=min(1, weight.shape[2] - 1)),
    "mean": lambda weight, clip: clip * weight.abs().mean(dim=2),
}


def check_matrix(values: Tensor, name: str, next_step: str) -> None:
    """Refuse what is no finite matrix."""
    bad = int((~torch.isfinite(values)).sum())
    if values.ndim != 2 or bad:
        raise UserError(
            f"{name}: expected a finite matrix, found shape {list(values.shape)} with {bad} values that are "
            f"not finite. {next_step}"
        )


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse a weight that cannot be quantized."""
    check_matrix(weight, name, "The run diverged: lower the learning rates or set optim.grad_clip_norm=1.")


def row_scales(weight: Tensor, grid: Grid) -> Tensor:
    """Return the float16 scales (rows, groups) that a grid's rule gives to float32 weights."""
    rows, cols = weight.shape
    width = grid.group_cols or max(cols, 1)
    if cols % width:
        raise UserError(f"expected group_cols that divides {cols} columns, found {width}. Change group_cols.")
    if weight.numel() == 0:
        return weight.new_full((rows, max(cols // width, 1)), SMALLEST_SCALE, dtype=torch.float16)
    clip = CLIP_RULES[grid.rule](weight.unflatten(1, (-1, width)), grid.clip)
    floor = 1.0 / grid.largest if grid.scale_floor else SMALLEST_SCALE
    return (clip / grid.largest).clamp_min(floor).half()


def column_factors(column_steps: Tensor) -> Tensor:
    """Return 2^(n / 8) for int8 column steps n, (cols,) float32, the same on every platform."""
    return torch.tensor(COLUMN_FACTORS, device=column_steps.device)[column_steps.long() + 128]


def element_steps(scales: Tensor, column_steps: Tensor | None, num_cols: int) -> Tensor:
    """Spread scales (rows, groups) and column steps over the elements, (rows, cols) float32."""
    steps = scales.float().repeat_interleave(num_cols // scales.shape[1], dim=1)
    return steps if column_steps is None else steps * column_factors(column_steps)


def round_codes(weight: Tensor, steps: Tensor, largest: int) -> Tensor:
    """Round weights to the nearest codes within +-largest, float32."""
    return torch.round(weight / steps).clamp_(-largest, largest)


def quantize(weight: Tensor, grid: Grid) -> Quantized:
    """Round (rows, cols) weights to a grid. Codes are taken against the float16 scales that are stored.

    Rule "mean" then fits the scales to the codes: ternary zeros shrink the mean otherwise.
    """
    weight = weight.detach().float()
    scales = row_scales(weight, grid)
    if grid.bits == 1:
        codes = torch.where(weight < 0, -1, 1).to(torch.int8)
    else:
        codes = round_codes(weight, element_steps(scales, None, weight.shape[1]), grid.largest).to(torch.int8)
    if grid.rule == "mean":
        pairs = (weight * codes).unflatten(1, (scales.shape[1], -1)).sum(dim=2)
        used = codes.float().square().unflatten(1, (scales.shape[1], -1)).sum(dim=2)
        scales = (pairs / used.clamp_min(1.0)).clamp_min(SMALLEST_SCALE).half()
    return Quantized(codes, scales)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the float32 weights (rows, cols) that a stored matrix stands for, exact on every platform."""
    codes = quantized.codes
    steps = element_steps(quantized.scales, quantized.column_steps, codes.shape[1])
    weight = codes.float() * steps
    if quantized.repair is not None:
        # One outer product at a time: a matrix product's order of summation is the library's choice.
        for left, right in zip(*(dequantize(factor) for factor in quantized.repair)):
            weight = weight + left[:, None] * right
    return weight


def fake_quantize(
    weight: Tensor, quantizer: Callable[[Tensor], Quantized], sharpness: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Return the weights that `quantizer` exports, and the slope of gradients through them (None: 1).

    Straight-through (arXiv 1308.3432) without sharpness. With sharpness a > 0 weights are on the soft stairs
    floor(y) + tanh(a r) / (2 tanh(a / 2)) + 1/2, r = y - floor(y) - 1/2, y in steps, and the slope is the
    stairs' own (contest pull requests 589 and 606); clipped weights go straight through.
    """
    quantized = quantizer(weight)
    target = dequantize(quantized)
    if not sharpness:
        return target, None
    steps = element_steps(quantized.scales, quantized.column_steps, weight.shape[1])
    scaled = weight / steps
    below = torch.floor(scaled)
    rise = torch.tanh(sharpness * (scaled - below - 0.5))
    height = 2 * math.tanh(sharpness / 2)
    inside = (target - weight).abs() <= 0.5001 * steps
    values = torch.where(inside, (below + 0.5 + rise / height) * steps, target)
    return values, torch.where(inside, sharpness * (1 - rise.square()) / height, 1.0)


@contextmanager
def stored_weights(model: nn.Module, grids: dict[str, Grid], sharpness: float) -> Iterator[None]:
    """Take gradients at the weights as they will be stored, then bring the masters back.

    The gradient there is the masters' (see fake_quantize). Weights change in place: a compiled graph reads
    their memory, while it would fold a flag and never quantize.
    """
    params = {name: param for name, param in model.named_parameters() if name in grids}
    masters = {name: param.detach().clone() for name, param in params.items()}
    slopes = {}
    with torch.no_grad():
        for name, param in params.items():
            quantizer = partial(quantize, grid=grids[name])
            values, slopes[name] = fake_quantize(masters[name], quantizer, sharpness)
            param.copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(masters[name])
                if slopes[name] is not None and param.grad is not None:
                    param.grad *= slopes[name]
