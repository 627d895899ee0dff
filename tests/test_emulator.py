"""The whole trainer on an emulated GPU: nothing mixes devices, numbers are the CPU's, syncs are counted."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fixtures_emulator import DeviceError, emulated_gpu
from fixtures_model import ROOT, as_overrides
from run_unchanged import small_recipes

import train_gpt
from common import read_json
from formats.recipe import flatten_recipe, with_values
from scoring.adaptive import LoraScorer
from scoring.modes import Scoring
from train_gpt import (
    Config,
    Environment,
    Ranks,
    Training,
    build_model,
    load_artifact,
    load_validation,
    run,
    score_model,
)

RECIPES = small_recipes()
# What no recipe above has, on top of the tiny configuration.
CASES = {
    "fp8": {"model.fp8": "gemm", "model.compute_dtype": "bfloat16"},
    "fp8 history": {"model.fp8": "emulate", "model.fp8_calibration_steps": 2},
    "awq": {"quant.method": "gptq", "quant.awq_group_cols": 16, "quant.calib_batches": 2},
    "scales fitted": {"eval.fit_scales": True, "quant.method": "gptq", "quant.calib_batches": 2},
    "layer norm, untied": {
        "model.norm": "layer",
        "model.norm_eps": 1e-5,
        "model.biases": "all",
        "model.tie_embeddings": False,
    },
    "dropout, clipped": {"model.dropout": 0.1, "optim.grad_clip_norm": 1.0, "optim.normuon_beta2": 0.95},
    "context": {"model.context_ratio": 4, "model.context_keep": 1},
    "saved": {"run.save_every": 2, "watch.tensorboard": True, "watch.sample_every": 3},
    "padded": {"model.vocab_pad": 20, "model.positions": "bwetaf051"},
}
LORA = {"eval.lora_rank": 2, "eval.lora_chunk_tokens": 8, "eval.lora_warm_lanes": 0}
MODES = {
    "chunked": {},
    "sliding": {"eval.tilt_online": 1.0},
    "doc": {},
    "sgd-ttt": {"eval.sgd_chunk_tokens": 64, "eval.sgd_epochs": 1},
    "lora-ttt": {"eval.lora_rank": 2, "eval.lora_chunk_tokens": 8, "eval.lora_warm_lanes": 0},
    "phased": {
        "eval.lora_rank": 2,
        "eval.lora_chunk_tokens": 8,
        "eval.phase_docs": 3,
        "eval.sgd_chunk_tokens": 64,
    },
}
NARROW = {
    "model.attn_in_document": True,
    "data.loader": "packed",
    "data.seq_len": 64,
    "data.batch_tokens": 512,
}


@pytest.fixture(autouse=True)
def weightless_code(monkeypatch):
    """Packing has nothing to do with devices."""
    monkeypatch.setattr(train_gpt, "weigh_code", lambda folder: (0, ""))


def run_on(device: str, cfg: Config, name: str) -> dict:
    """Train, quantize, reload and score; returns result.json."""
    cfg = with_values(cfg, {"run.run_id": name, "run.device": device}, "test")
    run(cfg, Environment({}))
    return read_json(Path(cfg.run.out_dir) / name / "result.json")


def test_tensors_of_two_devices_do_not_meet():
    """What the emulator is for; a number or an index of the CPU may meet any."""
    with emulated_gpu() as gpu:
        there, here = torch.arange(6.0, device="gpu"), torch.arange(6.0)
        assert (there * torch.tensor(2.0)).device.type == "gpu"
        assert there[here.long()].cpu().equal(here)
        assert gpu.syncs["_to_copy"] == 1
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.numpy()):
            with pytest.raises(DeviceError, match="gpu"):
                mixed()


def test_gradients_are_those_of_the_cpu():
    """Views, in-place updates and custom functions of autograd included."""
    grads = []
    with emulated_gpu():
        for device in ("cpu", "gpu"):
            torch.manual_seed(0)
            x = torch.randn(4, 6).to(device).requires_grad_()
            y = (x * 2).view(6, 4)
            y[:, 1] *= 3
            torch.nn.functional.rms_norm(y @ x, (6,)).pow(2).mean().backward()
            grads.append(x.grad.cpu())
    assert torch.equal(*grads)


def test_the_tiny_run_gives_the_same_numbers(tiny_config):
    """Only the last digits may differ: a GPU takes other backends of attention and norms."""
    cpu = run_on("cpu", tiny_config, "cpu")
    with emulated_gpu():
        gpu = run_on("auto", tiny_config, "gpu")
    assert gpu["score"]["val_bpb"] == pytest.approx(cpu["score"]["val_bpb"], rel=1e-3)
    assert "device:gpu" in (Path(tiny_config.run.out_dir) / "gpu" / "train.log").read_text()


@pytest.mark.parametrize(
    "changes", [{}, {"optim.grad_clip_norm": 1.0, "average.ema_decay": 0.9}, {"model.fp8": "emulate"}]
)
def test_a_step_never_waits_for_the_device(changes, tiny_config, monkeypatch):
    """A wait leaves a GPU idle until the CPU has launched again; only what is logged may cost one."""
    monkeypatch.setattr(train_gpt, "READ_EVERY_MS", 1e9)
    cfg = with_values(tiny_config, changes | {"run.train_log_every": 0, "run.val_loss_every": -1}, "test")
    waits = []
    for iterations in (4, 10):
        with emulated_gpu() as gpu:
            run_on("auto", with_values(cfg, {"run.iterations": iterations}, "test"), f"n{iterations}")
        waits.append(gpu.syncs)
    assert waits[1] - waits[0] == Counter()


def test_calibration_waits_twice_a_batch(tiny_config):
    """To read the clock and to count tokens; statistics stay on the device, their counts too."""
    waits = []
    for batches in (2, 5):
        with emulated_gpu() as gpu:
            fields = {"quant.method": "gptq", "quant.calib_batches": batches, "run.device": "auto"}
            training = Training(with_values(tiny_config, fields, "test"), Ranks(Environment({}), "auto"), 1)
            gpu.syncs.clear()
            train_gpt.collect_statistics(training)
            waits.append(gpu.syncs)
    assert waits[1] - waits[0] == Counter({"synchronize": 3, "bincount": 3})


@pytest.mark.parametrize("mode", MODES)
def test_every_scorer_runs_on_a_gpu(mode, tiny_config):
    """Scored there and on the CPU, one artifact has one score."""
    scores = []
    cfg = with_values(tiny_config, {"eval.mode": "chunked", "run.iterations": 2}, "test")
    run_on("cpu", cfg, "made")
    path = Path(cfg.run.out_dir) / "made" / "artifact.bin"
    with emulated_gpu():
        for device in ("cpu", "auto"):
            ranks = Ranks(Environment({}), device)
            model, packed, header = load_artifact(path, cfg, ranks.device)
            packed = with_values(packed, MODES[mode] | {"eval.mode": mode}, "test")
            text = load_validation(packed.data, "", header["tokenizer_sha256"])
            scores.append(score_model(model, packed, text, ranks).val_bpb)
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


# A kernel for packed documents is launched for so many: they are counted, which waits for the device.
@pytest.mark.parametrize("documents, most", [(False, 0), (True, 1)])
@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_a_chunk_of_adaptive_scoring_waits_for_the_device_at_most_once(
    documents, most, tilt, tiny_config, monkeypatch
):
    """Eight thousand chunks a rank: tokens come and nats go once a batch, not with every chunk."""
    waits, score_chunk = [], LoraScorer.score_chunk
    with emulated_gpu() as gpu:

        def counted(*args):
            before = sum(gpu.syncs.values())
            done = score_chunk(*args)
            waits.append(sum(gpu.syncs.values()) - before)
            return done

        monkeypatch.setattr(LoraScorer, "score_chunk", counted)
        changes = LORA | {"eval.mode": "lora-ttt", "eval.tilt_online": tilt, "eval.lora_batch_docs": 3}
        half = {"model.attn_in_document": documents, "model.compute_dtype": "bfloat16"}
        cfg = with_values(tiny_config, changes | half | {"run.attention": "fa3"}, "test")
        ranks = Ranks(Environment({}), "auto")
        model, text = build_model(cfg, ranks.device), load_validation(cfg.data)
        score_model(model, cfg, text, ranks, Scoring(warms_up=False))
    assert len(waits) > 20 and max(waits) <= most


@pytest.mark.parametrize("backend", ["fa3", "fa4", "fa2", "varlen", "sdpa", "math"])
@pytest.mark.parametrize("narrow", [{}, NARROW], ids=["plain", "documents"])
def test_every_backend_that_can_be_imitated_trains(backend, narrow, tiny_config):
    """With the packages' signatures, computed by math."""
    half = {"model.compute_dtype": "bfloat16", "run.attention": backend, "run.iterations": 2}
    with emulated_gpu():
        result = run_on("auto", with_values(tiny_config, half | narrow, "test"), "t")
    assert math.isfinite(result["score"]["val_bpb"])


