"""Probe an artifact of this harness with its own model and scorer, on toy text."""

from pathlib import Path

import numpy as np
import torch

from audit import probes
from audit.checks import Finding
from common import sha256_file
from formats.recipe import with_values
from scoring.sliding import plan_windows
from train_gpt import Config, load_artifact, only_live, read_environment

CONTEXT_LEN, STRIDE = 32, 16  # small: a minute on a CPU for all probes
NUM_TOKENS = 81
USED_TOKENS = 64  # ids that the toy text uses; sums still run over the whole vocabulary
BOS_ID = 1  # the contest's


def probe_artifact(path: Path) -> dict[str, Finding]:
    """Load an artifact as `python -m eval` does and attack its scores; returns check id -> finding.

    On the CPU, windows of CONTEXT_LEN whatever the artifact's own: what is judged is the model's forward pass
    and the window scorer, not the printed number.
    """
    live = only_live(with_values(Config(), read_environment().overrides, "environment"))
    model, cfg, _ = load_artifact(path, live, torch.device("cpu"))
    model.eval()
    which = f"artifact {path.name}, sha256 {sha256_file(path)[:12]}"
    found = probe_scorer(model, cfg.data.vocab_size)
    return {check: Finding(verdict, [*evidence, which]) for check, (verdict, evidence) in found.items()}


def sum_candidates(logits, prefix: np.ndarray, vocab_size: int) -> float:
    """Sum the probabilities of all tokens after a prefix, each scored with itself in the window."""
    rows = torch.from_numpy(np.append(prefix, 0).astype(np.int64)).repeat(vocab_size, 1)  # (V, T)
    candidates = torch.arange(vocab_size)
    rows[:, -1] = candidates
    scores = logits(rows, rows == BOS_ID, len(prefix) - 1)[:, 0].double()  # (V, V)
    return float(scores.log_softmax(-1)[candidates, candidates].exp().sum())


def sums_to_one(logits, stream: np.ndarray, vocab_size: int) -> Finding:
    """K12 as `probes.sums_to_one`, all candidates in one batch."""
    positions = (1, CONTEXT_LEN // 2, CONTEXT_LEN)
    sums = [sum_candidates(logits, stream[:position], vocab_size) for position in positions]
    worst = max(sums, key=lambda total: abs(total - 1))
    text = f"probabilities sum to {worst:.6f} at worst; {len(sums)} positions, {vocab_size} candidates each"
    return Finding("PASS" if abs(worst - 1) <= probes.SUM_TOLERANCE else "FAIL", [text])


@torch.no_grad()
def probe_scorer(logits, vocab_size: int) -> dict[str, Finding]:
    """Run every probe that a `logits(tokens, starts_doc, first)` callable allows."""
    score = probes.windowed(logits, CONTEXT_LEN, STRIDE, BOS_ID)
    source = probes.text_source(min(vocab_size, USED_TOKENS))
    stream = source.draw(NUM_TOKENS, seed=1)
    stream[[0, CONTEXT_LEN + 5]] = BOS_ID
    cuts = probes.cut_points(NUM_TOKENS, (CONTEXT_LEN, CONTEXT_LEN + STRIDE))
    documents = [np.concatenate([[BOS_ID], source.draw(9, seed)]).astype(np.uint16) for seed in range(2, 6)]
    windows = plan_windows(NUM_TOKENS - 1, CONTEXT_LEN, STRIDE)
    chunked = probes.windowed(logits, CONTEXT_LEN, 0, BOS_ID)
    return {
        "K12": sums_to_one(logits, stream, vocab_size),
        "K13": probes.future_flip(score, stream, cuts),
        "K14": probes.prefix_truncation(score, stream, cuts, tail=STRIDE),
        "K16": probes.coverage(probes.window_events(windows), NUM_TOKENS - 1),
        "K19": probes.document_order(score, documents),
        "K20": probes.memory_of_a_copy(chunked, stream[: 1 + 2 * CONTEXT_LEN]),
        "K22": probes.entropy_floor(score, source, 20 * NUM_TOKENS),
    }
