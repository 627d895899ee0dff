"""Fused operations on made-up inputs, each with its formula, and a program that uses them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fixtures_model import ROOT
from torch import Tensor

from kernels.fused import HeadGate, exclude_and_gate, head_loss, norm_rotate, square_mlp


class FusedCase(NamedTuple):
    """An operation, its inputs and its formula."""

    leaves: list[Tensor]
    run: Callable[..., Tensor]  # (fused, *leaves)
    exact: Callable[..., Tensor]  # (*leaves) in float64


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a leaf whose values the dtype holds exactly."""
    return torch.randn(shape).to(dtype).requires_grad_()


def norm_case(
    tokens: int, heads: int, dims: tuple[int, int], has_gain: bool, dtype: torch.dtype
) -> FusedCase:
    """Two rows of (tokens, heads, K), d of K dimensions rotated; tables of more positions than there are."""
    head_dim, turned = dims
    angles = torch.rand(tokens + 3, 1, turned // 2) * 6.28
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def run(fused: bool, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return norm_rotate(x, (cos.to(x.dtype), sin.to(x.dtype)), gain, fused)

    def exact(x: Tensor, gain: Tensor | None = None) -> Tensor:
        normed = x / x.square().mean(-1, keepdim=True).sqrt()
        pairs = torch.complex(normed[..., : turned // 2], normed[..., turned // 2 : turned])
        pairs = pairs * torch.complex(cos.double(), -sin.double())[3:]
        y = torch.cat((pairs.real, pairs.imag, normed[..., turned:]), -1)
        return y if gain is None else torch.einsum("bthk,h->bthk", y, gain.to(dtype).double())

    gains = [draw(heads)] if has_gain else []
    return FusedCase([draw(2, tokens, heads, head_dim, dtype=dtype), *gains], run, exact)


def gate_case(tokens: int, heads: tuple[int, int, int], parts: str, dtype: torch.dtype) -> FusedCase:
    """Two rows; `parts` names what is there of value and gate, which reads 12 of 20 channels."""
    num_heads, num_kv_heads, head_dim = heads
    leaves = [draw(2, tokens, num_heads, head_dim, dtype=dtype)]
    leaves += [draw(2, tokens, num_kv_heads, head_dim, dtype=dtype)] if "value" in parts else []
    leaves += [draw(2, tokens, 20, dtype=dtype), draw(num_heads, 12)] if "gate" in parts else []

    def read(others: tuple[Tensor, ...]) -> tuple:
        v = others[0] if "value" in parts else None
        return v, others[-2:] if "gate" in parts else None

    def run(fused: bool, y: Tensor, *others: Tensor) -> Tensor:
        v, gate = read(others)
        return exclude_and_gate(y, v, gate and HeadGate(*gate, 2.0, 0.5), fused)

    def exact(y: Tensor, *others: Tensor) -> Tensor:
        v, gate = read(others)
        if v is not None:
            v = v.repeat_interleave(num_heads // num_kv_heads, 2)
            y = y - v * ((y * v).sum(-1) / (v * v).sum(-1))[..., None]
        if gate is not None:
            score = gate[0][..., :12] @ gate[1].to(dtype).double().mT
            y = y * (2 / (1 + torch.exp(-score / 2)))[..., None]
        return y

    return FusedCase(leaves, run, exact)


def mlp_case(tokens: int, sizes: tuple[int, int], slope: float, dtype: torch.dtype) -> FusedCase:
    """D and F of a size; weights are float32."""
    model_dim, hidden = sizes
    leaves = [draw(tokens, model_dim, dtype=dtype), draw(hidden, model_dim), draw(model_dim, hidden)]

    def exact(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = x @ up.to(dtype).double().mT
        return torch.where(h < 0, slope * h, h) ** 2 @ down.to(dtype).double().mT

    return FusedCase(leaves, lambda fused, *leaves: square_mlp(*leaves, slope, fused), exact)


def loss_case(tokens: int, sizes: tuple[int, int], cap: float, dtype: torch.dtype) -> FusedCase:
    """V and D of a size."""
    vocab_size, model_dim = sizes
    targets = torch.randint(vocab_size, (tokens,))
    leaves = [draw(tokens, model_dim, dtype=dtype), draw(vocab_size, model_dim)]

    def exact(x: Tensor, rows: Tensor) -> Tensor:
        logits = x @ rows.to(dtype).double().mT
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return (logits.logsumexp(1) - logits[torch.arange(tokens), targets]).mean()

    return FusedCase(leaves, lambda fused, *leaves: head_loss(*leaves, targets, cap, fused), exact)


def compare(case: FusedCase, fused: bool) -> list[tuple[Tensor, Tensor]]:
    """Return (found, expected) of the output and of each gradient, all in float64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    y, exact = case.run(fused, *case.leaves), case.exact(*wide)
    dy = torch.randn(y.shape).to(y.dtype)
    found = [y, *torch.autograd.grad(y, case.leaves, dy)]
    expected = [exact, *torch.autograd.grad(exact, wide, dy.double())]
    assert [one.dtype for one in found[1:]] == [leaf.dtype for leaf in case.leaves]
    return [(ours.detach().double(), theirs.detach()) for ours, theirs in zip(found, expected)]


PROGRAM = '''
"""A program that uses the kernels as a trainer does."""

import json
import sys
from dataclasses import dataclass

import torch

from formats.recipe import option
from kernels.fused import HeadGate, exclude_and_gate, head_loss, norm_rotate, square_mlp
from kernels.fused_choice import FusedShape, resolve_fused

PACKED_RECIPE: dict | None = None


@dataclass(frozen=True)
class ModelConfig:
    fused: str = option("off")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()


def main() -> None:
    """Print loss and gradients; operations named on the command line are kernels even where no GPU is."""
    cfg = Config()
    torch.manual_seed(0)
    names = ()
    if cfg.model.fused != "off":
        cpu = torch.device("cpu")
        names = resolve_fused(cfg.model.fused, cpu, torch.bfloat16, FusedShape(), True).names
        names += tuple(sys.argv[1:])
    x, rows, targets = torch.randn(1, 5, 64), torch.randn(40, 64), torch.randint(40, (5,))
    q, v, gain = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16), torch.ones(4)
    weight, up, down = torch.randn(4, 12), torch.randn(32, 64) / 8, torch.randn(64, 32) / 6
    rope = torch.rand(5, 1, 4), torch.rand(5, 1, 4)
    leaves = [one.requires_grad_() for one in (x, rows, q, v, gain, weight, up, down)]
    y = norm_rotate(q, rope, gain, "qk" in names)
    y = exclude_and_gate(y, v, HeadGate(x, weight, 1.0, 0.5), "xsa" in names)
    y = square_mlp(x + y.flatten(2), up, down, 0.5, "mlp" in names)
    loss = head_loss(y[0], rows, targets, 30.0, "loss" in names)
    grads = torch.autograd.grad(loss, leaves)
    print(json.dumps([loss.item(), *(float(grad.abs().sum()) for grad in grads), "triton" in sys.modules]))


if __name__ == "__main__":
    main()
'''


def write_project(folder: Path) -> Path:
    """Write the program beside copies of what it imports; returns its file."""
    for name in ("kernels", "formats", "durable"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "common.py", folder)
    for fused in ("auto", "off"):
        (folder / f"{fused}.toml").write_text(f'[model]\nfused = "{fused}"\n')
    (folder / "train_gpt.py").write_text(PROGRAM.lstrip())
    return folder / "train_gpt.py"
