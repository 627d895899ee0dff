"""What kernels for rows of any length are launched for: offsets and longest document, recorded on a CPU.

On a GPU too many documents are a device-side assert, and a packed row's whole length as the longest document
is millions of idle blocks a launch: nothing on a CPU stops or slows down by either.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from fixtures_attention import PACKAGES, install, pretend, torch_varlen_kernel

import kernels.attention
from formats.recipe import with_values
from kernels.attention import Extent, MaskSpec, build_mask, extent_of, has_usual_docs, usual_docs
from scoring.adaptive import Callbacks, ScoringRun, WindowSettings, score_lora
from scoring.config import EvalConfig
from scoring.sliding import CompiledWindows, ScoreOptions, plan_windows, score_windows
from train_gpt import Training, phase_at

pytestmark = pytest.mark.numeric

BOS = 1


class Launch(NamedTuple):
    """What one call of a kernel got."""

    lengths: list[int]  # of its documents
    num_offsets: int
    max_len: int
    num_tokens: int


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """Let torch's varlen kernel compute here, with a stand-in that records its calls."""
    recorded = []

    def record(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        lengths = [size for size in cu_q.diff().tolist() if size]
        recorded.append(Launch(lengths, len(cu_q), max_q, len(q)))
        options.setdefault("enable_gqa", q.size(1) != k.size(1))
        return torch_varlen_kernel(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    pretend(monkeypatch, "varlen")
    monkeypatch.setitem(PACKAGES, "varlen", {"torch.nn.attention.varlen": {"varlen_attn": record}})
    install(monkeypatch, "varlen")
    monkeypatch.setattr(kernels.attention, "varlen_takes", lambda name: name != "is_causal")
    return recorded


def in_documents(cfg, **changes):
    """A tiny recipe whose attention stays in documents and whose kernel is torch's varlen."""
    fields = {"model.attn_in_document": True, "run.attention": "varlen", "run.device": "cpu"}
    fields |= {"run.compile": "off", "model.compute_dtype": "float32"}
    return with_values(cfg, fields | changes, "test")


def launched_by_step(cfg, alone, launches) -> list[Launch]:
    """Run the first micro-batch of a recipe and return what its layers launched."""
    training = Training(cfg, alone, BOS)
    training.model.train()
    launches.clear()
    training.micro_step(phase_at(cfg, 0, 0.0), 0)
    assert len(launches) == cfg.model.num_layers
    return launches


def test_a_packed_row_launches_for_its_longest_document(tiny_config, alone, launches):
    """512 tokens in one row of documents cut at 64: the kernel is told 64, not 512."""
    packed = {"data.loader": "packed", "data.seq_len": 64, "data.batch_tokens": 512, "data.micro_batches": 1}
    for launch in launched_by_step(in_documents(tiny_config, **packed), alone, launches):
        assert launch.num_tokens == sum(launch.lengths) == 512
        assert max(launch.lengths) == launch.max_len == 64


def test_training_text_of_very_short_documents_trains(tiny_config, alone, launches, monkeypatch):
    """A document every six tokens is twenty times what a batch is expected to hold."""
    cfg = in_documents(tiny_config, **{"data.loader": "packed", "data.micro_batches": 1})
    monkeypatch.setattr(
        "data.loader.StreamLoader.span_at",
        lambda self, first, count: np.where(np.arange(first, first + count) % 6 == 0, BOS, 7),
    )
    for launch in launched_by_step(cfg, alone, launches):
        assert max(launch.lengths) == 6
        assert len(launch.lengths) > usual_docs(1, launch.num_tokens)


def test_fillers_behind_short_documents_start_none(tiny_config, alone, launches):
    """32 documents of 20 to 51 tokens in one batch: 32 pieces, although every filler is a BOS."""
    cfg = in_documents(tiny_config)
    model = Training(cfg, alone, BOS).model.eval()
    model.attention = "varlen"
    lengths = np.arange(20, 52)
    tokens = np.concatenate([*([BOS] + [9] * (length - 1) for length in lengths), [BOS]])
    session = ScoringRun(tokens, WindowSettings(96, 16), ScoreOptions(BOS, 32 * 96), alone, Callbacks())
    launches.clear()
    outcome = score_lora(model, session, EvalConfig(lora_rank=2, lora_chunk_tokens=96))
    assert (outcome.nats > 0).all()
    batches = [launch for launch in launches if launch.num_tokens == 32 * 51]
    assert len(batches) == cfg.model.num_layers
    for launch in batches:
        assert launch.lengths == [51] * 32
        assert launch.max_len == 51


def test_fillers_change_no_score(tiny_config, alone):
    """A document costs the same in company and alone."""
    cfg = in_documents(tiny_config, **{"run.attention": "math"})
    model = Training(cfg, alone, BOS).model.double().eval()
    model.compute_dtype = torch.float64
    texts = [[BOS, *range(5, 5 + length)] for length in (40, 25, 7)]

    def nats(documents: list[list[int]]) -> torch.Tensor:
        tokens = np.array([token for text in documents for token in text] + [BOS])
        session = ScoringRun(tokens, WindowSettings(64, 16), ScoreOptions(BOS, 4096), alone, Callbacks())
        return score_lora(model, session, EvalConfig(lora_rank=2, lora_chunk_tokens=16)).nats

    torch.testing.assert_close(nats(texts), torch.cat([nats([text]) for text in texts]))


def test_extents_come_in_few_sizes_and_hold_every_batch():
    """Each size is a compiled graph: the usual number, doubled, never more than tokens."""
    starts = np.zeros((2, 256), dtype=bool)
    assert extent_of(starts, 64) == Extent(usual_docs(2, 256), 64) == Extent(6, 64)
    starts[0, 1:8] = True
    assert extent_of(starts, 1000) == Extent(12, 256)
    starts[:] = True
    assert extent_of(starts, 1) == Extent(512, 1)
    sizes = set()
    for count in range(256):
        starts = np.zeros((1, 256), dtype=bool)
        starts[0, :count] = True
        extent = extent_of(starts, 256)
        assert extent.max_docs >= max(count, 1)
        sizes.add(extent.max_docs)
    assert sorted(sizes) == [3, 6, 12, 24, 48, 96, 192, 256]


def test_without_an_extent_documents_are_counted():
    """Scorers run eagerly and hand over texts of any kind."""
    starts = torch.ones(2, 100, dtype=torch.bool)
    mask = build_mask(MaskSpec(documents=True), starts, "varlen", torch.float32)
    assert mask.offsets.tolist() == list(range(201))
    assert mask.max_len == 100


def test_a_compiled_scorer_leaves_crowded_batches_to_the_model(monkeypatch):
    """A graph has room for the usual number of documents; more must not stop the scoring."""
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda *inputs: graph(model, *inputs))
    compiled = []

    def model(tokens, starts_doc, first):
        return torch.zeros(len(tokens), tokens.size(1) - first, 4)

    def graph(model, tokens, starts_doc, first):
        compiled.append(int(starts_doc[:, 1:].sum()) + len(tokens))
        return model(tokens, starts_doc, first)

    sparse, crowded = np.tile([BOS] + [2] * 255, 8), np.full(2048, BOS)
    tokens = np.concatenate([sparse, crowded, [BOS]])
    windows = plan_windows(len(tokens) - 1, 256)
    for fits, expected in (((has_usual_docs,), 4), ((), 8)):
        compiled.clear()
        scorer = CompiledWindows(model, windows, 512, *fits)
        nats = score_windows(scorer, tokens, windows, ScoreOptions(BOS, 512))
        assert len(compiled) == expected
        torch.testing.assert_close(nats, torch.full_like(nats, np.log(4)))


@pytest.mark.parametrize("takes", [{"is_causal"}, {"window_size"}, {"window_size", "enable_gqa"}])
@pytest.mark.parametrize("window", [0, 9])
def test_each_torch_gets_the_arguments_that_its_varlen_kernel_takes(monkeypatch, takes, window):
    """torch 2.10 has no windows, 2.11 no groups; a silent TypeError would choose another kernel."""
    seen = {}

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        seen.update(options, heads=k.size(1))
        return q

    monkeypatch.setitem(PACKAGES, "varlen", {"torch.nn.attention.varlen": {"varlen_attn": varlen_attn}})
    install(monkeypatch, "varlen")
    monkeypatch.setattr(kernels.attention, "varlen_takes", takes.__contains__)
    q, k = torch.zeros(1, 8, 4, 2), torch.zeros(1, 8, 2, 2)
    mask = build_mask(MaskSpec(window), torch.zeros(1, 8, dtype=torch.bool), "varlen", torch.float32)
    if takes == {"is_causal"} and window:
        with pytest.raises(RuntimeError, match="has no window_size"):
            kernels.attention.torch_varlen(q, k, k, mask)
        return
    kernels.attention.torch_varlen(q, k, k, mask)
    expected = {"is_causal": True} if takes == {"is_causal"} else {"window_size": (window or -1, 0)}
    groups = {"enable_gqa": True, "heads": 2} if "enable_gqa" in takes else {"heads": 4}
    assert seen == expected | groups


def test_varlen_is_asked_what_it_takes(monkeypatch):
    """The real signature, by name."""

    def varlen_attn(query, key, *, window_size=(-1, -1)):
        pass

    monkeypatch.setitem(PACKAGES, "varlen", {"torch.nn.attention.varlen": {"varlen_attn": varlen_attn}})
    install(monkeypatch, "varlen")
    assert [kernels.attention.varlen_takes(name) for name in ("window_size", "enable_gqa")] == [True, False]
