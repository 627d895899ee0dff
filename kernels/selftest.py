"""A kernel held against its oracle at start: the self-test of attention backends and of fused kernels."""

import math
from collections.abc import Callable

from torch import Tensor


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest element of its tensor; infinite for NaN."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def why_wrong(test: Callable[[], float], tolerance: float, oracle: str) -> str:
    """Run a test that returns a relative error; say what is wrong, empty for nothing."""
    try:
        error = test()
    except Exception as problem:  # what foreign kernels, compilers and drivers raise has no common class
        return f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
    return "" if error <= tolerance else f"it differs from {oracle} by {error:.2g} of the largest element"
