"""Grids, GPTQ with any steps, rate-distortion steps, repair, rate control and bit allocation."""

import math
from functools import partial

import pytest
import torch
from fixtures_numbers import assert_close_at_scale

from common import UserError
from quantizers import gptq as gptq_module
from quantizers.config import METHODS
from quantizers.gptq import (
    LARGEST_CODE,
    Calibrated,
    CalibrationStats,
    CodeModel,
    Powers,
    RateDistortionRounding,
    awq_column_steps,
    calibrate,
    collect_stats,
    combine_roles,
    factorize,
    gptq,
    lowrank_repair,
    output_error,
    rd_gptq,
    row_step_unit,
    solve_codes,
    water_fill,
)
from quantizers.grid import (
    Grid,
    Quantized,
    column_factors,
    dequantize,
    element_steps,
    fake_quantize,
    quantize,
)
from quantizers.methods import QUANTIZERS, check_codes
from quantizers.rate import StorageChoice, allocate, class_entropy_bits, entropy_bits, fit_rate

pytestmark = pytest.mark.numeric

GRIDS = {
    "int8 quantile": Grid(),
    "int6 sigmas": Grid(6, "sigmas", 12.85),
    "int4 max": Grid(4, "max", 1.0),
    "int6 floor": Grid(6, "quantile", 0.9999984, scale_floor=True),
    "ternary": Grid(2, "mean", 1.0, group_cols=16),
    "binary": Grid(1, "mean", 1.0),
}


