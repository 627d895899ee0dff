"""Fields that no other test varies, each seen to change something; and that every field has such a test."""

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_model import ROOT, build_random

from formats.recipe import config_fields, with_values
from quantizers.gptq import Calibrated
from quantizers.grid import quantize
from quantizers.methods import build_grid, repair_worst
from scoring.adaptive import Callbacks, ScoringRun, WindowSettings, score_lora, score_sgd
from scoring.sliding import ScoreOptions
from train_gpt import (
    Config,
    Log,
    Optimizers,
    StepRates,
    Training,
    attach_fp8,
    build_model,
    count_ngrams,
    learning_rate_mul,
    train,
    training_ms,
)

pytestmark = pytest.mark.numeric

UNTIED = {"model.tie_embeddings": False}
NORMAL = {"model.init": "normal", "model.out_init": "plain"}
COMPRESSED = {"model.context_ratio": 3, "model.context_keep": 1}
# (field, two values of it, what else must be set)
INITIAL = [
    ("model.init", ("default", "normal"), {}),
    ("model.init", ("default", "orthogonal"), {"model.model_dim": 64}),
    ("model.out_init", ("plain", "depth"), {}),
    ("model.init_std", (0.01, 0.02), NORMAL),
    ("model.untied_embed_init_std", (0.5, 1.0), UNTIED),
    ("model.embed_proj_init_std", (0.01, 0.02), {"model.embed_dim": 8}),
    ("model.bigram_proj_scale", (0.5, 1.0), {"model.bigram_buckets": 64}),
    ("model.vocab_pad", (0, 4), {}),
]
UPDATED = [("optim.embed_lr", (0.1, 0.6), UNTIED), ("optim.head_lr", (0.001, 0.008), UNTIED)]
PREDICTED = [("model.context_ratio_min", (2, 3), COMPRESSED)]
ADAPTED = [
    ("eval.sgd_momentum", (0.0, 0.9)),
    ("eval.lora_beta2", (0.5, 0.99)),
    ("eval.lora_lr_fall", (0.0, 0.5)),
    ("eval.lora_lr_fall", (0.0, 0.5)),
    ("eval.lora_weight_decay", (0.0, 0.5)),
    ("eval.lora_seed", (0, 1)),
]


def pair(base: Config, name: str, values: tuple, others: dict) -> list[Config]:
    """Return a config with either value of a field."""
    return [with_values(base, others | {name: value}, "test") for value in values]


@pytest.mark.parametrize(("name", "values", "others"), INITIAL)
def test_fields_of_the_initial_weights_change_them(tiny_config, alone, name, values, others):
    """Drawn from one seed: what differs is the field's doing."""
    one, other = (build_model(cfg, alone.device) for cfg in pair(tiny_config, name, values, others))
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "values", "others"), UPDATED)
def test_learning_rates_move_their_weights(tiny_config, alone, name, values, others):
    """A step with the same gradients ends elsewhere."""
    ends = []
    for cfg in pair(tiny_config, name, values, others):
        model = build_model(cfg, alone.device)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        Optimizers(model, cfg, alone).step(StepRates(1.0, 0.9))
        ends.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert not torch.equal(*ends)


@pytest.mark.parametrize(("name", "values", "others"), PREDICTED)
def test_fields_of_the_forward_pass_change_its_logits(tiny_config, name, values, others):
    """The same weights, another prediction."""
    tokens = torch.arange(1, 17)[None]
    one, other = (build_random(cfg)(tokens, tokens == 1) for cfg in pair(tiny_config, name, values, others))
    assert not torch.equal(one, other)


def test_fp8_fields_reach_the_rule_of_the_products(tiny_config, alone):
    """Margin, history, choice of amax and first steps are what the shared state works by."""
    values = {"model.fp8": "emulate", "model.fp8_margin": 2, "model.fp8_history": 5, "model.mlp_mult": 4.0}
    values |= {"model.fp8_amax": "most_recent", "model.fp8_calibration_steps": 7}
    cfg = with_values(tiny_config, values, "test")
    rule = attach_fp8(build_model(cfg, alone.device), cfg.model, alone.device).rule
    assert rule[1:] == (2, 5, "most_recent", 7)


