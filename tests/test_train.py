"""The main job end to end on tiny data: lines, artifact, fresh process, packed program, ranks, bad input."""

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_model import TINY, as_overrides, run_python
from fixtures_numbers import assert_close_at_scale
from fixtures_packing import UNPACKED, UNPACKED_ENVIRONMENT

import kernels.attention
import train_gpt
from common import UserError, read_json
from data.shards import HEADER_BYTES
from durable.seals import write_sealed
from eval.__main__ import main as evaluate
from formats.checkpoints import NUMBERED, newest_checkpoint, read_newest
from formats.recipe import with_values
from formats.state import read_state
from quantizers.grid import dequantize, quantize, stored_weights
from scoring.budget import BudgetError
from train_gpt import (
    Config,
    Environment,
    Log,
    Start,
    Training,
    load_artifact,
    load_validation,
    log_setup,
    restore,
    save_checkpoint,
    warm_up,
)

ALONE = Environment({})

# Runs in this process; those of the command line, in processes of their own, pack their source.
pytestmark = pytest.mark.usefixtures("stand_in_program")


TWENTY = {"run.iterations": 20, "optim.grad_clip_norm": 1.0}


def losses(folder) -> list[float]:
    """Read the training losses of a run folder."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["train_loss"] for event in events if event["kind"] == "train"]


@pytest.fixture(scope="module")
def whole_config(tiny_data, tmp_path_factory) -> Config:
    """The configuration of the one whole run: average, sliding score, six bits."""
    values = TINY | {
        "data.data_path": str(tiny_data), "data.tokenizer_path": str(tiny_data / "tokenizer.model"),
        "run.out_dir": str(tmp_path_factory.mktemp("runs")), "run.run_id": "whole",
        "average.ema_decay": 0.9, "eval.mode": "sliding", "eval.keep_tail": True,
        "quant.matrix_bits": 6, "quant.codec": "zstd", "quant.scale_floor": False,
    }  # fmt: skip
    return with_values(Config(), values, "test")


@pytest.fixture(scope="module")
def finished_run(whole_config):
    """One whole run through the command line, packing included: (overrides, run folder, process result)."""
    overrides = as_overrides(whole_config)
    result = run_python("train_gpt.py", *overrides)
    assert result.returncode == 0, result.stderr
    return overrides, Path(whole_config.run.out_dir) / "whole", result


def test_the_log_has_the_lines_that_contest_tools_parse(finished_run):
    """Patterns of contest_rules: every tool that reads the contest's logs must read ours."""
    _, folder, result = finished_run
    for pattern in (
        r"^model_params:\d+$",
        r"^seed:1337$",
        r"^train_loader:dataset:\S+ train_shards:1$",
        r"^val_loader:shards pattern=\S+ tokens:\d+$",
        r"^warmup_step:1/1$",
        r"^projected_step_seconds:\d+\.\d+ steps:6 seconds:\d+$",
        r"^val_bytes:\d+ raw_bytes:\d+$",
        r"^step:6/6 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
        r"^step:6/6 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
        r"^peak memory allocated: \d+ MiB reserved: \d+ MiB$",
        r"^final_int6_zstd_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} stride:8$",
        r"^Serialized model: \d+ bytes$",
        r"^Code size: \d+ bytes$",
        r"^Serialized model int6\+zstd: \d+ bytes",
        r"^Total submission size int6\+zstd: \d+ bytes$",
        r"^final_int6_zstd_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms$",
        r"^final_int6_zstd_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    ):
        assert re.search(pattern, result.stdout, re.M), pattern
        assert re.search(pattern, (folder / "train.log").read_text(), re.M), pattern


def test_the_run_folder_is_whole_and_its_ledger_true(finished_run):
    """Log, metrics, recipe, packed source, artifact, result; bytes in the ledger are bytes on disk."""
    _, folder, _ = finished_run
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "train.log", "metrics.jsonl", "recipe.toml", "train_gpt.py", "artifact.bin", "result.json",
    }  # fmt: skip
    result = read_json(folder / "result.json")
    sizes = dict(result["ledger"])
    assert sizes.pop("code (packed train_gpt.py)") == (folder / "train_gpt.py").stat().st_size
    assert sum(sizes.values()) == (folder / "artifact.bin").stat().st_size
    assert len(losses(folder)) == result["steps"] == 6