def random_weight(rows=24, cols=48, seed=0):
    """Weights whose rows and columns differ in spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
    return 0.1 * spread * torch.randn(rows, cols, generator=generator)


# Grids


def plain_rounding(weight, grid):
    """Round to a grid of one scale a row an element at a time."""
    values = []
    for row in weight.tolist():
        sizes = sorted(abs(value) for value in row)
        mean = sum(row) / len(row)
        clip = {
            "max": sizes[-1],
            "sigmas": grid.clip * math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1)),
            "quantile": sizes[-2] + (sizes[-1] - sizes[-2]) * (1 - (1 - grid.clip) * (len(row) - 1)),
        }[grid.rule]
        scale = max(clip / grid.largest, 1 / grid.largest if grid.scale_floor else 0)
        scale = float(torch.tensor(scale).half())
        values.append([max(-grid.largest, min(grid.largest, round(v / scale))) * scale for v in row])
    return torch.tensor(values)


def test_every_method_of_a_recipe_has_its_quantizer():
    """A row or a description that is forgotten would be a choice that fails when it is used."""
    assert list(QUANTIZERS) == list(METHODS), "QUANTIZERS (methods.py), METHODS (config.py) of quantizers/"


def test_codes_that_their_storage_would_wrap_are_refused():
    """int16 codes in a storage of bytes would come back as other weights, in silence."""
    wide = quantize(random_weight(), Grid(8, "sigmas", 1.0))
    wide = wide._replace(codes=wide.codes.to(torch.int16))
    check_codes({"a": wide}, "steps")
    with pytest.raises(ValueError, match=r"codes of a: expected torch.int8, found torch.int16"):
        check_codes({"a": wide}, "rows")


@pytest.mark.parametrize("name", ["int8 quantile", "int6 sigmas", "int4 max", "int6 floor"])
def test_rounding_is_that_of_the_slow_loop(name):
    """One wrong scale rule silently costs every record that uses it."""
    weight = random_weight()
    assert torch.allclose(dequantize(quantize(weight, GRIDS[name])), plain_rounding(weight, GRIDS[name]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_stay_within_their_bits(bits):
    """A code beyond the range would be cut by the container."""
    codes = quantize(random_weight(), Grid(bits, "sigmas", 1.0)).codes
    assert codes.dtype == torch.int8
    assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_ternary_and_binary_weights_are_the_best_multiples_of_their_codes():
    """Zeros shrink the mean: with the mean as a scale ternary weights come back too small."""
    weight = random_weight()
    for name, levels in (("ternary", {-1, 0, 1}), ("binary", {-1, 1})):
        quantized = quantize(weight, GRIDS[name])
        assert set(quantized.codes.flatten().tolist()) == levels
        error = (dequantize(quantized) - weight).square().sum()
        for factor in (0.95, 1.05):
            other = quantized._replace(scales=(factor * quantized.scales.float()).half())
            assert (dequantize(other) - weight).square().sum() > error


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (1, 7)])
def test_empty_and_tiny_matrices_come_back_with_their_shape(shape):
    """A gate may have one row or one column; no rule may divide by nothing."""
    weight = torch.full(shape, 0.25)
    for rule in ("quantile", "max", "sigmas", "mean"):
        restored = dequantize(quantize(weight, Grid(8, rule, 1.0)))
        assert restored.shape == weight.shape
        assert torch.isfinite(restored).all()


def test_column_factors_are_octaves():
    """They are a table, so that a reader on another platform has the same bits."""
    steps = torch.arange(-128, 128).to(torch.int8)
    factors = column_factors(steps)
    assert torch.allclose(factors, torch.exp2(steps.double() / 8).float(), rtol=1e-6)
    assert torch.equal(factors[8:], 2 * factors[:-8])


def test_column_groups_must_divide_the_columns():
    """A cut group would have no defined width for the reader."""
    with pytest.raises(UserError, match="divides 48 columns"):
        quantize(random_weight(), Grid(2, "mean", 1.0, group_cols=32))


# Fake quantization


@pytest.mark.parametrize("name", GRIDS)
def test_fake_quantization_is_the_exported_grid(name):
    """Training on another grid than the exported one trains for nothing."""
    weight = random_weight()
    quantizer = partial(quantize, grid=GRIDS[name])
    values, slope = fake_quantize(weight, quantizer)
    assert torch.equal(values, dequantize(quantizer(weight))) and slope is None


def test_soft_stairs_sharpen_into_rounding():
    """The values approach the exported grid; the slope is the staircase's own, 1 where it is clipped."""
    weight = random_weight()
    quantizer = partial(quantize, grid=Grid(4, "sigmas", 2.0))
    target = dequantize(quantizer(weight))
    distance = [
        (fake_quantize(weight, quantizer, a)[0] - target).abs().mean().item() for a in (1.0, 4.0, 16.0, 64.0)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.1 * distance[0]
    row, shift = torch.tensor([[0.3, 0.49, 0.1, 7.0]]), 1e-3
    soft = [fake_quantize(row + d, lambda w: stored_ones(w, 5), 4.0) for d in (-shift, 0.0, shift)]
    slope = (soft[2][0] - soft[0][0]) / (2 * shift)
    assert torch.allclose(soft[1][1][0, :3], slope[0, :3], rtol=1e-3)
    assert soft[1][1][0, 3] == 1.0 and soft[1][0][0, 3] == 5.0


def stored_ones(weight: torch.Tensor, largest: int) -> Quantized:
    """Round to whole numbers within +-largest."""
    codes = torch.round(weight).clamp(-largest, largest).to(torch.int8)
    return Quantized(codes, torch.ones(len(weight), 1, dtype=torch.float16))


# GPTQ


def random_hessian(cols=48, seed=0, tokens=400):
    """The mean of x x^T of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mixing = torch.randn(cols, cols, generator=generator) + 2 * torch.eye(cols)
    sizes = torch.exp(torch.randn(cols, generator=generator))
    inputs = torch.randn(tokens, cols, generator=generator) @ mixing * sizes
    return (inputs.mT @ inputs).double() / tokens


def total_error(weight, quantized, hessian):
    """tr(E H E^T) in float64."""
    return float(output_error((dequantize(quantized) - weight).double(), hessian).sum())


def plain_gptq(weight, hessian, steps, largest):
    """Round a column, solve for the best values of all later ones in float64, repeat."""
    weight = weight.double().clone()
    codes = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = torch.round(weight[:, j] / steps[:, j]).clamp(-largest, largest)
        moved = codes[:, j] * steps[:, j] - weight[:, j]
        weight[:, j] += moved
        if j + 1 < weight.shape[1]:
            # The rest minimises e H e^T given the errors so far: H_rest,rest e_rest = -H_rest,j e_j.
            rest = hessian[j + 1 :, j + 1 :]
            weight[:, j + 1 :] -= torch.linalg.solve(rest, torch.outer(hessian[j + 1 :, j], moved)).mT
    return codes


@pytest.mark.parametrize("block", [7, 128])
def test_solver_is_the_slow_one(block, monkeypatch):
    """Whatever the block, each column's error is made up for by all later columns."""
    monkeypatch.setattr(gptq_module, "BLOCK_COLS", block)
    weight, hessian = random_weight(), random_hessian()
    steps = torch.full_like(weight, 0.03)
    factor = factorize(hessian, damping=0.0, act_order=False)
    codes = solve_codes(weight, factor, steps, torch.full((48,), 31.0), None)
    assert torch.equal(codes, plain_gptq(weight, hessian, steps, 31).float())


def test_factor_is_that_of_the_damped_inverse():
    """U^T U = H^-1 in the order of the largest inputs."""
    hessian = random_hessian()
    factor = factorize(hessian)
    diagonal = hessian.diagonal()[factor.order]
    assert torch.equal(diagonal, diagonal.sort(descending=True).values)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48))[factor.order][:, factor.order]
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.mT @ upper @ damped, torch.eye(48, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("grid", [Grid(6, "sigmas", 12.85), Grid(4, "sigmas", 1.5), Grid(3, "max", 1.0)])
def test_gptq_is_never_worse_than_rounding(grid, seed):
    """Also where clipping spoils what feedback won; and mostly it is far better."""
    weight, hessian = random_weight(seed=seed), random_hessian(seed=seed)
    ours = total_error(weight, gptq(weight, factorize(hessian), grid), hessian)
    rounding = total_error(weight, quantize(weight, grid), hessian)
    assert ours <= rounding * (1 + 1e-6)
    assert ours < 0.7 * rounding or grid.clip == 1.5


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_of_independent_inputs_is_rounding(name):
    """With H = I no column can make up for another."""
    if GRIDS[name].rule == "mean":
        return
    weight = random_weight()
    ours, rounded = gptq(weight, factorize(torch.eye(48)), GRIDS[name]), quantize(weight, GRIDS[name])
    assert torch.equal(ours.codes, rounded.codes)
    assert torch.equal(ours.scales, rounded.scales)


def test_act_order_ignores_the_order_of_the_columns():
    """And is the plain order for inputs that are sorted already."""
    weight, hessian, grid = random_weight(), random_hessian(), Grid(6, "max", 1.0)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    codes = gptq(weight, factorize(hessian), grid).codes
    shuffled = gptq(weight[:, order], factorize(hessian[order][:, order]), grid).codes
    assert torch.equal(shuffled, codes[:, order])
    falling = torch.argsort(hessian.diagonal(), descending=True)
    weight, hessian = weight[:, falling], hessian[falling][:, falling]
    plain = gptq(weight, factorize(hessian, act_order=False), grid)
    assert torch.equal(plain.codes, gptq(weight, factorize(hessian), grid).codes)


def test_dead_and_dependent_inputs_are_damped():
    """Inputs that are always zero, or copies of each other, make H singular."""
    weight, hessian = random_weight(), random_hessian(tokens=5)
    hessian[:, 7] = 0.0
    hessian[7] = 0.0
    grid = Grid(6, "sigmas", 12.85)
    quantized = gptq(weight, factorize(hessian), grid)
    assert total_error(weight, quantized, hessian) < total_error(weight, quantize(weight, grid), hessian)
    assert torch.isfinite(dequantize(gptq(weight, factorize(torch.zeros(48, 48)), grid))).all()


def test_bad_calibration_names_the_tensor_and_the_next_step():
    """A run that diverged must not end in codes of nothing."""
    hessian, weight = random_hessian(), random_weight()
    weight[3, 4] = math.nan
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up: .* 1 values .*lower the learning rates"):
        calibrate("blocks.0.mlp.up", weight, hessian, None)
    with pytest.raises(UserError, match=r"up: .*not finite\. Lower the learning rates"):
        calibrate("up", random_weight(), hessian, torch.full((24,), math.inf))
    hessian[3, 4] = math.inf
    with pytest.raises(UserError, match=r"up: .*not finite\. Calibrate"):
        calibrate("up", random_weight(), hessian, None)
    with pytest.raises(UserError, match=r"up: .*positive definite.*Raise the damping"):
        factorize(-torch.eye(4), name="up")


def test_moments_count_every_visit_and_add_up_over_ranks():
    """Recurrent layers see several inputs a token; each rank calibrates on its own text."""
    layer = torch.nn.Linear(6, 3, bias=False)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 6, generator=generator) for _ in range(4)]
    upstream = [torch.randn(4, 3, generator=generator) for _ in range(4)]

    def visits(chosen):
        total = sum((layer(parts[i].requires_grad_()) * upstream[i]).sum() for i in chosen)
        total.backward()

    ours, theirs = (
        collect_stats({"layer": layer}, partial(visits, chosen))["layer"] for chosen in ((0, 1), (2, 3))
    )
    ours.merge(lambda tensor: tensor + theirs.sums["gram" if len(tensor) == 37 else "rows"])
    inputs, gradients = torch.cat(parts).double(), torch.cat(upstream).double()
    assert_close_at_scale(ours.hessian, inputs.mT @ inputs / 16, units=16)  # entries of 1, others near 0
    assert torch.allclose(ours.row_weights, gradients.square().mean(dim=0), rtol=1e-5)
    assert len(layer._forward_hooks) == 0


