"""Bytes as the given, error as the result: entropy of codes, rate control, bit allocation."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common import UserError


def entropy_bits(codes: Tensor) -> float:
    """Return the order-0 entropy of integer codes, in bits for all of them together."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def class_entropy_bits(codes: Tensor, num_classes: int = 16) -> float:
    """Return the entropy of (rows, cols) codes whose columns a coder knows in classes of equal spread."""
    order = codes.float().square().mean(dim=0).argsort()
    return sum(entropy_bits(codes[:, part]) for part in order.tensor_split(num_classes) if len(part))


class RateFit(NamedTuple):
    """Where rate control ended."""

    parameter: float
    size_bytes: int
    num_evals: int


def fit_rate(
    size_of: Callable[[float], int], target_bytes: int, low: float, high: float, slack: float = 1e-3
) -> RateFit:
    """Find the knob whose size is the largest within [(1 - slack), 1] of target_bytes.

    size_of falls as the knob grows; sizes are nearly linear in its logarithm, so false position (with
    halved ends, the Illinois rule) needs few evaluations. A low end that fits already is returned: there
    are bytes left over and nothing to spend them on. A high end that does not fit is an error.
    """
    goal = target_bytes * (1 - slack / 2)
    left, right = math.log(low), math.log(high)
    over, under = size_of(low) - goal, size_of(high) - goal
    if over + goal <= target_bytes:
        return RateFit(low, round(over + goal), 2)
    if under + goal > target_bytes:
        raise UserError(
            f"expected at most {target_bytes:,} bytes, found {round(under + goal):,} at the coarsest setting "
            f"{high:g}: {round(under + goal - target_bytes):,} over. Raise quant.target_bytes, widen the "
            "range of the knob or make the model smaller."
        )
    best = RateFit(high, round(under + goal), 2)
    last_side = 0
    for num_evals in range(3, 20):
        if best.size_bytes >= target_bytes * (1 - slack):
            break
        middle = left + (right - left) * over / (over - under)
        parameter = math.exp(middle)
        size = size_of(parameter)
        side = 1 if size > target_bytes else -1
        if side > 0:
            left, over = middle, size - goal
            under /= 2 if last_side == side else 1
        else:
            right, under = middle, size - goal
            over /= 2 if last_side == side else 1
            best = max(best, RateFit(parameter, size, num_evals), key=lambda fit: fit.size_bytes)
        last_side = side
    return best


class StorageChoice(NamedTuple):
    """One way to store a tensor."""

    size_bytes: int
    loss: float  # that it costs; see output_error


def allocate(choices: dict[str, list[StorageChoice]], target_bytes: int) -> dict[str, int]:
    """Choose a way to store each tensor, by its index: the least summed loss within target_bytes.

    Greedy along each tensor's convex hull, most loss saved a byte first: optimal up to the last upgrade.
    """
    hulls = {name: lower_hull(ways) for name, ways in choices.items()}
    chosen = dict.fromkeys(choices, 0)  # positions on the hulls
    left = target_bytes - sum(choices[name][hull[0]].size_bytes for name, hull in hulls.items())
    if left < 0:
        raise UserError(
            f"expected tensors of at most {target_bytes:,} bytes, found {target_bytes - left:,} with the "
            "fewest bits each. Raise quant.target_bytes, allow fewer bits or make the model smaller."
        )
    upgrades = []
    for name, hull in hulls.items():
        for position in range(1, len(hull)):
            more = choices[name][hull[position]].size_bytes - choices[name][hull[position - 1]].size_bytes
            gain = choices[name][hull[position - 1]].loss - choices[name][hull[position]].loss
            upgrades.append((-gain / more, name, position, more))
    for _, name, position, more in sorted(upgrades):
        if position == chosen[name] + 1 and more <= left:
            chosen[name] = position
            left -= more
    return {name: hulls[name][position] for name, position in chosen.items()}


def lower_hull(ways: list[StorageChoice]) -> list[int]:
    """Return the indices of the choices on the lower convex hull, cheapest first; loss falls along it."""
    hull: list[int] = []
    for index in sorted(range(len(ways)), key=lambda i: ways[i]):
        if hull and ways[index].loss >= ways[hull[-1]].loss:
            continue
        while len(hull) > 1 and loss_slope(ways, hull[-2], hull[-1]) >= loss_slope(ways, hull[-2], index):
            hull.pop()
        hull.append(index)
    return hull


def loss_slope(ways: list[StorageChoice], cheap: int, dear: int) -> float:
    """Return the change of loss a byte from one choice to a larger one."""
    return (ways[dear].loss - ways[cheap].loss) / (ways[dear].size_bytes - ways[cheap].size_bytes)