def test_the_cosine_is_held_and_calibration_reserved():
    """schedule.lr_hold_iters steps share a rate; quant.reserve_seconds leave the training clock."""
    values = {"schedule.shape": "cosine", "schedule.lr_hold_iters": 4}
    cfg = with_values(Config(), values | {"run.max_wallclock_seconds": 0, "run.iterations": 100}, "test")
    rates = [learning_rate_mul(cfg, step, 0.0) for step in range(40, 48)]
    assert rates == [rates[0]] * 4 + [rates[4]] * 4 and rates[4] < rates[0]
    cfg = with_values(Config(), {"quant.reserve_seconds": 40, "run.max_wallclock_seconds": 600}, "test")
    assert training_ms(cfg) == 560_000


def test_the_log_tells_every_so_many_steps(tiny_config, alone, tmp_path):
    """run.train_log_every: after the first ten steps, which are always told."""
    tiny = {"run.iterations": 15, "run.val_loss_every": -1, "data.batch_tokens": 16, "data.micro_batches": 1}
    cfg = with_values(tiny_config, tiny | {"run.train_log_every": 6}, "test")
    train(Training(cfg, alone, 1), Log(tmp_path, is_main=True), lambda: None)
    lines = re.findall(r"step:(\d+)/15 train_loss", (tmp_path / "train.log").read_text())
    assert [int(step) for step in lines] == [*range(1, 11), 12]


def test_repairs_are_coded_in_their_bits():
    """quant.repair_bits: finer factors have other codes."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    codes = []
    for bits in (2, 8):
        quant = replace(Config().quant, repair_rank=2, repair_top=1, repair_bits=bits, repair_outputs=False)
        coarse = quantize(weight, build_grid("matrix", replace(quant, matrix_bits=3)))
        codes.append(repair_worst({"a": coarse}, {"a": Calibrated(weight)}, quant)["a"].repair[0].codes)
    assert codes[0].abs().max() <= 2 < codes[1].abs().max()


def test_static_hints_are_counted_on_so_many_tokens():
    """eval.tilt_static_tokens: what comes later is not seen."""
    cfg = replace(Config().eval, tilt_static_entries=8, tilt_static_lengths=(2,))
    text = np.array([5, 6, 7] * 20 + [8, 9, 3] * 20, dtype=np.uint16)
    tables = []
    for count in (60, 120):
        data = SimpleNamespace(vocab_size=10)
        asked = SimpleNamespace(eval=replace(cfg, tilt_static_tokens=count), data=data)
        loader = SimpleNamespace(shards=[text], sizes=[len(text)])
        training = SimpleNamespace(cfg=asked, loader=loader, ranks=SimpleNamespace(is_main=True))
        tables.append(count_ngrams(training)[0].table)
    assert len(tables[0].keys) < len(tables[1].keys)


@pytest.mark.parametrize(("name", "values"), ADAPTED)
def test_fields_of_adaptation_change_the_scores(tiny_model, alone, name, values):
    """From the second update on."""
    tokens = np.random.default_rng(0).integers(2, 12, 97).astype(np.uint16)
    tokens[::48] = 1
    base = replace(Config().eval, sgd_lr=0.5, sgd_chunk_tokens=16, sgd_batch_seqs=1, sgd_epochs=2)
    base = replace(base, lora_rank=2, lora_lr=0.05, lora_chunk_tokens=8, lora_sites="q,mlp")
    field = name.removeprefix("eval.")
    score = score_sgd if field.startswith("sgd") else score_lora
    nats = []
    for value in values:
        run = ScoringRun(tokens, WindowSettings(16, 8), ScoreOptions(1, 64), alone, Callbacks())
        nats.append(score(tiny_model, run, replace(base, **{field: value})).nats)
    assert not torch.equal(*nats)


def test_every_field_and_every_choice_is_varied_by_a_test():
    """A switch that never fires is a defect: whoever adds a field or a choice writes a test that sets it.

    Looked for are "section.field", field= and the choice in quotes: add a row to SWITCHES
    (tests/test_architecture.py), to the table of tests/test_optim.py or to those above.
    """
    paths = set(ROOT.glob("tests/test_*.py")) - {ROOT / "tests/test_add_a_trick.py"}  # of fields that are not
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    words = set(re.findall(r'"[\w.-]+"', text))
    for chain in set(re.findall(r"[\w.]+=?", text)):
        words |= {chain.rpartition(".")[2], *map(".".join, pairwise(chain.rstrip("=").split(".")))}
    forgotten = []
    for name, item in config_fields(Config).items():
        choices = set(item.metadata["choices"]) - {item.default}
        forgotten += [name] if not {name, f"{item.name}="} & words else []
        forgotten += [f"{name}={choice}" for choice in choices if f'"{choice}"' not in words]
    assert set(forgotten) <= {"run.attention=cudnn"}  # which no CPU has