def test_auto_takes_the_best_backend_of_the_card(tiny_config):
    """Hopper's order and that of other cards."""
    half = with_values(tiny_config, {"model.compute_dtype": "bfloat16", "run.iterations": 1}, "test")
    for capability, best in (((9, 0), "fa3"), ((8, 0), "fa4")):
        with emulated_gpu(capability):
            run_on("auto", half, best)
        assert f"backend:{best} " in (Path(half.run.out_dir) / best / "train.log").read_text()


@pytest.mark.slow
def test_one_and_two_ranks_give_one_score(tiny_config, tmp_path):
    """The collectives take tensors of the device."""
    scores = []
    for ranks in (1, 2):
        cfg = with_values(tiny_config, {"run.run_id": f"r{ranks}", "run.device": "auto"}, "test")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, str(ROOT / "tests/fixtures_emulator.py"), *as_overrides(cfg)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        scores.append(read_json(Path(cfg.run.out_dir) / f"r{ranks}" / "result.json")["score"]["val_bpb"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECIPES, *CASES])
def test_every_recipe_runs_whole(name, tiny_config, tiny_data):
    """Train, average, quantize, reload, score: each in records/ at the size of a test, and what none has."""
    cfg = with_values(tiny_config, CASES.get(name, {}), "test")
    if name in RECIPES:
        paths = {"data.data_path": str(tiny_data), "data.tokenizer_path": str(tiny_data / "tokenizer.model")}
        values = flatten_recipe(RECIPES[name], name) | paths | {"run.out_dir": cfg.run.out_dir}
        cfg = with_values(Config(), values, "test")
    with emulated_gpu():
        result = run_on("auto", cfg, "t")
    assert math.isfinite(result["score"]["val_bpb"])