def test_an_embedding_is_a_linear_of_one_hot_inputs():
    """Seen from the other side: what its Linear's rows are to the loss, an embedding's columns are."""
    table = torch.nn.Embedding(5, 3)
    linear = torch.nn.Linear(5, 3, bias=False)
    tokens = torch.tensor([[0, 1, 1], [3, 0, 1]])
    upstream = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))

    def run():
        one_hot = torch.nn.functional.one_hot(tokens, 5).float().requires_grad_()
        ((table(tokens) + linear(one_hot)) * upstream).sum().backward()

    stats = collect_stats({"table": table, "linear": linear}, run)
    assert torch.allclose(stats["table"].row_weights, stats["linear"].hessian.diagonal())
    assert torch.allclose(stats["table"].hessian.diagonal(), stats["linear"].row_weights)


def test_combined_roles_keep_the_totals():
    """A tied embedding is looked up and multiplied by; each row's sum over both is what it weighs."""
    roles = []
    for seed in range(2):
        role = CalibrationStats()
        role.add("gram", random_hessian(seed=seed), 10)
        role.add_rows(torch.rand(24, generator=torch.Generator().manual_seed(seed)), 10)
        roles.append(role)
    hessian, rows = combine_roles(*roles)
    true = sum(torch.einsum("i,jk->ijk", role.row_weights, role.hessian) for role in roles)
    ours = torch.einsum("i,jk->ijk", rows, hessian)
    assert torch.allclose(ours.sum(dim=0), true.sum(dim=0))
    assert torch.allclose(ours.diagonal(dim1=1, dim2=2).sum(dim=1), true.diagonal(dim1=1, dim2=2).sum(dim=1))
    single = combine_roles(roles[0])
    assert torch.allclose(
        torch.outer(single[1], single[0][0]), torch.outer(roles[0].row_weights, roles[0].hessian[0])
    )


