"""The loss in blocks: the same number and gradients as whole logits give."""

import pytest
import torch
import torch.nn.functional as F
from fixtures_numbers import assert_close_at_scale

import train_gpt
from formats.recipe import with_values
from kernels import loss
from kernels.loss import blocked_loss

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize(("rows", "per_block"), [(1, 4), (7, 4), (8, 4), (9, 100)])
def test_blocks_give_the_loss_and_gradients_of_whole_logits(cap, rows, per_block, monkeypatch):
    """Slow and obvious in float64, to rounding; also a last block that is not full, also scaled gradients."""
    torch.manual_seed(rows)
    monkeypatch.setattr(loss, "BLOCK_LOGITS", per_block * 11)
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (rows,))
    logits = x @ weight.mT
    expected = F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, targets)
    found = blocked_loss(x, weight, targets, cap)
    assert found.item() == pytest.approx(expected.item(), abs=1e-13)
    slow = torch.autograd.grad(3 * expected, (x, weight))
    fast = torch.autograd.grad(3 * found, (x, weight))
    for ours, theirs in zip(fast, slow):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cap", [0.0, 300.0])
def test_a_target_of_no_probability_costs_what_its_logit_says(cap):
    """Its share of the sum is 0 in float32; its loss is not infinite."""
    x, weight = torch.full((1, 4), 10.0), torch.eye(2, 4) * torch.tensor([[15.0], [-15.0]])
    logits = x @ weight.mT
    expected = F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, torch.tensor([1]))
    assert blocked_loss(x, weight, torch.tensor([1]), cap).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "values",
    [{}, {"model.tie_embeddings": False, "model.out_init": "plain"}, {"model.embed_dim": 8},
     {"model.logit_softcap": 0.0}, {"model.compute_dtype": "bfloat16"}],
)  # fmt: skip
def test_training_uses_it_on_every_kind_of_head(tiny_config, alone, values):
    """Tied, untied, factorised, without a cap, in bfloat16: the step's gradients are those of mean_loss."""
    cfg = with_values(tiny_config, values, "test")
    training = train_gpt.Training(cfg, alone, bos_id=1)
    assert training.loss is train_gpt.mean_loss_in_blocks
    batch = train_gpt.next_batch(training.loader, train_gpt.get_stages(cfg)[0], alone)
    grads = []
    for function in (train_gpt.mean_loss, training.loss):
        training.optimizers.zero_grad()
        function(training.model, batch).backward()
        grads.append({name: param.grad.clone() for name, param in training.model.named_parameters()})
    dtype = torch.bfloat16 if "model.compute_dtype" in values else torch.float32
    for name, grad in grads[0].items():  # gradients of 6e-5 to 0.3, by parameter
        assert_close_at_scale(grads[1][name], grad, 4 if dtype == torch.bfloat16 else 16, dtype)


def test_a_learned_cap_takes_whole_logits(tiny_config, alone):
    """Its own gradient needs them."""
    cfg = with_values(tiny_config, {"model.asymmetric_softcap": True}, "test")
    assert train_gpt.Training(cfg, alone, bos_id=1).loss is train_gpt.mean_loss
