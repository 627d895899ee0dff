"""Records: what is trained again, what is refused, and a folder that passes its own audit."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from fixtures_audit import verdicts
from fixtures_model import ROOT, TINY, make_documents, run_python

from common import UserError, read_json, sha256_file
from data.codecs import load_codec
from data.prepare import Document, write_dataset
from dev import record, submission
from durable.seals import write_events, write_sealed
from eval import stats
from formats.recipe import config_hash, format_toml, get_recipe, read_recipe, with_values
from pack.program import PackReport
from train_gpt import Config, read_environment

NAME = "2026-11-21_Tiny"
SEEDS = {1337: 2.10, 42: 2.11, 2025: 2.121}
PER_TOKEN = 2.5  # bytes
PROGRAM = b"""import numpy
import torch


def main():
    print("train_gpt.py", torch.zeros(3), numpy.pi)


main()
"""
READABLE = b"print('what people read')\n"
MODEL_BYTES = 20_000
LIMITS = {"quant.limit_bytes": 1_000_000, "eval.limit_seconds": 180, "eval.limit_text_bytes": 500_000}


def score_of(bpb: float) -> dict:
    return {
        "val_loss": bpb * math.log(2) * PER_TOKEN,
        "val_bpb": bpb,
        "num_tokens": 40_000,
        "num_bytes": 100_000,
        "mode": "sliding",
        "seconds": 4.5,
        "switch_at": 0,
    }


def log_of(seed: int, bpb: float, world_size: int = 1) -> str:
    """A log with the lines that a run of this harness leaves."""
    loss = score_of(bpb)["val_loss"]
    return (
        "Running Python 3.11.7\nRunning PyTorch 2.13.0+cpu\n"
        f"model_params:1234\nworld_size:{world_size} compile:False\n"
        f"seed:{seed}\nwarmup_step:1/1\nprojected_step_seconds:0.{seed} steps:{seed} seconds:170\n"
        "step:1/20000 train_loss:6.9 train_time:80ms step_avg:80.00ms\n"
        "stopping_early: wallclock_cap train_time:170012ms step:900/20000\n"
        f"Serialized model: 90000 bytes\nCode size: {len(PROGRAM)} bytes\n"
        f"Serialized model int8+zlib: {MODEL_BYTES} bytes (payload_ratio:4.50x)\n"
        f"Total submission size int8+zlib: {MODEL_BYTES + len(PROGRAM)} bytes\n"
        f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:4500ms\n"
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
    )


def write_run(plan: record.RecordPlan, seed: int, bpb: float, log: str = "") -> Path:
    """Make a run folder as a finished, evaluated seed leaves it."""
    folder = plan.run_folder(seed)
    folder.mkdir(parents=True)
    cfg = with_values(plan.cfg, {"run.seed": seed}, "test")
    recipe = get_recipe(cfg, live=True)
    for section, key in (name.split(".") for name in record.PLACE_FIELDS):
        recipe[section].pop(key)
    (folder / "recipe.toml").write_text(format_toml(recipe))
    (folder / "train_gpt.py").write_bytes(PROGRAM)
    (folder / "artifact.bin").write_bytes(seed.to_bytes(2, "big") * (MODEL_BYTES // 2))
    (folder / "train.log").write_text(log or log_of(seed, bpb))
    result = {"steps": 900, "train_ms": 170_012.0, "tokens_per_second": 5000.0, "score": score_of(bpb)}
    result |= {"seed": seed, "config_hash": config_hash(cfg), "ledger": [["code", len(PROGRAM)]]}
    result |= {"artifact_sha256": sha256_file(folder / "artifact.bin"), "seconds": {}}
    result["places"] = {"data.data_path": cfg.data.data_path, "data.tokenizer_path": cfg.data.tokenizer_path}
    write_sealed(folder / "result.json", result)
    write_sealed(folder / "evaluation.json", score_of(bpb) | {"artifact_sha256": result["artifact_sha256"]})
    return folder


def forbid(*_, **__):
    raise AssertionError("nothing may be trained, scored or packed here")


@pytest.fixture
def made(tmp_path, tiny_data, monkeypatch):
    """A function that runs the command in tmp_path; `plan` is what it resolves to. Packing costs nothing."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        (data / name).touch()
    shutil.copy(tiny_data / "tokenizer.model", data)
    values = TINY | LIMITS | {"run.out_dir": str(tmp_path / "runs")}
    recipe = get_recipe(with_values(Config(), values, "test"), live=True)
    home = tmp_path / "recipes" / NAME
    home.mkdir(parents=True)
    (home / "recipe.toml").write_text(format_toml(recipe))
    (home / "README.md").write_text("# A tiny record\n\nWhat it is.\n\n## Old section\n")
    base = ["--recipe", str(home / "recipe.toml"), "--out", str(tmp_path / "records" / "track_cpu")]
    base += ["--data", str(data), "--audit", "folder"]

    def pack(_, out: Path) -> PackReport:
        out.write_bytes(PROGRAM)
        return PackReport(str(out), 0, 0, 0, len(PROGRAM), [])

    def make(*args: str) -> Path:
        assert record.main([*base, *args]) == 0
        return tmp_path / "records" / "track_cpu" / NAME

    monkeypatch.setattr(record, "pack", pack)
    monkeypatch.setattr(record, "write_readable", lambda _, out: out.write_bytes(READABLE))
    monkeypatch.setattr(record, "run_logged", forbid)
    make.plan = record.make_plan(record.build_parser().parse_args(base))
    return make


