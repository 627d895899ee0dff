"""8-bit products: rounding, scales, calibration, gradients, and what of a model computes in them."""

import itertools
import math

import pytest
import torch
from fixtures_model import recipe, shape_of
from fixtures_numbers import assert_close_at_scale

import train_gpt
from common import UserError
from formats.recipe import with_values
from formats.state import map_leaves
from kernels.fp8 import BACKWARD, FORWARD, LARGEST, Fp8Gemm, Fp8Rule, Fp8State, require_fp8, to_fp8
from train_gpt import Training, fp8_linears

pytestmark = pytest.mark.numeric

E197, E270 = "reference_systems/E_yxanul197_ultra10", "reference_systems/E_yxanul270_mem9"
FP8_KINDS = ("q", "k", "v", "o", "gate", "up", "down")
WIDE_KINDS = ("embedding", "block norm", "final norm", "head", "softmax and attention")


def new_state(**values) -> Fp8State:
    return Fp8State(1, Fp8Rule(**values), torch.device("cpu"))


@pytest.mark.reference("E5")
def test_the_share_of_8_bit_weights_is_the_published_one():
    """Seven Linears a layer, gate and up packed in one; 43.75 and 86.89 % of the weights; 7 of 12 kinds."""
    for name, share in ((E270, 43.75), (E197, 86.89)):
        model = shape_of(recipe(name))
        linears = fp8_linears(model)
        total = sum(param.numel() for param in model.parameters())
        assert f"{100 * sum(m.weight.numel() for m in linears.values()) / total:.2f}" == f"{share:.2f}"
        packed = sum(name.endswith("mlp.up") for name in linears)
        assert len(linears) + packed == 196 == 28 * len(FP8_KINDS)
    assert f"{len(FP8_KINDS) / (len(FP8_KINDS) + len(WIDE_KINDS)):.1%}" == "58.3%"


@pytest.mark.reference("E6")
@pytest.mark.parametrize("name", [E197, E270])
def test_every_8_bit_dimension_is_a_multiple_of_16(name):
    """The head's 200,005 rows are not, and it stays wide."""
    model = shape_of(recipe(name))
    shapes = {name: tuple(module.weight.shape) for name, module in fp8_linears(model).items()}
    require_fp8(Fp8Rule("emulate"), shapes, torch.device("cpu"))
    assert recipe(name).data.vocab_size % 16 == 5 and not any("head" in name for name in shapes)


@pytest.mark.reference("E7")
@pytest.mark.parametrize("dtype, largest, bits", [(FORWARD, 448.0, 3), (BACKWARD, 57_344.0, 2)])
def test_rounding_is_that_of_the_format(dtype, largest, bits):
    """Largest values, saturation, and half a step of a normal number: 2^-4 and 2^-3 of its binade's start."""
    assert LARGEST[dtype] == largest == torch.finfo(dtype).max
    one = torch.ones(())
    assert to_fp8(torch.tensor([1e9, -1e9]), one, dtype).float().tolist() == [largest, -largest]
    x = torch.logspace(-1.5, 2.6, 5000)
    assert ((to_fp8(x, one, dtype).float() - x).abs() / x).max() <= 2.0 ** -(bits + 1)
    steps = [m * 2.0**e for e in range(-3, 8) for m in torch.arange(1, 2, 2.0**-bits).tolist()]
    assert torch.equal(to_fp8(torch.tensor(steps), one, dtype).float(), torch.tensor(steps))


@pytest.mark.reference("E7")
def test_scales_follow_the_history():
    """Largest value / amax * 2^-margin; of the maximum of 16 steps, or of the newest; 1 before anything."""
    for amax, expected in (("max", 4.0), ("most_recent", 0.5)):
        state = new_state(margin=2, amax=amax)
        assert state.scales.tolist() == [[1.0, 1.0, 1.0]]
        for value in (4.0, 1.0, 0.5):
            state.roll(torch.full((1, 3), value))
        expected = [448 / expected / 4, 448 / expected / 4, 57_344 / expected / 4]
        assert state.scales.tolist() == [pytest.approx(expected)]
    state = new_state()
    for value in (4.0, *[1.0] * 15):
        state.roll(torch.full((1, 3), value))
    assert state.scales[0, 0] == 112
    state.roll(torch.full((1, 3), 1.0))  # the seventeenth: the first is forgotten
    assert state.scales[0, 0] == 448
    state.roll(torch.full((1, 3), math.inf))
    assert state.scales.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.reference("E8")