def test_activation_aware_columns_get_finer_steps():
    """The group with the largest inputs has int8 codes and a smaller error in the same solve."""
    weight, hessian = random_weight(cols=64), random_hessian(cols=64)
    hessian = hessian / hessian.diagonal().sqrt()[:, None] / hessian.diagonal().sqrt()
    hessian[32:48] *= 8
    hessian[:, 32:48] *= 8
    factor, grid = factorize(hessian), Grid(6, "max", 1.0)
    columns = awq_column_steps(weight, factor, group_cols=16)
    assert columns.nonzero().flatten().tolist() == list(range(32, 48))
    mixed = gptq(weight, factor, grid, columns)
    assert 32 < mixed.codes[:, 32:48].abs().max() <= 127
    assert mixed.codes[:, :32].abs().max() <= 31
    assert total_error(weight, mixed, hessian) < 0.5 * total_error(
        weight, gptq(weight, factor, grid), hessian
    )


# Rate-distortion steps


def unlike_matrices():
    """Three matrices whose inputs, rows and places in the model matter very differently."""
    matrices = {}
    for seed, stake in enumerate((1.0, 30.0, 0.03)):
        generator = torch.Generator().manual_seed(seed)
        rows = stake * torch.exp(torch.randn(40, generator=generator))
        weight = random_weight(rows=40, seed=seed)
        matrices[f"m{seed}"] = Calibrated(weight, factorize(random_hessian(seed=seed)), rows)
    return matrices


