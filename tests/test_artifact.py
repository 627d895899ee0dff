"""Quantization and the artifact file: round trips, the ledger, damage."""

import hashlib
import json
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from formats.artifact import (
    ARTIFACT_PREFIX,
    CHECKSUM_BYTES,
    ArtifactError,
    Stream,
    compress,
    decompress,
    unpack_artifact,
)
from formats.recipe import with_values
from train_gpt import (
    QuantConfig,
    build_model,
    dequantize_rows,
    load_artifact,
    quantize_rows,
    write_artifact,
)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_codes_stay_in_range_and_errors_within_half_a_step(bits):
    """Symmetric codes; where nothing is clipped the error is at most half of the row's step."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    cfg = QuantConfig(clip_quantile=1.0, scale_floor=False)
    quantized = quantize_rows(weight, bits, cfg)
    assert quantized.codes.abs().max() == 2 ** (bits - 1) - 1
    error = (dequantize_rows(quantized) - weight).abs()
    assert (error <= 0.501 * quantized.scales.float()[:, None]).all()


def test_the_scale_floor_is_the_step_of_small_rows():
    """With the contest's floor a row whose largest weight is under 1 is stored in steps of 1 / 127."""
    weight = torch.full((1, 4), 0.01)
    floored = quantize_rows(weight, 8, QuantConfig(scale_floor=True))
    free = quantize_rows(weight, 8, QuantConfig(scale_floor=False))
    assert floored.scales.item() == pytest.approx(1 / 127, rel=1e-3)
    assert floored.codes.tolist() == [[1, 1, 1, 1]] and free.codes.tolist() == [[127, 127, 127, 127]]


def test_a_zero_row_stays_zero():
    """No division by a zero scale."""
    quantized = quantize_rows(torch.zeros(2, 8), 6, QuantConfig(scale_floor=False))
    assert torch.equal(dequantize_rows(quantized), torch.zeros(2, 8))


def test_clipping_at_a_quantile_spares_the_rest_of_the_row():
    """One outlier must not set the step of its whole row when the quantile says so."""
    weight = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 100.0
    clipped = quantize_rows(weight, 8, QuantConfig(clip_quantile=0.99, scale_floor=False))
    full = quantize_rows(weight, 8, QuantConfig(clip_quantile=1.0, scale_floor=False))
    assert clipped.scales.item() < 0.05 < full.scales.item()


@pytest.mark.parametrize("codec", ["zlib", "lzma", "zstd"])
@given(data=st.binary(max_size=3000))
@settings(max_examples=30, deadline=None)
def test_streams_round_trip_through_every_codec(codec, data):
    """What is stored is what comes back, the empty stream included."""
    assert decompress(Stream(compress(data, codec), len(data)), codec) == data


@pytest.mark.parametrize("codec", ["zlib", "lzma", "zstd"])
def test_a_stream_of_another_length_is_refused(codec):
    """A bomb that unpacks to more than it declares must not be unpacked."""
    stored = compress(bytes(1_000_000), codec)
    for declared in (10, 999_999, 1_000_001):
        with pytest.raises(ArtifactError, match="expected"):
            decompress(Stream(stored, declared), codec)


@pytest.fixture
def artifact(tiny_config, alone, tmp_path):
    """A written artifact with its ledger and the model it came from."""
    values = {"quant.codec": "lzma", "model.smear": "gated", "quant.float16_numel": 1024}
    cfg = with_values(tiny_config, values, "test")
    model = build_model(cfg, alone.device)
    path = tmp_path / "artifact.bin"
    ledger = write_artifact(model, cfg, "f" * 64, path)
    return path, cfg, model, ledger


def test_the_ledger_adds_up_to_the_file(artifact):
    """Every byte on disk belongs to a part."""
    path, _, _, ledger = artifact
    assert sum(size for _, size in ledger) == path.stat().st_size


