"""The published reference systems: the numbers that belong to model, optimizer and schedule."""

import math

import pytest
import torch
import torch.nn.functional as F
from fixtures_model import build_random, recipe, shape_of
from fixtures_numbers import assert_close_at_scale

from data.codecs import load_codec
from data.prepare import Document, write_dataset
from formats.recipe import with_values
from kernels.context import (
    ContextRule,
    attend_compressed,
    feature_projection,
    projected_dim,
    visible_entries,
)
from train_gpt import (
    GPT,
    POSITIONS,
    Config,
    Environment,
    Optimizers,
    Ranks,
    StepRates,
    check_config,
    get_stages,
    layer_plan,
    learning_rate_mul,
    make_gpt,
    match_rules,
    mean_loss,
    next_batch,
    open_loader,
    rope_tables,
    rotate_interleaved,
    stage_at,
    takes_snapshot,
)

pytestmark = pytest.mark.numeric

B = "reference_systems/B_bese288"
A, D = "reference_systems/A_bwetaf53", "reference_systems/D_exp01"
C = "reference_systems/C_pr281"
E197 = "reference_systems/E_yxanul197_ultra10"
E270, E270_MEM6 = "reference_systems/E_yxanul270_mem9", "reference_systems/E_yxanul270_mem6"


def sizes(cfg: Config) -> dict[str, int]:
    """Count every parameter of a recipe's model."""
    return {name: param.numel() for name, param in shape_of(cfg).named_parameters()}


def total(named: dict[str, int], start: str = "") -> int:
    return sum(size for name, size in named.items() if name.startswith(start))


def small(name: str, **values) -> Config:
    """A recipe with a small vocabulary and few layers, so that it runs in a test."""
    shape = {"data.vocab_size": 300, "model.num_layers": 2, "model.compute_dtype": "float32"}
    return with_values(recipe(name), shape | values, "test")


def start_loss(cfg: Config, num_tokens: int) -> float:
    """Loss of the initial weights on random tokens, in nats."""
    torch.manual_seed(0)
    model = GPT(cfg.model, cfg.data.vocab_size).eval()
    tokens = torch.randint(cfg.data.vocab_size, (1, num_tokens + 1))
    with torch.no_grad():
        logits = model(tokens[:, :-1], tokens[:, :-1] == -1)
    return F.cross_entropy(logits[0], tokens[0, 1:]).item()


@pytest.mark.reference("A1")
def test_system_a_has_its_counts():
    """Embedding, block and total; two layers as a second point."""
    named = sizes(recipe(A))
    assert (total(named), named["embed.weight"], total(named, "blocks.0.")) == (
        53_012_480, 25_733_120, 3_409_920,
    )  # fmt: skip
    assert total(sizes(with_values(recipe(A), {"model.num_layers": 2}, "test"))) == 32_552_960


@pytest.mark.reference("A2")
def test_system_a_has_biases_on_outputs_only_and_no_final_norm():
    """16 bias vectors of 512 and 16 gains."""
    named = sizes(recipe(A))
    biases = [size for name, size in named.items() if name.endswith("bias")]
    gains = [size for name, size in named.items() if name.endswith("gain")]
    assert biases == [512] * 16 and sum(biases) == 8_192
    assert gains == [512] * 16 and not total(named, "final_norm")


@pytest.mark.reference("A3")
def test_system_a_reads_its_tokens_once():
    """1,348,599,808 tokens are 20,578 whole steps, of which 4 % warm up."""
    cfg = recipe(A)
    assert cfg.run.iterations * cfg.data.batch_tokens == 1_348_599_808
    assert cfg.schedule.lr_warmup_iters == int(0.04 * cfg.run.iterations)


