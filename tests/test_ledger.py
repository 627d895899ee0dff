"""The byte ledgers of the published reference systems, through the same artifact and the same budget."""

import pytest
import torch
from fixtures_model import recipe

from formats.recipe import with_values
from quantizers.methods import build_grid
from scoring.budget import BYTES, Ledger, overruns
from train_gpt import Config, make_gpt, match_rules, pack_model, quantize_model, tensor_table

B, C = "reference_systems/B_bese288", "reference_systems/C_pr281"
PUBLISHED = {"quant.matrix_bits": 6, "quant.codec": "none"}


def published(name: str) -> Config:
    """A system's recipe with the quantizer that it was published with, its bytes not compressed."""
    return with_values(recipe(name), PUBLISHED, "test")


def storages(cfg: Config) -> dict[str, str]:
    """Map every tensor to int6, int8, float16 (the rest, as published) by rule and size."""
    table = tensor_table(cfg)
    rules = match_rules(cfg, [row.name for row in table])
    bits = {
        row.name: build_grid(rules[row.name].storage, cfg.quant).bits
        for row in table
        if row.storage == "rows"
    }
    return {row.name: f"int{bits[row.name]}" if row.name in bits else "float16" for row in table}


def payloads(cfg: Config) -> dict[str, int]:
    """Return the bytes of each storage: codes and a float16 scale a row, or two bytes an element."""
    stored, sizes = storages(cfg), dict.fromkeys(("int6", "int8", "float16"), 0)
    for name, shape, _ in tensor_table(cfg):
        numel = torch.Size(shape).numel()
        sizes[stored[name]] += 2 * numel if stored[name] == "float16" else numel + 2 * shape[0]
    return sizes


@pytest.mark.reference("B12")
def test_system_b_has_its_payload():
    """22 and 44 block matrices in 6 bits, embedding and bigram table in 8, what is small in halves."""
    assert payloads(published(B)) == {"int6": 26_031_104, "int8": 414_272, "float16": 321_720}


@pytest.mark.reference("C7")
def test_system_c_has_its_payload():
    """The same skeleton with 1,024 tokens and without value embeddings."""
    assert payloads(published(C)) == {"int6": 26_031_104, "int8": 792_576, "float16": 182_450}


@pytest.mark.reference("C8")
def test_system_c_stores_each_tensor_in_its_class():
    """66 matrices, two tables; the bigram projection lies exactly on the edge to float16."""
    cfg = published(C)
    stored = storages(cfg)
    kinds = {kind: [name for name in stored if stored[name] == kind] for kind in ("int6", "int8")}
    parts = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down")
    expected = {f"blocks.{layer}.{part}.weight" for layer in range(11) for part in parts}
    assert set(kinds["int6"]) == expected and len(expected) == 66
    assert kinds["int8"] == ["embed.weight", "bigram.table.weight"]
    (edge,) = [row for row in tensor_table(cfg) if row.name == "bigram.proj.weight"]
    assert (stored[edge.name], torch.Size(edge.shape).numel()) == ("float16", cfg.quant.float16_numel)


@pytest.mark.reference("B12")
@pytest.mark.reference("C7")
@pytest.mark.parametrize("name", [B, C])
def test_the_ledger_of_a_system_has_its_payload(name):
    """The artifact's own ledger: published sums, scalars with two bytes more each, a frame."""
    cfg = published(name)
    model = make_gpt(cfg, torch.device("cpu"), "meta").to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.01)
    blob, ledger = pack_model(model, cfg, quantize_model(model, cfg, {}, len), "f" * 64)
    sizes, parts = payloads(cfg), dict(ledger)
    assert parts["weights: codes"] + parts["weights: scales"] == sizes["int6"] + sizes["int8"]
    assert parts["weights: halves"] + parts["weights: floats"] // 2 == sizes["float16"]
    assert sum(parts.values()) == len(blob)


@pytest.mark.reference("B13")
@pytest.mark.parametrize(
    "artifact, total", [(12_635_100, 12_723_902), (12_658_480, 12_747_282), (12_727_756, 12_816_558)]
)
def test_system_b_fits_with_its_code(artifact, total):
    """88,802 bytes of code in each of the three runs."""
    parts = [("code", 88_802), ("artifact", artifact)]
    ledger = Ledger(BYTES, parts, 16_000_000, "bytes")
    assert overruns([ledger]) == {} and ledger.total == total
    assert f"{total:,} bytes" in ledger.format()


@pytest.mark.reference("C7")
def test_system_c_fits_with_its_code():
    """And 497,779 more bytes would be one too many."""
    parts = [("code", 69_101), ("artifact", 15_433_121)]
    assert Ledger(BYTES, parts, 16_000_000, "bytes").total == 15_502_222
    assert overruns([Ledger(BYTES, [*parts, ("more", 497_779)], 16_000_000, "bytes")])
