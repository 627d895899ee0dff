"""Draw text from a model, token by token."""

import codecs
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from common import UserError


class Sampling(NamedTuple):
    """How tokens are drawn."""

    max_tokens: int = 64
    temperature: float = 1.0  # 0: always the likeliest
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach this probability
    seed: int = 0


def check_sampling(sampling: Sampling) -> None:
    """Raise naming the setting, its value and its range."""
    rules = [
        ("max_tokens", sampling.max_tokens >= 0, "at least 0"),
        ("temperature", sampling.temperature >= 0, "at least 0"),
        ("top_k", sampling.top_k >= 0, "at least 0"),
        ("seed", -(2**63) <= sampling.seed < 2**64, "from -2^63 to 2^64 - 1"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
    ]
    for name, holds, bounds in rules:
        if not holds:
            raise UserError(f"{name}={getattr(sampling, name)!s:.60}: expected a number {bounds}.")


def token_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the (V,) probabilities that a token is drawn with, from (V,) logits."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probs = torch.softmax(logits.double() / sampling.temperature, 0)
    ordered, order = probs.sort(descending=True, stable=True)
    kept = ordered.cumsum(0) - ordered < sampling.top_p  # the first token that reaches top_p is the last kept
    if sampling.top_k:
        kept[sampling.top_k :] = False
    probs = torch.zeros_like(probs).scatter(0, order, ordered * kept)
    return probs / probs.sum()


def draw_tokens(
    next_logits: Callable[[list[int]], Tensor], tokens: list[int], sampling: Sampling, end_id: int
) -> Iterator[int]:
    """Yield drawn tokens, at most max_tokens, until end_id; next_logits gives (V,) after all so far."""
    check_sampling(sampling)
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(tokens)
    for _ in range(sampling.max_tokens):
        probs = token_probs(next_logits(tokens).cpu(), sampling)
        token = int(torch.multinomial(probs, 1, generator=generator))
        if token == end_id:
            return
        tokens.append(token)
        yield token


def last_logits(model: torch.nn.Module, codec, context_len: int) -> Callable[[list[int]], Tensor]:
    """Return what gives the logits of the codec's entries after tokens, from the last context_len of them."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def logits(tokens: list[int]) -> Tensor:
        row = torch.tensor([tokens[-context_len:]], device=device)
        return model(row, row == codec.bos_id, row.size(1) - 1)[0, 0, : codec.vocab_size].float()

    return logits


def stream_text(codec, prompt: str, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of drawn tokens as it grows, whole characters only; the prompt is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = codec.encode(prompt).tolist()
    done = len(codec.decode(ids))
    for token in tokens:
        ids.append(token)
        text = codec.decode(ids)
        piece, done = decoder.decode(text[done:]), max(done, len(text))
        if piece:
            yield piece
    yield decoder.decode(b"", final=True)
