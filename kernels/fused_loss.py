"""Mean softcapped cross-entropy of a large vocabulary: logits in chunks of rows, each read and written once.

A chunk's logits are written by the product, read by one kernel that overwrites them with their gradient, and
read by two more products; the forward pass finds all gradients. kernels/loss.py is the same for a CPU.
"""

import torch
from torch import Tensor

from kernels.jit import jit, tl
from kernels.loss import mean_gradients

CHUNK_LOGITS = 1 << 26  # elements of a chunk: 128 MiB in bfloat16
MOST_VOCAB = 1 << 16  # a program holds a row in registers


@jit
def loss_kernel(logits, targets, losses, vocab_size, CAP: tl.constexpr, BLOCK: tl.constexpr):
    # A program does a row, whose logits become their gradient.
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK)
    live = entry < vocab_size
    place = logits + row * vocab_size + entry
    z = tl.load(place, mask=live, other=0.0).to(tl.float32)
    if CAP > 0:  # cap tanh(z / cap) is 2 cap sigmoid(2 z / cap) - cap, and softmax sees no constant
        share = 1.0 / (1.0 + tl.exp(z * (-2.0 / CAP)))
        z = share * (2.0 * CAP)
    is_target = entry == tl.load(targets + row)
    wanted = tl.sum(tl.where(is_target, z, 0.0), 0)
    z = tl.where(live, z, float("-inf"))
    largest = tl.max(z, 0)
    grad = tl.exp(z - largest)
    total = tl.sum(grad, 0)
    tl.store(losses + row, tl.log(total) + largest - wanted)
    grad = grad / total - tl.where(is_target, 1.0, 0.0)
    if CAP > 0:
        grad *= 4.0 * share * (1.0 - share)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=live)


def loss_constants(vocab_size: int, cap: float) -> dict:
    """Return the constants of the kernel: registers enough for a row, 32 elements a thread."""
    block = max(1 << (vocab_size - 1).bit_length(), 128)
    return {"CAP": cap, "BLOCK": block, "num_warps": min(max(block // 1024, 4), 32)}


@torch.library.custom_op("golf::head_loss", mutates_args=())
def head_loss_forward(x: Tensor, rows: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss, and the gradients of the sum of losses: of x (N, D) and of rows (V, D)."""
    table, vocab_size = rows.to(x.dtype), len(rows)
    losses = x.new_empty(len(x), dtype=torch.float32)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_rows = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    constants = loss_constants(vocab_size, cap)
    size = max(CHUNK_LOGITS // vocab_size, 1)
    chunks = zip(x.split(size), targets.split(size), losses.split(size), grad_x.split(size))
    for part, wanted, lost, grad_part in chunks:
        logits = part @ table.mT
        loss_kernel[(len(part),)](logits, wanted.contiguous(), lost, vocab_size, **constants)
        torch.mm(logits, table, out=grad_part)
        grad_rows += logits.mT @ part
    return losses.mean(), grad_x, grad_rows.to(rows.dtype)


@head_loss_forward.register_fake
def _(x, rows, targets, cap):
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape), rows.new_empty(rows.shape)


def _keep_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _loss_gradients(ctx, grad, *_):
    return *mean_gradients(grad, *ctx.saved_tensors), None, None


head_loss_forward.register_autograd(_loss_gradients, setup_context=_keep_loss)