@pytest.fixture
def old(tmp_path):
    """The logs of a row to beat."""
    for seed in SEEDS:
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / f"train_seed{seed}.log").write_text(log_of(seed, SEEDS[seed] + 0.3))
    return tmp_path / "old"


def test_finished_runs_become_a_folder_that_passes_its_own_audit(made, old):
    """A record that its own audit doubts costs a reviewer's day; complete seeds are not trained again."""
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb)
    folder = made("--against", str(old))
    assert (folder / record.READABLE_NAME).read_bytes() == READABLE
    assert read_json(folder / "submission.json")["bytes_code"] == len(PROGRAM)
    found = verdicts(folder, [folder / "baseline.json"])
    assert {check: found[check] for check in ("K1", "K2", "K5", "K6", "K7", "K8", "K24")} == dict.fromkeys(
        ("K1", "K2", "K5", "K6", "K7", "K8", "K24"), "PASS"
    )
    assert set(found.values()) == {"PASS", "NOT RUN"}


def test_the_folder_states_what_was_measured(made, old):
    """Every number of README.md and submission.json is one of the runs', the tests', or a file's size."""
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb)
    folder = made("--against", str(old), "--author", "A", "--github-id", "a")
    facts, readme = read_json(folder / "submission.json"), (folder / "README.md").read_text()
    mean = sum(SEEDS.values()) / 3
    assert facts["val_bpb"] == pytest.approx(mean)
    assert facts["seeds"] == list(SEEDS)
    total = MODEL_BYTES + len(PROGRAM)
    assert (facts["bytes_total"], facts["bytes_code"], facts["author"]) == (total, len(PROGRAM), "A")
    assert facts["seed_results"]["42"]["artifact_sha256"] == sha256_file(folder / "artifact.bin")
    assert read_json(folder / "result.json")["seed"] == 42  # 2.11 is the nearest to the mean of 2.1103
    for text in (f"{mean:.8f}", "seed 42, whose score is the nearest", "# A tiny record", "What it is."):
        assert text in readme
    assert "Old section" not in readme
    tests = stats.compare(stats.read_scores([folder]), stats.read_scores([old]))["tests"]
    assert facts["comparison"]["tests"] == tests
    assert f"{tests[0]['p']:.3g}" in readme
    assert not (folder / "source").exists()
    assert read_json(folder / "submission.json")["source"] == submission.get_source()
    pins = (folder / "requirements.txt").read_text().split()
    assert [pin.partition("==")[0] for pin in pins] == ["numpy", "torch"]


def test_the_record_shows_the_losses_of_its_seeds(made):
    """A curve a seed: of the events of a run, else of its log; the README shows the picture."""
    for seed, bpb in SEEDS.items():
        folder = write_run(made.plan, seed, bpb)
    write_events(
        folder / "metrics.jsonl", [{"kind": "train", "step": 1, "train_loss": 1.25, "train_ms": 9.0}]
    )
    record_folder = made()
    picture = (record_folder / "loss.svg").read_text()
    assert all(f">seed {seed}<" in picture for seed in SEEDS)
    assert "seed 1337: 6.9 at" in picture and "seed 2025: 1.25 at" in picture
    assert "](loss.svg)" in (record_folder / "README.md").read_text()


