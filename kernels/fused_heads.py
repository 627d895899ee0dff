"""Kernels of attention heads: norm, rotation and gain in one pass, XSA and gates in another, both ways.

A program of a kernel does some tokens of one head, or of all heads where tokens' gradients sum over them.
Sums over tokens go through one partial sum a program, so that no result depends on the order of programs.
"""

import torch
from torch import Tensor

from kernels.jit import jit, last_dense, tl

ROTATED_TOKENS = 64  # of a program
GATED_TOKENS = 16
EPS = torch.finfo(torch.float32).eps  # of the norm, as rms_norm has it for bfloat16
LEAST_NORM = 1e-12  # of a value, as F.normalize has it


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of (B, T, heads, K); the last is 1."""
    return x.stride()[:3]


# RMS norm, rotation, gain


@jit
def rotate_forward_kernel(
    x, cos, sin, gain, y, x_row, x_token, x_head, num_tokens, seq_len,
    EPS: tl.constexpr, HAS_GAIN: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    dim = tl.arange(0, K)
    live = (token < num_tokens)[:, None]
    start = token // seq_len * x_row + token % seq_len * x_token + head * x_head
    turned = live & (dim < 2 * HALF)[None, :]
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    a = tl.load(x + start[:, None] + dim[None, :], mask=live, other=0.0).to(tl.float32)  # (BLOCK, K)
    b = tl.load(x + start[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    angle = (token % seq_len * HALF)[:, None] + (dim % HALF)[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    s = tl.where((dim < HALF)[None, :], s, -s)
    factor = 1.0 / tl.sqrt(tl.sum(a * a, 1) / K + EPS)
    if HAS_GAIN:
        factor *= tl.load(gain + head).to(y.dtype.element_ty).to(tl.float32)
    turn = (a * c + b * s) * factor[:, None]
    out = (token * tl.num_programs(0) + head) * K
    tl.store(y + out[:, None] + dim[None, :], turn.to(y.dtype.element_ty), mask=live)


@jit
def rotate_backward_kernel(
    dy, x, cos, sin, gain, dx, dgain, dy_row, dy_token, dy_head, x_row, x_token, x_head, num_tokens, seq_len,
    EPS: tl.constexpr, HAS_GAIN: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    dim = tl.arange(0, K)
    live = (token < num_tokens)[:, None]
    start = token // seq_len * x_row + token % seq_len * x_token + head * x_head
    dy_start = token // seq_len * dy_row + token % seq_len * dy_token + head * dy_head
    turned = live & (dim < 2 * HALF)[None, :]
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    a = tl.load(x + start[:, None] + dim[None, :], mask=live, other=0.0).to(tl.float32)  # (BLOCK, K)
    da = tl.load(dy + dy_start[:, None] + dim[None, :], mask=live, other=0.0).to(tl.float32)
    db = tl.load(dy + dy_start[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    angle = (token % seq_len * HALF)[:, None] + (dim % HALF)[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    s = tl.where((dim < HALF)[None, :], s, -s)
    factor = 1.0 / tl.sqrt(tl.sum(a * a, 1) / K + EPS)
    normed = a * factor[:, None]
    back = da * c - db * s  # the gradient turned back
    along = tl.sum(back * normed, 1)
    grad = (back - normed * (along / K)[:, None]) * factor[:, None]
    if HAS_GAIN:
        tl.store(dgain + tl.program_id(1) * tl.num_programs(0) + head, tl.sum(along, 0))
        grad *= tl.load(gain + head).to(dx.dtype.element_ty).to(tl.float32)
    out = (token * tl.num_programs(0) + head) * K
    tl.store(dx + out[:, None] + dim[None, :], grad.to(dx.dtype.element_ty), mask=live)


def rotation(x: Tensor, cos: Tensor, has_gain: bool) -> tuple[tuple[int, int], dict]:
    """Return the grid and the constants of a rotation kernel."""
    rows, seq_len, num_heads, head_dim = x.shape
    constants = {"K": head_dim, "HALF": cos.size(-1), "BLOCK": ROTATED_TOKENS, "num_warps": 4}
    grid = num_heads, -(-rows * seq_len // ROTATED_TOKENS)
    return grid, constants | {"EPS": EPS, "HAS_GAIN": has_gain}


@torch.library.custom_op("golf::norm_rotate", mutates_args=())
def norm_rotate_forward(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None) -> Tensor:
    """Normalise, rotate and scale (B, T, H, K); cos and sin are (T, 1, d / 2)."""
    x, cos, sin = last_dense(x), cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, constants = rotation(x, cos, gain is not None)
    sizes = x.size(0) * x.size(1), x.size(1)
    scale = x if gain is None else gain
    rotate_forward_kernel[grid](x, cos, sin, scale, y, *strides_of(x), *sizes, **constants)
    return y


@norm_rotate_forward.register_fake
def _(x, cos, sin, gain):
    return x.new_empty(x.shape)


@torch.library.custom_op("golf::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the gain, float32 (H,); empty without one."""
    dy, x, cos, sin = last_dense(dy), last_dense(x), cos.contiguous(), sin.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, constants = rotation(x, cos, gain is not None)
    partial = x.new_empty((0, 0) if gain is None else grid[::-1], dtype=torch.float32)
    places = *strides_of(dy), *strides_of(x), x.size(0) * x.size(1), x.size(1)
    scale = x if gain is None else gain
    rotate_backward_kernel[grid](dy, x, cos, sin, scale, dx, partial, *places, **constants)
    return dx, partial.sum(0)


