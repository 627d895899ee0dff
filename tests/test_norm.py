"""RMS norm on a CPU: torch's function in fewer passes."""

import pytest
import torch
import torch.nn.functional as F
from fixtures_numbers import assert_close_at_scale

from kernels.norm import RmsNorm, rms_norm

pytestmark = pytest.mark.numeric
EPS32 = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_torchs_rms_norm_in_outputs_and_gradients(dtype, scale):
    """Against float64, from ordinary rows to rows that eps keeps from growing to 1."""
    torch.manual_seed(0)
    x = (scale * torch.randn(3, 5, 16, dtype=torch.float64)).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, 16, dtype=torch.float64).to(dtype)
    y = rms_norm(x)
    eps = torch.finfo(dtype).eps if dtype == torch.float64 else EPS32
    exact = x.detach().double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()
    assert y.dtype == dtype
    assert_close_at_scale(y.double(), expected, 4, dtype)
    pairs = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, exact, grad.double())
    assert_close_at_scale(pairs[0][0].double(), pairs[1][0], 4, dtype)


def test_eps_and_gain_are_torchs():
    """A larger eps shrinks small rows; a gain is a factor a channel."""
    x, gain = torch.linspace(-1e-2, 2e-2, 24).reshape(3, 8), torch.arange(8.0)
    torch.testing.assert_close(rms_norm(x, gain, 1e-3), F.rms_norm(x, (8,), gain, 1e-3))
    assert rms_norm(x, eps=1e-3).abs().max() < rms_norm(x).abs().max()


def test_second_differences_agree_with_its_gradient():
    """The written backward pass is the derivative of the forward pass."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, 1e-6), (x,))


def test_a_compiler_gets_torchs_own():
    """It fuses that into one kernel."""
    x = torch.randn(2, 8, requires_grad=True)
    assert "RmsNorm" in type(rms_norm(x).grad_fn).__name__
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(rms_norm, backend=keep)(x), rms_norm(x))
    assert any(node.target in (F.rms_norm, torch.rms_norm) for node in graphs[0].graph.nodes)