def test_compliance_states_only_what_ran(made):
    """A line of `compliance` that nobody measured is how invalid records described themselves."""
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb)
    folder = made()
    facts = read_json(folder / "submission.json")["compliance"]
    sources = facts.pop("checks")
    assert facts == {
        "train_under_300s": True,
        "eval_under_36s": True,  # 180 s for 500,000 bytes, 100,000 here
        "artifact_under_1mb": True,
        "three_seeds": True,
        "no_slot": None,
        "no_pre_quant_ttt": None,
        "no_etlb": None,
        "no_ngram_cache": None,
        "score_first_ttt": None,
    }
    assert sources.keys() == facts.keys()
    assert sources["no_pre_quant_ttt"] == ["K11"]


@pytest.mark.parametrize(
    ("verdict", "expected"), [("PASS", True), ("FAIL", False), ("SUSPECT", None), ("NOT RUN", None)]
)
def test_compliance_follows_the_verdict(made, verdict, expected):
    """Only a PASS proves, only a FAIL disproves."""
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb)
    runs = [record.evaluate_seed(made.plan, seed) for seed in SEEDS]
    track = record.TRACKS["track_cpu"]
    row = submission.Record(NAME, track, made.plan.cfg, Path(), Path(), runs, [], {})
    found = submission.compliance(row, [{"id": "K11", "verdict": verdict}])
    assert found["no_pre_quant_ttt"] is expected
    assert submission.compliance(row._replace(runs=runs[:2]), [])["three_seeds"] is False


def test_compliance_counts_calibration_as_training(made):
    """Hessians of training data after the clock were ruled training time (#1028)."""
    for seed, bpb in SEEDS.items():
        log = log_of(seed, bpb).replace("Serialized model: ", "calibration_time:131000ms\nSerialized model: ")
        write_run(made.plan, seed, bpb, log)
    folder = made()
    assert read_json(folder / "submission.json")["compliance"]["train_under_300s"] is False


def edit_recipe(folder: Path) -> None:
    values = read_recipe(folder / "recipe.toml") | {"optim.matrix_lr": 0.5}
    recipe: dict = {}
    for name, value in values.items():
        section, key = name.split(".")
        recipe.setdefault(section, {})[key] = value
    (folder / "recipe.toml").write_text(format_toml(recipe))


def edit_result(folder: Path, **changes) -> None:
    write_sealed(folder / "result.json", read_json(folder / "result.json") | changes)


CHANGES = {
    "optim.matrix_lr is 0.5, not 0.04": edit_recipe,
    "run.seed is 43, not 42": lambda folder: edit_result(folder, seed=43),
    "config_hash is 00, not": lambda folder: edit_result(folder, config_hash="00"),
    "artifact.bin is not the file": lambda folder: (folder / "artifact.bin").write_bytes(b"other"),
    "train.log, artifact.bin missing": lambda folder: [
        (folder / name).unlink() for name in ("train.log", "artifact.bin")
    ],
    "train_gpt.py is another program": lambda folder: (folder / "train_gpt.py").write_bytes(b"other"),
    "data.data_path is elsewhere, not": lambda folder: edit_result(
        folder, places={"data.data_path": "elsewhere", "data.tokenizer_path": "elsewhere"}
    ),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_a_complete_run_of_something_else_is_neither_used_nor_overwritten(made, expected):
    """Seeds of two configurations are no sample, and hours of training are not deleted by a typing error."""
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb)
    CHANGES[expected](made.plan.run_folder(42))
    with pytest.raises(UserError, match=expected) as error:
        made()
    assert "--name" in str(error.value)
    assert not made.plan.target.exists()
    assert made.plan.run_folder(42).is_dir()


def test_seeds_that_ran_differently_are_refused(made):
    """The log knows what the recipe does not: ranks, backends, the text that was scored."""
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb, log_of(seed, bpb, world_size=2 if seed == 42 else 1))
    with pytest.raises(UserError, match="world_size: 1, 2, 1"):
        made()
    assert not made.plan.target.exists()


