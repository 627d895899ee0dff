"""Optimizers, schedules and averaging."""

import copy
import math

import pytest
import torch
from fixtures_numbers import assert_close_at_scale

from formats.recipe import with_values
from train_gpt import (
    MATRIX_OPTIMIZERS,
    UPDATE_RULES,
    Config,
    Ema,
    Muon,
    OptimConfig,
    Optimizers,
    StepRates,
    Swa,
    build_model,
    decay_mul,
    get_stages,
    learning_rate_mul,
    muon_momentum,
    newton_schulz,
    step_rates,
)

pytestmark = pytest.mark.numeric


def set_gradients(model, seed: int) -> None:
    """Give every parameter a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("table, lowest", [("classic", 0.3), ("polar_express", 0.65)])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (48, 48)])
def test_newton_schulz_brings_all_singular_values_near_one(shape, table, lowest):
    """Muon's update has an almost flat spectrum: [0.7, 1.2], Polar Express flatter."""
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    batched = newton_schulz(stack, 5, table)
    values = torch.linalg.svdvals(batched)
    assert values.min() > lowest and values.max() < 1.25
    torch.testing.assert_close(batched[1], newton_schulz(stack[1:2], 5, table)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_takes_the_same_steps_as_torch_muon(tiny_config, alone, weight_decay):
    """torch.optim.Muon as the oracle over five steps with changing gradients.

    Its momentum buffer is an average, (1 - m) times our sum at every step, and its Nesterov direction
    (1 - m) g + m buffer is (1 - m) times ours: orthogonalization drops the factor.
    """
    values = {"optim.matrix_lr": 0.02, "optim.matrix_weight_decay": weight_decay, "optim.num_ns_steps": 5}
    model = build_model(with_values(tiny_config, values, "test"), alone.device)
    weight = model.blocks[1].mlp.up.weight
    start = weight.detach().clone()
    twin = torch.nn.Parameter(start.clone())
    oracle = torch.optim.Muon(
        [twin], lr=0.02, weight_decay=weight_decay, momentum=0.9, ns_steps=5, adjust_lr_fn="original"
    )
    optimizers = Optimizers(model, with_values(tiny_config, values, "test"), alone)
    for seed in range(5):
        set_gradients(model, seed)
        twin.grad = weight.grad.clone()
        optimizers.step(StepRates(1.0, 0.9))
        oracle.step()
    moved, expected = (weight.detach() - start).flatten(), (twin.detach() - start).flatten()
    assert moved.norm() > 0.5 * 0.02
    # The oracle iterates in bfloat16, so single elements differ by about a hundredth of a step.
    assert (moved - expected).norm() < 0.02 * expected.norm()


class Sign:
    """A matrix optimizer as an example: the sign of a running mean."""

    def __init__(self, cfg, dtype):
        self.cfg = cfg

    def new_state(self, weights):
        return {"mean": torch.zeros_like(weights)}

    def update(self, grad, state, rates, step):
        state["mean"].lerp_(grad, 1 - rates.momentum)
        return (state["mean"] / (1 - rates.momentum**step)).sign()


def test_a_matrix_optimizer_is_one_class_and_one_row(tiny_config, alone, monkeypatch):
    """Its state is saved and restored, decay and clipping are applied, without a line of its own for it."""
    monkeypatch.setitem(MATRIX_OPTIMIZERS, "muon", Sign)
    cfg = with_values(tiny_config, {"optim.matrix_weight_decay": 0.1}, "test")
    ends = []
    for restores in (False, True):
        model = build_model(cfg, alone.device)
        weight = model.blocks[0].attn.q.weight
        start = weight.detach().clone()
        optimizers = Optimizers(model, cfg, alone)
        set_gradients(model, seed=1)
        expected = start * (1 - 0.04 * 0.1) - 0.04 * weight.grad.sign()
        optimizers.step(StepRates(1.0, 0.9))
        torch.testing.assert_close(weight.detach(), expected)
        if restores:
            state = copy.deepcopy(optimizers.state_dict())
            optimizers = Optimizers(model, cfg, alone)
            optimizers.load_state_dict(state)
        set_gradients(model, seed=2)
        optimizers.step(StepRates(1.0, 0.9, grad_clip_norm=0.5))
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_every_optimizer_of_a_recipe_has_its_row():
    """A row or a description that is forgotten would be a choice that fails when it is used."""
    assert list(MATRIX_OPTIMIZERS) == list(UPDATE_RULES), "both in train_gpt.py"


def test_global_norm_is_clipped_once_over_all_parameters(tiny_config, alone):
    """A clipped step with AdamW's scale-free first step hides clipping; Muon's momentum shows it."""
    cfg = tiny_config
    model = build_model(cfg, alone.device)
    set_gradients(model, seed=1)
    total = math.sqrt(sum(param.grad.double().square().sum().item() for param in model.parameters()))
    before = model.blocks[0].attn.q.weight.grad.clone()
    optimizers = Optimizers(model, cfg, alone)
    optimizers.step(StepRates(1.0, 0.0, grad_clip_norm=0.5))
    stack = next(stack for stack in optimizers.stacks if stack.params[0] is model.blocks[0].attn.q.weight)
    torch.testing.assert_close(stack.state["momentum"][0], before * (0.5 / total), rtol=1e-4, atol=1e-7)


def test_weight_decay_shrinks_matrices_by_the_scheduled_rate(tiny_config, alone):
    """Decoupled decay: w <- w (1 - lr * wd) - lr * update, with the scheduled lr."""
    ends = {}
    for decay in (0.0, 0.5):
        cfg = with_values(tiny_config, {"optim.matrix_weight_decay": decay}, "test")
        model = build_model(cfg, alone.device)
        start = model.blocks[0].mlp.up.weight.detach().clone()
        set_gradients(model, seed=2)
        Optimizers(model, cfg, alone).step(StepRates(0.5, 0.9))
        ends[decay] = model.blocks[0].mlp.up.weight.detach().clone()
    # Weights of 0.2, compared as such: their difference is a hundredth of them, with their rounding.
    assert_close_at_scale(ends[0.5] + start * 0.5 * 0.04 * 0.5, ends[0.0], units=4)


@pytest.mark.parametrize(
    "row",  # field, two values, and what else must be set
    [
        ("optim.matrix_lr", (0.01, 0.02)),
        ("optim.tied_embed_lr", (0.01, 0.02)),
        ("optim.scalar_lr", (0.01, 0.02)),
        ("optim.num_ns_steps", (3, 5)),
        ("optim.ns_table", ("classic", "polar_express")),
        ("optim.row_norm", (False, True)),
        ("optim.normuon_beta2", (0.0, 0.95)),
        ("optim.normuon_beta2", (0.5, 0.95)),
        ("optim.matrix_optimizer", ("muon", "adamw")),
        ("optim.beta1", (0.5, 0.9)),
        ("optim.beta2", (0.5, 0.95)),
        ("optim.adam_eps", (1e-8, 1e-2)),
        ("optim.scalar_weight_decay", (0.0, 0.5)),
        ("optim.embed_weight_decay", (0.0, 0.5)),
    ],
)
def test_every_optimizer_setting_changes_the_weights(tiny_config, alone, row):
    """A setting nobody reads is a defect."""
    (name, values, *others), ends = row, []
    for value in values:
        cfg = with_values(tiny_config, dict(*others) | {name: value}, "test")
        model = build_model(cfg, alone.device)
        optimizers = Optimizers(model, cfg, alone)
        for seed in (1, 2):
            set_gradients(model, seed)
            optimizers.step(StepRates(1.0, 0.9))
        ends.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert not torch.equal(*ends)


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_state_restored_is_state_continued(tiny_config, alone, name):
    """Hidden state is banned: save, restore and go on must equal going on, bitwise."""
    values = {"average.ema_decay": 0.9, "optim.matrix_optimizer": name, "optim.normuon_beta2": 0.9}
    cfg = with_values(tiny_config, values, "test")
    model = build_model(cfg, alone.device)
    optimizers, ema = Optimizers(model, cfg, alone), Ema(model, 0.9)

    def steps(seeds):
        for seed in seeds:
            set_gradients(model, seed)
            optimizers.step(StepRates(1.0, 0.9))
            ema.update()
        return [param.detach().clone() for param in model.parameters()], [a.clone() for a in ema.averages]

    steps([1, 2])
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizers, ema)])
    straight = steps([3, 4])
    for part, state in zip((model, optimizers, ema), saved, strict=True):
        part.load_state_dict(state)
    resumed = steps([3, 4])
    for a, b in zip(straight[0] + straight[1], resumed[0] + resumed[1], strict=True):
        assert torch.equal(a, b)