@pytest.mark.reference("A4")
@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.0), (1, 1.57958688e-6), (411, 6.49210207e-4), (823, 1.3e-3), (5000, 1.16180369e-3),
        (10289, 6.92552318e-4), (10700, 6.50101680e-4), (15000, 2.39478858e-4), (20578, 1e-7),
    ],
)  # fmt: skip
def test_system_a_follows_its_published_learning_rates(step, expected):
    """Linear warm-up, then a cosine to 1e-7."""
    cfg = recipe(A)
    assert cfg.optim.matrix_lr * learning_rate_mul(cfg, step, 0.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.reference("A5")
def test_attention_by_blocks_of_queries_is_the_same_function():
    """System A cuts queries into chunks to save memory; here the backend does, with equal logits."""
    cfg = small(A, **{"model.model_dim": 64})
    outputs = []
    for backend in ("blocked", "math"):
        torch.manual_seed(0)
        model = GPT(cfg.model, 300, attention=backend).train(False)
        tokens = (torch.arange(128) * 7 % 300).view(1, 128)
        outputs.append(model(tokens, tokens == -1))
    assert_close_at_scale(*outputs, units=16)  # logits of 0.03, sums over 64 channels


@pytest.mark.reference("A6")
@pytest.mark.parametrize("positions", ["embed_heads", "bwetaf051", "bwetaf06"])
def test_system_a_never_looks_ahead(positions):
    """A changed tail, be it text or padding, leaves earlier logits alone, in every position mode."""
    cfg = small(A, **{"model.positions": positions, "model.model_dim": 64})
    model = build_random(cfg).eval()
    tokens = (torch.arange(32) * 7 % 300).view(2, 16)
    changed = tokens.clone()
    changed[:, 9:] = 0
    with torch.no_grad():
        before, after = (model(text, text == -1) for text in (tokens, changed))
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


@pytest.mark.slow
@pytest.mark.reference("A7")
def test_system_a_starts_near_the_log_of_its_vocabulary():
    """ln 50260 = 10.825 and a little for the spread of random logits."""
    assert 10.82 <= start_loss(recipe(A), 512) <= 10.90


@pytest.mark.slow
@pytest.mark.reference("A7")
def test_the_initial_stream_of_system_a_has_its_measured_size():
    """Root mean square about 0.52 after eight blocks."""
    torch.manual_seed(0)
    model = GPT(recipe(A).model, 50_257).eval()
    tokens = torch.randint(50_257, (1, 512))
    with torch.no_grad():
        stream = model.hidden(tokens, tokens == -1)
    assert stream.square().mean().sqrt().item() == pytest.approx(0.52, abs=0.03)


@pytest.mark.slow
def test_system_a_learns_one_batch_by_heart():
    """Its optimizer and blocks at a small size: 4 rows of 64 tokens to below 0.1 nats."""
    values = {"model.num_layers": 4, "model.model_dim": 64, "model.init_std": 0.06, "model.dropout": 0.0}
    cfg = small(A, **values | {"model.embed_init_std": 0.06})
    torch.manual_seed(0)
    model = GPT(cfg.model, 300)
    optimizers = Optimizers(model, cfg, Ranks(Environment({}), "cpu"))
    tokens = torch.randint(300, (4, 65))
    for _ in range(150):
        logits = model(tokens[:, :-1], tokens[:, :-1] == -1)
        loss = F.cross_entropy(logits.flatten(0, 1)[:, :300], tokens[:, 1:].flatten())
        loss.backward()
        optimizers.step(StepRates(4.0, 0.9))  # a peak of 5.2e-3, for so few channels
    assert loss.item() < 0.1


@pytest.mark.reference("A9")
def test_the_published_position_code_of_system_a_is_kept_as_it_was():
    """Interleaved angles on half-split pairs: not a rotation, kept for its weights only."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    turned = rotate_interleaved(x, rope_tables(2, 4, 10_000.0, x))[0, 1, 0]
    expected = torch.tensor([-1.984111, -2.285279, 3.00985, 4.0198])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_position_mode_computes_something_else(positions):
    """Five modes, five functions of the same weights."""
    outputs = {}
    for mode in POSITIONS:
        model = build_random(small(A, **{"model.positions": mode, "model.model_dim": 64})).eval()
        tokens = (torch.arange(16) * 7 % 300).view(1, 16)
        with torch.no_grad():
            outputs[mode] = model(tokens, tokens == -1)
    others = [found for mode, found in outputs.items() if mode != positions]
    assert not any(torch.allclose(outputs[positions], other, atol=1e-5) for other in others)


def test_dropout_acts_in_training_only():
    """After attention; a scored model must not be noisy."""
    cfg = small(A, **{"model.model_dim": 64})
    model = build_random(cfg)
    tokens = torch.arange(16).view(1, 16)
    noisy = [model.train()(tokens, tokens == -1) for _ in range(2)]
    exact = [model.eval()(tokens, tokens == -1) for _ in range(2)]
    assert torch.equal(*exact) and not torch.equal(*noisy) and not torch.equal(noisy[0], exact[0])


@pytest.mark.reference("C1")
def test_system_c_has_its_block_count():
    """2,361,352 a block."""
    named = sizes(recipe(C))
    assert (total(named), total(named, "blocks.0.")) == (26_829_913, 2_361_352)


@pytest.mark.reference("C6")
def test_system_c_averages_its_seven_snapshots():
    """Every 200 steps while the learning-rate factor is below 0.5, at the published pace of 65.65 ms."""
    cfg = recipe(C)
    taken = [
        step
        for step in range(1, 9001)
        if takes_snapshot(cfg.average, step, learning_rate_mul(cfg, step, 65.65 * step))
    ]
    assert taken == [7800 + 200 * k for k in range(7)]


@pytest.mark.reference("C13")
def test_system_c_sees_its_published_tokens():
    """9,000 steps of 524,288 tokens."""
    assert 9000 * recipe(C).data.batch_tokens == 4_718_592_000


@pytest.mark.reference("D1")
@pytest.mark.reference("D2")
@pytest.mark.reference("D11")
def test_system_d_has_its_counts_without_memory():
    """Tied and untied, per part, on the meta device."""
    named = sizes(recipe(D))
    parts = total(named), total(named, "blocks.0."), named["embed.weight"], total(named, "final_norm")
    assert parts == (372_904_960, 5_252_608, 204_819_456, 2_048)
    assert f"{parts[0] / 1e6:.5f} M" == "372.90496 M"
    assert total(sizes(with_values(recipe(D), {"model.tie_embeddings": False}, "test"))) == 577_724_416
    assert total(sizes(with_values(recipe(D), {"model.num_layers": 2}, "test"))) == 215_326_720
    assert all(param.is_meta for param in shape_of(recipe(D)).parameters())


@pytest.mark.reference("D3")
def test_system_d_has_the_published_module_tree():
    """Its printed modules and their shapes, by our names; its c_attn is our q, k and v."""
    ours = {name: tuple(param.shape) for name, param in shape_of(recipe(D)).named_parameters()}
    block = {
        "ln_1.weight": ["attn_norm.gain"], "ln_1.bias": ["attn_norm.bias"],
        "attn.c_attn.weight": ["attn.q.weight", "attn.k.weight", "attn.v.weight"],
        "attn.c_attn.bias": ["attn.q.bias", "attn.k.bias", "attn.v.bias"],
        "attn.c_proj.weight": ["attn.out.weight"], "attn.c_proj.bias": ["attn.out.bias"],
        "ln_2.weight": ["mlp_norm.gain"], "ln_2.bias": ["mlp_norm.bias"],
        "mlp.c_fc.weight": ["mlp.up.weight"], "mlp.c_fc.bias": ["mlp.up.bias"],
        "mlp.c_proj.weight": ["mlp.down.weight"], "mlp.c_proj.bias": ["mlp.down.bias"],
    }  # fmt: skip
    published = {
        "ln_1.weight": (1024,), "ln_1.bias": (1024,), "attn.c_attn.weight": (3072, 1024),
        "attn.c_attn.bias": (3072,), "attn.c_proj.weight": (1024, 1024), "attn.c_proj.bias": (1024,),
        "ln_2.weight": (1024,), "ln_2.bias": (1024,), "mlp.c_fc.weight": (512, 1024),
        "mlp.c_fc.bias": (512,), "mlp.c_proj.weight": (1024, 512), "mlp.c_proj.bias": (1024,),
    }  # fmt: skip
    used = {"embed.weight": (200_019, 1024), "final_norm.gain": (1024,), "final_norm.bias": (1024,)}
    for layer in range(32):
        for name, parts in block.items():
            shapes = {f"blocks.{layer}.{part}": ours[f"blocks.{layer}.{part}"] for part in parts}
            joined = (sum(shape[0] for shape in shapes.values()), *next(iter(shapes.values()))[1:])
            assert joined == published[name], name
            used |= shapes
    assert used == ours


FULL = {"model.context_ratio": 0}
FEATURES = {"model.context_axis": "features"}


@pytest.mark.reference("D4")
@pytest.mark.parametrize("values", [FULL, FEATURES])
def test_the_context_projection_has_no_parameters(values):
    """The same names with, without it and along the other axis; along features no buffer either."""
    changed = with_values(recipe(D), values, "test")
    assert recipe(D).model.context_ratio == 10
    assert set(shape_of(changed).state_dict()) == set(shape_of(recipe(D)).state_dict())
    assert not dict(shape_of(changed).named_buffers())


@pytest.mark.reference("D5")
def test_a_short_context_is_not_compressed():
    """Up to 40 tokens full attention, beyond it something else."""
    full = build_random(small(D, **{"model.model_dim": 64} | FULL))
    compressed = build_random(small(D, **{"model.model_dim": 64}))
    tokens = (torch.arange(64) * 7 % 300).view(1, 64)
    with torch.no_grad():
        ours, expected = (model(tokens, tokens == -1) for model in (compressed, full))
        assert_close_at_scale(ours[:, :40], expected[:, :40], units=32)  # logits of 7, other products
    assert not torch.allclose(ours[:, 45:], expected[:, 45:], atol=1e-3)


def test_features_shrink_with_depth_between_exact_ends():
    """Of 64 in 32 layers: half in the third, a tenth in the thirtieth, all in the two at either end."""
    rule = ContextRule(10, 2, 2)
    kept = [projected_dim(rule, layer, 32, 64) for layer in range(32)]
    assert kept[:3] == [64, 64, 32] and kept[29:] == [6, 64, 64]
    assert kept[2:30] == sorted(kept[2:30], reverse=True)
    assert torch.equal(feature_projection(rule, 1, 32, 64), torch.eye(64))
    drawn = feature_projection(rule, 29, 32, 64)
    assert torch.linalg.matrix_rank(drawn) == 6 and torch.equal(drawn, feature_projection(rule, 29, 32, 64))
    mean = sum(feature_projection(ContextRule(2, 2, 0), layer, 400, 8) for layer in range(400)) / 400
    torch.testing.assert_close(mean, torch.eye(8), atol=0.12, rtol=0)


def test_attention_along_projected_features_is_its_slow_definition():
    """softmax(q P (k P)^T / sqrt(K)) v P P^T, row by row; it is causal, and gradients pass."""
    cfg = small(D, **{"model.num_layers": 5, "model.model_dim": 64} | FEATURES)
    model = build_random(cfg)
    attn = model.blocks[2].attn
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    tokens = torch.zeros(1, 9, dtype=torch.long)
    y, _ = attn(x, model.share(tokens, tokens.bool(), x, layer_plan(cfg.model)), None, 0)
    q, k, v = (part(x).unflatten(-1, (16, 4)) for part in (attn.q, attn.k, attn.v))
    values, vectors = torch.linalg.eigh(attn.projection)
    half = vectors * values.clamp(min=0).sqrt()  # a P of the same product
    rows = []
    for t in range(9):
        scores = torch.einsum("hk,shk->hs", q[0, t] @ half, k[0, : t + 1] @ half) / 2
        rows.append(torch.einsum("hs,shk->hk", scores.softmax(1), v[0, : t + 1] @ half) @ half.T)
    slow = attn.out(torch.stack(rows).flatten(1))
    assert_close_at_scale(y[0], slow, units=64)  # outputs of 4; the root of P P^T rounds too
    y[0, 3].sum().backward()
    assert x.grad[0, :4].abs().sum(1).min() > 0 and not x.grad[0, 4:].any()


@pytest.mark.reference("D6")
def test_entries_of_the_compressed_context_are_the_published_ones():
    """(exact, pooled) for queries in a short and in a long text: 8192 / 862 = 9.503."""
    queries = torch.tensor([39, 40, 50, 63, 8191])
    exact, pooled = visible_entries(queries, 8192, ContextRule(10, 2, 2))
    assert list(zip(exact.sum(1).tolist(), pooled.sum(1).tolist())) == [
        (40, 0), (31, 5), (31, 9), (34, 12), (32, 830),
    ]  # fmt: skip


@pytest.mark.reference("D7")
def test_the_compressed_context_is_causal_and_trains_what_it_pools():
    """No later token reaches an output; gradients reach pooled tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    rule = ContextRule(10, 2, 2)
    y = attend_compressed(q, k, v, rule)
    y[:, 63].sum().backward()
    assert k.grad[0, 25].abs().sum() > 0 and v.grad[0, 25].abs().sum() > 0  # chunk 2 is pooled
    with torch.no_grad():
        other_k, other_v = k.clone(), v.clone()
        other_k[:, 50:], other_v[:, 50:] = 3.0, -2.0
        assert torch.equal(attend_compressed(q, other_k, other_v, rule)[:, :50], y[:, :50])


@pytest.mark.reference("D9")
def test_system_d_holds_its_learning_rate_for_a_thousand_steps():
    """Linear to 1e-3 over 4,000 steps, then constant inside each bucket and falling between them."""
    cfg = recipe(D)
    rate = [cfg.optim.matrix_lr * learning_rate_mul(cfg, step, 0.0) for step in range(8001)]
    assert rate[0] == 0 and rate[2000] == pytest.approx(5e-4) and rate[4000] == 1e-3
    for start in range(4000, 8000, 1000):
        assert len(set(rate[start : start + 1000])) == 1 and rate[start + 1000] < rate[start]


@pytest.mark.reference("E1")
@pytest.mark.reference("E2")
def test_system_e_has_its_counts():
    """197M, 270M and their factorised embeddings."""
    small_named, large_named = sizes(recipe(E197)), sizes(recipe(E270))
    assert (total(small_named), total(large_named)) == (196_398_464, 273_284_480)
    assert sizes(recipe(E270_MEM6)) == large_named
    embedding = [total(named, "embed") for named in (small_named, large_named)]
    assert embedding == [25_698_944, 25_682_560]
    saving = [200_005 * width - size for width, size in zip((768, 640), embedding)]
    assert saving == [127_904_896, 102_320_640]
    assert f"{saving[0] / (200_005 * 768):.2%}" == "83.27%"


@pytest.mark.reference("E3")
def test_a_tied_factorised_head_is_the_transposed_embedding():
    """Logits x P^T E^T against the dense product (E P)^T."""
    cfg = small(E197)
    model = build_random(cfg)
    x = torch.randn(2, 5, 768)
    dense = model.embed.weight @ model.embed_proj.weight.T  # (V, D)
    # Logits of 270, sums over 768 channels, (x P^T) E^T against x (E P)^T.
    assert_close_at_scale(model.predict(x), model.final_norm(x) @ dense.T, units=64)


@pytest.mark.reference("E4")
@pytest.mark.parametrize("name, group", [(E197, 6), (E270, 5)])
def test_system_e_shares_keys_and_values(name, group):
    """Six and five query heads a kv head, equal to attention with repeated heads."""
    cfg = small(name, **{"model.num_layers": 1, "model.model_dim": recipe(name).model.num_heads * 8})
    assert cfg.model.num_heads // cfg.model.num_kv_heads == group
    grouped = build_random(cfg)
    repeated = GPT(with_values(cfg, {"model.num_kv_heads": cfg.model.num_heads}, "test").model, 300)
    weights = grouped.state_dict()
    for part in ("k", "v"):
        key = f"blocks.0.attn.{part}.weight"
        weights[key] = weights[key].unflatten(0, (2, 8)).repeat_interleave(group, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        ours, expected = (model(tokens, tokens == -1) for model in (grouped, repeated))
    assert_close_at_scale(ours, expected, units=16)  # logits of up to 430: keys of another shape


ULTRA10 = [
    (0, 8, 32_768), (2_000, 16, 16_384), (5_000, 32, 16_384), (10_000, 64, 16_384), (20_000, 128, 16_384),
    (35_000, 256, 16_384), (55_000, 512, 16_384), (80_000, 768, 36_864), (110_000, 1536, 73_728),
    (140_000, 2048, 65_536),
]  # fmt: skip


@pytest.mark.reference("E9")
def test_system_e_goes_through_ten_stages():
    """Boundaries are inclusive; cumulative tokens at stage ends as published."""
    cfg = recipe(E197)
    found = [(stage.start, stage.seq_len, stage.batch_tokens) for stage in get_stages(cfg)]
    assert found == ULTRA10
    for (start, seq_len, _), (before_len) in zip(ULTRA10[1:], [row[1] for row in ULTRA10]):
        assert stage_at(cfg, start, 0.0).seq_len == seq_len
        assert stage_at(cfg, start - 1, 0.0).seq_len == before_len
    ends = [row[0] for row in ULTRA10[1:]] + [200_000]
    tokens = [stage_at(cfg, step, 0.0).batch_tokens for step in range(0, 200_000, 1000)]
    cumulative = [1000 * sum(tokens[: end // 1000]) for end in ends]
    assert cumulative == [
        65_536_000, 114_688_000, 196_608_000, 360_448_000, 606_208_000, 933_888_000, 1_343_488_000,
        2_449_408_000, 4_661_248_000, 8_593_408_000,
    ]  # fmt: skip


@pytest.mark.reference("E10")
def test_system_e_has_the_memory_saving_stages():
    """Tokens a step of the nine entries and their total by 150,000 steps."""
    cfg = recipe(E270)
    stages = get_stages(cfg)
    assert [stage.batch_tokens for stage in stages] == [32768, 32768, 32768, 49152, 32768, 49152] + [
        65536
    ] * 3
    assert [stage.start for stage in stages] == [0, 3000, 6000, 10000, 15000, 25000, 40000, 60000, 100000]
    assert 1000 * sum(stage_at(cfg, s, 0.0).batch_tokens for s in range(0, 150_000, 1000)) == 8_847_360_000


@pytest.mark.reference("E10")
def test_system_e_has_the_six_stages_of_its_card():
    """The nine without the stage of 1,536 tokens and the repetitions; one more total that is exact."""
    cfg = recipe(E270_MEM6)
    found = [(stage.start, stage.seq_len, stage.batch_tokens) for stage in get_stages(cfg)]
    assert found == [
        (0, 128, 32_768), (3_000, 256, 32_768), (6_000, 512, 32_768), (10_000, 768, 49_152),
        (15_000, 1024, 32_768), (25_000, 2048, 65_536),
    ]  # fmt: skip
    tokens = sum(stage_at(cfg, step, 0.0).batch_tokens for step in range(0, 150_000, 1000))
    assert 1000 * tokens == 9_093_120_000
    sequences = [stage.batch_tokens // stage.seq_len for stage in get_stages(cfg)]
    assert sequences[:5] == [256, 128, 64, 64, 32]


@pytest.mark.reference("E10")
@pytest.mark.parametrize("name, accumulation", [(E197, [8, 4, 4, 4, 4, 4, 4, 3, 6, 4]), (E270, [32] * 9)])
def test_system_e_accumulates_gradients_as_published(name, accumulation):
    """The original's loop never did; a step is a step of the optimizer."""
    cfg = recipe(name)
    assert [stage.micro_batches for stage in get_stages(cfg)] == accumulation
    assert all(
        stage.batch_tokens % (stage.seq_len * count) == 0
        for stage, count in zip(get_stages(cfg), accumulation)
    )


@pytest.mark.parametrize("name", [E197, E270, E270_MEM6])
def test_learning_rates_are_higher_with_8_bit_products(name):
    """By 1.2, as published; model.fp8=off, the original's --disable-fp8, takes that back too."""
    cfg = recipe(name)
    wide = with_values(cfg, {"model.fp8": "off"}, "test")
    for step in (500, 70_000, 140_000):
        factor = stage_at(cfg, step, 0.0).lr_mul * min(step / cfg.schedule.lr_warmup_iters, 1)
        assert learning_rate_mul(wide, step, 0.0) == pytest.approx(factor)
        assert learning_rate_mul(cfg, step, 0.0) == pytest.approx(1.2 * factor)


@pytest.mark.slow
@pytest.mark.reference("E18")
@pytest.mark.parametrize("name, expected", [(E197, 12.214), (E270, 12.373)])
def test_system_e_starts_near_the_log_of_its_vocabulary(name, expected):
    """ln 200005 = 12.206; the default head of the large one adds a sixth of a nat."""
    assert start_loss(recipe(name), 2048) == pytest.approx(expected, abs=0.03)  # targets spread by 0.6 nats


@pytest.mark.parametrize("name", [A, D, E197, E270, E270_MEM6])
def test_systems_have_rules_for_every_parameter_and_pass_the_checks(name):
    """AdamW on every leaf, each with a row."""
    cfg = recipe(name)
    check_config(cfg)
    assert len(match_rules(cfg, list(sizes(cfg)))) == len(sizes(cfg))
    assert cfg.optim.matrix_optimizer == "adamw"


def test_recomputing_visits_changes_no_gradient(tiny_config):
    """checkpoint_every trades time for memory, nothing else."""
    grads = []
    for every in (0, 1, 2):
        cfg = with_values(tiny_config, {"model.checkpoint_every": every}, "test")
        model = build_random(cfg).train()
        tokens = (torch.arange(32) * 7 % 300).view(2, 16)
        model(tokens, tokens == 1).square().mean().backward()
        grads.append([param.grad for param in model.parameters()])
    for ours in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ours, grads[0], strict=True))


def test_double_precision_reaches_the_masters(tiny_config):
    """float64 is for proofs: no parameter stays behind."""
    cfg = with_values(tiny_config, {"model.compute_dtype": "float64"}, "test")
    model = make_gpt(cfg, torch.device("cpu"))
    assert {param.dtype for param in model.parameters()} == {torch.float64}
    assert math.isfinite(model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4).bool()).sum().item())


@pytest.mark.reference("B13")
@pytest.mark.reference("B14")
@pytest.mark.reference("C9")
@pytest.mark.reference("C14")
@pytest.mark.reference("D8")
@pytest.mark.reference("E16")
def test_published_constants_agree_with_each_other():
    """Arithmetic on the originals' logs only: nothing of ours is tested, and none of it is counted."""
    assert 12_635_100 + 88_802 == 12_723_902
    assert 1.18169806 / (1.61403749 / math.log(2)) == pytest.approx(0.507479, abs=1e-6)
    assert 1.15986333 / (1.95838065 / math.log(2)) == pytest.approx(0.410521, abs=1e-6)
    assert round((1.1374 + 1.1372 + 1.1397) / 3, 4) == 1.1381 and 15_433_121 + 69_101 == 15_502_222
    assert divmod(1_577_715_712, 3_200) == (493_036, 512)
    assert math.exp(12.2583) == pytest.approx(210_700, rel=1e-3) and math.exp(9.6898) == pytest.approx(
        16_152, rel=1e-4
    )


@pytest.mark.reference("E11")
def test_training_and_validation_share_no_document(tiny_data, tmp_path):
    """605,406 and 31,864 of 637,270 rows as published; ours leaves out of training what is in both."""
    assert (int(0.95 * 637_270), 637_270 - int(0.95 * 637_270)) == (605_406, 31_864)
    codec = load_codec(tiny_data / "tokenizer.model")
    texts = [f"text number {i} of a made-up collection" for i in range(20)]
    train, val = (
        [Document(text, text) for text in part] for part in (texts[: int(0.95 * 20)], texts[int(0.95 * 20) :])
    )
    manifest = write_dataset(tmp_path / "apart", codec, train, val, {}, num_threads=1)
    assert (manifest["train"]["documents"], manifest["val"]["documents"]) == ([0, 19], [0, 1])
    shared = write_dataset(tmp_path / "shared", codec, [*val, *train], val, {}, num_threads=1)
    assert shared["train"] == manifest["train"] | {"left_out": 1}


@pytest.mark.reference("E12")
def test_targets_are_the_next_tokens(tiny_config, alone):
    """A model that repeats its input is wrong, one that knows the next token is right."""
    batch = next_batch(open_loader(tiny_config, 0), get_stages(tiny_config)[0], alone)
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    onehot = torch.eye(tiny_config.data.vocab_size)

    def copy(tokens, starts_doc, first, passes, extent):
        return 3 * onehot[tokens]

    def know(tokens, starts_doc, first, passes, extent):
        return 50 * onehot[batch.targets]

    assert mean_loss(copy, batch).item() > 0.9 * math.log(tiny_config.data.vocab_size)
    assert mean_loss(know, batch).item() < 1e-6


@pytest.mark.reference("E13")
@pytest.mark.parametrize("padding", [1, 7, 40])
def test_padding_behind_a_text_changes_no_loss_of_it(padding):
    """Rows are packed here; where a caller pads, the text's own targets cost the same."""
    model = build_random(small(E197)).eval()
    text = (torch.arange(20) * 7 % 300).view(1, 20)
    padded = F.pad(text, (0, padding), value=3)
    with torch.no_grad():
        short, long = (model(row[:, :-1], row[:, :-1] == -1)[0, :19] for row in (text, padded))
    plain, masked = (F.cross_entropy(logits, text[0, 1:]) for logits in (short, long))
    # The weights are a wave, not trained: 4,094 nats, the difference of logits that are sums over 768
    # channels through two layers. 100 units are 1.2e-5 of it.
    assert_close_at_scale(masked, plain, units=100)
