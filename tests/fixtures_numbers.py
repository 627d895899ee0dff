"""A tolerance that follows the size of the numbers which it compares."""

import torch


def assert_close_at_scale(found, expected, units: float, dtype: torch.dtype = torch.float32) -> None:
    """Allow `units` in the last place of the largest expected number, for all numbers alike.

    Processors add in another order, fuse products with sums or not, and choose kernels by shape and number
    of threads. Each of these rounds the largest terms of a sum otherwise, so that two right results differ
    by a part of the largest terms, however small the sum itself is. One product of K terms rounds to about
    sqrt(K) / 2 units; dtype is that of the computation.
    """
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    unit = torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=units * unit, rtol=0)