@pytest.mark.packs
@pytest.mark.numeric
def test_a_fresh_process_reproduces_the_score(finished_run):
    """The score comes from bytes: another process with only the artifact prints the same number."""
    _, folder, _ = finished_run
    result = run_python("-m", "eval", folder, "--json")
    assert result.returncode == 0, result.stderr
    score = json.loads(result.stdout)
    assert {
        "val_loss",
        "val_bpb",
        "num_tokens",
        "num_bytes",
        "vocab_size",
        "bos_id",
        "mode",
        "seconds",
    } <= set(score)
    assert abs(score["val_bpb"] - read_json(folder / "result.json")["score"]["val_bpb"]) < 1e-6


def test_a_recorded_score_that_is_not_reproduced_fails_eval(finished_run, tmp_path, capsys):
    """make eval exits non-zero when the number differs, or when the artifact is another file."""
    _, folder, _ = finished_run
    forged = tmp_path / "forged"
    shutil.copytree(folder, forged)
    result = read_json(forged / "result.json")
    result["score"]["val_bpb"] += 1e-4
    write_sealed(forged / "result.json", result)
    assert evaluate([str(forged)]) == 1
    assert "not reproduced" in capsys.readouterr().err
    with open(forged / "artifact.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"not the file that result\.json describes"):
        evaluate([str(forged)])


@pytest.mark.packs
@pytest.mark.numeric
def test_the_packed_program_trains_and_scores_like_the_source_bit_for_bit(finished_run, tmp_path):
    """What is weighed must be what runs: same losses, same artifact bytes, same score."""
    overrides, folder, _ = finished_run
    program = tmp_path / "elsewhere" / "train_gpt.py"
    program.parent.mkdir()
    shutil.copy(folder / "train_gpt.py", program)
    live = [text for text in overrides if text.startswith(("run.", "data.data_path", "data.tokenizer_path"))]
    free = [text for text in live if text != "run.compile=off"]  # folded: the recipe does not say auto
    refused = run_python(program, *free, "model.num_layers=2", cwd=program.parent)
    assert refused.returncode == 1 and "model.num_layers is fixed in this packed program" in refused.stderr
    free = [text.removesuffix("/tokenizer.model") for text in free]  # the folder is name enough
    packed = run_python(program, *free, "run.run_id=packed", cwd=program.parent)
    assert packed.returncode == 0, packed.stderr
    twin = folder.parent / "packed"
    assert losses(twin) == losses(folder)
    assert (twin / "artifact.bin").read_bytes() == (folder / "artifact.bin").read_bytes()
    assert (twin / "train_gpt.py").read_bytes() == (folder / "train_gpt.py").read_bytes()
    first, second = (read_json(path / "result.json")["score"] for path in (folder, twin))
    assert first["val_bpb"] == second["val_bpb"]


def test_the_artifact_holds_the_averaged_weights(finished_run, whole_config, alone):
    """EMA must be what is exported: the same run without it ends in other weights."""
    _, folder, _ = finished_run
    train_gpt.run(with_values(whole_config, {"average.ema_decay": 0.0, "run.run_id": "raw"}, "test"), ALONE)
    raw = folder.parent / "raw"
    assert losses(raw) == losses(folder)
    averaged, last = (
        load_artifact(path / "artifact.bin", Config(), alone.device)[0].state_dict() for path in (folder, raw)
    )
    assert all(not torch.equal(averaged[name], last[name]) for name in averaged if name.endswith("weight"))


@pytest.mark.numeric
def test_two_ranks_train_like_one(whole_config):
    """The same global batch for any number of ranks; float32 throughout, Newton-Schulz included."""
    one, two = (with_values(whole_config, TWENTY | {"run.run_id": name}, "test") for name in ("one", "two"))
    train_gpt.run(one, ALONE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", UNPACKED]
    result = run_python(*launcher, *as_overrides(two), env=UNPACKED_ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    folders = [Path(cfg.run.out_dir) / cfg.run.run_id for cfg in (one, two)]
    ones, twos = map(losses, folders)
    assert len(ones) == len(twos) == 20
    assert_close_at_scale(twos, ones, units=32)  # losses of 6 nats, sums over ranks in another order
    a, b = (read_json(folder / "result.json")["score"]["val_bpb"] for folder in folders)
    assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.numeric
def test_warm_up_leaves_no_trace(tiny_config, alone, tmp_path):
    """Compile steps before the clock must not train: weights, optimizer, stream and average are restored."""
    cfg = with_values(tiny_config, {"average.ema_decay": 0.9, "run.warmup_steps": 2}, "test")
    training = Training(cfg, alone, bos_id=1)
    before = copy.deepcopy(training.state_dict())
    warm_up(training, Log(tmp_path, True))
    after = training.state_dict()
    assert after["loader"] == before["loader"]
    for name, tensor in before["model"].items():
        assert torch.equal(tensor, after["model"][name])
    for old, new in zip(before["average"]["averages"], after["average"]["averages"], strict=True):
        assert torch.equal(old, new)
    assert all(not stack["momentum"].any() for stack in after["optimizers"]["stacks"])
    assert not after["optimizers"]["adamw"]["state"]


def weights_of(path: Path) -> list[np.ndarray]:
    """The model's weights in a checkpoint."""
    state, _ = read_state(path)
    return list(state["model"].values())


@pytest.mark.numeric
@pytest.mark.parametrize(
    "values", [{}, {"average.swa_every": 1, "average.swa_below": 1.0, "average.ema_decay": 0.0}]
)
def test_a_resumed_run_is_the_uninterrupted_run_bitwise(tiny_config, tmp_path, values):
    """Train 10, save, restore, train 10 equals train 20; dropout's noise and the loader's place too."""
    shape = {
        "run.val_loss_every": -1, "model.dropout": 0.2, "data.loader": "shuffled", "average.ema_decay": 0.9,
        "run.iterations": 20, "optim.normuon_beta2": 0.9, "run.save_every": 10, "schedule.warmdown_iters": 0,
    }  # fmt: skip
    cfg = with_values(tiny_config, shape | values, "test")
    checkpoint = Path(cfg.run.out_dir) / "tiny" / NUMBERED.format(20)
    train_gpt.run(with_values(cfg, {"run.iterations": 10}, "test"), ALONE)
    half = Path(shutil.copy(checkpoint.with_name(NUMBERED.format(10)), tmp_path))
    ends = []
    for start in (Start(), Start(None, read_newest(half))):
        train_gpt.run(cfg, ALONE, start)
        ends.append([*weights_of(checkpoint), np.fromfile(checkpoint.with_name("artifact.bin"), np.uint8)])
    for straight, resumed in zip(*ends, strict=True):
        assert np.array_equal(straight, resumed)
    assert losses(checkpoint.parent) and not np.array_equal(weights_of(half)[0], ends[0][0])


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("values", [[], ["optim.normuon_beta2=0.9", "data.loader=shuffled"]])
def test_one_to_eight_ranks_train_the_same_weights_and_score(tiny_config, tmp_path, values):
    """Ten steps in float64 to 1e-9, orthogonalization included; stacks of five layers are padded to eight."""
    shape = {
        "model.compute_dtype": "float64", "model.num_layers": 5, "run.iterations": 10, "run.save_every": 10,
        "run.val_loss_every": -1, "optim.grad_clip_norm": 0.5, "model.dropout": 0.1, "data.micro_batches": 8,
    }  # fmt: skip
    cfg = with_values(tiny_config, shape, "test")
    weights, scores = {}, {}
    for world_size in (1, 2, 4, 8):
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world_size}",
            "train_gpt.py",
        ]
        result = run_python(*command, *as_overrides(cfg), *values, f"run.run_id={world_size}", timeout=500)
        assert result.returncode == 0, result.stderr
        folder = Path(cfg.run.out_dir) / str(world_size)
        weights[world_size] = weights_of(newest_checkpoint(folder))
        scores[world_size] = read_json(folder / "result.json")["score"]["val_bpb"]
    for world_size in (2, 4, 8):
        assert scores[world_size] == pytest.approx(scores[1], abs=1e-9)
        for ours, expected in zip(weights[world_size], weights[1], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


def test_a_checkpoint_of_another_recipe_is_refused(tiny_config, alone, tmp_path):
    """Its weights would fit another model, or worse, this one."""
    path = tmp_path / NUMBERED.format(0)
    training = Training(tiny_config, alone, bos_id=1)
    save_checkpoint(training, path)
    restore(training, read_newest(path))
    other = Training(with_values(tiny_config, {"optim.beta1": 0.5}, "test"), alone, bos_id=1)
    with pytest.raises(UserError, match="Another recipe"):
        restore(other, read_newest(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged or foreign"):
        read_newest(path)
    assert read_newest(tmp_path / "none") is None


def test_stages_change_the_shape_of_steps(tiny_config, alone, tmp_path):
    """Rows grow in the middle of the run; every shape is warmed up before the clock."""
    rows = "0:8:128:4:1:0,0.5:16:256:4:1:0"
    cfg = with_values(tiny_config, {"schedule.stages": rows, "run.val_loss_every": -1}, "test")
    training = Training(cfg, alone, bos_id=1)
    assert [phase.stage.seq_len for phase in train_gpt.get_phases(cfg)] == [8, 16]
    shapes = []
    loss = training.loss
    training.loss = lambda model, batch, passes: (
        shapes.append(batch.tokens.shape) or loss(model, batch, passes)
    )
    train_gpt.train(training, Log(tmp_path, True), validate=None)
    assert shapes == [(4, 8)] * 12 + [(4, 16)] * 12
    assert "phase: seq_len:16 batch_tokens:256" in (tmp_path / "train.log").read_text()


QAT = {
    "quant.clip_rule": "sigmas",
    "quant.matrix_clip": 3.0,
    "quant.matrix_bits": 3,
    "quant.float16_numel": 0,
}


@pytest.mark.numeric
@pytest.mark.parametrize("method", ["round", "gptq"])
def test_late_in_training_gradients_see_the_stored_weights(tiny_config, alone, tmp_path, method):
    """From qat_start on the loss is that of the exported model, embedding and all; masters stay float."""
    fields = QAT | {"quant.method": method, "quant.qat_start": 0.5, "run.val_loss_every": -1}
    cfg = with_values(tiny_config, fields, "test")
    training = Training(cfg, alone, bos_id=1)
    grids, stored, loss = train_gpt.exported_grids(cfg), [], training.loss

    def watch(model, batch, passes):
        named = dict(model.named_parameters())
        stored.append(all(len(row.unique()) <= 7 for row in named["blocks.1.mlp.up.weight"]))
        return loss(model, batch, passes)

    training.loss = watch
    train_gpt.train(training, Log(tmp_path, True), validate=None)
    assert stored == [False] * 12 + [True] * 12
    params = dict(training.model.named_parameters())
    masters = {name: params[name].detach().clone() for name in grids}
    with stored_weights(training.model, grids, 0.0):
        for name, grid in grids.items():
            assert torch.equal(params[name], dequantize(quantize(masters[name], grid)))
            assert not torch.equal(params[name], masters[name])
    assert all(torch.equal(params[name], masters[name]) for name in grids)
    assert "embed.weight" in grids
    assert "qat:True step:3" in (tmp_path / "train.log").read_text()


@pytest.mark.numeric
@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_the_switch_of_fake_quantization_changes_the_weights(tiny_config, alone, tmp_path, compiled):
    """The contest's late QAT was folded away by torch.compile and never ran."""
    ends = []
    for start, sharpness in ((1.0, 0.0), (0.5, 0.0), (0.5, 4.0)):
        fields = {"quant.qat_start": start, "quant.qat_sharpness": sharpness, "run.compile": compiled}
        cfg = with_values(tiny_config, QAT | fields | {"run.val_loss_every": -1}, "test")
        training = Training(cfg, alone, bos_id=1)
        warm_up(training, Log(tmp_path, True))
        train_gpt.train(training, Log(tmp_path, True), validate=None)
        ends.append(training.model.state_dict()["blocks.0.mlp.up.weight"])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_the_clock_stops_a_step_within_one_micro_batch(tiny_config, alone, tmp_path, monkeypatch):
    """A slow machine must not overrun the cap by a whole accumulated step."""
    now = itertools.count(0.0, 1e-6)
    spent = [0.0]
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: spent[0] + next(now))
    cfg = with_values(tiny_config, {"run.max_wallclock_seconds": 8.0, "run.val_loss_every": -1}, "test")
    training = Training(cfg, alone, bos_id=1)
    mean_loss = training.loss

    def slow_loss(model, batch, passes):
        spent[0] += 3.0
        return mean_loss(model, batch, passes)

    training.loss = slow_loss
    facts = train_gpt.train(training, Log(tmp_path, True), validate=None)
    assert facts["steps"] == 0
    assert 8_000.0 <= facts["train_ms"] <= 11_000.0
    assert "stopping_early: wallclock_cap train_time:9000ms step:0/6" in (tmp_path / "train.log").read_text()


def break_shard(folder, name, change):
    """Damage one shard of a folder."""
    path = folder / name
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-2], "expected .* tokens"),
        (lambda data: data[:100], "header bytes"),
        (lambda data: b"\0" + data[1:], "expected shard magic"),
        (
            lambda data: data[:HEADER_BYTES] + b"\xff\xff" + data[HEADER_BYTES + 2 :],
            "token id 65535|expected sha256",
        ),
    ],
)
@pytest.mark.parametrize("name", ["fineweb_train_000000.bin", "fineweb_val_000000.bin"])
def test_a_damaged_shard_is_named(tiny_config, tmp_path, change, message, name):
    """Truncated, foreign or wrongly tokenized data must stop the run before it trains on noise."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_config.data.data_path, folder)
    break_shard(folder, name, change)
    with pytest.raises(UserError, match=message) as caught:
        train_gpt.run(with_values(tiny_config, {"data.data_path": str(folder)}, "test"), ALONE)
    assert name in str(caught.value) or "fineweb_val_*.bin" in str(caught.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data.data_path": "nowhere"}, "no shards match"),
        ({"data.tokenizer_path": "nowhere.model"}, "no such tokenizer"),
        ({"data.vocab_size": 512}, "300 entries"),
        ({"eval.context_len": 60_000, "data.seq_len": 16}, "expected at least one window"),
        ({"optim.matrix_lr": 1e30, "run.iterations": 3}, "finite"),
        ({"optim.matrix_lr": 1e38, "run.iterations": 1}, "finite"),
    ],
)
def test_bad_input_says_what_was_expected(tiny_config, values, message):
    """Missing data, a tokenizer that disagrees, too little text, a diverging run."""
    with pytest.raises(UserError, match=message):
        train_gpt.run(with_values(tiny_config, values, "test"), ALONE)


def test_over_budget_fails_and_loses_nothing(tiny_config):
    """The artifact and its score stay; the exit says no."""
    cfg = with_values(tiny_config, {"quant.limit_bytes": 1000}, "test")
    with pytest.raises(BudgetError, match=r"^NOT A VALID RUN: bytes .* [\d,]+ bytes of 1,000$"):
        train_gpt.run(cfg, ALONE)
    folder = Path(cfg.run.out_dir) / "tiny"
    result = read_json(folder / "result.json")
    assert result["score"]["val_bpb"] > 0
    assert result["over_limits"][0].startswith("bytes of the submission")
    assert (folder / "artifact.bin").is_file()
    assert (folder / "train.log").read_text().splitlines()[-1].startswith("NOT A VALID RUN: bytes")
    train_gpt.run(with_values(cfg, {"run.enforce_limits": False}, "test"), ALONE)
    assert (folder / "train.log").read_text().splitlines()[-1].startswith("NOT A VALID RUN: bytes")


def test_a_run_that_cannot_start_keeps_the_older_run_of_its_name(tiny_config):
    """A typo in a path must not cost the artifact that lies there."""
    train_gpt.run(tiny_config, ALONE)
    with pytest.raises(UserError):
        train_gpt.run(with_values(tiny_config, {"data.data_path": "typo"}, "test"), ALONE)
    assert (Path(tiny_config.run.out_dir) / "tiny" / "result.json").is_file()


def test_a_failed_run_leaves_no_result_of_an_older_one(tiny_config):
    """A run folder with a result is complete; a re-run under the same name must not inherit it."""
    train_gpt.run(tiny_config, ALONE)
    folder = Path(tiny_config.run.out_dir) / "tiny"
    assert (folder / "result.json").is_file()
    with pytest.raises(UserError):
        train_gpt.run(with_values(tiny_config, {"optim.matrix_lr": 1e38}, "test"), ALONE)
    assert not (folder / "result.json").exists() and not (folder / "artifact.bin").exists()


def test_errors_are_one_message_and_a_status(capsys):
    """No traceback for what a user can break."""
    result = run_python("train_gpt.py", "model.num_layer=3")
    assert result.returncode == 1
    assert result.stderr.startswith("error: command line: unknown field") and "Traceback" not in result.stderr
    with pytest.raises(SystemExit, match="2"):
        train_gpt.main(["--recipee", "x"])
    assert "Did you mean --recipe?" in capsys.readouterr().err


def test_a_world_size_that_does_not_divide_the_micro_batches_is_refused(tiny_config):
    """Otherwise ranks would see another global batch."""
    with pytest.raises(UserError, match="must be a multiple of the world size 3"):
        train_gpt.run(tiny_config, Environment({}, world_size=3))


def test_loading_needs_only_the_artifact(finished_run, alone):
    """Settings come from the file: defaults of another shape must not leak in."""
    _, folder, _ = finished_run
    model, cfg, _ = load_artifact(folder / "artifact.bin", Config(), alone.device)
    assert (cfg.model.num_layers, cfg.eval.mode, cfg.data.seq_len) == (3, "sliding", 16)
    assert cfg.run == Config().run
    assert sum(param.numel() for param in model.parameters()) > 10_000


def test_the_log_says_which_attention_backends_were_passed_over(tiny_config, alone, monkeypatch):
    """A silent second choice costs tens of percent; the reason names what to install."""
    monkeypatch.setitem(kernels.attention.PLAIN_ORDER, "cpu", ("fa3", "sdpa"))
    lines = []
    log = SimpleNamespace(line=lambda text, console=True: lines.append(text))
    text = load_validation(tiny_config.data)
    log_setup(tiny_config, Training(tiny_config, alone, text.bos_id), text, log)
    logged = "\n".join(lines).splitlines()
    assert "attention_mode:gqa backend:sdpa num_heads:4 num_kv_heads:2" in logged
    assert "attention_passed_over:fa3 it trains on cuda only" in logged


def test_a_step_that_takes_a_cpu_minutes_is_announced(tiny_config, alone):
    """The contest's default on a laptop would be silent for its first minutes."""
    training = Training(tiny_config, alone, 1)
    assert train_gpt.slow_note(training) == ""
    training.cfg = with_values(tiny_config, {"data.batch_tokens": 1 << 30}, "test")
    assert "TFLOP: minutes on a CPU" in train_gpt.slow_note(training)