def loss_and_bits(matrices, quantizer):
    """Second-order loss, and order-0 entropies of codes in classes of columns and of scales."""
    loss = bits = 0.0
    for name, matrix in matrices.items():
        quantized = quantizer(name)
        error = dequantize(quantized) - matrix.weight
        loss += float(output_error(error, matrix.factor.hessian, matrix.row_weights).sum())
        bits += class_entropy_bits(quantized.codes, 8) + entropy_bits(quantized.scales.view(torch.int16))
    return loss, bits


def loss_at(matrices, quantizer_of, target_bits):
    """The loss of a quantizer family with one knob at a number of bits.

    A knob lands within 1 % of the bits, by the last rounding on this side or that; the loss, which falls
    fourfold a bit, is taken to the target. Knobs below 0.02 row deviations saturate a byte.
    """
    fit = fit_rate(
        lambda parameter: loss_and_bits(matrices, quantizer_of(parameter))[1],
        target_bits,
        0.02,
        100.0,
        slack=0.01,
    )
    loss, bits = loss_and_bits(matrices, quantizer_of(fit.parameter))
    return loss * 4 ** ((bits - target_bits) / sum(matrix.weight.numel() for matrix in matrices.values()))


def sdclip_of(matrices):
    """The contest's quantizer as a family: its knob is the step in row deviations."""
    return lambda parameter: (
        lambda name: gptq(matrices[name].weight, matrices[name].factor, Grid(8, "sigmas", 127 * parameter))
    )


def rate_distortion_of(matrices, powers, rate_weight=0.0):
    """Water-filled steps as a family."""
    relative = water_fill(matrices, powers)
    return lambda parameter: lambda name: rd_gptq(matrices[name], relative[name], parameter, rate_weight)


def test_rate_distortion_steps_lose_less_at_equal_bits():
    """Columns alone, then rows, then matrices: each takes a part of the loss away."""
    matrices = unlike_matrices()
    target = 2.8 * sum(matrix.weight.numel() for matrix in matrices.values())
    losses = [loss_at(matrices, sdclip_of(matrices), target)]
    for powers in (Powers(0.85, 0.0, 0.0), Powers(0.85, 0.7, 0.0), Powers(0.85, 0.7, 1.0)):
        losses.append(loss_at(matrices, rate_distortion_of(matrices, powers), target))
    assert losses[1] < 0.85 * losses[0]
    assert losses[2] < 0.98 * losses[1]  # rows of 48 weights: naming their steps costs most of the gain
    assert losses[3] < 0.6 * losses[2]