@norm_rotate_backward.register_fake
def _(dy, x, cos, sin, gain):
    return x.new_empty(x.shape), x.new_empty(0 if gain is None else x.size(2), dtype=torch.float32)


def _keep_rotation(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _rotation_gradients(ctx, dy):
    x, cos, sin, gain = ctx.saved_tensors
    dx, dgain = norm_rotate_backward(dy, x, cos, sin, gain)
    return dx, None, None, None if gain is None else dgain.to(gain.dtype)


norm_rotate_forward.register_autograd(_rotation_gradients, setup_context=_keep_rotation)


# Exclusive self-attention and the gate of heads' outputs


@jit
def gate_forward_kernel(
    y, v, x, weight, out, y_row, y_token, y_head, v_row, v_token, v_head, x_row, x_token, num_tokens, seq_len,
    SCALE: tl.constexpr, SLOPE: tl.constexpr, LEAST: tl.constexpr, HAS_VALUE: tl.constexpr,
    HAS_GATE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    dim = tl.arange(0, K)[None, :]
    column = tl.arange(0, PADDED)[None, :]
    live = (token < num_tokens)[:, None]
    row, position = token // seq_len, token % seq_len
    y_start = (row * y_row + position * y_token)[:, None] + dim
    v_start = (row * v_row + position * v_token)[:, None] + dim
    out_start = (token * (GROUPS * HEADS * K))[:, None] + dim
    if HAS_GATE:
        read = (row * x_row + position * x_token)[:, None] + column
        seen = tl.load(x + read, mask=live & (column < WIDTH), other=0.0).to(tl.float32)  # (BLOCK, PADDED)
    for group in range(GROUPS):
        if HAS_VALUE:
            value = tl.load(v + v_start + group * v_head, mask=live, other=0.0).to(tl.float32)  # (BLOCK, K)
            value /= tl.maximum(tl.sqrt(tl.sum(value * value, 1)), LEAST)[:, None]
        for member in range(HEADS):
            head = group * HEADS + member
            kept = tl.load(y + y_start + head * y_head, mask=live, other=0.0).to(tl.float32)
            if HAS_VALUE:
                kept -= tl.sum(kept * value, 1)[:, None] * value
            if HAS_GATE:
                w = tl.load(weight + head * WIDTH + column, mask=column < WIDTH, other=0.0)
                score = tl.sum(seen * w.to(out.dtype.element_ty).to(tl.float32), 1)
                kept *= (SCALE / (1.0 + tl.exp(-SLOPE * score)))[:, None]
            tl.store(out + out_start + head * K, kept.to(out.dtype.element_ty), mask=live)


@jit
def gate_backward_kernel(
    dout, y, v, x, weight, dy, dv, dx, dweight, d_row, d_token, d_head, y_row, y_token, y_head,
    v_row, v_token, v_head, x_row, x_token, num_tokens, seq_len,
    SCALE: tl.constexpr, SLOPE: tl.constexpr, LEAST: tl.constexpr, HAS_VALUE: tl.constexpr,
    HAS_GATE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    dim = tl.arange(0, K)[None, :]
    column = tl.arange(0, PADDED)[None, :]
    live = (token < num_tokens)[:, None]
    row, position = token // seq_len, token % seq_len
    d_start = (row * d_row + position * d_token)[:, None] + dim
    y_start = (row * y_row + position * y_token)[:, None] + dim
    v_start = (row * v_row + position * v_token)[:, None] + dim
    dy_start = (token * (GROUPS * HEADS * K))[:, None] + dim
    dv_start = (token * (GROUPS * K))[:, None] + dim
    if HAS_GATE:
        read = (row * x_row + position * x_token)[:, None] + column
        seen = tl.load(x + read, mask=live & (column < WIDTH), other=0.0).to(tl.float32)  # (BLOCK, PADDED)
        dseen = tl.zeros((BLOCK, PADDED), tl.float32)
    for group in range(GROUPS):
        if HAS_VALUE:
            value = tl.load(v + v_start + group * v_head, mask=live, other=0.0).to(tl.float32)  # (BLOCK, K)
            norm = tl.sqrt(tl.sum(value * value, 1))
            inverse = 1.0 / tl.maximum(norm, LEAST)
            value *= inverse[:, None]
            dvalue = tl.zeros((BLOCK, K), tl.float32)
        for member in range(HEADS):
            head = group * HEADS + member
            kept = tl.load(y + y_start + head * y_head, mask=live, other=0.0).to(tl.float32)
            grad = tl.load(dout + d_start + head * d_head, mask=live, other=0.0).to(tl.float32)
            if HAS_VALUE:
                part = tl.sum(kept * value, 1)
                grad_part = tl.sum(grad * value, 1)
            if HAS_GATE:
                w = tl.load(weight + head * WIDTH + column, mask=column < WIDTH, other=0.0)
                w = w.to(dy.dtype.element_ty).to(tl.float32)
                share = 1.0 / (1.0 + tl.exp(-SLOPE * tl.sum(seen * w, 1)))
                dgate = tl.sum(grad * kept, 1)
                if HAS_VALUE:
                    dgate -= part * grad_part
                    grad_part *= SCALE * share
                dscore = (dgate * (SCALE * SLOPE) * share * (1.0 - share))[:, None]
                dseen += dscore * w
                place = dweight + (tl.program_id(0) * (GROUPS * HEADS) + head) * WIDTH + tl.arange(0, PADDED)
                tl.store(place, tl.sum(dscore * seen, 0), mask=tl.arange(0, PADDED) < WIDTH)
                grad *= (SCALE * share)[:, None]
            if HAS_VALUE:
                dvalue -= part[:, None] * grad + grad_part[:, None] * kept
                grad -= grad_part[:, None] * value
            tl.store(dy + dy_start + head * K, grad.to(dy.dtype.element_ty), mask=live)
        if HAS_VALUE:
            along = tl.where(norm > LEAST, tl.sum(dvalue * value, 1), 0.0)[:, None]
            dvalue = (dvalue - along * value) * inverse[:, None]
            tl.store(dv + dv_start + group * K, dvalue.to(dv.dtype.element_ty), mask=live)
    if HAS_GATE:
        place = (token * WIDTH)[:, None] + column
        tl.store(dx + place, dseen.to(dx.dtype.element_ty), mask=live & (column < WIDTH))


def gating(y: Tensor, v: Tensor | None, weight: Tensor | None, scale: float, slope: float) -> dict:
    """Return the constants of a gate kernel."""
    num_heads, head_dim = y.shape[2:]
    groups = num_heads if v is None else v.size(2)
    width = 1 if weight is None else weight.size(1)
    constants = {"GROUPS": groups, "HEADS": num_heads // groups, "K": head_dim, "WIDTH": width}
    constants |= {"PADDED": max(1 << (width - 1).bit_length(), 2), "BLOCK": GATED_TOKENS, "num_warps": 4}
    constants |= {"SCALE": scale, "SLOPE": slope, "LEAST": LEAST_NORM}
    return constants | {"HAS_VALUE": v is not None, "HAS_GATE": weight is not None}


def gate_places(v: Tensor, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Return what both gate kernels are told about where things are."""
    return *strides_of(y), *strides_of(v), *x.stride()[:2], y.size(0) * y.size(1), y.size(1)


@torch.library.custom_op("golf::exclude_and_gate", mutates_args=())
def gate_forward(
    y: Tensor, v: Tensor | None, x: Tensor | None, weight: Tensor | None, scale: float, slope: float
) -> Tensor:
    """Take the part along v out of y and gate it by x (B, T, W); either v or x and weight may be None."""
    y = last_dense(y)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    constants = gating(y, v, weight, scale, slope)
    values, read, matrix = gate_inputs(y, v, x, weight)
    grid = (-(-y.size(0) * y.size(1) // GATED_TOKENS),)
    gate_forward_kernel[grid](y, values, read, matrix, out, *gate_places(values, read, y), **constants)
    return out


def gate_inputs(y: Tensor, v: Tensor | None, x: Tensor | None, weight: Tensor | None) -> tuple:
    """Return v, x and weight as the kernels read them; y stands for what is absent and not read."""
    return (
        y if v is None else last_dense(v),
        y if x is None else last_dense(x),
        y if weight is None else weight.contiguous(),
    )


@gate_forward.register_fake
def _(y, v, x, weight, scale, slope):
    return y.new_empty(y.shape)


@torch.library.custom_op("golf::exclude_and_gate_backward", mutates_args=())
def gate_backward(
    dout: Tensor, inputs: list[Tensor], has_value: bool, scale: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of y, v, x and weight; of inputs (y, then v, then x and weight) absent ones' are
    empty."""
    y, v, x, weight = named_inputs(inputs, has_value)
    y, dout = last_dense(y), last_dense(dout)
    constants = gating(y, v, weight, scale, slope)
    values, read, matrix = gate_inputs(y, v, x, weight)
    grid = (-(-y.size(0) * y.size(1) // GATED_TOKENS),)
    dy, dv, dx = (y.new_empty(0 if one is None else one.shape) for one in (y, v, x))
    partial = y.new_empty((0, 0) if weight is None else (*grid, *weight.shape), dtype=torch.float32)
    places = *strides_of(dout), *gate_places(values, read, y)
    gate_backward_kernel[grid](dout, y, values, read, matrix, dy, dv, dx, partial, *places, **constants)
    return dy, dv, dx, partial.sum(0)


def named_inputs(inputs: list[Tensor], has_value: bool) -> tuple[Tensor | None, ...]:
    """Return (y, v, x, weight), None for what is absent."""
    y, *others = inputs
    v = others.pop(0) if has_value else None
    return y, v, *(others or (None, None))


@gate_backward.register_fake
def _(dout, inputs, has_value, scale, slope):
    y, v, x, weight = named_inputs(inputs, has_value)
    shape = 0 if weight is None else weight.shape
    grads = [y.new_empty(0 if one is None else one.shape) for one in (y, v, x)]
    return *grads, y.new_empty(shape, dtype=torch.float32)


def _keep_gate(ctx, inputs, output):
    *tensors, ctx.scale, ctx.slope = inputs
    ctx.dtype = None if tensors[3] is None else tensors[3].dtype
    ctx.present = [one is not None for one in tensors]
    ctx.save_for_backward(*tensors)


def _gate_gradients(ctx, dout):
    inputs = [one for one in ctx.saved_tensors if one is not None]
    *grads, dweight = gate_backward(dout, inputs, ctx.present[1], ctx.scale, ctx.slope)
    grads.append(dweight.to(ctx.dtype) if ctx.dtype else dweight)
    return *(grad if there else None for grad, there in zip(grads, ctx.present)), None, None


gate_forward.register_autograd(_gate_gradients, setup_context=_keep_gate)
