"""Stand-ins inside the sandbox, so that a script written for CUDA runs on a CPU, and a record of its losses.

CUDA devices turn into the CPU, torch.cuda's calls into nothing, torch.compile into the function itself,
FlashAttention into scaled_dot_product_attention. F.cross_entropy writes each call's targets and costs to a
file. What is not imitated (Triton kernels, several ranks) fails as it does without CUDA.
"""

import contextlib
import json
import sys
import types
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

MAX_RECORDED = 400_000  # targets; the miniature text has 2048
ZEROS = (
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "current_device",
)
NOTHING = (
    "synchronize", "set_device", "manual_seed", "manual_seed_all", "empty_cache", "reset_peak_memory_stats",
    "current_stream", "set_per_process_memory_fraction", "_lazy_init", "init",
)  # fmt: skip


def on_cpu(value):
    """Turn a CUDA device, by object or by name, into the CPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    """Let every torch function take the CPU for CUDA; `.cuda()` and pinned memory change nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        kwargs = {key: on_cpu(value) for key, value in (kwargs or {}).items() if key != "pin_memory"}
        return function(*map(on_cpu, args), **kwargs)


class Stream:
    """A stream or event of CUDA that does nothing."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: 0.0


def without_gradients(mode=True):
    """Stand in for inference_mode, whose tensors eager autograd may not use; compiled graphs keep none."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else torch.enable_grad()


def imitate_cuda() -> None:
    """Replace what scripts call before they compute."""
    for name in ZEROS:
        setattr(torch.cuda, name, lambda *_, **__: 0)
    for name in NOTHING:
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda *_: "CPU in a sandbox"
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.mem_get_info = lambda *_: (1 << 33, 1 << 33)
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.stream = Stream
    torch.compile = lambda function=None, **_: function if function is not None else (lambda inner: inner)
    torch.inference_mode = without_gradients
    plain = torch.autocast

    class Autocast(plain):
        def __init__(self, device_type="cuda", *args, **options):
            super().__init__(on_cpu(device_type), *args, **options)

    torch.autocast = torch.amp.autocast = Autocast
    OnCpu().__enter__()


def flash_attn_func(q, k, v, *_, causal=False, window_size=(-1, -1), softmax_scale=None, **__):
    """Attend (B, T, H, K) heads, fewer keys than queries allowed; a left window is a band."""
    heads = [part.transpose(1, 2) for part in (q, k, v)]
    mask = None
    if window_size[0] >= 0:
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = (distance <= window_size[0]) & ((distance >= 0) if causal else True)
    out = F.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=causal and mask is None, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, *_, **options):
    """Attend (N, H, K) heads within segments."""
    options = {key: value for key, value in options.items() if not key.startswith("max_seqlen")}
    spans = pairwise(torch.unique(cu_seqlens_q).tolist())
    segments = [[part[None, lo:hi] for part in (q, k, v)] for lo, hi in spans]
    return torch.cat([flash_attn_func(*segment, **options)[0] for segment in segments])


def imitate_flash_attention() -> None:
    """Offer FlashAttention's functions under the names of its packages."""
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.flash_attn_interface"):
        module = types.ModuleType(name)
        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        sys.modules[name] = module


def record_losses(path: str) -> None:
    """Write [learns, targets, costs, log probabilities] of each call of F.cross_entropy as JSON."""
    plain, left = F.cross_entropy, [MAX_RECORDED]
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - until the process ends

    def cross_entropy(scores, targets, *args, **options):
        if not targets.is_floating_point() and scores.ndim == 2 and left[0] > 0:
            left[0] -= targets.numel()
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                logs = scores.detach().float().log_softmax(-1)
                costs = -logs.gather(-1, targets[:, None])[:, 0]
                row = [scores.requires_grad, targets.tolist(), costs.tolist()]
                rounded = (logs * 1e4).round().int().tolist() if not row[0] else []
                print(json.dumps([*row, rounded]), file=file, flush=True)
        return plain(scores, targets, *args, **options)

    F.cross_entropy = cross_entropy


def install(recorded: str) -> None:
    """Install all stand-ins; a machine with CUDA would have no use for them."""
    imitate_cuda()
    imitate_flash_attention()
    record_losses(recorded)
