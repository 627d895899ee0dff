"""The contest's architecture ladder: exact parameter counts, layer plans, and every switch alive."""

import math

import pytest
import torch
import torch.nn.functional as F
from fixtures_model import build_random, recipe, shape_of
from fixtures_numbers import assert_close_at_scale

from common import UserError
from formats.recipe import with_values
from kernels.fused import subtract_self_value
from train_gpt import (
    GPT,
    PARAM_RULES,
    Config,
    ModelConfig,
    OptimConfig,
    Optimizers,
    StepRates,
    check_config,
    layer_plan,
    match_rules,
    num_skips,
    recur_passes_at,
    rope_base_at,
)

pytestmark = pytest.mark.numeric

COUNTS = {
    "track_10min_16mb/2026-03-17_NaiveBaseline": 17_059_912,
    "track_10min_16mb/2026-03-20_Int6_MLP3x_SmearGate_BigramHash": 22_368_841,
    "track_10min_16mb/2026-04-09_3LayerRecurrence_QK525": 35_944_536,
    "track_10min_16mb/2026-04-27_SparseGate_TwoLane_SmearGate": 35_945_671,
    "track_10min_16mb/2026-04-30_ContextGrowth_3072": 35_945_671,
    "reference_systems/A_bwetaf53": 53_012_480,
    "reference_systems/B_bese288": 26_522_716,
    "reference_systems/C_pr281": 26_829_913,
    "reference_systems/D_exp01": 372_904_960,
    "reference_systems/E_yxanul197_ultra10": 196_398_464,
    "reference_systems/E_yxanul270_mem9": 273_284_480,
    "reference_systems/E_yxanul270_mem6": 273_284_480,
}
RECUR = {"model.recur_layers": (1, 1), "model.recur_passes": 3}
NEUTRAL = ("model.model_dim",)  # shapes that a switch needs
SWITCHES = [
    {"model.leaky_slope": 0.5},
    {"model.unet_skips": False},
    {"model.skip_gates": True},
    {"model.ln_scale": True},
    {"model.xsa_last": 3},
    {"model.attn_gate": "out"},
    {"model.attn_gate": "sparse", "model.model_dim": 48},
    {"model.attn_gate": "dense"},
    {"model.smear": "gated"},
    {"model.smear": "channel"},
    {"model.bigram_buckets": 64},
    {"model.value_embed_layers": (1, 2), "model.value_embed_dim": 8},
    RECUR,
    RECUR | {"model.recur_skips": "first_pass"},
    {"model.parallel": "gptj", "model.parallel_start": 1},
    {"model.parallel": "two_lane", "model.parallel_start": 1},
    {"model.rope_dims": 4},
    {"model.rope_base": 100.0},
    {"model.rope_ref_len": 8},
    {"model.logit_softcap": 3.0},
    {"model.q_gain_init": 3.0},
    {"model.tie_embeddings": False},
    {"model.mlp": "swiglu"},
    {"model.mlp": "gelu"},
    {"model.biases": "outputs"},
    {"model.biases": "all"},
    {"model.norm": "rms_gain"},
    {"model.norm": "layer", "model.norm_eps": 1e-5},
    {"model.norm_eps": 0.1},
    {"model.final_norm": False},
    {"model.embed_norm": False},
    {"model.qk_norm": False},
    {"model.channel_scales": False},
    {"model.value_residual": True},
    {"model.attn_window": 3, "model.window_layers": (0, 2)},
    {"model.attn_in_document": True},
    {"model.context_ratio": 3, "model.context_keep": 1},
    {"model.embed_dim": 8},
    {"model.embed_dim": 8, "model.tie_embeddings": False},
    {"model.positions": "none"},
    {"model.positions": "embed_heads"},
    {"model.logit_softcap": 0.0},
    {"model.asymmetric_softcap": True},
]


@pytest.mark.parametrize("name, expected", COUNTS.items())
def test_recipes_have_the_published_parameter_counts(name, expected):
    """One wrong switch changes the count; these are the numbers of the contest's logs."""
    assert sum(param.numel() for param in shape_of(recipe(name)).parameters()) == expected


def test_rows_name_optimizers_and_storages_that_there_are():
    """ "muon" would be a natural guess, and would silently be AdamW at Muon's rate."""
    for rule in PARAM_RULES:
        assert rule.optimizer in ("matrix", "adamw"), rule
        assert rule.storage in ("matrix", "mlp", "embed", "float32"), rule
        assert rule.lr in vars(OptimConfig()) and rule.weight_decay in vars(OptimConfig()), rule


