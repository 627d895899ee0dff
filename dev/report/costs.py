"""What an artifact's tokens cost: where the bits of the validation text go, and a text as a heat map.

Scored plainly, in windows side by side and without adaptation or hints, and only the first tokens, as far as
the time goes: the score of a run is `python -m eval`'s business.
"""

import codecs
import itertools
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from dev.desk.runs import RunFacts
from eval.breakdown import BreakdownRow, Windows, break_down, get_costs
from eval.runs import find_target
from scoring.adaptive import plan_documents
from scoring.config import EvalConfig
from scoring.generate import Sampling, draw_tokens, last_logits, stream_text
from scoring.sliding import ScoreOptions, plan_windows, score_windows
from train_gpt import (
    GPT,
    Config,
    Environment,
    Ranks,
    load_artifact,
    load_validation,
    open_tokenizer,
    scored_tokens,
)

SHOWN_TOKENS = 700  # of the heat map
BATCH_TOKENS = 4096
PROMPT_TOKENS = 32
SAMPLE = Sampling(max_tokens=48, temperature=0.8, top_p=0.95, seed=1)
MOST_TEXT = 1 << 20  # bytes of a text that is read for a heat map
LEVELS, MOST_BITS = 9, 12.0  # of the heat map: the last is for all that costs more


class Piece(NamedTuple):
    """A token of a heat map."""

    text: str
    bits: float
    level: int  # 0: cheap .. LEVELS: dearer than MOST_BITS


class Costs(NamedTuple):
    """What a run's artifact charges."""

    num_tokens: int  # scored of the validation text
    num_bytes: int  # that they stand for
    text: tuple  # equal of those that scored the same tokens of the same tokenizer
    bpb: float  # of these
    tables: dict[str, list[BreakdownRow]]
    source: str  # of the heat map
    pieces: list[Piece]
    shown_bytes: int  # that the pieces stand for
    sample: tuple[str, str]  # the start of that text, and how the model goes on
    is_cut: bool  # whether the time was up before all tokens were scored


class Model(NamedTuple):
    """An artifact, ready to score."""

    gpt: GPT
    cfg: Config
    codec: object
    options: ScoreOptions
    header: dict

    @property
    def context_len(self) -> int:
        return self.cfg.data.seq_len


def measure_costs(run: RunFacts, text: Path | None, num_tokens: int, deadline: float) -> Costs:
    """Score the first tokens of a run's validation text and a text; raises a UserError where it cannot.

    Without a text, the heat map is of the validation text's start. deadline: as time.perf_counter counts;
    each of the two gets at least one batch.
    """
    model = open_model(run)
    validation = load_validation(model.cfg.data, "", model.header["tokenizer_sha256"])
    tokens = scored_tokens(validation, 1, keep_tail=True)[: num_tokens + 1]
    nats = score_tokens(model, tokens, deadline)
    scored = tokens[: len(nats) + 1]
    costs = get_costs(whole_documents(nats, scored, model.codec.bos_id), validation.target_bytes)
    how = Windows(EvalConfig(), model.context_len, BATCH_TOKENS, 0)
    tables = break_down(costs, scored[: len(costs.bits) + 1], model.codec, how)
    source = "the start of the validation text"
    if text is None:
        shown, shown_nats = scored[: SHOWN_TOKENS + 1], nats[:SHOWN_TOKENS]
    else:
        source, shown = read_text(text, model.codec)
        shown_nats = score_tokens(model, shown, deadline)
        source += ", cut off where the time was up" if len(shown_nats) < len(shown) - 1 else ""
    num_bytes = int(costs.num_bytes.sum())
    ids = shown[1 : len(shown_nats) + 1]
    pieces, shown_bytes = cut_pieces(model.codec, ids, shown_nats), len(model.codec.decode(ids.tolist()))
    identity = model.header["tokenizer_sha256"], zlib.crc32(scored[: len(costs.bits) + 1].tobytes())
    is_cut = len(nats) < len(tokens) - 1
    prompt = "".join(piece.text for piece in pieces[:PROMPT_TOKENS])
    sample = draw_sample(model, prompt, deadline)
    return Costs(
        len(costs.bits), num_bytes, identity, float(costs.bits.sum() / max(num_bytes, 1)), tables,
        source, pieces, shown_bytes, (prompt, sample), is_cut,
    )  # fmt: skip