def test_muoneq_r_forgets_the_scale_of_rows(tiny_config, alone):
    """Rows are normalised before orthogonalization: a louder row steps as the quiet one did."""
    ends = []
    for factor in (1.0, 100.0):
        cfg = with_values(tiny_config, {"optim.row_norm": True}, "test")
        model = build_model(cfg, alone.device)
        set_gradients(model, seed=1)
        model.blocks[0].mlp.up.weight.grad[3] *= factor
        Optimizers(model, cfg, alone).step(StepRates(1.0, 0.9))
        ends.append(model.blocks[0].mlp.up.weight.detach().clone())
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)


def test_normuon_evens_rows_and_keeps_the_norm():
    """After the first step every row of an update has the same length, the matrix the same norm."""
    muon = Muon(OptimConfig(normuon_beta2=0.95), torch.float32)
    update = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)[:, None]
    evened = muon.even_rows(update, muon.new_state(update)["row_squares"], 1)
    lengths = evened.norm(dim=2)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(3, 8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evened.norm(dim=(1, 2)), update.norm(dim=(1, 2)))


def test_decay_tapers_over_the_end_of_the_run():
    """Full until 70 %, then linear to half; without a start it never falls."""
    cfg = OptimConfig(decay_taper_start=0.7, decay_taper_end=0.5)
    found = [decay_mul(cfg, progress) for progress in (0.0, 0.7, 0.85, 1.0, 1.2)]
    assert found == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    assert decay_mul(OptimConfig(), 1.0) == 1.0


