"""RMS norm: torch's where it is one kernel, on a CPU without a compiler one of fewer passes.

There torch computes it from eight operations forward and more backward, in bfloat16 with casts between them:
18 norms were a tenth of a step of the CPU recipe (dev/LOG.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension; the factor of a row is rounded to x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        y = x * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, factor = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(factor), None


def rms_norm(x: Tensor, gain: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Divide by the root mean square over the last dimension, times a gain a channel.

    eps is added to the mean square; None: the epsilon of x's dtype, float32's for bfloat16, as torch has it.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.size(-1),), gain, eps)
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    y = RmsNorm.apply(x, eps)
    return y if gain is None else y * gain
