"""Wrong settings as a newcomer, somebody in haste and a saboteur type them: each is one sentence, at once."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from fixtures_model import ROOT, as_overrides, run_python

import train_gpt
from common import UserError
from durable.peers import check_launch, waiting_told
from formats import preflight
from formats.hardware import format_hardware, parse_machine, project
from formats.help import explain
from formats.memory import legal_counts
from formats.recipe import read_recipe, with_values
from quantizers.config import METHODS
from train_gpt import Config, check_config, describe, load_config

LONGEST = 700  # characters of a sentence about a wrong setting
DIGITS = "9" * 5000
WORDS = ("two", "", "None", "1,000", "1 000", "1e3", "1.5", "nan", "inf", "0x10", "[1]", "1:2", DIGITS)

# Field -> values that are refused when the config is resolved, whatever else it says.
ODD = {
    "model.num_layers": (*WORDS, "0", "-1", "257", "99999999", "1" + "0" * 30, "1" + "0" * 4000),
    "model.model_dim": (*WORDS, "0", "-64", "33", "1048577", "1" + "0" * 4000),
    "model.num_heads": ("0", "-1", "3"),
    "model.num_kv_heads": ("0", "3", "1e9"),
    "model.mlp_mult": ("0", "-1", "nan", "1e300", "1e30", "0.0001", "wide"),
    "model.window_layers": ("0", "99", "-1", "a", "0.5", "0:1"),
    "model.recur_layers": ("0", "0,5", "a,b", "0,0,0", "1:2", "0.5,1", "0:1,1"),
    "model.recur_passes": ("5", "1000000"),
    "model.rope_base": ("0", "1e308"),
    "model.rope_dims": ("3", "1e6"),
    "model.value_embed_layers": ("7", "0.5"),
    "model.bigram_buckets": ("1", "1e12", "10000000000"),
    "model.bigram_dim": ("1000000000",),
    "model.vocab_pad": ("-5", "10000000"),
    "model.dropout": ("1", "-0.1"),
    "model.fp8": ("on",),
    "model.positions": ("rope",),
    "data.vocab_size": ("0", "1", "1024.5", "10000000000"),
    "data.seq_len": ("0", "1", "7", "10000000000000"),
    "data.batch_tokens": ("0", "100", "1e18", "1000000000000000000", "8" * 30),
    "data.micro_batches": ("-1", "3", "AUTO", "1.5"),
    "data.loader": ("random",),
    "run.iterations": (DIGITS, "three", "-5", "9" * 25),
    "run.max_wallclock_seconds": ("-1", "nan", "inf", "ten", "1e308"),
    "run.seed": (DIGITS, "1.5", "18446744073709551616", "-9223372036854775809", "abc", ""),
    "run.warmup_steps": ("-1",),
    "run.device": ("gpu", "cuda:7", "CPU", ""),
    "run.resume": ("on",),
    "run.out_dir": ("",),
    "run.run_id": ("a/b", "..", "x" * 300, "a\nb"),
    "optim.matrix_lr": ("-1", "nan", "1e300", "1,0", "0.04.1"),
    "optim.beta1": ("1", "2"),
    "optim.beta2": ("1",),
    "optim.adam_eps": ("0", "-1"),
    "optim.num_ns_steps": ("0", "1000000000"),
    "optim.matrix_optimizer": ("sgd", "Muon", ""),
    "schedule.stages": (
        "x", "0", "0:16:128:4", "0.5:16:128:4:1:0", "0:0:128:4:1:0", "0:16:128:4:nan:0", "0:16.5:128:4:1:0",
        "0:16:128:4:-1:0", "0:16:128:4:1:-1", ":::::", "0:16:128:4:1:0,0:16:128:4:1:0",
    ),
    "schedule.warmdown_frac": ("2",),
    "schedule.recur_start_fracs": ("0.5", "a", "0:1"),
    "average.ema_decay": ("1", "nan"),
    "quant.matrix_bits": ("0", "4", "9", "8.5"),
    "quant.embed_bits": ("6",),
    "quant.mlp_bits": ("7",),
    "quant.method": ("GPTQ", "awq"),
    "quant.matrix_clip": ("0", "2"),
    "quant.embed_clip": ("1.5",),
    "quant.mlp_clip": ("3",),
    "quant.target_bytes": ("100", "-1"),
    "quant.limit_bytes": ("16MB", "16,000,000", "-1"),
    "quant.codec": ("zip",),
    "eval.mode": ("ttt", "Sliding", ""),
    "eval.stride": ("0", "1.5"),
    "eval.deadline_s": ("-0.5", "1e9"),
    "eval.lora_sites": ("x", "", "q,x"),
    "eval.lora_seed": ("-1", "99999999999999999999999"),
    "eval.lora_rank": ("100000000",),
    "eval.lora_short_chunks": ("5", "a:b", "100:10,50:5", "0:0", "1:2:3"),
    "eval.lora_beta2": ("1",),
    "eval.sgd_freeze_blocks": ("99",),
    "eval.tilt_static_lengths": ("0", "a", "", "1000000", "0.5"),
    "watch.keep_checkpoints": ("0",),
}  # fmt: skip
CASES = [f"{name}={value}" for name, values in ODD.items() for value in values]


@pytest.fixture
def words(tiny_config) -> list[str]:
    """The command line of a run that works."""
    return as_overrides(tiny_config)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Names of files are relative to the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run the trainer's command in this process; returns the sentence that refuses it before it trains."""
    monkeypatch.setattr(train_gpt.Stops, "install", lambda *_: None)
    monkeypatch.setattr(train_gpt, "Training", lambda *_: pytest.fail("training begins"))

    def command(*words: str) -> str:
        with pytest.raises((UserError, SystemExit)) as refusal:
            train_gpt.main([*words])
        error = refusal.value
        said = str(error) if isinstance(error, UserError) else capsys.readouterr().err
        assert not isinstance(error, SystemExit) or error.code == 2
        assert 20 < len(said) < LONGEST * (1 + isinstance(error, SystemExit))
        return said

    return command