@pytest.mark.parametrize("name", COUNTS)
def test_every_parameter_of_every_recipe_has_a_rule(name):
    """match_rules raises for a parameter without a row and for a row without a parameter."""
    cfg = recipe(name)
    names = [parameter for parameter, _ in shape_of(cfg).named_parameters()]
    assert len(match_rules(cfg, names)) == len(names)


@pytest.mark.reference("B5")
def test_parts_of_system_b_have_their_counts():
    """The whole, value embedding and matrix banks."""
    named = {
        name: param.numel()
        for name, param in shape_of(recipe("reference_systems/B_bese288")).named_parameters()
    }
    assert sum(named.values()) == 26_522_716
    assert sum(size for name, size in named.items() if name.startswith("value_embed.")) == 69_635
    banks = [size for name, size in named.items() if name.startswith("blocks.") and name.endswith(".weight")]
    assert sum(banks) == 25_952_256


@pytest.mark.reference("B6")
def test_system_b_visits_layers_in_the_published_order():
    """17 visits with recurrence, 11 without; only the first pass joins skips."""
    model = recipe("reference_systems/B_bese288").model
    plan = layer_plan(model, 3)
    assert [step.layer for step in plan] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [step.layer for step in layer_plan(model, 1)] == list(range(11))


@pytest.mark.reference("B7")
def test_system_b_has_its_parallel_xsa_value_and_skip_layers():
    """Parallel 7-10, XSA 7-10, value embedding 9 and 10, skips into 5-9."""
    cfg = recipe("reference_systems/B_bese288")
    plan = layer_plan(cfg.model, 3)
    model = shape_of(cfg)
    assert [step.layer for step in plan if step.kind == "gptj"] == [7, 8, 9, 10]
    assert [i for i, block in enumerate(model.blocks) if block.attn.xsa] == [7, 8, 9, 10]
    assert model.value_embed.layers == (9, 10)
    assert [step.layer for step in plan if step.pop is not None] == [5, 6, 7, 8, 9]
    assert [step.pop for step in plan if step.pop is not None] == [0, 1, 2, 3, 4]
    assert [step.layer for step in plan if step.push] == [0, 1, 2, 3, 4]


def test_skips_of_the_record_stack_join_all_visits():
    """Encoder visits 0 1 2 3 4 5 3 4, decoder the other nine; eight skips, five without recurrence."""
    model = recipe("track_10min_16mb/2026-04-09_3LayerRecurrence_QK525").model
    plan = layer_plan(model, 3)
    assert [step.layer for step in plan if step.push] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert [(step.layer, step.pop) for step in plan if step.pop is not None] == [
        (5, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 5), (8, 6), (9, 7),
    ]  # fmt: skip
    assert num_skips(model) == 8
    assert [step.pop for step in layer_plan(model, 1) if step.pop is not None] == [0, 1, 2, 3, 4]


@pytest.mark.reference("B8")
def test_rope_base_of_system_b_is_ntk_scaled():
    """16 rotated dimensions, reference length 1024."""
    model = recipe("reference_systems/B_bese288").model
    assert rope_base_at(model, 2048) == pytest.approx(22_081.790, abs=5e-3)
    assert rope_base_at(model, 1024) == 10_000


@pytest.mark.reference("C2")
@pytest.mark.parametrize("seq_len, base", [(1024, 10_000), (2048, 20_452.2287), (4096, 41_829.37)])
def test_rope_base_of_system_c_is_ntk_scaled(seq_len, base):
    """All 64 dimensions of a head."""
    assert rope_base_at(recipe("reference_systems/C_pr281").model, seq_len) == pytest.approx(base, rel=1e-7)


@pytest.mark.reference("B9")
def test_normed_inputs_shrink_with_the_square_root_of_depth():
    """1 / sqrt(l + 1)."""
    scales = [block.norm_scale for block in shape_of(recipe("reference_systems/B_bese288")).blocks]
    published = [1, 0.7071, 0.5774, 0.5, 0.4472, 0.4082, 0.3780, 0.3536, 0.3333, 0.3162, 0.3015]
    assert scales == pytest.approx(published, abs=5e-5)


