"""Log-likelihoods of texts after contexts, and text until a stop: what downstream tasks ask of a model.

A document begins with BOS, as in training. Every token of a text is scored once, with as many tokens before
it as the model's context holds; windows that reach its end are full, as lm-evaluation-harness has them.
The weights stand still: test-time training and hints of the recipe's scorer are no part of this.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.codecs import TokenCodec
from eval.hub import Loaded, open_codec
from scoring.generate import Sampling, check_sampling, token_probs
from train_gpt import GPT

BATCH_TOKENS = 8192  # of the windows that are computed at once


class Likelihood(NamedTuple):
    """What a model says of a text."""

    log_prob: float  # nats, at most 0
    is_greedy: bool  # whether each token is the likeliest one


class Piece(NamedTuple):
    """A window of a document: it reads tokens[start:end] and scores what follows tokens first to end - 1."""

    document: int
    start: int
    first: int
    end: int


def split_pair(codec: TokenCodec, context: str, text: str) -> tuple[list[int], int]:
    """Encode context and text as one; returns BOS and all ids, and how many of them the context has.

    A token that reaches over the boundary belongs to the text: nothing of the text goes unpaid.
    """
    whole = codec.encode(context + text).tolist()
    alone = codec.encode(context).tolist() if context else []
    shared = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
    return [codec.bos_id, *whole], 1 + shared


def plan_pieces(document: int, num_context: int, num_tokens: int, context_len: int) -> list[Piece]:
    """Plan the windows that score tokens num_context to num_tokens - 1, each of up to context_len tokens."""
    pieces, first = [], num_context - 1
    while first < num_tokens - 1:
        end = min(first + context_len, num_tokens - 1)
        pieces.append(Piece(document, max(end - context_len, 0), first, end))
        first = end
    return pieces


def batches(pieces: Iterable[Piece], batch_tokens: int) -> Iterable[list[Piece]]:
    """Group windows, the longest first, so that a batch with its padding has at most batch_tokens tokens."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):
        longest = batch[0].end - batch[0].start if batch else 0
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


class Scorer:
    """A model with its tokenizer, in batches of rows that are padded at their ends, which no token sees."""

    def __init__(self, model: GPT, codec: TokenCodec, context_len: int, batch_tokens: int = BATCH_TOKENS):
        self.model, self.codec = model, codec
        self.context_len, self.batch_tokens = context_len, batch_tokens
        self.device = next(model.parameters()).device

    @classmethod
    def of(cls, loaded: Loaded, batch_tokens: int = BATCH_TOKENS) -> "Scorer":
        """Take a loaded model with the context that its recipe scores with."""
        context_len = loaded.cfg.eval.context_len or loaded.cfg.data.seq_len
        return cls(loaded.model, open_codec(loaded), context_len, batch_tokens)

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int] | np.ndarray], first: int) -> Tensor:
        """Return the (B, T - first, V) float32 logits of rows of tokens, of the positions from `first` on."""
        tokens = torch.full((len(rows), max(map(len, rows))), self.codec.bos_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.as_tensor(row)
        tokens = tokens.to(self.device)
        return self.model(tokens, tokens == self.codec.bos_id, first).float()

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Score each text after its context; without one it begins a document."""
        split = [split_pair(self.codec, *pair) for pair in pairs]
        documents = [np.array(tokens) for tokens, _ in split]
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
        pieces = [piece for i, (tokens, num_context) in enumerate(split)
                  for piece in plan_pieces(i, num_context, len(tokens), self.context_len)]  # fmt: skip
        for batch in batches(pieces, self.batch_tokens):
            rows = [documents[piece.document][piece.start : piece.end] for piece in batch]
            skipped = min(piece.first - piece.start for piece in batch)
            logits = self.logits(rows, skipped)
            for piece, row in zip(batch, logits):
                low, high = (at - piece.start - skipped for at in (piece.first, piece.end))
                targets = torch.as_tensor(documents[piece.document][piece.first + 1 : piece.end + 1])
                found = row[low:high].log_softmax(-1)
                chosen = found.gather(-1, targets.to(self.device).unsqueeze(-1)).double().sum()
                sums[piece.document] += float(chosen)
                greedy[piece.document] &= bool((found.argmax(-1).cpu() == targets).all())
        return [Likelihood(float(total), bool(every)) for total, every in zip(sums, greedy)]

    def continue_prompts(
        self, prompts: Sequence[str], sampling: Sampling, stops: Sequence[str] = ()
    ) -> list[str]:
        """Continue prompts together, each until a stop, the document's end or sampling.max_tokens.

        What a prompt gives does not depend on the others: each draws from a generator of its own.
        """
        check_sampling(sampling)
        rows = [Continuation(self.codec, prompt, sampling, stops) for prompt in prompts]
        for _ in range(sampling.max_tokens):
            going = [row for row in rows if not row.is_done]
            if not going:
                break
            windows = [row.tokens[-self.context_len :] for row in going]
            first = min(map(len, windows)) - 1
            logits = self.logits(windows, first)[..., : self.codec.vocab_size].cpu()
            for row, window, found in zip(going, windows, logits):
                row.draw(found[len(window) - 1 - first])
        return [row.text for row in rows]


class Continuation:
    """One prompt that is being continued."""

    def __init__(self, codec: TokenCodec, prompt: str, sampling: Sampling, stops: Sequence[str]):
        ids = codec.encode(prompt).tolist()
        self.codec, self.sampling, self.stops = codec, sampling, stops
        self.tokens = [codec.bos_id, *ids]
        self.written = len(codec.decode(ids))  # bytes of the prompt
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.text, self.is_done = "", False

    def draw(self, logits: Tensor) -> None:
        """Add a token that (V,) logits give, or find that this is the end."""
        token = int(torch.multinomial(token_probs(logits, self.sampling), 1, generator=self.generator))
        if token == self.codec.bos_id:
            self.is_done = True
            return
        self.tokens.append(token)
        found = self.codec.decode(self.tokens[1:])[self.written :]
        self.text = codecs.decode(found, "utf-8", "replace")
        ends = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.is_done = self.text[: min(ends)], True
