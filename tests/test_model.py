"""The model: parameter counts, causality, isolation of documents, layer plan, init."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fixtures_numbers import assert_close_at_scale

from formats.recipe import with_values
from train_gpt import (
    GPT,
    Batch,
    Config,
    ModelConfig,
    Step,
    layer_plan,
    match_rules,
    mean_loss,
    rope_tables,
    rotate,
)

pytestmark = pytest.mark.numeric


def count(values: dict) -> int:
    """Count the parameters of a config without allocating any."""
    cfg = with_values(Config(), values, "test")
    with torch.device("meta"):
        return sum(param.numel() for param in GPT(cfg.model, cfg.data.vocab_size).parameters())


@pytest.mark.parametrize("num_layers, expected", [(9, 17_059_912), (10, 18_897_488)])
def test_the_naive_baseline_has_the_contest_parameter_count(num_layers, expected):
    """The contest's log prints model_params; ours must be the same model."""
    assert count({"model.num_layers": num_layers}) == expected


def test_an_untied_head_adds_vocabulary_times_width():
    """TIE_EMBEDDINGS=0 is a different model, not a flag nobody reads."""
    assert count({"model.tie_embeddings": False}) - count({}) == 1024 * 512


def test_layer_plan_joins_the_halves_innermost_first():
    """The plan as a literal list: first-half outputs return in reverse order."""
    expected = [
        Step(0, True, None), Step(1, True, None),
        Step(2, False, 0), Step(3, False, 1), Step(4, False, None),
    ]  # fmt: skip
    assert layer_plan(ModelConfig(num_layers=5)) == expected
    assert layer_plan(ModelConfig(num_layers=2, unet_skips=False)) == [
        Step(0, False, None),
        Step(1, False, None),
    ]


@pytest.mark.parametrize("position", [0, 7, 14])
def test_future_tokens_never_move_earlier_logits(tiny_model, position):
    """A score is legal only if the prediction at t depends on tokens[: t + 1] and nothing later."""
    tokens = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, position + 1 :] = 3
    before, after = (tiny_model(text, text == 1) for text in (tokens, changed))
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert not torch.equal(before[:, position + 1 :], after[:, position + 1 :])


def test_smear_gate_is_the_identity_at_init_and_never_crosses_a_document_start(tiny_config):
    """Zero strength is no change; a non-zero one must not leak the previous document into a BOS."""
    cfg = with_values(tiny_config, {"model.smear": "gated"}, "test").model
    model = GPT(cfg, 300)
    x = torch.randn(1, 8, cfg.model_dim)
    starts = torch.zeros(1, 8, dtype=torch.bool)
    starts[0, 4] = True
    assert torch.equal(model.smear(x, starts), x)
    torch.nn.init.ones_(model.smear.strength)
    smeared = model.smear(x, starts)
    assert torch.equal(smeared[:, [0, 4]], x[:, [0, 4]])
    assert not torch.equal(smeared[:, 5], x[:, 5])


def test_rope_keeps_lengths_and_depends_on_distance_only():
    """The two properties that make it a relative position encoding."""
    x, y = torch.randn(2, 1, 1, 8, dtype=torch.float64).unbind(0)
    rope = rope_tables(40, 8, 10_000.0, x)
    turned_x, turned_y = (rotate(a.expand(1, 40, 1, 8), rope)[0, :, 0] for a in (x, y))
    assert_close_at_scale(turned_x.norm(dim=-1), x.norm().expand(40), units=1)  # angles are float32
    cosines = turned_x @ turned_y.T / (x.norm() * y.norm())
    torch.testing.assert_close(cosines[5, 2], cosines[35, 32], atol=1e-6, rtol=0)  # numbers below 1


def test_initial_loss_is_the_log_of_the_vocabulary(tiny_config):
    """Zero output projections and a small embedding: the first prediction is uniform."""
    torch.manual_seed(0)
    model = GPT(tiny_config.model, 300)
    tokens = torch.randint(0, 300, (4, 16))
    loss = mean_loss(model, Batch(tokens, torch.randint(0, 300, (4, 16)), tokens == 1))
    assert abs(loss.item() - math.log(300)) < 0.05


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    """A parameter that no optimizer owns would stay at its initial value in silence."""
    cfg = with_values(Config(), {"model.smear": "gated"}, "test")
    with torch.device("meta"):
        names = [name for name, _ in GPT(cfg.model, 64).named_parameters()]
    assert set(match_rules(cfg, names)) == set(names)
    with pytest.raises(ValueError, match="stray has no row"):
        match_rules(cfg, [*names, "stray"])
    with pytest.raises(ValueError, match="matches no parameter"):
        match_rules(cfg, [name for name in names if "smear" not in name])


@pytest.mark.parametrize(
    "stray",
    [
        "blocks.0.attn.value_gate.weight",
        "blocks.0.mlp.gate.weight",
        "blocks.0.attn.q.extra.weight",
        "blocks.0.out_scale",
        "skip_bias",
        "embed.weight.more",
    ],
)
def test_a_parameter_that_nobody_planned_for_stops_the_run(tiny_config, stray):
    """A gate that looks like a matrix would go to Muon and the quantizer without a word."""
    names = [name for name, _ in GPT(tiny_config.model, 300).named_parameters()]
    with pytest.raises(ValueError, match=f"parameter {stray} has no row in PARAM_RULES"):
        match_rules(tiny_config, [*names, stray])


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_softcap_is_computed_in_float32(tiny_config, asymmetric):
    """Each bfloat16 step of cap * tanh(z / cap) would round: logits near the cap to 1 / 8."""
    fields = {"model.logit_softcap": 30.0, "model.asymmetric_softcap": asymmetric}
    cfg = with_values(tiny_config, fields, "test")
    model = GPT(cfg.model, 300, torch.bfloat16)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        model.embed.weight.mul_(400)
        states, weight = model.before_head(model.hidden(tokens, tokens == 0))
        plain = model.readout(states, weight).float()  # the very call: another product may round up to 1 / 8
        logits = model(tokens, tokens == 0)
    assert plain.abs().max() > 15
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, 30 * torch.tanh(plain / 30))


def test_loss_is_taken_from_float32_logits(tiny_config):
    """bfloat16 logits summed in bfloat16 would lose the third digit of the loss."""
    model = SimpleNamespace()
    logits = torch.randn(2, 16, 300).bfloat16()
    model = lambda tokens, starts_doc, first, passes, extent: logits  # noqa: E731
    tokens = torch.zeros(2, 16, dtype=torch.long)
    loss = mean_loss(model, Batch(tokens, tokens, tokens == 1))
    assert torch.equal(loss, F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()))
