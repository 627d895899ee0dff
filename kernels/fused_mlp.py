"""The MLP with max(h, slope h)^2 computed where the product h = x up^T leaves the tensor cores, both ways.

What the backward pass needs of h is its sign: |max(h, slope h)| is the root of the activation, which the
next product and its gradient read anyway. So the up-product writes the activation and one bit of sign an
element, never h; the backward product grad down takes the derivative from both, and never writes what it
multiplies. In bytes an element of (N, F): 6.25 each step of a visit, where a pass over h in memory needs 14.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import jit, last_dense, tl

# Of a program: two programs share a multiprocessor, so that one writes while the other multiplies.
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
BYTE_SIGNS = 8  # a byte; F is a multiple of it


@jit
def square_kernel(
    a, b, out, signs, square, size_m, size_n, a_row, b_k, b_n,
    SLOPE: tl.constexpr, BACKWARD: tl.constexpr, SIZE_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(size_n, BLOCK_N)
    first_m = (tl.program_id(0) // num_columns).to(tl.int64) * BLOCK_M  # neighbours share the rows of a
    program_n = tl.program_id(0) % num_columns
    left_m = (size_m - first_m).to(tl.int32)  # rows from here on
    m = tl.arange(0, BLOCK_M)
    n = program_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Offsets within a tile have 32 bits; what lies beyond the edges is not stored.
    a_place = a + first_m * a_row + (m % left_m * a_row)[:, None] + k[None, :]
    b_place = b + (n % size_n * b_n)[None, :] + (k * b_k)[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, SIZE_K, BLOCK_K):
        if SIZE_K % BLOCK_K == 0:
            left = tl.load(a_place)
            right = tl.load(b_place)
        else:
            left = tl.load(a_place, mask=(k < SIZE_K - first)[None, :], other=0.0)
            right = tl.load(b_place, mask=(k < SIZE_K - first)[:, None], other=0.0)
        product = tl.dot(left, right, product, input_precision="ieee")
        a_place += BLOCK_K
        b_place += BLOCK_K * b_k
    # By halves of the columns: what a half needs beside the products then fits the registers.
    halves = tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    products = tl.split(halves)
    bit = tl.arange(0, 8)[None, None, :]
    for half in tl.static_range(2):
        part = products[half]
        n = program_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        byte = program_n * (BLOCK_N // 8) + half * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
        live = (m < left_m)[:, None] & (n < size_n)[None, :]
        place = (m * size_n)[:, None] + n[None, :]
        sign_place = signs + first_m * (size_n // 8) + (m * (size_n // 8))[:, None] + byte[None, :]
        sign_live = (m < left_m)[:, None] & (byte < size_n // 8)[None, :]
        if BACKWARD:
            packed = tl.load(sign_place, mask=sign_live, other=0).to(tl.int32)
            negative = tl.reshape((packed[:, :, None] >> bit) & 1, (BLOCK_M, BLOCK_N // 2))
            root = tl.sqrt(tl.load(square + first_m * size_n + place, mask=live, other=0.0).to(tl.float32))
            part *= root * tl.where(negative == 1, -2.0 * SLOPE, 2.0)
        else:
            negative = tl.reshape((part < 0).to(tl.int32), (BLOCK_M, BLOCK_N // 16, 8))
            tl.store(sign_place, tl.sum(negative << bit, 2).to(tl.uint8), mask=sign_live)
            part = tl.where(part < 0, SLOPE * part, part)
            part *= part
        tl.store(out + first_m * size_n + place, part.to(out.dtype.element_ty), mask=live)


def launch(a: Tensor, b: Tensor, out: Tensor, signs: Tensor, **options) -> None:
    """Multiply a (M, K) with b (K, N) and apply the epilogue; with `square` it is the backward one."""
    size_n = b.size(1)
    grid = (-(-a.size(0) // TILE["BLOCK_M"]) * -(-size_n // TILE["BLOCK_N"]),)
    square = options.pop("square", out)
    places = a.size(0), size_n, a.stride(0), *b.stride()
    constants = TILE | {"SIZE_K": a.size(1), "BACKWARD": square is not out} | options
    square_kernel[grid](a, b, out, signs, square, *places, **constants)


@torch.library.custom_op("golf::square_up", mutates_args=())
def square_up(x: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Return max(h, slope h)^2 with h = x up^T, (N, F), and the signs of h, (N, F / 8) bytes."""
    x = last_dense(x)
    out = x.new_empty(len(x), len(up))
    signs = x.new_empty(len(x), len(up) // BYTE_SIGNS, dtype=torch.uint8)
    launch(x, up.mT, out, signs, SLOPE=slope)
    return out, signs


@square_up.register_fake
def _(x, up, slope):
    return x.new_empty(len(x), len(up)), x.new_empty(len(x), len(up) // BYTE_SIGNS, dtype=torch.uint8)


@torch.library.custom_op("golf::square_back", mutates_args=())
def square_back(dy: Tensor, down: Tensor, square: Tensor, signs: Tensor, slope: float) -> Tensor:
    """Return the gradient of h, (N, F), from dy (N, D), down (D, F) and what square_up returned."""
    dy = last_dense(dy)
    out = torch.empty_like(square)
    launch(dy, down, out, signs, SLOPE=abs(slope), square=square)
    return out


@square_back.register_fake
def _(dy, down, square, signs, slope):
    return torch.empty_like(square)


class SquareMlp(torch.autograd.Function):
    """max(h, slope h)^2 down^T with h = x up^T, for x (N, D), up (F, D), down (D, F) of one dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        square, signs = square_up(x, up, slope)
        ctx.save_for_backward(x, up, down, square, signs)
        ctx.slope = slope
        return F.linear(square, down)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, up, down, square, signs = ctx.saved_tensors
        dh = square_back(dy, down, square, signs, ctx.slope)
        return dh @ up, dh.mT @ x, dy.mT @ square, None
