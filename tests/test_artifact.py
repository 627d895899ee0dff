"""Quantization and the artifact file: round trips, the ledger, damage."""

import copy
import importlib.util
import math
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from fixtures_artifact import put_together, take_apart, write_artifact
from fixtures_model import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from common import UserError
from formats.artifact import (
    ARTIFACT_PREFIX,
    PLAIN_CODECS,
    STREAM_CODECS,
    ArtifactError,
    Stream,
    compress,
    decompress,
    require_codec,
    unpack_artifact,
)
from formats.recipe import with_values
from kernels.attention import Extent, count_docs
from quantizers.gptq import output_error
from quantizers.grid import dequantize, quantize
from quantizers.methods import build_grid
from train_gpt import (
    Batch,
    Config,
    Training,
    build_model,
    calibrated_matrices,
    collect_statistics,
    in_pieces,
    load_artifact,
    mean_loss,
    pack_model,
    quantize_model,
    quantized_names,
)


def store(model, cfg, path) -> list[tuple[str, int]]:
    """Quantize by rounding and write."""
    quantized = quantize_model(model, cfg, {}, len)
    return write_artifact(model, cfg, quantized, "f" * 64, path)


@pytest.mark.parametrize("codec", STREAM_CODECS)
@given(data=st.binary(max_size=3000))
@settings(max_examples=30, deadline=None)
def test_streams_round_trip_through_every_codec(codec, data):
    """What is stored is what comes back, the empty stream included."""
    assert decompress(Stream(compress(data, codec), len(data)), codec) == data


@pytest.mark.parametrize("codec", STREAM_CODECS)
def test_a_stream_of_another_length_is_refused(codec):
    """A bomb that unpacks to more than it declares must not be unpacked."""
    stored = compress(bytes(1_000_000), codec)
    for declared in (10, 999_999, 1_000_001):
        with pytest.raises(ArtifactError, match="expected"):
            decompress(Stream(stored, declared), codec)


def test_best_is_the_smallest_codec_and_a_byte():
    """Chosen by real bytes, stream by stream; what does not shrink is kept as it is."""
    noise = random.Random(0).randbytes(5000)
    for raw in (noise, bytes(5000), bytes(value % 7 for value in noise)):
        smallest = min(len(compress(raw, codec)) for codec in PLAIN_CODECS)
        stored = compress(raw, "best")
        assert len(stored) == smallest + 1
        assert decompress(Stream(stored, len(raw)), "best") == raw
    assert compress(noise, "best")[1:] == noise


def test_floats_are_smaller_in_byte_planes():
    """Signs and exponents are alike, fractions are noise: apart, the former shrink."""
    generator = torch.Generator().manual_seed(0)
    raw = (1 + 0.1 * torch.randn(2000, generator=generator)).numpy().tobytes()
    smallest = min(len(compress(raw, codec)) for codec in PLAIN_CODECS)
    stored = compress(raw, "best")
    assert len(stored) < 0.97 * smallest
    assert decompress(Stream(stored, len(raw)), "best") == raw


@pytest.mark.parametrize("stored", [b"", b"\x05", b"\xff1234"])
def test_a_best_stream_of_an_unknown_codec_is_refused(stored):
    """The first byte comes from the file."""
    with pytest.raises(ArtifactError, match="damaged"):
        decompress(Stream(stored, 4), "best")