@pytest.mark.parametrize("cols, unit", [(1, 4.0), (32, 0.5), (128, 0.25), (512, 0.125), (2048, 0.0625)])
def test_rows_have_few_steps_where_they_are_short(cols, unit):
    """A short row pays more for naming its step than it loses by one that is near."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(200, cols, generator=generator), torch.rand(200, generator=generator) + 1e-3
    hessian = torch.eye(cols) * (0.5 + torch.rand(cols, generator=generator))
    (relative,) = water_fill({"only": Calibrated(weight, factorize(hessian), rows)}).values()
    assert row_step_unit(cols) == unit
    assert torch.equal(relative.log_rows, torch.round(relative.log_rows / unit) * unit)


def test_rate_aware_rounding_loses_less_at_equal_bits():
    """At low rates the code next to the nearest one is often cheaper by more than it is worse."""
    matrices = unlike_matrices()
    target = 1.5 * sum(matrix.weight.numel() for matrix in matrices.values())
    plain, aware = (
        loss_at(matrices, rate_distortion_of(matrices, Powers(), rate_weight), target)
        for rate_weight in (0.0, 0.7)
    )
    assert aware < 0.97 * plain


def test_free_bits_and_flat_steps_are_the_plain_form():
    """With nothing to weigh, rate-distortion GPTQ is GPTQ on the same grid."""
    weight, hessian = random_weight(), random_hessian()
    weight = weight / weight.std(dim=1, keepdim=True)
    matrix = Calibrated(weight, factorize(hessian), torch.ones(24))
    (relative,) = water_fill({"only": matrix}, Powers(0.0, 0.5, 0.0)).values()
    flat = rd_gptq(matrix, relative, 0.5)
    plain = gptq(weight, matrix.factor, Grid(8, "sigmas", 127 * 0.5))
    assert torch.equal(flat.scales, plain.scales)
    assert torch.equal(flat.codes, plain.codes)
    steps = element_steps(flat.scales, flat.column_steps, 48)
    limits = torch.full((48,), float(LARGEST_CODE))
    free = solve_codes(weight, matrix.factor, steps, limits, torch.zeros_like(weight))
    assert torch.equal(free, solve_codes(weight, matrix.factor, steps, limits, None))


def test_code_lengths_are_a_code_that_learns():
    """Lengths satisfy Kraft with equality, and what occurs gets shorter, in its class alone."""
    model = CodeModel(torch.tensor([2.0, 40.0, 2.0]), 10)
    before = model.lengths()
    model.add(2, torch.full((1, 10), 9.0))
    after = model.lengths()
    for lengths in (before, after):
        assert torch.allclose(torch.exp2(-lengths).sum(dim=1), torch.ones(2), atol=1e-4)
    assert after[0, LARGEST_CODE + 9] < before[0, LARGEST_CODE + 9] - 3
    assert after[0, LARGEST_CODE] > before[0, LARGEST_CODE]
    assert torch.equal(after[1], before[1])


def test_cheap_rounding_takes_the_least_of_two_costs():
    """Against the costs written out: squared error plus price times length."""
    generator = torch.Generator().manual_seed(2)
    scaled = 3 * torch.randn(1, 200, generator=generator)
    prices = torch.rand(1, 200, generator=generator)
    rounding = RateDistortionRounding(scaled, prices)
    codes = rounding(0, scaled[0], torch.round(scaled[0]))
    lengths = rounding.model.lengths()[0]

    def cost(code):
        return (scaled[0] - code).square() + prices[0] * lengths[code.long() + LARGEST_CODE]

    near = torch.round(scaled[0])
    assert torch.allclose(cost(codes), torch.minimum(cost(near), cost(near - near.sign())), rtol=1e-5)
    assert 0 < int((codes != near).sum()) < 100


def test_codes_beyond_a_byte_are_kept():
    """Sensitive matrices have steps so small that a byte is too narrow."""
    matrix = unlike_matrices()["m0"]
    (relative,) = water_fill({"only": matrix}).values()
    fine = rd_gptq(matrix, relative, 0.02)
    assert fine.codes.dtype == torch.int16
    assert fine.codes.abs().max() > 127
    assert rd_gptq(matrix, relative, 0.5).codes.dtype == torch.int8


# Low-rank repair


def test_repair_takes_error_away():
    """More the higher its rank; with a Hessian it repairs what outputs show."""
    weight, hessian = random_weight(rows=40), random_hessian()
    factor = factorize(hessian)
    quantized = quantize(weight, Grid(3, "sigmas", 3.0))
    plain = [lowrank_repair(weight, quantized, rank, 6) for rank in (1, 4, 8)]
    sizes = [float((dequantize(q) - weight).norm()) for q in (quantized, *plain)]
    assert sizes == sorted(sizes, reverse=True)
    weighted = [lowrank_repair(weight, quantized, rank, 6, factor) for rank in (1, 4, 8)]
    for ours, other in zip(weighted, plain):
        assert total_error(weight, ours, hessian) < 0.9 * total_error(weight, other, hessian)


# Rate


def test_entropy_of_codes():
    """Four equal codes take two bits each; classes of columns tell narrow from wide ones."""
    assert entropy_bits(torch.arange(4).repeat(5)) == pytest.approx(40, rel=1e-12)  # sums of logarithms
    assert entropy_bits(torch.zeros(9, dtype=torch.int8)) == 0.0
    codes = torch.cat([torch.zeros(8, 4), torch.arange(-2, 2).repeat(8, 1)], dim=1)
    assert class_entropy_bits(codes, 2) < entropy_bits(codes)


@pytest.mark.parametrize("target", [1_300_000, 1_000_001, 777_777])
def test_rate_control_lands_just_below_the_target(target):
    """Within 0.1 %, in few evaluations: each is a whole quantization with the real coder."""
    calls = []

    def size_of(parameter):
        calls.append(parameter)
        return int(4_000_000 / 8 * (5.9 - math.log2(parameter)) + 900 * math.sin(40 * parameter)) + 1500

    fit = fit_rate(size_of, target, 1.0, 60.0)
    assert 0.999 * target <= fit.size_bytes <= target
    assert fit.size_bytes == size_of(fit.parameter)
    assert fit.num_evals == len(calls) - 1 <= 8


def test_rate_control_at_its_ends():
    """Bytes that nothing can use are left; bytes that cannot be saved are said."""
    assert fit_rate(lambda parameter: 500, 1000, 1.0, 2.0).parameter == 1.0
    with pytest.raises(UserError, match=r"1,100 .* 100 over.*target_bytes"):
        fit_rate(lambda parameter: round(1300 - 100 * parameter), 1000, 1.0, 2.0)


def test_allocation_is_the_best_of_all():
    """Against every combination, where the target leaves no rest."""
    choices = {
        "a": [StorageChoice(10, 9.0), StorageChoice(20, 3.0), StorageChoice(30, 1.0), StorageChoice(15, 8.9)],
        "b": [StorageChoice(10, 5.0), StorageChoice(20, 4.0), StorageChoice(30, 0.5)],
        "c": [StorageChoice(5, 1.0), StorageChoice(8, 1.0)],
    }
    assert allocate(choices, 25) == {"a": 0, "b": 0, "c": 0}
    assert allocate(choices, 35) == {"a": 1, "b": 0, "c": 0}
    assert allocate(choices, 55) == {"a": 1, "b": 2, "c": 0}
    assert allocate(choices, 65) == {"a": 2, "b": 2, "c": 0}
    with pytest.raises(UserError, match="found 25"):
        allocate(choices, 24)