def open_model(run: RunFacts) -> Model:
    """Load the artifact of a run or a record as `python -m eval` does."""
    if run.artifact is None:
        raise UserError(f"{run.folder}: no artifact.bin of this seed in it.")
    target = find_target(run.folder)
    ranks = Ranks(Environment({}), target.live.run.device)
    gpt, cfg, header = load_artifact(
        target.artifact, target.live, ranks.device, target.recorded_dtype(ranks.device.type)
    )
    codec = open_tokenizer(cfg.data)
    return Model(gpt, cfg, codec, ScoreOptions(codec.bos_id, BATCH_TOKENS, ranks.device), header)


def score_tokens(model: Model, tokens: np.ndarray, deadline: float) -> np.ndarray:
    """Score (N + 1,) tokens in windows side by side until the time is up; returns (M,) nats, M <= N."""
    windows, parts = plan_windows(len(tokens) - 1, model.context_len), []
    size = max(1, BATCH_TOKENS // model.context_len)
    for i in range(0, len(windows), size):
        chosen = windows[i : i + size]
        parts.append(score_windows(model.gpt, tokens, chosen, model.options)[int(chosen[0, 0]) :].numpy())
        if time.perf_counter() > deadline:
            break
    return np.concatenate(parts)


def whole_documents(nats: np.ndarray, tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Leave out the last document, which the number of tokens cut off, unless it is the only one."""
    documents = plan_documents(tokens, bos_id)
    return nats[: documents[-1, 0]] if len(documents) > 1 else nats


def read_text(path: Path, codec) -> tuple[str, np.ndarray]:
    """Read the start of a UTF-8 text: what it is, and its tokens after a document's start."""
    with open(path, "rb") as file:
        raw = file.read(MOST_TEXT)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if error.end < len(raw) or len(raw) < MOST_TEXT:
            raise UserError(f"{path}: expected text in UTF-8, found other bytes ({error}).") from error
        text = raw.decode(errors="ignore")
    tokens = codec.encode(text).tolist()
    ids = [codec.bos_id, *tokens[:SHOWN_TOKENS]]
    if len(ids) < 2:
        raise UserError(f"{path}: expected a text, found an empty one. Name another by --text.")
    is_cut = len(tokens) > SHOWN_TOKENS or len(raw) == MOST_TEXT
    return f"{path}{f', cut off after {SHOWN_TOKENS} tokens' if is_cut else ''}", np.array(ids, np.int64)


def cut_pieces(codec, ids: np.ndarray, nats: np.ndarray) -> list[Piece]:
    """Pair each token's text with its cost; a character of several tokens goes to the last of them."""
    bits = nats / np.log(2.0)
    levels = np.clip(bits / MOST_BITS * LEVELS, 0, LEVELS).astype(int)
    pieces = zip(token_texts(codec, ids.tolist()), bits.tolist(), levels.tolist())
    return [Piece(*piece) for piece in pieces]


def token_texts(codec, ids: list[int]) -> Iterator[str]:
    """Yield the text that each token adds to those before it."""
    decoder, done = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for i, token in enumerate(ids):
        text = codec.decode(ids[: i + 1])
        piece, done = decoder.decode(text[done:]), max(done, len(text))
        yield "\u00b6\n" if token == codec.bos_id else piece


def draw_sample(model: Model, prompt: str, deadline: float) -> str:
    """Let a model go on from a prompt, as far as the time goes."""
    bos_id = model.codec.bos_id
    tokens = [bos_id, *model.codec.encode(prompt).tolist()]
    drawn = draw_tokens(last_logits(model.gpt, model.codec, model.context_len), tokens, SAMPLE, bos_id)
    in_time = itertools.takewhile(lambda _: time.perf_counter() <= deadline, drawn)
    return "".join(stream_text(model.codec, prompt, in_time))
