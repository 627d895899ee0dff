"""Stand-ins for the flash attention packages: their signatures, computed by `math` on any device."""

import math
import sys
from types import ModuleType

import torch

from kernels.attention import BACKENDS, AttentionMask, math_attention, visible_keys


def dense_kernel(q, k, v, *, causal, window_size):
    """flash_attn_func of flash-attn 2 and 3."""
    check_flags(causal, window_size)
    assert q.ndim == k.ndim == v.ndim == 4
    return math_attention(q, k, v, AttentionMask("math", max(window_size[0] or 0, 0)))


def varlen_kernel(q, k, v, *, causal, window_size, **lengths):
    """flash_attn_varlen_func of flash-attn 2, 3 and 4."""
    check_flags(causal, window_size)
    mask = AttentionMask("math", max(window_size[0] or 0, 0), flat_segments(q, **lengths))
    return math_attention(q[None], k[None], v[None], mask)[0]


def check_flags(causal, window_size):
    left, right = window_size
    assert causal is True
    assert right == 0
    assert left is None or left == -1 or left > 0


def flat_segments(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Number the documents of (B * T, H, K) from their offsets; (1, B * T)."""
    assert q.ndim == 3
    assert cu_seqlens_q is cu_seqlens_k or torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert isinstance(max_seqlen_q, int)
    assert max_seqlen_q == max_seqlen_k
    position = torch.arange(q.size(0), dtype=torch.int32, device=q.device)
    return torch.bucketize(position, cu_seqlens_q, right=True).to(torch.int32)[None]


def flash4_dense(q, k, v, *, return_lse, **options):
    """flash_attn_func of FlashAttention 4."""
    assert return_lse
    assert options["window_size"][0] != -1
    return dense_kernel(q, k, v, **options), torch.zeros(q.size(0), q.size(2), q.size(1))


def flash4_varlen(q, k, v, *, return_lse, **options):
    """flash_attn_varlen_func of FlashAttention 4."""
    assert return_lse
    assert options["window_size"][0] != -1
    return varlen_kernel(q, k, v, **options), torch.zeros(q.size(1), q.size(0))


def flash4_backward_kernel(
    q, k, v, out, dout, lse, *, causal, window_size_left, window_size_right, **lengths
):
    """_flash_attn_bwd of FlashAttention 4, by formula: autograd records nothing inside an operator."""
    check_flags(causal, (window_size_left, window_size_right))
    assert dout.is_contiguous()
    assert out.shape == dout.shape == q.shape
    segments = flat_segments(q, **lengths) if lengths else None
    q, k, v, dout = (x[None] if lengths else x for x in (q, k, v, dout))
    q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))  # (B, heads, T, K)
    group, scale = q.size(1) // k.size(1), q.size(-1) ** -0.5
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    visible = visible_keys(q.size(2), window_size_left or 0, segments, q.device)
    weights = (q @ wide_k.mT * scale).masked_fill(~visible, -math.inf).softmax(-1)
    dweights = dout @ wide_v.mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    wide = (dscores @ wide_k, dscores.mT @ q, weights.mT @ dout)
    grads = [wide[0], *(x.unflatten(1, (-1, group)).sum(2) for x in wide[1:])]
    grads = [x.transpose(1, 2).contiguous() for x in grads]
    return tuple(x[0] if lengths else x for x in grads)


def torch_varlen_kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn: groups only when it is told of them."""
    assert enable_gqa or q.size(1) == k.size(1)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    return varlen_kernel(q, k, v, causal=True, window_size=window_size, **lengths)


PACKAGES = {
    "fa2": {"flash_attn": {"flash_attn_func": dense_kernel, "flash_attn_varlen_func": varlen_kernel}},
    "fa3": {
        "flash_attn_interface": {"flash_attn_func": dense_kernel, "flash_attn_varlen_func": varlen_kernel}
    },
    "fa4": {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash4_dense, "flash_attn_varlen_func": flash4_varlen},
        "flash_attn.cute.interface": {"_flash_attn_bwd": flash4_backward_kernel},
    },
    "varlen": {"torch.nn.attention.varlen": {"varlen_attn": torch_varlen_kernel}},
}


def install(monkeypatch, backend: str) -> None:
    """Put a package's stand-in where `import` finds it."""
    for name, functions in PACKAGES[backend].items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def pretend(monkeypatch, backend: str) -> None:
    """Install a package's stand-in and let its backend run here."""
    install(monkeypatch, backend)
    here = BACKENDS[backend]._replace(devices=("cpu",), dtypes=(torch.float32, torch.float64))
    monkeypatch.setitem(BACKENDS, backend, here)
