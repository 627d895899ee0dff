"""Cross-entropy of a large vocabulary in blocks of rows, so that logits stay in a CPU's cache.

Whole logits of 4,096 tokens and 4,096 entries are 64 MiB, and a dozen elementwise passes over them cost
more than the products. Here a block's logits live only until its share of the gradients is known.
"""

import torch
from torch import Tensor

BLOCK_LOGITS = 1 << 19  # elements of a block: 2 MiB of float32


class BlockedLoss(torch.autograd.Function):
    """Mean of -log softmax(cap * tanh(x W^T / cap))[target]; the forward pass finds the gradients too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        table = weight.to(x.dtype)
        rows = max(BLOCK_LOGITS // len(weight), 1)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(table)
        for block, wanted, grad_rows in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            logits, index = (block @ table.mT).to(wide), torch.arange(len(wanted), device=x.device)
            if cap:  # cap tanh(z / cap) is 2 cap sigmoid(2 z / cap) - cap, and softmax sees no constant
                sigmoid = logits.mul_(2 / cap).sigmoid_()
                logits = sigmoid * (2 * cap)
            grad = torch.softmax(logits, dim=1)
            # The log of the sum of exponentials, by the largest: its share is at least 1 / V.
            total += (logits.amax(1) - grad.amax(1).log() - logits[index, wanted]).sum()
            grad[index, wanted] -= 1
            if cap:
                grad.mul_(sigmoid.addcmul_(sigmoid, sigmoid, value=-1).mul_(4))
            grad = grad.to(x.dtype)
            torch.mm(grad, table, out=grad_rows)
            grad_weight.addmm_(grad.mT, block)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *mean_gradients(grad, *ctx.saved_tensors), None, None


def mean_gradients(grad: Tensor, grad_x: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the gradients of the sum of (N,) losses into those of their mean, whose gradient is `grad`."""
    share = grad / len(grad_x)
    return grad_x * share.to(grad_x.dtype), grad_weight * share.to(grad_weight.dtype)


def blocked_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Return the mean cross-entropy in nats of (N, D) states, (V, D) head rows, (N,) targets; cap 0: none."""
    return BlockedLoss.apply(x, weight, targets, cap)
