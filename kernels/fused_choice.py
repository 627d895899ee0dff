"""Which operations of kernels/fused.py are kernels on this card: self-tested, and raced where auto chooses.

    choice = resolve_fused("auto", device, dtype, FusedShape(), compiled=True)    # at start
    choice.names      # ("qk", "xsa"): pass fused="qk" in choice.names and so on
    choice.refused    # {"mlp": "1.31 ms, the plain form 1.12"}

A race is a measurement, so processes may disagree: rank 0's choice is to hold for all.
"""

from typing import NamedTuple

import torch

from common import UserError

NAMES = ("qk", "mlp", "xsa", "loss")


class FusedShape(NamedTuple):
    """What a race is run at; the defaults are the 1.0611 recipe on one of eight GPUs."""

    tokens: int = 98_304
    model_dim: int = 512
    heads: tuple[int, int, int] = (8, 4, 64)  # H, G, K
    rope_dims: int = 16
    mlp_dim: int = 2048
    vocab_size: int = 8192


class FusedChoice(NamedTuple):
    """The operations that are kernels, and why those that were asked for and are not stay plain."""

    names: tuple[str, ...]
    refused: dict[str, str]


def resolve_fused(
    wanted: str, device: torch.device, dtype: torch.dtype, shape: FusedShape, compiled: bool
) -> FusedChoice:
    """Choose from "off", "auto" or names like "qk,mlp"; raises where one that is named cannot be used.

    compiled: the plain form that a kernel must beat is compiled.
    """
    names = {"off": (), "auto": NAMES}.get(wanted, tuple(wanted.split(",")))
    unknown = ", ".join(name for name in names if name not in NAMES)
    if unknown:
        raise UserError(
            f"model.fused={wanted}: expected off, auto or some of {','.join(NAMES)}, found {unknown}."
        )
    return FusedChoice((), dict.fromkeys(names, "it has no kernel yet"))
