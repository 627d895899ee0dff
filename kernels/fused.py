"""Operations of a block and of the loss that one GPU kernel can do in one pass, and their plain twins.

    q = norm_rotate(q, rope, gain, fused)             # "qk": RMS norm, RoPE, gain a head
    y = square_mlp(x, up, down, slope, fused)         # "mlp": up, leaky ReLU squared, down
    y = exclude_and_gate(y, v, gate, fused)           # "xsa": XSA and the gate of heads' outputs
    loss = head_loss(x, rows, targets, cap, fused)    # "loss": head, softcap, mean cross-entropy

fused False: plain PyTorch, the oracle and what a CPU runs. True: Triton kernels (kernels/fused_*.py) that
keep float32 between reading and writing, forward and backward; they work eagerly and in torch.compile, take
any strides as long as the last is 1, and give the same bits in every run. Weights and gains are the float32
masters; they are rounded to the activations' dtype at their use, as in the plain form. Which operations pay
on a card is found out by kernels/fused_choice.py.
Shapes: B rows, T positions, H query heads, G kv heads (G divides H), K head dim, D model, F mlp, V words.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_heads import gate_forward, norm_rotate_forward
from kernels.fused_loss import head_loss_forward
from kernels.fused_mlp import SquareMlp
from kernels.loss import blocked_loss
from kernels.norm import rms_norm


class HeadGate(NamedTuple):
    """A gate of heads' outputs: scale * sigmoid(slope * (x[..., :W] weight^T)), W the weight's columns."""

    x: Tensor  # (B, T, D), the block's normed input
    weight: Tensor  # (H, W)
    scale: float
    slope: float


def norm_rotate(
    x: Tensor, rope: tuple[Tensor, Tensor], gain: Tensor | None = None, fused: bool = False
) -> Tensor:
    """RMS-normalise heads (B, T, H, K), rotate them as `rotate` does, scale each by its gain of (H,)."""
    if fused:
        return norm_rotate_forward(x, *last_positions(rope, x.size(1)), gain)
    x = rotate(rms_norm(x), rope)
    return x if gain is None else x * gain.to(x.dtype)[:, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to the first d dimensions of (B, T, H, K), those of the tables; pairs are (i, i + d / 2).

    The tables may be longer: x holds the last of their positions.
    """
    cos, sin = last_positions(rope, x.size(1))
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def last_positions(rope: tuple[Tensor, Tensor], seq_len: int) -> list[Tensor]:
    """Return the tables of the last positions."""
    return [table[-seq_len:] for table in rope]


def square_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, fused: bool = False) -> Tensor:
    """Return max(h, slope h)^2 down^T with h = x up^T, for x (..., D), up (F, D), down (D, F)."""
    if fused:
        return SquareMlp.apply(x.flatten(0, -2), up.to(x.dtype), down.to(x.dtype), slope).view(x.shape)
    h = F.linear(x, up.to(x.dtype))
    return F.linear(F.leaky_relu(h, slope).square(), down.to(x.dtype))


def exclude_and_gate(y: Tensor, v: Tensor | None, gate: HeadGate | None, fused: bool = False) -> Tensor:
    """Take each head's part along its position's value out of y (B, T, H, K), then gate the heads.

    v (B, T, G, K) None: nothing is taken out; gate None: none.
    """
    if fused and gate is None:
        return gate_forward(y, v, None, None, 0.0, 0.0)
    if fused:
        x, weight, scale, slope = gate
        return gate_forward(y, v, x[..., : weight.size(1)], weight, scale, slope)
    if v is not None:
        y = subtract_self_value(y, v)
    if gate is None:
        return y
    x, weight, scale, slope = gate
    score = F.linear(x[..., : weight.size(1)].contiguous(), weight.to(x.dtype))  # (B, T, H)
    return y * (scale * torch.sigmoid(slope * score)).unsqueeze(-1)


def subtract_self_value(y: Tensor, v: Tensor) -> Tensor:
    """Take out of each head's output its part along the position's own value (XSA, arXiv 2603.09078).

    y <- y - (y . v^) v^ with v^ = v / |v|, for y (B, T, H, K) and v (B, T, G, K); G divides H.
    """
    direction = F.normalize(v, dim=-1).unsqueeze(3)  # (B, T, G, 1, K)
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H / G, K)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


def head_loss(x: Tensor, rows: Tensor, targets: Tensor, cap: float, fused: bool = False) -> Tensor:
    """Return the mean cross-entropy in nats of (N, D) states, (V, D) head rows, (N,) targets.

    Logits z are capped to cap * tanh(z / cap); cap 0: they are not.
    """
    if fused:
        return head_loss_forward(x, rows, targets, cap)[0]
    return blocked_loss(x, rows, targets, cap)