@pytest.mark.reference("B18")
def test_xsa_output_is_orthogonal_to_the_own_value():
    """What is left of a head's output has no part along its position's value."""
    generator = torch.Generator().manual_seed(0)
    y, v = (torch.randn(2, 5, heads, 8, generator=generator) for heads in (4, 2))
    left = subtract_self_value(y, v)
    own = F.normalize(v, dim=-1).repeat_interleave(2, dim=2)
    assert (left * own).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(left + (y * own).sum(-1, keepdim=True) * own, y)


@pytest.mark.reference("C3")
def test_initial_weights_of_system_c():
    """Output projections zero, bigram projection orthogonal columns over sqrt(22), table and gamma zero."""
    cfg = recipe("reference_systems/C_pr281")
    torch.manual_seed(0)
    model = GPT(cfg.model, cfg.data.vocab_size)
    assert all(not block.attn.out.weight.any() and not block.mlp.down.weight.any() for block in model.blocks)
    proj = model.bigram.proj.weight.double()
    torch.testing.assert_close(proj.T @ proj, torch.eye(128, dtype=torch.float64) / 22, atol=1e-5, rtol=0)
    assert not model.bigram.table.weight.any() and not model.smear.gamma.any()


@pytest.mark.reference("B19")
@pytest.mark.reference("C4")
@pytest.mark.parametrize("name, expected", [("B_bese288", 288), ("C_pr281", 1024)])
def test_loss_at_the_start_is_the_log_of_the_vocabulary(name, expected):
    """On 64 random tokens; the published logs start at 5.6818 (ln 288 = 5.663) and 6.9315 (ln 1024)."""
    cfg = recipe(f"reference_systems/{name}")
    torch.manual_seed(0)
    model = GPT(cfg.model, cfg.data.vocab_size)
    tokens = torch.randint(4, expected, (1, 65))
    with torch.no_grad():
        logits = model(tokens[:, :-1], tokens[:, :-1] == 70)
    assert F.cross_entropy(logits[0], tokens[0, 1:]).item() == pytest.approx(math.log(expected), abs=0.05)