@pytest.mark.parametrize(
    ("codec", "package"), [("zstd", "zstandard"), ("brotli", "brotli"), ("best", "brotli")]
)
def test_a_missing_compressor_is_named(codec, package, monkeypatch):
    """Known before ten minutes of training, not after."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=f"{package} is missing"):
        require_codec(codec)


CODINGS = [
    {"quant.codec": "lzma"},
    {"quant.codec": "rans"},
    {"quant.codec": "rans", "quant.method": "water_fill"},
    {"quant.codec": "best", "quant.method": "gptq", "quant.clip_rule": "sigmas", "quant.matrix_clip": 12.85,
     "quant.embed_clip": 20.0, "quant.matrix_bits": 6},
    {"quant.codec": "rans", "quant.method": "gptq", "quant.mlp_bits": 4, "quant.repair_rank": 2},
    {"quant.codec": "zstd", "quant.method": "gptq", "quant.awq_group_cols": 8, "quant.repair_rank": 3,
     "quant.repair_outputs": False, "quant.matrix_bits": 4},
    {"quant.codec": "lzma", "quant.repair_rank": 1, "quant.repair_top": 99, "quant.float16_names": "embed.*"},
]  # fmt: skip


@pytest.mark.numeric
@pytest.mark.parametrize("values", CODINGS, ids=lambda values: "-".join(map(str, values.values())))
def test_every_coding_gives_back_the_weights_that_it_quantized(tiny_config, alone, tmp_path, values):
    """Calibrated or not, coded by libraries or by ours: the file holds the quantizer's result, exactly."""
    cfg = with_values(tiny_config, values | {"quant.scale_floor": False, "quant.calib_batches": 2}, "test")
    training = Training(cfg, alone, bos_id=1)
    with torch.no_grad():
        for param in training.model.parameters():
            param.add_(0.05 * torch.sin(torch.arange(param.numel()).float()).view(param.shape))
    stats = collect_statistics(training)[0] if cfg.quant.method != "round" else {}
    quantized = quantize_model(training.model, cfg, stats, len)
    write_artifact(training.model, cfg, quantized, "f" * 64, tmp_path / "coded.bin")
    loaded, _, _ = load_artifact(tmp_path / "coded.bin", cfg, alone.device)
    back = dict(loaded.named_parameters())
    assert len(quantized) > 15
    repaired = [name for name, stored in quantized.items() if stored.repair]
    assert len(repaired) == (min(cfg.quant.repair_top, len(quantized)) if cfg.quant.repair_rank else 0)
    for name, stored in quantized.items():
        assert torch.equal(back[name], dequantize(stored)), name


@pytest.mark.numeric
def test_calibration_passes_a_large_batch_in_pieces(tiny_config, alone, monkeypatch):
    """98,304 tokens at once, each visit's activations kept, took 67.5 GB; sums over pieces are the same."""
    values = {"quant.method": "gptq", "quant.calib_batches": 2, "model.compute_dtype": "float32"}
    cfg = with_values(tiny_config, values, "test")
    found, sizes = [], []

    def counted(model, batch):
        sizes[-1].append(batch.tokens.numel())
        return mean_loss(model, batch)

    monkeypatch.setattr(train_gpt, "mean_loss", counted)
    for limit in (train_gpt.CALIBRATION_TOKENS, 2 * cfg.data.seq_len, 1):
        monkeypatch.setattr(train_gpt, "CALIBRATION_TOKENS", limit)
        sizes.append([])
        found.append(collect_statistics(Training(cfg, alone, bos_id=1))[0])
    per_batch = cfg.data.batch_tokens // cfg.data.micro_batches
    assert sizes[0] == [per_batch] * 2
    assert set(sizes[1]) == {2 * cfg.data.seq_len} and sum(sizes[1]) == 2 * per_batch
    assert set(sizes[2]) == {cfg.data.seq_len} and sum(sizes[2]) == 2 * per_batch
    for name, kept in found[0].items():
        for other in found[1:]:
            for mine, theirs in (
                (kept.hessian, other[name].hessian),
                (kept.row_weights, other[name].row_weights),
            ):
                assert float((mine - theirs).abs().max()) <= 1e-5 * float(mine.abs().max()), name