def test_swa_is_the_mean_of_its_snapshots():
    """And nothing without any."""
    model = torch.nn.Linear(1, 1, bias=False)
    swa = Swa(model)
    torch.nn.init.constant_(model.weight, 3.0)
    swa.apply()
    assert model.weight.item() == 3.0
    for value in (1.0, 2.0, 6.0):
        torch.nn.init.constant_(model.weight, value)
        swa.update()
    swa.apply()
    assert model.weight.item() == 3.0 and swa.num_snapshots == 3


def test_a_stage_scales_the_rate_and_sets_the_clip():
    """Starts below 1 are fractions of the run, others steps; the last one that has started holds."""
    rows = "0:16:128:4:0.5:0.1,0.5:32:128:4:1:0.2"
    cfg = with_values(Config(), {"schedule.stages": rows, "schedule.warmdown_iters": 0}, "test")
    before, after = (step_rates(cfg, 10, elapsed) for elapsed in (299_999.0, 300_000.0))
    assert (before.lr_mul, before.grad_clip_norm) == (0.5, 0.1)
    assert (after.lr_mul, after.grad_clip_norm) == (1.0, 0.2)
    assert [stage.seq_len for stage in get_stages(cfg)] == [16, 32]


def test_the_cosine_follows_the_clock_where_there_is_one():
    """Half of the time is half of the way, at any pace."""
    values = {"schedule.shape": "cosine", "schedule.min_lr_frac": 0.1}
    cfg = with_values(Config(), values, "test")
    assert learning_rate_mul(cfg, 70, 300_000.0) == pytest.approx(0.55)
    assert learning_rate_mul(cfg, 5000, 600_000.0) == pytest.approx(0.1)


def test_ema_is_the_closed_form_from_the_initial_weights():
    """average_n = d^n w_0 + (1 - d) sum d^(n-i) w_i."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 8.0)
    ema = Ema(model, 0.5)
    for value in (4.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        ema.update()
    ema.apply()
    assert model.weight.item() == 8.0 / 4 + 4.0 / 4 + 2.0 / 2


@pytest.mark.parametrize(
    "step, elapsed_ms, expected",
    [(0, 0.0, 1.0), (2500, 205_038.0, 0.9631), (2600, 255_143.0, 0.7028), (5000, 548_881.0, 0.0931)],
)
def test_warmdown_follows_the_average_pace_of_the_clock(step, elapsed_ms, expected):
    """The contest's rule with values from a public log: warmdown 5000 steps, cap 600 s."""
    cfg = with_values(Config(), {"schedule.warmdown_iters": 5000}, "test")
    assert learning_rate_mul(cfg, step, elapsed_ms) == pytest.approx(expected, abs=5e-5)


def test_warmdown_without_a_clock_counts_steps():
    """run.max_wallclock_seconds=0 makes a run of a fixed number of steps."""
    values = {"run.max_wallclock_seconds": 0, "run.iterations": 100, "schedule.warmdown_iters": 20}
    cfg = with_values(Config(), values, "test")
    assert [learning_rate_mul(cfg, step, 1e9) for step in (0, 80, 90, 99)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.05]
    )


def test_warmdown_by_fraction_has_a_floor():
    """warmdown_frac of the clock, never below min_lr_frac."""
    values = {"schedule.warmdown_frac": 0.5, "schedule.min_lr_frac": 0.1}
    cfg = with_values(Config(), values, "test")
    multipliers = [learning_rate_mul(cfg, 10, elapsed) for elapsed in (0.0, 300_000.0, 450_000.0, 599_000.0)]
    assert multipliers == pytest.approx([1.0, 1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    "step, expected", [(0, 0.92), (375, 0.9375), (750, 0.955), (1500, 0.99), (9000, 0.99)]
)
def test_momentum_warms_up_linearly(step, expected):
    """Values of a reference system: 0.92 to 0.99 over 1,500 steps."""
    cfg = OptimConfig(muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500)
    assert muon_momentum(cfg, step) == pytest.approx(expected)