def test_a_loaded_model_has_the_quantized_weights_and_the_recipe(artifact, tiny_config, alone):
    """Matrices come back as their codes say, vectors exactly, settings from the file."""
    path, cfg, model, _ = artifact
    other = with_values(tiny_config, {"model.num_layers": 1, "quant.matrix_bits": 3}, "test")
    loaded, loaded_cfg, header = load_artifact(path, other, alone.device)
    assert loaded_cfg.model == cfg.model and loaded_cfg.quant == cfg.quant
    assert header["tokenizer_sha256"] == "f" * 64
    for (name, param), (_, back) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        is_matrix = param.ndim == 2 and name != "skip_weights" and "smear" not in name
        if is_matrix and param.numel() > 1024:
            expected = dequantize_rows(quantize_rows(param, 8, cfg.quant))
        else:
            expected = param.half().float() if is_matrix else param
        assert torch.equal(back, expected.detach()), name


def test_weights_that_are_not_finite_are_not_written(artifact, tmp_path):
    """NaN has no integer code; a diverged run must say so before it writes anything."""
    _, cfg, model, _ = artifact
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.up\.weight is not finite"):
        write_artifact(model, cfg, "f" * 64, tmp_path / "nan.bin")
    assert not (tmp_path / "nan.bin").exists()


def test_writing_twice_gives_the_same_bytes(artifact, tmp_path):
    """A hash in a record is worth something only if it can be made again."""
    path, cfg, model, _ = artifact
    write_artifact(model, cfg, "f" * 64, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 15, 40, 200, -1])
def test_a_truncated_artifact_is_refused(artifact, tiny_config, alone, keep):
    """Half a download must not become half a model."""
    path, *_ = artifact
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError):
        load_artifact(path, tiny_config, alone.device)


def test_a_flipped_bit_anywhere_is_refused(artifact):
    """The checksum covers every byte of the file."""
    path, *_ = artifact
    blob = path.read_bytes()
    unpack_artifact(blob, path)
    for position in range(0, len(blob), max(1, len(blob) // 199)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            unpack_artifact(bytes(damaged), path)


def forge(path, change) -> None:
    """Rewrite an artifact's header through `change` with lengths and checksum made right."""
    blob = path.read_bytes()
    magic, version, stored, _ = ARTIFACT_PREFIX.unpack_from(blob)
    header = json.loads(zlib.decompress(blob[ARTIFACT_PREFIX.size : ARTIFACT_PREFIX.size + stored]))
    change(header)
    raw = json.dumps(header).encode()
    packed = zlib.compress(raw, 9)
    streams = blob[ARTIFACT_PREFIX.size + stored : -CHECKSUM_BYTES]
    body = ARTIFACT_PREFIX.pack(magic, version, len(packed), len(raw)) + packed + streams
    path.write_bytes(body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["streams"][0].__setitem__(2, 1 << 40),
        lambda header: header["streams"][0].__setitem__(1, 3),
        lambda header: header["tensors"][0].__setitem__(1, [1 << 30, 1 << 30]),
        lambda header: header["tensors"].append(header["tensors"][0]),
        lambda header: header["tensors"].pop(),
        lambda header: header["tensors"][1].__setitem__(2, "exec"),
        lambda header: header["recipe"]["model"].__setitem__("num_layers", 4),
        lambda header: header["recipe"]["model"].__setitem__("os", "system"),
        lambda header: header["recipe"]["quant"].__setitem__("codec", "pickle"),
        lambda header: header["recipe"]["model"].__setitem__("num_layers", 10**9),
        lambda header: header["recipe"]["model"].__setitem__("mlp_mult", 1e999),
        lambda header: header["recipe"]["data"].__setitem__("data_path", "/etc"),
        lambda header: header.__setitem__("recipe", None),
        lambda header: header.pop("tokenizer_sha256"),
        lambda header: header.pop("streams"),
        lambda header: header.__setitem__("tensors", 5),
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(artifact, tiny_config, alone, change):
    """The checksum can be right and the content wrong: lengths, names and settings are checked too."""
    path, *_ = artifact
    forge(path, change)
    with pytest.raises(UserError):
        load_artifact(path, tiny_config, alone.device)


def test_a_foreign_file_is_named_as_such(tiny_config, alone, tmp_path):
    """A wrong path is the commonest mistake."""
    path = tmp_path / "artifact.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ArtifactError, match="expected an artifact of version 1"):
        load_artifact(path, tiny_config, alone.device)
    with pytest.raises(UserError, match="no such artifact"):
        load_artifact(tmp_path / "missing.bin", tiny_config, alone.device)
    assert struct.calcsize("<6sHII") == ARTIFACT_PREFIX.size