def test_there_are_150_odd_settings():
    """As many as were promised."""
    assert len(set(CASES)) >= 150


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[:40])
def test_an_odd_setting_is_one_sentence_that_names_it(case, words):
    """No traceback, nothing that hangs, and no echo of 5,000 digits."""
    own = dict(word.split("=", 1) for word in words)
    name = case.partition("=")[0]
    with pytest.raises(UserError) as refusal:
        load_config(None, {}, [f"{key}={value}" for key, value in own.items() if key != name] + [case])
    said = str(refusal.value)
    assert name.partition(".")[2] in said or name.partition(".")[0] in said
    assert len(said) < LONGEST and said.endswith(".")


# ---- Knowable before training -----------------------------------------------------------------------


KNOWABLE = {
    "a window beyond the text": (["eval.context_len=100000"], "one window of eval.context_len=100,000"),
    "rows beyond the text": (
        ["data.seq_len=16384", "data.batch_tokens=16384", "data.micro_batches=1", "eval.context_len=16"],
        "one window of data.seq_len=16,384",
    ),
    "weights beyond memory": (["model.model_dim=262144"], "GiB for weights .* Lower the model's sizes: "),
    "a vocabulary beyond memory": (
        ["model.bigram_buckets=1048576", "model.bigram_dim=1048576"], r"bigram\.[a-z.]*weight has 1,099,511"
    ),
    "a micro-batch beyond memory": (
        ["data.batch_tokens=274877906944", "data.micro_batches=1"], r"set data.micro_batches=2 \(same batch\)"
    ),
    "bytes beyond the limit": (["quant.limit_bytes=100"], "expected at least 540"),
    "a name of no weight": (["quant.float16_names=blocks.9.*"], "names none"),
    "an empty name": (["quant.float16_names=["], "names none"),
    "a data folder that is not there": (["data.data_path=nowhere"], "no such folder"),
    "a tokenizer that is not there": (["data.tokenizer_path=nowhere"], "nowhere"),
    "another vocabulary": (["data.vocab_size=301"], "301"),
    "another codec": (["data.tokenizer_kind=bytelevel"], "."),
    "an output folder that is a file": (["run.out_dir=README.md"], "a folder that can be written"),
    "an output folder below a file": (["run.out_dir=README.md/x"], "a folder that can be written"),
    "an endless name": (["run.out_dir=" + "x" * 300], "a folder that can be written"),
    "no step and no clock": (["run.iterations=0"], "needs a step or a clock"),
    "no clock left": (
        ["run.max_wallclock_seconds=5", "quant.reserve_seconds=5"], "above 5 s, which quant.reserve_seconds"
    ),
    "two averages": (["average.ema_decay=0.9", "average.swa_every=2"], "one average"),
    "gptq below 8 bits with a floor": (
        ["quant.method=gptq", "quant.target_bytes=9000"], "quant.scale_floor=True destroys weights of 2 bits"
    ),
    "more phases than documents": (["eval.mode=phased", "eval.phase_count=1000000000"], "eval.phase_docs"),
    "a CPU that is no GPU": (["run.device=mps"], "run.device=mps: expected such a device"),
    "an attention of other machines": (["run.attention=fa3"], "fa3"),
    "the contest's name as an argument": (
        ["MAX_WALLCLOCK_SECONDS=20"], "Write run.max_wallclock_seconds=..., or set MAX_WALLCLOCK_SECONDS in"
    ),
    "a field without its section": (["num_layers=2"], "Did you mean model.num_layers"),
    "a field as an option": (["--num-layers", "2"], "fields are written model.num_layers="),
    "a misspelled option": (["--recipie", "x"], "Did you mean --recipe"),
    "spaces around the sign": (["model.num_layers", "=", "2"], "expected section.key=value"),
    "a recipe almost of this name": (["--recipe", "NaiveBaselin"], "Did you mean records/.*NaiveBaseline"),
    "a path almost right": (
        ["--recipe", "records/track_cpu/2026-11-21_Sp2048_LoraScorin/recipe.toml"],
        "Did you mean records/track_cpu/2026-11-21_Sp2048_LoraScoring",
    ),
    "a folder without a recipe": (["--recipe", "tests"], "no file or folder of a recipe"),
    "no recipe at all": (["--recipe", ""], "no file or folder of a recipe"),
    "an endless recipe": (["--recipe", "/dev/zero"], "no file or folder of a recipe"),
    "a run that is not there": (["--resume", "nope"], "expected a run folder"),
    "steps that are none": (["--describe", "--steps", "x"], "--steps x: expected whole numbers from 0 on"),
    "steps below none": (["--describe", "--steps=-5"], "from 0 on"),
    "steps of 5,000 digits": (["--describe", "--steps", DIGITS], "from 0 on"),
    "times that are none": (["--describe", "--elapsed-ms", "nan"], "--elapsed-ms nan: expected numbers"),
    "a link of one machine": (["--hardware", "h100x8@eth25"], "Leave @eth25 out"),
    "cards of 5,000 digits": (["--hardware", "h100x" + DIGITS], "expected a name of"),
    "help on a section's misspelling": (["--help", "modle"], r"Did you mean model\?"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWABLE)
def test_what_can_be_known_before_training_is_refused_before_it(name, words, refused):
    """An hour of training before "validation is too short" sends people away."""
    changes, expected = KNOWABLE[name]
    assert re.search(expected, refused(*words, *changes))


@pytest.mark.parametrize("text", ["", "# nothing\n", "[model]\n"])
def test_a_recipe_that_says_nothing_is_refused(text, tmp_path, words, refused):
    """It would train the naive baseline, for ten minutes of eight GPUs."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert "found an empty recipe" in refused("--recipe", str(path), *words)


@pytest.mark.parametrize(
    ("free", "changes", "expected"),
    [
        (1000, [], "disk, found 0.00 MiB"),
        (400_000, ["run.save_every=1"], "of it 3 x"),
        (400_000, ["run.save_every=6", "watch.keep_checkpoints=9"], "of it 1 x"),
    ],
)
def test_a_disk_too_small_for_what_is_surely_written_is_refused(
    free, changes, expected, words, refused, monkeypatch
):
    """Checkpoints that a run without a clock will keep are counted, no others."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free))
    said = refused(*words, *changes)
    assert "MiB free on its disk" in said and expected in said


def test_a_folder_that_nobody_may_write_to_is_refused(words, refused, monkeypatch):
    """Root may write everywhere, so the error is made up."""

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "found: Permission denied. Set run.out_dir" in refused(*words)


def test_what_may_fit_is_not_refused(tiny_config, tmp_path, monkeypatch):
    """A false refusal is worse than a late one: exactly the certain bytes of memory and disk are enough."""
    sizes = train_gpt.find_sizes(tiny_config, torch.device("cpu"))
    stages = train_gpt.get_stages(tiny_config)
    numel, stacked = sizes.num_params, sizes.stacked
    tokens = tiny_config.data.batch_tokens // tiny_config.data.micro_batches
    weights, gradients, moments = numel, numel + stacked, 2 * (numel - stacked) + stacked
    need = 4 * (weights + moments) + max(4 * gradients, tokens * (16 + 4 * 32))
    preflight.check_memory(tiny_config, stages, sizes, (1, 1), (need, "cpu"))
    preflight.check_memory(tiny_config, stages, sizes, (1, 1), (0, "machine that does not say"))
    with pytest.raises(UserError, match="MiB of memory"):
        preflight.check_memory(tiny_config, stages, sizes, (1, 1), (need - 1, "cpu"))
    with pytest.raises(UserError, match="MiB of memory"):
        preflight.check_memory(tiny_config, stages, sizes, (1, 2), (need, "cpu"))
    assert preflight.count_checkpoints(tiny_config.run, 3) == 0
    clocked = with_values(tiny_config, {"run.save_every": 1, "run.max_wallclock_seconds": 600}, "test")
    assert preflight.count_checkpoints(clocked.run, 3) == 1
    preflight.check_disk(tiny_config, sizes, True)
    assert not (tmp_path / "runs").exists()


def test_divisors_are_found_without_trying_every_number():
    """As the slow way finds them; 2^34 rows take no time."""
    stage = train_gpt.Stage(0, 2, 720, 1)
    for world_size in (1, 2, 3, 7):
        slow = [count for count in range(world_size, 361, world_size) if 360 % count == 0]
        assert legal_counts(stage, world_size) == slow
    assert len(legal_counts(stage._replace(batch_tokens=1 << 35), 1)) == 35


# ---- Artifacts and runs of before -------------------------------------------------------------------


def test_old_artifacts_load_with_what_new_runs_may_not_have(tiny_config, tmp_path):
    """Weights of 4 bits with a floor of their steps are bad, but they are somebody's."""
    cfg = with_values(tiny_config, {"quant.matrix_bits": 4}, "test")
    assert cfg.quant.scale_floor
    check_config(cfg)
    model = train_gpt.build_model(cfg, torch.device("cpu"))
    path = tmp_path / "artifact.bin"
    quantized = train_gpt.quantize_model(model, cfg, {}, len)
    path.write_bytes(train_gpt.pack_model(model, cfg, quantized, "f" * 64)[0])
    assert train_gpt.load_artifact(path, Config(), torch.device("cpu"))[1].quant == cfg.quant
    with pytest.raises(
        UserError, match=r"quant.scale_floor=True destroys weights of 4 bits: set quant.scale_floor=0"
    ):
        load_config(None, {}, as_overrides(cfg))
    assert load_config(None, {}, [*as_overrides(cfg), "quant.scale_floor=0"]).quant.matrix_bits == 4


def test_a_run_that_goes_on_may_not_be_given_less_than_it_has_used(tiny_config):
    """Found at once, not after the data were read; the clock that it began with is always enough."""
    begun = {"run.save_every": 3, "run.max_wallclock_seconds": 500}
    cfg = with_values(tiny_config, begun, "test")
    folder = Path(cfg.run.out_dir) / "tiny"
    folder.mkdir(parents=True)
    train_gpt.write_recipe(folder, cfg)
    facts = {"step": "3", "train_ms": "500100.0"}
    found = namedtuple("found", "path facts")(folder / "checkpoint_step0000003.safetensors", facts)
    recipe = folder / "recipe.toml"
    preflight.check_spent(cfg, found, recipe)
    preflight.check_spent(with_values(cfg, {"run.iterations": 3}, "test"), found, recipe)
    for name, value in {"run.max_wallclock_seconds": 20, "run.iterations": 2}.items():
        with pytest.raises(
            UserError, match=f"{name}={value}.*: expected at least .*, which the run has used"
        ):
            preflight.check_spent(with_values(cfg, {name: value}, "test"), found, recipe)


def test_a_choice_without_a_row_is_named(monkeypatch, words):
    """Who adds a quantizer and forgets its row gets no KeyError."""
    monkeypatch.setitem(METHODS, "mine", "not there yet")
    with pytest.raises(UserError, match=r"quant\.method=mine has no row in its table, which has round, gptq"):
        load_config(None, {}, [*words, "quant.method=mine"])


# ---- Launchers --------------------------------------------------------------------------------------


PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHES = {
    "RANK=abc": {"RANK": "abc"},
    "RANK= ": {"RANK": ""},
    "RANK=-1": {"RANK": "-1", "WORLD_SIZE": "2"},
    "RANK=5": {"RANK": "5", "WORLD_SIZE": "2", **PLACE},
    "RANK=3": {"RANK": "3"},
    "WORLD_SIZE=abc": {"WORLD_SIZE": "abc"},
    "WORLD_SIZE=0": {"WORLD_SIZE": "0"},
    "WORLD_SIZE=-2": {"WORLD_SIZE": "-2"},
    "WORLD_SIZE=1e9": {"WORLD_SIZE": "1e9"},
    "WORLD_SIZE=999": {"WORLD_SIZE": DIGITS},
    "WORLD_SIZE=2": {"WORLD_SIZE": "2"},
    "WORLD_SIZE=2 alone": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    "MASTER_PORT=0": {"WORLD_SIZE": "2", "RANK": "0", **PLACE, "MASTER_PORT": "0"},
    "MASTER_PORT=abc": {"WORLD_SIZE": "2", "RANK": "0", **PLACE, "MASTER_PORT": "abc"},
    "MASTER_PORT=70000": {"WORLD_SIZE": "2", "RANK": "0", **PLACE, "MASTER_PORT": "70000"},
    "LOCAL_RANK=1.0": {"LOCAL_RANK": "1.0"},
    "LOCAL_RANK=2": {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
    "LOCAL_WORLD_SIZE=0": {"LOCAL_WORLD_SIZE": "0"},
    "TORCHELASTIC_RESTART_COUNT=x": {"TORCHELASTIC_RESTART_COUNT": "x"},
    "TORCHELASTIC_RESTART_COUNT=2": {"TORCHELASTIC_RESTART_COUNT": "2"},
    "TORCHELASTIC_RUN_ID=none": {"TORCHELASTIC_RUN_ID": "none"},
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_variables_of_a_launcher_that_make_no_sense_are_refused(name, words, refused, monkeypatch):
    """Before anybody waits an hour for ranks that do not exist."""
    for variable, value in LAUNCHES[name].items():
        monkeypatch.setenv(variable, value)
    said = refused(*words)
    assert said.startswith(f"environment: {name.split(' ')[0]}") and "unset RANK WORLD_SIZE" in said


def test_variables_of_a_launcher_that_make_sense_pass():
    """torchrun's, those of a launcher that says less, a GPU that is chosen by hand, and none."""
    for environ in (
        {},
        {"LOCAL_RANK": "3"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "9", "WORLD_SIZE": "16", **PLACE},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **PLACE,
         "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"},
    ):  # fmt: skip
        check_launch(environ)


def test_gpus_that_a_variable_hides_are_missed(monkeypatch):
    """A run that silently takes the CPU is a thousand times slower."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "banana")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not train_gpt.read_environment().misspelled
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA_VISIBLE_DEVICES=banana leaves no GPU" in train_gpt.read_environment().misspelled[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not train_gpt.read_environment().misspelled


def test_who_waits_for_others_says_so(monkeypatch, capsys):
    """Silence looks like a hang."""
    monkeypatch.setattr("durable.peers.PATIENCE_S", 0.05)
    said, ends_at = "", time.monotonic() + 10
    with waiting_told("the other ranks of 2"):
        while not said and time.monotonic() < ends_at:
            time.sleep(0.02)
            said = capsys.readouterr().err
    assert said == "waiting for the other ranks of 2\n"


# ---- What is shown ----------------------------------------------------------------------------------


def test_columns_of_a_projection_do_not_run_together():
    """Of two CPU cores a step takes seven digits of milliseconds."""
    found = describe(Config(), [0], [0.0])
    table = format_hardware(project(found, "cpu,h100x8", []))
    assert [len(re.split(r"  +", line.strip())) for line in table[1:4]] == [7, 7, 7]
    assert parse_machine("h100x16@eth25").link.title.startswith("25 Gb/s")


def test_help_prefers_a_section_to_a_field():
    """`modle` is nearer to `mode` by letters."""
    with pytest.raises(UserError, match=r"Did you mean model\?"):
        explain(Config, "modle")


@pytest.mark.parametrize(
    ("target", "words", "expected"),
    [
        ("bench", ["GPU=0"], "python -m dev.bench $"),
        ("bench", ["GPU=1"], "python -m dev.bench --gpu$"),
        ("bench", ["GPU=banana"], "GPU=banana: expected 0, 1 or one of"),
        ("gpu-battery", ["REHEARSE=0"], r"--out runs/gpu_battery +\\$"),
        ("gpu-battery", ["REHEARSE=1"], r"--out runs/gpu_battery --rehearse"),
    ],
)
def test_make_takes_0_for_no(target, words, expected):
    """A switch that is set to 0 is off."""
    done = subprocess.run(
        ["make", "-n", target, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert re.search(expected, done.stdout + done.stderr, re.MULTILINE)


# ---- Real processes ---------------------------------------------------------------------------------


RECORD = "records/track_cpu/2026-11-21_NaiveBaseline"
REAL = {
    "a wrong number": (["train_gpt.py", "model.num_layers=two"], {}, 1, "expected a whole number"),
    "5,000 digits": (["train_gpt.py", f"run.seed={DIGITS}"], {}, 1, "run.seed"),
    "a launcher's rubbish": (["train_gpt.py"], {"WORLD_SIZE": "abc"}, 1, "WORLD_SIZE=abc"),
    "half a launcher": (["train_gpt.py"], {"WORLD_SIZE": "2", "RANK": "0"}, 1, "MASTER_ADDR and MASTER_PORT"),
    "a misspelled recipe": (["train_gpt.py", "--recipe", "NaiveBaselin"], {}, 1, "Did you mean records/"),
    "no steps": (["train_gpt.py", "--describe", "--steps", "x"], {}, 1, "--steps x"),
    "no such case": (["-m", "audit", "--cases", "nope"], {}, 1, "--cases: expected some of"),
    "no such artifact": (["-m", "eval", "--artifact", "nope"], {}, 2, "a file or folder that is there"),
    "no units": (["-m", "eval", "--switch-at", "-5"], {}, 2, "expected -1 or a number of units"),
    "a seed too large": (
        ["-m", "eval.sample", RECORD, "--seed", "9" * 25], {}, 1, "seed=999"
    ),
    "no program": (["-m", "pack", "--entry", "docs/progress.svg"], {}, 1, "expected a Python program"),
    "no cache": (["-m", "pack", "--cache", "README.md"], {}, 1, "a folder that can be written"),
    "no pair": (["-m", "eval", "--compare", RECORD, "nope"], {}, 2, "a file or folder that is there"),
    "no place": (["-m", "pack", "--out", ""], {}, 1, "expected a file to write"),
    "no such seeds": (
        ["-m", "dev.record", "--recipe", f"{RECORD}/recipe.toml", "--seeds", "x"], {}, 1, "--seeds x: ex"
    ),
    "no folder": (["-m", "dev.twins", "--folder", "README.md", "A"], {}, 1, "a folder that can be written"),
    "no data": (["-m", "dev.gpu_battery", "--data", "nope"], {}, 2, "a file or folder that is there"),
    "no option": (["-m", "dev.submission", "--nope"], {}, 2, "unrecognized arguments: --nope"),
    "no bits": (["-m", "eval.stats", RECORD, "--against", "0"], {}, 1, "above 0"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_command_that_is_typed_wrong_ends_with_a_sentence(name):
    """As a shell runs it: status, no traceback, within seconds."""
    words, environment, status, expected = REAL[name]
    done = run_python(*words, env=os.environ | environment, timeout=60)
    assert done.returncode == status and expected in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr) < 3000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("words", ["train_gpt.py --describe", "train_gpt.py --help", "-m dev.submission"])
def test_a_full_disk_below_standard_output_is_said(words):
    """Python's own words come after the work is done, and name no file."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, *words.split(" ")]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the disk is full: standard output or a file was not written. Free space and run this again.\n"
    )


@pytest.mark.slow
def test_a_rank_without_others_says_what_it_waits_for(words):
    """WORLD_SIZE that a scheduler left behind: the first line comes within ten seconds."""
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"} | PLACE | {"MASTER_PORT": "29391"}
    command = [sys.executable, "train_gpt.py", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stderr.readline() == (
            "waiting for the other ranks of 2 at 127.0.0.1:29391; this is rank 0\n"
        )
        rank.kill()


# ---- Outputs that would replace what is read --------------------------------------------------------


VERIFY = ("data.tokenizer", "verify", "--tokenizer", "TOKENIZER", "--input", "TEXT")


@pytest.mark.parametrize(
    "command",
    [
        ("pack", "--out", "train_gpt.py"),
        ("pack", "--recipe", "RECIPE", "--out", "RECIPE"),
        (*VERIFY, "--out", "TOKENIZER/tokenizer.model"),
        (*VERIFY, "--out", "TEXT"),
    ],
)
def test_an_output_does_not_replace_what_is_read(tmp_path, command):
    """The contest's file has the name of the source: `--out train_gpt.py` is typed soon."""
    recipe, text, folder = tmp_path / "mine.toml", tmp_path / "a.txt", tmp_path / "tokenizer"
    recipe.write_text("[model]\nnum_layers = 2\n")
    text.write_text("abc")
    shutil.copytree(ROOT / "tokenizers" / "sp1024", folder)
    files = [ROOT / "train_gpt.py", recipe, text, folder / "tokenizer.model"]
    before = [path.read_bytes() for path in files]
    names = {"RECIPE": str(recipe), "TOKENIZER": str(folder), "TEXT": str(text)}
    module, *words = (names.get(word, word.replace("TOKENIZER", str(folder))) for word in command)
    main = importlib.import_module(f"{module}.__main__" if module == "pack" else module).main
    with pytest.raises(UserError, match="this is a file that is read"):
        main(words)
    assert [path.read_bytes() for path in files] == before


def test_describe_tells_of_recipes_alone(refused):
    """Beside --resume it described the default recipe."""
    assert "not --resume or --score" in refused("--describe", "--resume", "runs/a")


# ---- Recipes as people write them -------------------------------------------------------------------


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Some editors put one before everything."""
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf[model]\nnum_layers = 2\n")
    assert read_recipe(tmp_path / "mine.toml") == {"model.num_layers": 2}


@pytest.mark.parametrize("name", ["run.iterations", "run.seed", "run.max_wallclock_seconds", "run.out_dir"])
def test_true_is_no_number_and_no_text(name):
    """TOML has it as a value of its own."""
    with pytest.raises(UserError, match=f"{name}.*found True"):
        with_values(Config(), {name: True}, "test")


def test_a_list_is_typed_as_recipes_write_it():
    """Or with commas alone."""
    for typed in ("[1, 3]", "1,3"):
        values = {"model.window_layers": typed, "schedule.stages": "[[0, 8, 64, 1, 1, 0]]"}
        cfg = with_values(Config(), values, "test")
        assert cfg.model.window_layers == (1, 3) and cfg.schedule.stages == ((0, 8, 64, 1, 1, 0),)
    with pytest.raises(UserError, match="expected a list: 3,4 or 1:2,3:4"):
        with_values(Config(), {"model.window_layers": "[1, 3"}, "test")