def test_a_packed_row_is_cut_within_its_extent():
    """Parts of one row: every target once, and no part has more documents than the row."""
    starts = torch.zeros(1, 100, dtype=torch.bool)
    starts[0, [0, 7, 30, 31, 64, 90]] = True
    tokens = torch.arange(100)[None]
    batch = Batch(tokens, tokens + 1, starts, Extent(6, 33))
    parts = list(in_pieces(batch, 32))
    assert [part.tokens.size(1) for part in parts] == [32, 32, 32, 4]
    assert torch.equal(torch.cat([part.targets for part in parts], 1), batch.targets)
    assert all(part.extent == batch.extent and count_docs(part.starts_doc) <= 6 for part in parts)


@pytest.mark.numeric
def test_water_filling_meets_a_target_of_bytes(tiny_config, alone, tmp_path):
    """Code and artifact together land within 0.1 % under the target, the coder in the loop."""
    values = {"quant.codec": "rans", "quant.method": "water_fill", "quant.target_bytes": 11_000}
    cfg = with_values(tiny_config, values | {"quant.calib_batches": 2, "model.num_layers": 2}, "test")
    training = Training(cfg, alone, bos_id=1)
    with torch.no_grad():
        for param in training.model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(3)))
    sizes = []

    def size_of(quantized) -> int:
        sizes.append(1000 + len(pack_model(training.model, cfg, quantized, "f" * 64)[0]))
        return sizes[-1]

    quantized = quantize_model(training.model, cfg, collect_statistics(training)[0], size_of)
    ledger = write_artifact(training.model, cfg, quantized, "f" * 64, tmp_path / "fitted.bin")
    assert 0.998 * 11_000 <= 1000 + sum(size for _, size in ledger) <= 11_000
    assert len(sizes) <= 16


def shaken(cfg, alone) -> Training:
    """A training whose weights are not those of the start, some matrices larger than others."""
    training = Training(cfg, alone, bos_id=1)
    with torch.no_grad():
        for index, param in enumerate(training.model.parameters()):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
            param.add_(0.02 * (1 + index % 4) * noise)
    return training


@pytest.mark.numeric
def test_bits_are_given_where_they_save_most(tiny_config, alone):
    """One byte target, bits by matrix: the predicted loss is below that of equal bits at no more bytes.

    Of all codecs zstd is done first: the search weighs some twenty artifacts.
    """
    fields = {"quant.method": "gptq", "quant.codec": "zstd", "quant.calib_batches": 2, "model.model_dim": 64}
    fields |= {"quant.clip_rule": "max", "quant.matrix_clip": 1.0, "quant.embed_clip": 1.0}
    fields |= {"quant.matrix_bits": 5, "quant.embed_bits": 5, "quant.scale_floor": False}
    cfg = with_values(tiny_config, fields, "test")
    training = shaken(cfg, alone)
    stats = collect_statistics(training)[0]
    matrices = calibrated_matrices(training.model, cfg, stats)

    def size_of(quantized) -> int:
        return len(pack_model(training.model, cfg, quantized, "f" * 64)[0])

    def loss_of(quantized) -> float:
        return sum(
            float(output_error(m.weight - dequantize(quantized[n]), m.factor.hessian) @ m.row_weights)
            for n, m in matrices.items()
        )

    equal = quantize_model(training.model, cfg, stats, size_of)
    target = with_values(cfg, {"quant.target_bytes": size_of(equal)}, "test")
    given = quantize_model(training.model, target, stats, size_of)
    assert 0.95 * size_of(equal) < size_of(given) <= size_of(equal)
    assert loss_of(given) < 0.8 * loss_of(equal)
    with pytest.raises(UserError, match=r"Raise quant\.target_bytes"):
        quantize_model(training.model, with_values(cfg, {"quant.target_bytes": 5000}, "test"), stats, size_of)


