"""Decoding with the compressed cache: the same numbers as attention over the whole text, fewer entries."""

from types import SimpleNamespace

import pytest
import torch
from fixtures_model import build_random, recipe
from fixtures_numbers import assert_close_at_scale

from eval.decode import can_cache, decoding
from formats.recipe import with_values
from kernels.context import ContextRule, attend_compressed
from kernels.context_cache import ContextCache

pytestmark = pytest.mark.numeric

D = "reference_systems/D_exp01"


@pytest.mark.reference("D6")
@pytest.mark.parametrize("rule", [ContextRule(10, 2, 2), ContextRule(4, 2, 1), ContextRule(3, 3, 2)])
def test_every_decoded_token_attends_as_in_the_whole_text(rule):
    """150 tokens, grouped heads, every position against the rows of the mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, heads, 8, generator=generator) for heads in (4, 2, 2))
    expected, cache = attend_compressed(q, k, v, rule), ContextCache(rule)
    for t in range(150):
        cache.append(k[:, t : t + 1], v[:, t : t + 1])
        torch.testing.assert_close(cache.attend(q[:, t : t + 1])[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)


@pytest.mark.reference("D6")
def test_8192_tokens_leave_the_published_entries():
    """862 seen, 9.503 times fewer; what is stored beyond them are the tokens that are averaged anew."""
    cache, one = ContextCache(ContextRule(10, 2, 2)), torch.zeros(1, 1, 1, 2)
    for _ in range(8192):
        cache.append(one, one)
    seen, stored = cache.sizes()
    assert seen == 862 and stored == 862 + 80


def test_decoding_through_the_model_is_its_forward():
    """Two layers, 60 tokens, one at a time and the prompt at once."""
    values = {"data.vocab_size": 300, "model.num_layers": 2, "model.model_dim": 64, "model.num_heads": 4}
    values |= {"model.num_kv_heads": 4, "model.compute_dtype": "float32", "model.context_ratio": 10}
    cfg = with_values(recipe(D), values, "test")
    assert can_cache(cfg.model) and not can_cache(recipe("reference_systems/C_pr281").model)
    model = build_random(cfg).eval()
    tokens = (torch.arange(60) * 7 % 300).tolist()
    row = torch.tensor([tokens])
    with torch.no_grad():
        expected = model(row, row == 0)[0]
    with decoding(model, SimpleNamespace(bos_id=0, vocab_size=300), 64) as after:
        for length in (25, *range(26, 61)):
            # Logits of 7. A token at a time sums in other blocks, in both layers.
            assert_close_at_scale(after(tokens[:length]), expected[length - 1], units=128)
    with torch.no_grad():
        assert torch.equal(model(row, row == 0)[0], expected)  # the model is as it was