def test_products_are_exact_until_calibration_ends():
    """Steps 0 to 99 only record, step 100 is the first in 8 bits."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((3, 32), (16, 32)))
    state = new_state(calibration_steps=100)
    for step in range(102):
        y = Fp8Gemm(state, 0)(x.requires_grad_(), weight.requires_grad_())
        y.square().sum().backward()
        assert torch.equal(y, x @ weight.T) == (step < 100), step
        amax = [x.abs().max(), weight.abs().max(), 2 * y.abs().max()]
        assert state.seen[0].tolist() == pytest.approx([value.item() for value in amax])
        state.roll(state.seen.clone())


def test_forward_and_backward_are_the_slow_obvious_products():
    """Rounded operands, multiplied element by element in float64; the weight's gradient in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 32, generator=generator).requires_grad_()
    weight = torch.randn(16, 32, generator=generator).requires_grad_()
    grad = torch.randn(2, 3, 16, generator=generator)
    state = new_state()
    state.roll(torch.tensor([[2.0, 4.0, 1.0]]))  # too small for some: they saturate
    sx, sw, sg = state.scales[0].double()
    y = Fp8Gemm(state, 0)(x, weight)
    y.backward(grad)
    qx, qw = (to_fp8(t.detach(), s, FORWARD).double() / s for t, s in ((x, sx), (weight, sw)))
    qg = to_fp8(grad, sg, BACKWARD).double() / sg
    slow_y, slow_x = torch.zeros(2, 3, 16).double(), torch.zeros(2, 3, 32).double()
    slow_w = torch.zeros(16, 32).double()
    for b, t in itertools.product(range(2), range(3)):
        for o, i in itertools.product(range(16), range(32)):
            slow_y[b, t, o] += qx[b, t, i] * qw[o, i]
            slow_x[b, t, i] += qg[b, t, o] * qw[o, i]
            slow_w[o, i] += qg[b, t, o] * qx[b, t, i]
    for found, slow in ((y, slow_y), (x.grad, slow_x), (weight.grad, slow_w)):
        assert_close_at_scale(found, slow, units=32)  # values of 6 to 16, sums of up to 32 products
    assert not torch.allclose(y, x @ weight.T, atol=1e-3)


def test_emulated_training_stays_near_the_exact_and_resumes(tiny_config, alone):
    """Twelve steps with calibration; state in the checkpoint; scored models compute exactly."""
    values = {"model.fp8_calibration_steps": 2, "model.fp8_history": 3, "run.iterations": 12}
    losses = {}
    for fp8 in ("off", "emulate"):
        training = Training(with_values(tiny_config, values | {"model.fp8": fp8}, "test"), alone, 0)
        (phase,) = train_gpt.get_phases(training.cfg)
        losses[fp8] = []
        for step in range(12):
            losses[fp8].append(float(training.accumulate(phase, lambda: False)))
            training.update(0.0)
            if step == 7:
                kept = map_leaves(training.state_dict(), torch.Tensor, torch.clone)
    off, on = (torch.tensor(losses[fp8]) for fp8 in ("off", "emulate"))
    assert torch.equal(off[:2], on[:2]) and not torch.equal(off, on)
    torch.testing.assert_close(off, on, rtol=0.02, atol=0)
    training.load_state_dict(kept)
    again = []
    for _ in range(4):
        again.append(float(training.accumulate(phase, lambda: False)))
        training.update(0.0)
    assert again == losses["emulate"][8:]
    assert "fp8" in kept and not any("fp8" in name for name in training.model.state_dict())
    tokens = torch.arange(8).view(1, 8)
    plain = train_gpt.make_gpt(tiny_config, torch.device("cpu"))
    plain.load_state_dict(training.model.state_dict())
    assert torch.equal(training.model.eval()(tokens, tokens == 0), plain.eval()(tokens, tokens == 0))


def test_what_cannot_be_8_bit_is_refused(tiny_config, alone):
    """The option that helps is named."""
    odd = with_values(tiny_config, {"model.fp8": "emulate", "model.num_kv_heads": 1}, "test")
    with pytest.raises(UserError, match=r"attn\.k is 8 x 32, expected multiples of 16.*model\.fp8=off"):
        Training(odd, alone, 0)
    with pytest.raises(UserError, match=r"NVIDIA GPU of capability.*model\.fp8=emulate"):
        Training(with_values(tiny_config, {"model.fp8": "gemm"}, "test"), alone, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_devices_product_is_the_emulated_one():
    """All three products of a layer, to bfloat16's rounding."""
    results = []
    for product in ("emulate", "gemm"):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(64, 128, generator=generator).cuda().bfloat16().requires_grad_()
        weight = torch.randn(32, 128, generator=generator).cuda().requires_grad_()
        state = Fp8State(1, Fp8Rule(product), torch.device("cuda"))
        state.roll(torch.tensor([[4.0, 4.0, 4.0]], device="cuda"))
        y = Fp8Gemm(state, 0)(x, weight)
        y.square().sum().backward()
        results.append((y, x.grad, weight.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.1)
