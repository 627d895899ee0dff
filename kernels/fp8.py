"""Matrix products in 8-bit floats: E4M3 forward, E5M2 backward, delayed scaling (arXiv 2209.05433).

A tensor is multiplied by its scale, saturated, rounded to 8 bits; the product is divided by both scales.
A scale follows the largest absolute values (amax) of past steps: largest 8-bit value / amax * 2^-margin.
`emulate` rounds the same and multiplies in float32, where products of 8-bit floats are exact; `gemm` calls
the device's 8-bit product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common import UserError
from kernels.machine import nvidia_capability

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {FORWARD: 448.0, BACKWARD: 57_344.0}
ROLES = (FORWARD, FORWARD, BACKWARD)  # of input, weight, output gradient: the columns of the state's tables
FP8_MULTIPLE = 16  # of both dimensions of a weight, for the device's product
FP8_CAPABILITY = (8, 9)  # the first CUDA devices with 8-bit products


class Fp8Rule(NamedTuple):
    """How scales follow the amax of past steps."""

    product: str = "emulate"  # emulate | gemm
    margin: int = 0  # octaves of headroom
    history_len: int = 16  # steps remembered
    amax: str = "max"  # max: of the history | most_recent
    calibration_steps: int = 0  # steps that only record


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale, saturate and round to 8 bits."""
    limit = LARGEST[dtype]
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


def fp8_product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], settings: tuple) -> Tensor:
    """Multiply 8-bit (M, N) and (N, P) values, divide by their scales; settings: (product, output dtype)."""
    product, dtype = settings
    if product == "emulate":
        return (a.float() @ b.float() / (scales[0] * scales[1])).to(dtype)
    column_major = b.t().contiguous().t()
    inverse = [scale.reciprocal() for scale in scales]
    return torch._scaled_mm(a.contiguous(), column_major, inverse[0], inverse[1], out_dtype=dtype)


class Fp8Linear(torch.autograd.Function):
    """x @ weight.T with 8-bit operands in all three products; records amax into row (3,) in place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scales: Tensor, seen: Tensor, product: str) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        record_amax(seen[0], flat)
        record_amax(seen[1], weight)
        coded_x, coded_w = to_fp8(flat, scales[0], FORWARD), to_fp8(weight, scales[1], FORWARD)
        ctx.save_for_backward(coded_x, coded_w, scales)
        ctx.seen = seen  # not saved: every micro-batch raises it in place
        ctx.product, ctx.shape, ctx.dtypes = product, x.shape, (x.dtype, weight.dtype)
        y = fp8_product(coded_x, coded_w.t(), (scales[0], scales[1]), (product, x.dtype))
        return y.view(*x.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        coded_x, coded_w, scales = ctx.saved_tensors
        flat = grad.reshape(-1, grad.size(-1))
        record_amax(ctx.seen[2], flat)
        coded = to_fp8(flat, scales[2], BACKWARD)
        grad_x = fp8_product(coded, coded_w, (scales[2], scales[1]), (ctx.product, ctx.dtypes[0]))
        grad_w = fp8_product(coded.t(), coded_x, (scales[2], scales[0]), (ctx.product, ctx.dtypes[1]))
        return grad_x.view(ctx.shape), grad_w, None, None, None


class RecordAmax(torch.autograd.Function):
    """The identity, which records the amax of the gradient that passes: calibration."""

    @staticmethod
    def forward(ctx, y: Tensor, seen: Tensor) -> Tensor:
        ctx.seen = seen
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        record_amax(ctx.seen[2], grad)
        return grad, None


def record_amax(seen: Tensor, x: Tensor) -> None:
    """Raise the amax of this step."""
    seen.copy_(torch.maximum(seen, x.detach().abs().amax().float()))


class Fp8State:
    """Amax of this step and of past ones, (N, 3) and (history_len, N, 3), for N weights."""

    def __init__(self, num_weights: int, rule: Fp8Rule, device: torch.device):
        self.rule = rule
        self.seen = torch.zeros(num_weights, len(ROLES), device=device)
        self.history = torch.zeros(rule.history_len, num_weights, len(ROLES), device=device)
        self.calibrated = rule.calibration_steps == 0  # whether products are 8-bit by now
        self.largest = torch.tensor([LARGEST[role] for role in ROLES], device=device)
        self.steps = 0
        self.scales = self.next_scales()

    def next_scales(self) -> Tensor:
        """Return the (N, 3) scales that the history gives; 1 where nothing was seen."""
        amax = self.history[0] if self.rule.amax == "most_recent" else self.history.amax(0)
        usable = (amax > 0) & torch.isfinite(amax)
        return torch.where(usable, self.largest / amax * 2.0**-self.rule.margin, torch.ones_like(amax))

    def roll(self, seen: Tensor) -> None:
        """End a step: `seen`, this step's amax over all ranks, becomes the newest row of the history."""
        self.history = torch.cat((seen[None], self.history[:-1]))
        self.scales = self.next_scales()
        self.seen.zero_()
        self.count(self.steps + 1)

    def count(self, steps: int) -> None:
        """Set the steps done; compiled products look at `calibrated` alone, which changes once."""
        self.steps = steps
        self.calibrated = steps >= self.rule.calibration_steps

    def state_dict(self) -> dict:
        return {"seen": self.seen, "history": self.history, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.seen.copy_(state["seen"])
        self.history = state["history"].to(self.history.device, copy=True)
        self.scales = self.next_scales()
        self.count(state["steps"])


class Fp8Gemm:
    """What a Linear calls instead of its product: row `index` of the shared state."""

    def __init__(self, state: Fp8State, index: int):
        self.state, self.index = state, index

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        seen = self.state.seen[self.index]
        if self.state.calibrated:
            scales = self.state.scales[self.index]
            return Fp8Linear.apply(x, weight, scales, seen, self.state.rule.product)
        record_amax(seen[0], x)
        record_amax(seen[1], weight)
        return RecordAmax.apply(torch.nn.functional.linear(x, weight.to(x.dtype)), seen)


def require_fp8(rule: Fp8Rule, shapes: dict[str, tuple[int, int]], device: torch.device) -> None:
    """Raise where the device has no 8-bit product or a weight's dimensions do not fit it."""
    for name, shape in shapes.items():
        if any(dim % FP8_MULTIPLE for dim in shape):
            raise UserError(
                f"model.fp8={rule.product}: {name} is {shape[0]} x {shape[1]}, expected multiples of "
                f"{FP8_MULTIPLE}. Change model.model_dim, num_kv_heads or mlp_mult, or set model.fp8=off."
            )
    if rule.product == "gemm" and nvidia_capability(device) < FP8_CAPABILITY:
        raise UserError(
            f"model.fp8=gemm: expected an NVIDIA GPU of capability {FP8_CAPABILITY} or later, found "
            f"{device.type}. Set model.fp8=emulate (the same rounding, slower) or model.fp8=off."
        )