def test_a_failed_audit_writes_no_record(made):
    """The folder stays in the work folder, to be looked at."""
    for seed, bpb in SEEDS.items():
        log = log_of(seed, bpb).replace("train_time:170012ms", "train_time:417000ms")
        write_run(made.plan, seed, bpb, log)
    with pytest.raises(UserError, match="the audit FAILs K5"):
        made()
    assert not made.plan.target.exists()
    assert (made.plan.work / "staged" / "track_cpu" / NAME / "README.md").is_file()


def test_only_missing_seeds_are_trained(made, monkeypatch):
    """Started again after a stop, a record costs what is missing and no more."""
    for seed in (1337, 42):
        write_run(made.plan, seed, SEEDS[seed])
    commands = []

    def train(command: list[str], label: str) -> None:
        commands.append(command)
        write_run(made.plan, 2025, SEEDS[2025])

    monkeypatch.setattr(record, "run_logged", train)
    made()
    assert len(commands) == 1
    assert commands[0][1] == str(made.plan.program)
    assert "run.seed=2025" in commands[0]


def test_gpus_train_through_torchrun(made, monkeypatch):
    """As many ranks as the machine has and every step's micro-batches allow."""
    monkeypatch.setattr(record.torch.accelerator, "device_count", lambda: 3)
    command = record.training_command(made.plan, 7)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # of 4 each


def test_a_crashed_seed_shows_the_end_of_its_log(monkeypatch):
    """The reason is in the child's last lines, not in ours."""
    script = "[print('line', i) for i in range(50)]; raise SystemExit('out of memory')"
    with pytest.raises(UserError, match="seed 7: expected success, found exit status 1") as error:
        record.run_logged([sys.executable, "-c", script], "seed 7")
    lines = str(error.value).splitlines()
    assert ("line 49" in lines, "line 20" in lines, "out of memory" in lines) == (True, False, True)


def test_children_see_no_setting_of_the_environment(monkeypatch):
    """A forgotten MATRIX_LR would make another run than the recipe says."""
    monkeypatch.setenv("MATRIX_LR", "0.5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = record.child_environment()
    assert "MATRIX_LR" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"
    assert read_environment().overrides["optim.matrix_lr"] == "0.5"  # the plan has it instead


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", "1,1"], "different numbers"),
        (["--seeds", "one"], "whole numbers"),
        (["--name", "My record"], "YYYY-MM-DD_Name"),
        (["--out", "records/elsewhere"], "track_cpu"),
        (["--data", "nowhere"], "no such folder"),
        (["--against", "nowhere"], "no such file"),
        (["data.tokenizer_path=nowhere.model"], "no such tokenizer"),
        ([f"data.tokenizer_path={ROOT}/tokenizers/sp1024"], "1024 entries, the model's vocabulary has 300"),
        (["run.max_wallclock_seconds=301"], "over the limit of track_cpu"),
        (["quant.limit_bytes=16000000"], "over the limit of track_cpu"),
        (["optim.matrix_l=1"], "Did you mean optim.matrix_lr"),
    ],
)
def test_bad_input_is_refused_before_work_starts(made, args, message):
    """An hour of training is a dear way to find a typing error."""
    with pytest.raises(UserError, match=message):
        made(*args)
    assert not made.plan.work.exists()


def test_a_record_replaces_no_other(made):
    """Only the folder of the very recipe may be filled."""
    made.plan.target.mkdir(parents=True)
    with pytest.raises(UserError, match="it exists"):
        made()


def test_a_recipe_folder_becomes_its_record(made, tmp_path):
    """records/ holds recipes without runs: their record belongs beside them, under their own words."""
    home = made.plan.target
    shutil.copytree(made.plan.recipe.parent, home)
    for seed, bpb in SEEDS.items():
        write_run(made.plan, seed, bpb)
    args = ["--recipe", str(home / "recipe.toml"), "--out", str(home.parent), "--audit", "folder"]
    args += ["--data", str(tmp_path / "data")]
    text = (home / "recipe.toml").read_text()
    record.main(args)
    assert (home / "recipe.toml").read_text() == text
    assert "What it is." in (home / "README.md").read_text()
    with pytest.raises(UserError, match="not the one that would run"):
        record.main([*args, "optim.matrix_lr=0.5"])