def test_classes_have_their_own_bits_and_clips(tiny_config):
    """Attention, mlp and embedding are quantized as their fields say; names can be left out."""
    fields = {
        "quant.clip_rule": "sigmas",
        "quant.matrix_bits": 6,
        "quant.matrix_clip": 13.0,
        "quant.mlp_bits": 5,
    }
    fields |= {"quant.mlp_clip": 11.5, "quant.embed_bits": 7, "quant.float16_names": "blocks.2.attn.k.*,none"}
    cfg = with_values(tiny_config, fields, "test")
    names = quantized_names(cfg)
    assert names["blocks.1.mlp.up.weight"] == "mlp" and names["blocks.2.attn.q.weight"] == "matrix"
    assert "blocks.2.attn.k.weight" not in names and names["embed.weight"] == "embed"
    grids = {storage: build_grid(storage, cfg.quant) for storage in ("matrix", "mlp", "embed")}
    assert [(grid.bits, grid.clip) for grid in grids.values()] == [(6, 13.0), (5, 11.5), (7, 0.9999984)]
    plain = with_values(cfg, {"quant.mlp_bits": 0, "quant.mlp_clip": 0.0}, "test")
    assert build_grid("mlp", plain.quant) == build_grid("matrix", plain.quant)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An artifact, written once: what `artifact` hands out copies of."""
    values = {"quant.codec": "lzma", "model.smear": "gated", "quant.float16_numel": 1024}
    cfg = with_values(Config(), TINY | values, "test")
    torch.manual_seed(0)
    model = build_model(cfg, torch.device("cpu"))
    path = tmp_path_factory.mktemp("written") / "artifact.bin"
    return path, cfg, model, store(model, cfg, path)


@pytest.fixture
def artifact(written, tmp_path):
    """A written artifact with its ledger and the model it came from; a test may damage both."""
    path, cfg, model, ledger = written
    return Path(shutil.copy(path, tmp_path)), cfg, copy.deepcopy(model), ledger


def test_the_ledger_adds_up_to_the_file(artifact):
    """Every byte on disk belongs to a part."""
    path, _, _, ledger = artifact
    assert sum(size for _, size in ledger) == path.stat().st_size


@pytest.mark.numeric
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
            expected = dequantize(quantize(param, build_grid("matrix", cfg.quant)))
        else:
            expected = param.half().float() if is_matrix else param
        assert torch.equal(back, expected.detach()), name


def test_weights_that_are_not_finite_are_not_written(artifact, tmp_path):
    """NaN has no integer code; a diverged run must say so before it writes anything."""
    _, cfg, model, _ = artifact
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.up\.weight: expected a finite matrix"):
        store(model, cfg, tmp_path / "nan.bin")
    assert not (tmp_path / "nan.bin").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("skip_weights", math.nan), ("skip_weights", math.inf), ("blocks.0.attn.q.weight", 1e9)],
)
def test_weights_that_are_not_finite_as_stored_are_not_written(artifact, tmp_path, name, value):
    """A float16 scale of huge weights overflows; a file of them would be called damaged when it is read."""
    _, cfg, model, _ = artifact
    with torch.no_grad():
        model.get_parameter(name).fill_(value)
    with pytest.raises(UserError, match=f"{name} is not finite as .* diverged. Lower the learning rates"):
        store(model, cfg, tmp_path / "wild.bin")
    assert not (tmp_path / "wild.bin").exists()


@pytest.mark.numeric
def test_writing_twice_gives_the_same_bytes(artifact, tmp_path):
    """A hash in a record is worth something only if it can be made again."""
    path, cfg, model, _ = artifact
    store(model, cfg, tmp_path / "again.bin")
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
    """Rewrite an artifact's header through `change`."""
    header, streams = take_apart(path.read_bytes())
    change(header)
    path.write_bytes(put_together(header, streams))


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
    with pytest.raises(ArtifactError, match="expected an artifact of version 2"):
        load_artifact(path, tiny_config, alone.device)
    with pytest.raises(UserError, match="no such artifact"):
        load_artifact(tmp_path / "missing.bin", tiny_config, alone.device)
    assert struct.calcsize("<6sHII") == ARTIFACT_PREFIX.size
