"""The packages of flash kernels behind one interface; each is imported when it is first called.

    y = flash3((q, k, v), offsets, window, max_len)      # causal, (B, T, heads, K)

offsets (n + 1,) int32 cut the B * T positions into documents, none of which is longer than max_len; None:
rows are whole. The kernels launch blocks for max_len positions of every document: with a packed row's whole
length that would be millions. Their window of (W, 0) keeps W + 1 keys; 0 stands for no window here.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def call_flash(kernel: Callable, inputs: tuple, offsets: Tensor | None, window: int, max_len: int) -> Tensor:
    """Call a kernel of flash-attn 2 or 3: with offsets it is the one for rows of any length."""
    q = inputs[0]
    lengths = flash_lengths(offsets, max_len)
    parts = inputs if offsets is None else (x.flatten(0, 1) for x in inputs)  # (B * T, heads, K)
    y = kernel(*parts, **lengths, causal=True, window_size=(window or -1, 0))
    return (y[0] if isinstance(y, tuple) else y).view_as(q)  # early builds of FA3 return (y, log-sum-exp)


def flash_lengths(offsets: Tensor | None, max_len: int) -> dict:
    """Spell the documents' places for the kernels; nothing without offsets."""
    if offsets is None:
        return {}
    places = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets)
    return places | dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max_len)


def flash2(inputs: tuple, offsets: Tensor | None, window: int, max_len: int) -> Tensor:
    """Use flash-attn 2 (package flash-attn)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    kernel = flash_attn_func if offsets is None else flash_attn_varlen_func
    return call_flash(kernel, inputs, offsets, window, max_len)


def flash3(inputs: tuple, offsets: Tensor | None, window: int, max_len: int) -> Tensor:
    """Use FlashAttention 3 (requirements/flash.txt), for Hopper."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    kernel = flash_attn_func if offsets is None else flash_attn_varlen_func
    return call_flash(kernel, inputs, offsets, window, max_len)


def flash4(inputs: tuple, offsets: Tensor | None, window: int, max_len: int) -> Tensor:
    """Use FlashAttention 4 (requirements/flash4.txt), for Hopper and Blackwell."""
    parts = inputs if offsets is None else (x.flatten(0, 1) for x in inputs)
    return flash4_forward(*parts, offsets, window, max_len)[0].view_as(inputs[0])


# The package has no hook for torch.compile, so its kernels are operators here. An operator is registered
# without the package; only calling it needs it.
@torch.library.custom_op("golf::flash4", mutates_args=())
def flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, window: int, max_len: int
) -> tuple[Tensor, Tensor]:
    """Return y and its log-sum-exp; with offsets the inputs are (B * T, heads, K)."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options = {"causal": True, "window_size": (window or None, 0), "return_lse": True}
    if offsets is None:
        return flash_attn_func(q, k, v, **options)
    return flash_attn_varlen_func(q, k, v, **flash_lengths(offsets, max_len), **options)


@flash4_forward.register_fake
def _(q, k, v, offsets, window, max_len):
    by_head = (q.size(1), q.size(0)) if offsets is not None else (q.size(0), q.size(2), q.size(1))
    return torch.empty_like(q), q.new_empty(by_head, dtype=torch.float32)


@torch.library.custom_op("golf::flash4_backward", mutates_args=())
def flash4_backward(
    dy: Tensor, saved: list[Tensor], offsets: Tensor | None, window: int, max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from saved q, k, v, y and log-sum-exp."""
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, y, lse = saved
    lengths = flash_lengths(offsets, max_len)
    options = {"causal": True, "window_size_left": window or None, "window_size_right": 0}
    return _flash_attn_bwd(q, k, v, y, dy.contiguous(), lse, **lengths, **options)


@flash4_backward.register_fake
def _(dy, saved, offsets, window, max_len):
    return tuple(torch.empty_like(x) for x in saved[:3])


def _keep_flash4(ctx, inputs, output):
    q, k, v, offsets, ctx.window_len, ctx.max_len = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, offsets)


def _flash4_gradients(ctx, dy, _):
    *saved, offsets = ctx.saved_tensors
    return *flash4_backward(dy, saved, offsets, ctx.window_len, ctx.max_len), None, None, None


flash4_forward.register_autograd(_flash4_gradients, setup_context=_keep_flash4)
