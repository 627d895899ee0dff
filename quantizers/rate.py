"""Bytes as the given, error as the result: entropy of codes, rate control, bit allocation."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common import UserError


def entropy_bits(codes: Tensor) -> float:
    """Return the order-0 entropy of integer codes, in bits for all of them together."""
    counts = torch.unique(codes, return_counts=True)[1].cpu().double()
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


def solve_falling(value_of: Callable[[float], float], goal: float, low: float, high: float) -> float:
    """Find where a smooth function, falling and nearly linear in the logarithm, is `goal`; or an end."""
    ends = [(math.log(knob), value_of(knob) - goal) for knob in (low, high)]
    if ends[0][1] <= 0 or ends[1][1] >= 0:
        return low if ends[0][1] <= 0 else high
    for _ in range(20):
        (left, over), (right, under) = ends
        place = left + (right - left) * over / (over - under)
        rest = value_of(math.exp(place)) - goal
        if abs(rest) <= 1e-4 * goal:
            break
        # The end that stays counts half (Illinois rule), or it would stay for ever.
        ends = [(place, rest), (right, under / 2)] if rest > 0 else [(left, over / 2), (place, rest)]
    return math.exp(place)


def fit_rate(
    size_of: Callable[[float], int],
    estimate: Callable[[float], float],
    target_bytes: int,
    low: float,
    high: float,
    slack: float = 1e-3,
) -> RateFit:
    """Find the knob whose size is the largest within [(1 - slack), 1] of target_bytes.

    size_of falls as the knob grows, and costs a whole coding; `estimate` is cheap, and sizes are nearly
    linear in it: the line through the two nearest to the target says which estimate to look for. A low end
    that fits already is returned: there are bytes left over and nothing to spend them on. A high end that
    does not fit is an error.
    """
    goal = sought = target_bytes * (1 - slack / 2)
    sizes: dict[float, int] = {}
    left, right = low, high
    while len(sizes) < 16:
        knob = solve_falling(estimate, sought, left, right)
        if knob in sizes:  # what is left of the bracket is narrower than the estimate is true
            knob = math.sqrt(left * right)
        size = sizes[knob] = size_of(knob)
        left, right = (knob, right) if size > target_bytes else (left, knob)
        if target_bytes * (1 - slack) <= size <= target_bytes or left == right:
            break
        near, other = (2 * sorted(sizes, key=lambda knob: abs(sizes[knob] - goal)))[:2]
        apart = estimate(near) - estimate(other)
        slope = (sizes[near] - sizes[other]) / apart if apart else 1.0
        missing = goal - sizes[near]
        sought = estimate(near) + missing / slope if slope > 0 else math.copysign(math.inf, missing)
    fitting = {size: knob for knob, size in sizes.items() if size <= target_bytes}
    if not fitting:
        least = min(sizes.values())
        raise UserError(
            f"expected at most {target_bytes:,} bytes, found {least:,} at the coarsest setting {high:g}: "
            f"{least - target_bytes:,} over. Raise quant.target_bytes, widen the range of the knob or make "
            "the model smaller."
        )
    best = max(fitting)
    return RateFit(fitting[best], best, len(sizes))


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
