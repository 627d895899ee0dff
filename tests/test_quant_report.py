"""The report on quantization: every tensor of a run, and what is missing without float weights."""

import json

import pytest
import torch

from common import UserError
from dev import quant_report
from dev.codec import measure_codec
from durable.seals import write_sealed
from formats.artifact import compress
from formats.checkpoints import NUMBERED
from formats.recipe import format_toml, with_values
from quantizers.gptq import factorize
from quantizers.grid import Grid, quantize
from train_gpt import (
    Training,
    get_recipe,
    quantized_names,
    save_checkpoint,
)

pytestmark = pytest.mark.numeric


@pytest.fixture
def run_folder(tiny_config, alone, tmp_path):
    """A folder as a run with checkpoints leaves it."""
    values = {"quant.codec": "rans", "quant.method": "water_fill", "quant.calib_batches": 2}
    cfg = with_values(tiny_config, values | {"quant.scale_floor": False, "average.ema_decay": 0.9}, "test")
    training = Training(cfg, alone, bos_id=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in training.model.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator))
    for _ in range(40):
        training.average.update()
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint(training, folder / NUMBERED.format(0))
    (folder / "recipe.toml").write_text(format_toml(get_recipe(cfg)))
    places = {f"data.{key}": getattr(cfg.data, key) for key in ("data_path", "tokenizer_path")}
    write_sealed(folder / "result.json", {"places": places})
    return folder, cfg


def test_every_quantized_tensor_has_its_row(run_folder, capsys):
    """Measured on the weights that the run would store; standard output is one JSON object."""
    folder, cfg = run_folder
    quant_report.main([str(folder), "--tokens", "200", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["tensors"]] == list(quantized_names(cfg))
    assert report["quantized_val_bpb"] != report["val_bpb"]
    for row in report["tensors"]:
        assert 0 < row["weight_error"] < 1 and 0 < row["output_error"] < 1
        assert 0.5 < row["bits"] < 10 and row["bytes"] > 0 and abs(row["val_bpb_cost"]) < 0.5
    assert sum(abs(row["val_bpb_cost"]) for row in report["tensors"]) > 0


def test_a_tensor_is_measured_as_its_definition_says():
    """Bytes are the codec's own, the clip is SDClip's number, a coarser grid has the larger errors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator)
    matrix = quant_report.Calibrated(weight, factorize(torch.eye(64)), torch.ones(40))
    rows = [
        quant_report.report_tensor("w", quantize(weight, Grid(bits, "sigmas", 2.0)), matrix, "zlib", 0.5)
        for bits in (6, 3)
    ]
    stored = quantize(weight, Grid(6, "sigmas", 2.0))
    parts = (stored.codes.numpy().tobytes(), stored.scales.numpy().tobytes())
    assert rows[0].bytes == sum(len(compress(part, "zlib")) for part in parts)
    assert rows[0].clip == pytest.approx(2.0, rel=0.02) and rows[0].val_bpb_cost == 0.5
    assert rows[1].bits < rows[0].bits
    assert rows[1].weight_error > rows[0].weight_error and rows[1].output_error > rows[0].output_error


def test_a_run_without_float_weights_says_how_to_get_them(run_folder, alone):
    """The artifact holds what is left after quantization: nothing to compare with."""
    folder, _ = run_folder
    (folder / NUMBERED.format(0)).unlink()
    with pytest.raises(UserError, match=r"no float weights.*run\.save_every"):
        quant_report.make_report(folder, 200, alone)


def test_the_codec_is_measured_against_other_coders(run_folder, alone):
    """Every figure that the bench promises; a model this small says nothing about who is smaller."""
    found = measure_codec(run_folder[0], alone)
    for name in ("h0_bytes", "ours_bytes", "brotli_bytes", "zstd_bytes", "lzma_bytes", "scales_bytes"):
        assert 0 < found[name] < 2 * found["weights"]
    assert found["lrzip_bytes"] is None or found["lrzip_bytes"] > 0
    assert len(found["model_sha256"]) == 64 and found["encode_s"] > 0 and found["decode_s"] > 0