@pytest.mark.parametrize(
    ("verdicts", "expected", "evidence"),
    [
        (("PASS", "FAIL"), "FAIL", "b"),
        (("FAIL", "PASS"), "FAIL", "a"),
        (("NOT RUN", "PASS"), "PASS", "b"),
        (("SUSPECT", "NOT RUN"), "SUSPECT", "a"),
        (("PASS", "PASS"), "PASS", "ab"),
        (("NOT RUN", "NOT RUN"), "NOT RUN", "a"),
    ],
)
def test_checks_that_ran_twice_keep_the_worse_verdict(verdicts, expected, evidence):
    """A PASS in one depth must not hide a FAIL in another, nor a NOT RUN either."""
    reports = [[{"id": "K12", "verdict": v, "evidence": [e]}] for v, e in zip(verdicts, "ab")]
    (merged,) = submission.merge_checks(*reports)
    assert (merged["verdict"], "".join(merged["evidence"])) == (expected, evidence)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_record_from_training_to_audit(tiny_data, tmp_path):
    """The whole chain as a user starts it: pack, train, score, audit; then score the folder again."""
    shutil.copytree(tiny_data, tmp_path / "data")
    texts = {kind: make_documents(100, seed) for kind, seed in (("train", 1), ("val", 2))}
    documents = [[Document(text, f"{kind}:{i}") for i, text in enumerate(texts[kind])] for kind in texts]
    codec = load_codec(tiny_data / "tokenizer.model")
    write_dataset(tmp_path / "data", codec, *documents, {"made_by": "tests"}, num_threads=1)
    values = TINY | LIMITS | {"run.out_dir": str(tmp_path / "runs"), "run.val_batch_tokens": 16_384}
    values |= {"eval.mode": "sliding", "eval.keep_tail": True}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(format_toml(get_recipe(with_values(Config(), values, "test"), live=True)))
    track = tmp_path / "records" / "track_cpu"
    args = ["--recipe", recipe, "--out", track, "--name", NAME, "--seeds", "1,2,3"]
    args += ["--data", tmp_path / "data"]
    assert record.main([str(arg) for arg in args]) == 0
    folder, runs = track / NAME, tmp_path / "runs" / NAME
    found = verdicts(folder)
    assert not {"FAIL", "SUSPECT"} & set(found.values()), found
    merged = {check["id"]: check["verdict"] for check in read_json(folder / "audit.json")["checks"]}
    passed = {check for check, verdict in merged.items() if verdict == "PASS"}
    assert passed >= {"K1", "K2", "K5", "K6", "K7", "K12", "K13", "K14", "K16", "K22", "K24"}
    programs = [folder, *(runs / f"seed{seed}" for seed in (1, 2, 3))]
    assert len({sha256_file(path / "train_gpt.py") for path in programs}) == 1
    again = run_python("-m", "eval", folder, "--json", timeout=600)
    assert again.returncode == 0, again.stderr
    assert abs(json.loads(again.stdout)["difference"]) < 1e-6
    forged = bytearray((folder / "artifact.bin").read_bytes())
    forged[-1] ^= 1
    (folder / "artifact.bin").write_bytes(forged)
    assert run_python("-m", "eval", folder, timeout=600).returncode == 1


def test_sources_are_hashed_by_name_and_content(tmp_path):
    """A moved or changed module is another source; order and other files do not matter."""
    for name in ("a.py", "b.py", "other.py"):
        (tmp_path / name).write_text(name)
    digest = submission.hash_sources(tmp_path, ["b.py", "a.py"])
    assert digest == submission.hash_sources(tmp_path, ["a.py", "b.py"])
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert submission.hash_sources(tmp_path, ["c.py", "b.py"]) != digest
    (tmp_path / "c.py").rename(tmp_path / "a.py")
    (tmp_path / "b.py").write_text("changed")
    assert submission.hash_sources(tmp_path, ["a.py", "b.py"]) != digest
    assert submission.get_source()["commit"] in (
        "",
        *submission.ask_git("log", "-1", "--format=%H").split(),
    )