@pytest.mark.parametrize(
    "values", SWITCHES, ids=lambda values: ",".join(f"{k[6:]}={v}" for k, v in values.items())
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_switch_is_alive(tiny_config, values, compiled):
    """A switch that changes nothing is a defect; when torch.compile traces the model too."""
    on = with_values(tiny_config, values, "test")
    off = with_values(
        on, {name: getattr(ModelConfig(), name[6:]) for name in values if name not in NEUTRAL}, "test"
    )
    torch.compiler.reset()  # graphs of other tests count against the limit of recompilations
    outputs = []
    for cfg in (on, off):
        check_config(cfg)
        model = build_random(cfg)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        tokens = (torch.arange(32) * 7 % 300).view(2, 16)
        with torch.no_grad():
            outputs.append(forward(tokens, tokens == 70))
    assert torch.isfinite(outputs[0]).all()
    assert not torch.allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize(
    "values", SWITCHES, ids=lambda values: ",".join(f"{k[6:]}={v}" for k, v in values.items())
)
def test_no_switch_looks_ahead(tiny_config, values):
    """Causality holds for every feature: later tokens never move earlier logits."""
    model = build_random(with_values(tiny_config, values, "test")).eval()
    tokens = (torch.arange(32) * 7 % 300).view(2, 16)
    changed = tokens.clone()
    changed[:, 9:] = 5
    with torch.no_grad():
        before, after = (model(text, text == 70) for text in (tokens, changed))
    assert torch.equal(before[:, :9], after[:, :9])


@pytest.mark.parametrize(
    "values",
    [{}, *SWITCHES, {"model.context_ratio": 2}],
    ids=lambda values: ",".join(map(str, values.items())) or "plain",
)
@pytest.mark.parametrize("backend", ["sdpa", "blocked", "math"])
def test_predicting_late_positions_alone_changes_nothing(tiny_config, values, backend):
    """Scorers ask for the last positions: the last block computes no others, whatever is switched on."""
    model = build_random(with_values(tiny_config, values, "test")).eval()
    model.attention = backend
    tokens = (torch.arange(32) * 7 % 300).view(2, 16)
    starts = tokens == 70
    seen = []
    model.blocks[-1].mlp.register_forward_hook(lambda module, inputs, y: seen.append(y.size(1)))
    whole = model(tokens, starts)
    for first in (1, 11, 15):  # logits of 1.4 to 29, by switch; products of other shapes
        assert_close_at_scale(model(tokens, starts, first), whole[:, first:], units=32)
    expected = 16 if "model.context_ratio" in values else 1
    assert seen[-1] == expected


def shrunk(name: str) -> Config:
    """A recipe with all its switches, narrow; attention stays in documents, whatever it says."""
    cfg = recipe(name)
    narrow = {
        "data.vocab_size": 300,
        "model.model_dim": 8 * cfg.model.num_heads,
        "model.rope_dims": min(cfg.model.rope_dims, 4),
        "model.embed_dim": min(cfg.model.embed_dim, 8),
        "model.bigram_buckets": min(cfg.model.bigram_buckets, 64),
        "model.compute_dtype": "float32",
        "model.attn_in_document": not cfg.model.context_ratio,  # one excludes the other
    }
    return with_values(cfg, narrow, "test")


@pytest.mark.parametrize("name", COUNTS)
def test_no_recipe_looks_ahead_or_into_the_neighbouring_document(name):
    """Perturb the future, then the document before: what may not see them must not move, bitwise."""
    cfg = shrunk(name)
    check_config(cfg)
    model = build_random(cfg).eval()
    tokens = (torch.arange(48) * 7 % 300).view(2, 24)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[:, 11] = True
    future, neighbour = tokens.clone(), tokens.clone()
    future[:, 17:] = 5
    neighbour[:, :11] = 9
    with torch.no_grad():
        logits, after, beside = (model(text, starts) for text in (tokens, future, neighbour))
    assert torch.equal(logits[:, :17], after[:, :17]) and not torch.equal(logits[:, 17:], after[:, 17:])
    assert not torch.equal(logits[:, :11], beside[:, :11])
    assert torch.equal(logits[:, 11:], beside[:, 11:]) == cfg.model.attn_in_document


@pytest.mark.parametrize(
    "values", SWITCHES, ids=lambda values: ",".join(f"{k[6:]}={v}" for k, v in values.items())
)
def test_every_switch_trains_every_parameter_that_its_plan_uses(tiny_config, alone, values):
    """A step must change all weights of the block visits; rows that no visit reads may stay."""
    cfg = with_values(tiny_config, values | {"optim.bigram_proj": "adamw"}, "test")
    model = build_random(cfg)
    optimizers = Optimizers(model, cfg, alone)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    tokens = (torch.arange(34) * 7 % 300).view(2, 17)
    logits = model(tokens[:, :-1], tokens[:, :-1] == 70)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizers.step(StepRates(1.0, 0.9))
    still = [name for name, param in model.named_parameters() if torch.equal(param, before[name])]
    assert [name for name in still if ".lane_" not in name] == []


def test_recurrence_switches_on_by_progress():
    """One pass more at each start fraction; without fractions always on."""
    cfg = with_values(Config(), {"schedule.recur_start_fracs": "0.35,0.5"}, "test")
    assert [recur_passes_at(cfg, progress) for progress in (0.0, 0.34, 0.35, 0.49, 0.5, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    cfg = with_values(Config(), {"model.recur_layers": "3,5", "model.recur_passes": 3}, "test")
    assert recur_passes_at(cfg, 0.0) == 3


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model.recur_layers": (2, 3), "model.recur_passes": 2}, "recur_layers"),
        ({"model.recur_passes": 2}, "needs model.recur_layers"),
        ({"model.rope_dims": 3}, "must be even"),
        ({"model.rope_dims": 64}, "must be even and at most 8"),
        ({"model.value_embed_layers": (3,)}, "value_embed_layers"),
        ({"model.xsa_last": 4}, "xsa_last"),
        (RECUR | {"schedule.recur_start_fracs": (0.5,)}, "recur_passes - 1 rising entries"),
        (RECUR | {"schedule.recur_start_fracs": (0.5, 0.3)}, "recur_passes - 1 rising entries"),
        ({"model.parallel": "three_lane"}, "must be one of none, gptj, two_lane"),
    ],
)
def test_impossible_shapes_are_named(tiny_config, values, message):
    """Field, value and constraint, before a model is built."""
    with pytest.raises(UserError, match=message):
        check_config(with_values(tiny_config, values, "test"))
