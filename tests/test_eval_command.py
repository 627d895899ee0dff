"""`python -m eval`: what it takes from where, what it reproduces, compares and breaks down."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_artifact import write_artifact
from fixtures_model import make_documents, run_python

import train_gpt
from audit.probes import Event, coverage, order_of_events
from common import UserError, read_json, sha256_file, write_json
from data.codecs import load_codec
from data.prepare import Document, write_dataset
from durable.seals import write_sealed
from eval.__main__ import document_range, main, take_documents
from eval.breakdown import (
    BYTE_CLASSES,
    Windows,
    break_down,
    byte_shares,
    get_class,
    get_costs,
    visible_tokens,
)
from eval.compare import are_alike, document_costs
from eval.runs import Target, find_target, newest_run
from formats.recipe import config_fields, with_values
from scoring.adaptive import Callbacks, ScoringRun, WindowSettings, plan_documents
from scoring.modes import Scoring, score_session
from scoring.sliding import ScoreOptions
from train_gpt import (
    Config,
    EvalConfig,
    Log,
    build_model,
    finish,
    load_artifact,
    load_validation,
    quantize_model,
    score_model,
    write_recipe,
)

pytestmark = pytest.mark.numeric

ADAPTIVE = {
    "eval.mode": "sgd-ttt", "eval.keep_tail": True, "eval.sgd_chunk_tokens": 64, "eval.sgd_batch_seqs": 2,
    "eval.sgd_epochs": 1, "eval.sgd_lr": 0.05,
}  # fmt: skip

HINTED = {
    "eval.mode": "lora-ttt", "eval.keep_tail": True, "eval.lora_rank": 2, "eval.lora_sites": "q,mlp",
    "eval.lora_lr": 0.01, "eval.lora_chunk_tokens": 8, "eval.lora_batch_docs": 2, "eval.tilt_online": 1.0,
}  # fmt: skip
PHASED = HINTED | {"eval.mode": "phased", "eval.tilt_online": 0.0, "eval.phase_docs": 3, "eval.sgd_lr": 0.05}
EXACT = {"model.compute_dtype": "float64"}  # whole-weight steps of untrained models amplify rounding
CHANGES = {
    "sliding": {}, "sgd-ttt": ADAPTIVE, "lora-ttt and hints": HINTED, "phased": PHASED | EXACT,
}  # fmt: skip


@pytest.fixture
def make_run(tiny_config, alone, tmp_path):
    """Make complete run folders of untrained models: what a run leaves, without training and packing."""

    def make(name: str, changes: dict | None = None) -> Path:
        changes = {"eval.mode": "sliding", "eval.keep_tail": True} | (changes or {})
        cfg = with_values(tiny_config, {"run.run_id": name, **changes}, "test")
        folder = tmp_path / "runs" / name
        write_recipe(folder, cfg)
        text = load_validation(cfg.data)
        torch.manual_seed(sum(name.encode()))
        model = build_model(cfg, alone.device)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape) * 0.3)
        quantized = quantize_model(model, cfg, {}, None)
        ledger = write_artifact(model, cfg, quantized, text.tokenizer_sha256, folder / "artifact.bin")
        model, stored, _ = load_artifact(folder / "artifact.bin", cfg, alone.device)
        score = score_model(model, stored, text, alone, Scoring())._asdict()
        facts = {
            "steps": 0,
            "train_ms": 0.0,
            "calibration_ms": 0.0,
            "tokens_per_second": 0.0,
            "score": score,
            "ledger": ledger,
        }
        finish(folder, cfg, facts | {"seconds": {"scoring": score["seconds"]}}, Log(folder, False))
        return folder

    return make


def evaluate_on_ranks(world_size: int, place: Path, *args) -> tuple[dict, list[dict]]:
    """Run the command under torchrun; returns its JSON object and the events of all ranks.

    With the threads of this process: torchrun would give each rank one, and sums of more threads round
    otherwise.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    log = place / f"{world_size}.jsonl"
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = run_python(*launcher, "-m", "eval", *args, "--json", "--event-log", log, env=env)
    assert result.returncode == 0, result.stderr
    logs = [log, *(Path(f"{log}.{rank}") for rank in range(1, world_size))]
    return json.loads(result.stdout), [
        json.loads(line) for path in logs for line in path.read_text().splitlines()
    ]


def evaluate(capsys, *args) -> dict:
    """Run the command in this process; returns its JSON object."""
    capsys.readouterr()
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- What comes from where ---------------------------------------------------------------------------


def test_the_budget_counts_calibration_as_training(make_run, capsys):
    """Quantizers and tables read training text: that is time of the training clock."""
    folder = make_run("calibrated", {"run.max_wallclock_seconds": 10.0})
    with open(folder / "train.log", "a", encoding="utf-8") as log:
        log.write("calibration_time:2500ms reserve:4000ms\n")
    assert main([str(folder), "--budget"]) == 0
    clock = capsys.readouterr().out.split("training clock")[1].split("scoring clock")[0]
    rows = dict(re.findall(r"^  (\w.*?) +([\d.]+) s$", clock, re.MULTILINE))
    assert rows == {
        "training": "0.0", "calibration and n-grams": "2.5", "total": "2.5", "limit": "10.0", "left": "7.5"
    }  # fmt: skip


def test_the_environment_cannot_change_what_the_artifact_stores(make_run, tiny_config, monkeypatch, capsys):
    """A score is the artifact's; a variable left over in a shell must not move or break it."""
    folder = make_run("run")
    monkeypatch.setenv("DATA_PATH", tiny_config.data.data_path)
    monkeypatch.setenv("TOKENIZER_PATH", tiny_config.data.tokenizer_path)
    recorded = read_json(folder / "result.json")["score"]["val_bpb"]
    fields = config_fields(Config).values()
    stored = [item.metadata["env"] for item in fields if item.metadata["env"] and not item.metadata["live"]]
    assert {"EVAL_STRIDE", "NUM_LAYERS", "VOCAB_SIZE", "TTT_LR"} <= set(stored)
    for value in ("3", "nonsense"):
        for name in stored:
            monkeypatch.setenv(name, value)
        for target in (folder, folder / "artifact.bin"):
            part = ["--set", "run.val_batch_tokens=512", "run.compile=off"]
            assert evaluate(capsys, target, *part)["val_bpb"] == recorded


def test_the_command_line_changes_scoring_and_nothing_else(make_run, capsys):
    """--set reaches every [eval] field and live ones; what the artifact stores is out of reach."""
    folder = make_run("run")
    stored = evaluate(capsys, folder)
    changed = evaluate(
        capsys, folder, "--mode", "doc", "--set", "stride=4", "eval.context_len=8", "run.compile=off"
    )
    assert (changed["mode"], changed["stride"], changed["context_len"]) == ("doc", 4, 8)
    assert stored["difference"] == 0 and changed["difference"] is None
    named = evaluate(capsys, folder, "--mode", "doc", "--stride", "4", "--context-len", "8")
    assert named["val_bpb"] == changed["val_bpb"] != stored["val_bpb"]
    assert evaluate(capsys, folder, "--tilt", "2.0")["tilt"] == 2.0
    with pytest.raises(UserError, match=r"model\.num_layers: the artifact stores it"):
        main([str(folder), "--set", "model.num_layers=2"])
    with pytest.raises(UserError, match=r"Did you mean eval\.lora_rank"):
        main([str(folder), "--set", "lora_rang=2"])


def test_json_is_one_object_and_the_rest_goes_to_standard_error(make_run, tmp_path, capsys):
    """Programs read standard output; people see how long it will take, and the events go to a file."""
    folder, log = make_run("run", ADAPTIVE), tmp_path / "events.jsonl"
    assert main([str(folder), "--json", "--event-log", str(log)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    score = json.loads(printed.out)
    assert abs(score["implied_bytes"] / score["num_bytes"] - 1) < 1e-9
    assert "projected_seconds:" in printed.err and "limit:600.0" in printed.err
    assert "deadline" not in printed.err
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert list(rows[0]) == ["seq", "rank", "kind", "lo", "hi", "doc", "seconds"]
    events = [Event(row["kind"], row["lo"], row["hi"]) for row in rows if row["kind"] in ("score", "update")]
    assert {event.kind for event in events} == {"score", "update"}
    assert coverage(events, score["num_tokens"]).verdict == "PASS"
    assert order_of_events(events, score["num_tokens"]).verdict == "PASS"


def test_a_score_against_the_rules_says_so_in_every_output(make_run, capsys):
    """Training on the text before scoring it: a number that must not be mistaken for a score."""
    folder = make_run("run", ADAPTIVE)
    args = [str(folder), "--mode", "legacy_pre_eval", "--documents", "3"]
    assert "before they were scored" in evaluate(capsys, *args)["invalid"]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith("INVALID ")
    assert main(["--compare", str(folder), *args]) == 0  # the changed mode is that of both sides
    assert capsys.readouterr().out.count("INVALID: an update read") == 2


def test_an_order_by_length_is_named(make_run, capsys):
    """Some reviewers call it a look ahead: a reader of the number must know."""
    folder = make_run("run", PHASED)
    assert main([str(folder)]) == 0
    assert "disputed          lengths of documents decide" in capsys.readouterr().out
    warm = ["--mode", "lora-ttt", "--set", "lora_warm_lanes=2"]
    orders = [evaluate(capsys, folder, *args)["order"] for args in ([], warm, warm[:2], ["--mode", "doc"])]
    assert orders == ["by length", "by length", "text", "text"]


# ---- Recorded scores ---------------------------------------------------------------------------------


def test_a_score_cut_by_the_deadline_is_replayed_bitwise(make_run, monkeypatch, capsys):
    """Where the clock ended adaptation is stored; without a clock the same number comes out again."""
    with monkeypatch.context() as patch:
        ticks = itertools.count()
        patch.setattr("scoring.adaptive.time.perf_counter", lambda: float(next(ticks)))
        folder = make_run("cut", ADAPTIVE | {"eval.deadline_s": 60.0, "eval.limit_seconds": 1e9})
    recorded = read_json(folder / "result.json")["score"]
    assert 0 < recorded["switch_at"] < recorded["num_units"]
    again = evaluate(capsys, folder)
    assert (again["val_bpb"], again["switch_at"]) == (recorded["val_bpb"], recorded["switch_at"])
    told = evaluate(capsys, folder, "--switch-at", recorded["switch_at"])
    assert told["difference"] == 0
    other = evaluate(capsys, folder, "--switch-at", 0)
    assert other["difference"] is None and other["val_bpb"] != recorded["val_bpb"]


def test_a_limit_ends_adaptation_in_time_and_says_so(make_run, capsys):
    """A run must not fail its limit because adaptation was too ambitious; -1 lets it."""
    folder = make_run("late", ADAPTIVE)
    whole = evaluate(capsys, folder)
    assert main([str(folder), "--json", "--set", "limit_seconds=1e-6"]) == 0
    printed = capsys.readouterr()
    score = json.loads(printed.out)
    assert score["switch_at"] == 0 < score["num_units"] and score["val_bpb"] != whole["val_bpb"]
    said = f"deadline: adapted 0 of {score['num_units']} units, by the clock, and scored the rest plainly"
    assert said in printed.err and "eval.deadline_s=-1" in printed.err
    assert main([str(folder), "--json", "--switch-at", "1"]) == 0
    assert "deadline: adapted 1 of" in (again := capsys.readouterr().err) and "as replayed" in again
    never = ["--set", "limit_seconds=1e-6", "deadline_s=-1"]
    assert evaluate(capsys, folder, *never)["val_bpb"] == whole["val_bpb"]


@pytest.fixture
def record(make_run, tmp_path, monkeypatch):
    """A record folder of one seed, with its run in runs/ and no artifact of its own."""
    monkeypatch.chdir(tmp_path)
    run, folder = make_run("seed7"), tmp_path / "record"
    folder.mkdir()
    shutil.copy(run / "recipe.toml", folder)
    (folder / "README.md").write_text("x")
    places = read_json(run / "result.json")["places"]
    monkeypatch.setenv("DATA_PATH", places["data.data_path"])
    monkeypatch.setenv("TOKENIZER_PATH", places["data.tokenizer_path"])
    bpb = read_json(run / "result.json")["score"]["val_bpb"]
    row = {"val_bpb": bpb, "artifact_sha256": sha256_file(run / "artifact.bin")}
    write_json(folder / "submission.json", {"seed_results": {"7": row}})
    return folder, run


def test_the_artifact_of_a_run_is_scored_as_the_run(make_run):
    """Its folder knows where its data lie; elsewhere a file is scored by itself."""
    folder = make_run("whole")
    assert find_target(folder / "artifact.bin") == find_target(folder)
    copy = folder.parent / "copy.bin"
    copy.write_bytes((folder / "artifact.bin").read_bytes())
    assert find_target(copy).artifact == copy


def test_a_record_is_scored_from_the_artifact_that_it_states(record, tmp_path, capsys):
    """Its own file, or the run's with that hash, or the one that is named; others are refused."""
    folder, run = record
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", "nowhere")  # the run knows where its data lie
        assert evaluate(capsys, folder)["artifact"] == str(Path("runs/seed7/artifact.bin"))
    kept = shutil.move(run / "artifact.bin", tmp_path / "kept.bin")
    assert evaluate(capsys, folder, "--artifact", kept)["difference"] == 0
    other = tmp_path / "other.bin"
    other.write_bytes(Path(kept).read_bytes() + b"x")
    with pytest.raises(UserError, match=r"expected an artifact that .* states"):
        find_target(folder, other)
    shutil.copy(kept, folder / "artifact.bin")
    assert evaluate(capsys, folder)["artifact"] == str(folder / "artifact.bin")


def test_what_a_run_left_is_not_written_over(make_run, capsys):
    """An event log of its name would be the end of an artifact."""
    run = make_run("seed7")
    for name in ("artifact.bin", "result.json", "recipe.toml"):
        before = (run / name).read_bytes()
        with pytest.raises(UserError, match=r"--event-log .*: this is a file that is read"):
            main([str(run), "--event-log", str(run / name)])
        assert (run / name).read_bytes() == before
    evaluate(capsys, run, "--event-log", run / "events.jsonl")
    assert (run / "events.jsonl").is_file()


def test_a_run_with_the_recipe_of_another_is_refused(make_run):
    """Its artifact has its own; but one of the two files is not what it seems."""
    run = make_run("seed7")
    (run / "recipe.toml").write_text("[model]\nnum_layers = 7\n")
    with pytest.raises(UserError, match=r"recipe\.toml: expected the recipe .* that result\.json beside"):
        find_target(run)


def test_data_that_moved_are_named_by_the_environment(make_run, capsys, monkeypatch, tmp_path):
    """As by the run's own command."""
    run = make_run("seed7")
    result = read_json(run / "result.json")
    places = result["places"]
    lost = {name: str(tmp_path / "away") for name in ("data.data_path", "data.tokenizer_path")}
    write_sealed(run / "result.json", result | {"places": places | lost})
    monkeypatch.setenv("DATA_PATH", places["data.data_path"])
    monkeypatch.setenv("TOKENIZER_PATH", places["data.tokenizer_path"])
    assert evaluate(capsys, run)["difference"] == 0


def test_a_record_finds_the_seeds_that_were_trained_for_it(record, capsys):
    """`make record` leaves runs/NAME/seedN: a run of its own for a record, and the newest of all runs."""
    folder, run = record
    moved = Path("runs") / "2026-11-21_Record" / "seed7"
    moved.parent.mkdir()
    shutil.move(run, moved)
    assert evaluate(capsys, folder)["artifact"] == str(moved / "artifact.bin")
    assert newest_run() == moved


def test_a_record_without_its_artifact_says_how_to_train_it(record):
    """Weights of the contest's size are not committed: the way out is its program, or recipe, and a seed."""
    folder, run = record
    (run / "artifact.bin").unlink()
    data = r" data\.data_path=.* data\.tokenizer_path=\S+$"
    with pytest.raises(UserError, match=r"python train_gpt\.py --recipe .*/recipe\.toml run\.seed=7" + data):
        find_target(folder)
    (folder / "train_gpt.py").touch()
    with pytest.raises(UserError, match=r"python \S*record/train_gpt\.py run\.seed=7" + data):
        find_target(folder)
    (folder / "train_gpt.py").unlink()
    (folder / "submission.json").unlink()
    with pytest.raises(UserError, match=r"python train_gpt\.py --recipe \S*record/recipe\.toml" + data):
        find_target(folder)
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match="a complete run"):
        find_target(folder)


@pytest.mark.parametrize(("stated", "status"), [(None, 1), (1e-3, 0), (1e-5, 1)])
def test_a_difference_above_the_stated_tolerance_fails(record, stated, status, capsys):
    """The record may state its tolerance: other devices round otherwise; unstated it is 1e-6."""
    folder, _ = record
    facts = read_json(folder / "submission.json")
    facts["seed_results"]["7"]["val_bpb"] += 1e-4
    write_json(folder / "submission.json", facts | ({"tolerance_bpb": stated} if stated else {}))
    assert main([str(folder)]) == status
    assert ("not reproduced" in capsys.readouterr().err) == bool(status)


def test_scorers_that_adapt_have_a_wider_tolerance():
    """On another number of ranks or threads their gradients are summed in another order."""
    unstated = Target(Path("artifact.bin"), Config())
    assert [unstated.tolerance(mode) for mode in ("sliding", "lora-ttt", "phased")] == [1e-6, 1e-5, 1e-5]
    assert unstated._replace(stated_tolerance=0.0).tolerance("phased") == 0


def test_the_newest_complete_run_is_the_default(make_run, tmp_path):
    """An unfinished run is passed over."""
    with pytest.raises(UserError, match="no complete run"):
        newest_run(tmp_path / "runs")
    make_run("old")
    newest = make_run("new")
    (make_run("unfinished") / "result.json").unlink()
    assert newest_run(tmp_path / "runs") == newest


# ---- Documents, comparison, breakdown ----------------------------------------------------------------


def test_documents_are_scored_as_within_the_whole_text(make_run, capsys):
    """Shares of the documents add up to all of them, where documents do not see each other."""
    folder = make_run("run")
    doc = [folder, "--mode", "doc"]
    whole, first, rest = (
        evaluate(capsys, *doc, *part) for part in ([], ["--documents", "3"], ["--documents", "3:"])
    )
    for name in ("num_tokens", "num_bytes"):
        assert first[name] + rest[name] == whole[name]
    nats = [part["val_loss"] * part["num_tokens"] for part in (whole, first, rest)]
    assert nats[0] == pytest.approx(nats[1] + nats[2], rel=1e-5)
    assert evaluate(capsys, *doc, "--documents", "3:99")["num_bytes"] == rest["num_bytes"]
    with pytest.raises(UserError, match="found none in the range"):
        main([str(folder), "--documents", "50:60"])


@pytest.mark.parametrize("text", ["", ":", "x", "3:2", "0", "-1", "2:2", "-3:2"])
def test_ranges_of_documents_that_mean_nothing_are_refused(text):
    """An empty score would be taken for a good one."""
    with pytest.raises(Exception, match="expected"):
        document_range(text)


def test_a_run_equals_itself(make_run, capsys):
    """The one comparison whose outcome is known: no difference, no interval."""
    folder = make_run("run")
    report = evaluate(capsys, "--compare", folder, folder)
    assert report["difference"] == 0 and report["interval"]["low"] == report["interval"]["high"] == 0
    assert len(report["documents"]) == 8
    assert main(["--compare", str(folder), str(folder)]) == 0
    assert "A - B  +0.00000000 bpb" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # what would be ignored is refused
        main(["--compare", str(folder), str(folder), "--breakdown"])


def test_runs_with_different_tokenizers_are_compared_by_the_bytes_of_documents(
    make_run, trained, tmp_path, capsys
):
    """Tokens differ, documents and bytes do not; another text is refused whatever the tokenizer."""
    folders = {}
    for name, seed in (("same", 2), ("other", 3)):
        documents = [Document(text, f"{i}") for i, text in enumerate(make_documents(8, seed=seed))]
        training = [Document("a text to train on", "0")]
        codec = load_codec(trained["bytes"])
        write_dataset(tmp_path / name, codec, training, documents, {}, num_threads=1)
        places = {"data.data_path": tmp_path / name, "data.tokenizer_path": trained["bytes"]}
        kind = {"data.vocab_size": 260, "data.tokenizer_kind": "bytes", "eval.keep_tail": True}
        folders[name] = make_run(name, kind | {key: str(value) for key, value in places.items()})
    pieces = make_run("pieces")
    report = evaluate(capsys, "--compare", pieces, folders["same"])
    alone = [evaluate(capsys, run)["val_bpb"] for run in (pieces, folders["same"])]
    assert report["val_bpb"] == pytest.approx(alone, rel=1e-12)
    assert all(a == b for a, b in (row["bytes"] for row in report["documents"]))
    low, high = (report["interval"][end] for end in ("low", "high"))
    assert low < report["difference"] < high
    rows = report["documents"]
    assert sum(row["bits_saved"] > 0 for row in rows) == report["documents_better"]
    with pytest.raises(UserError, match="document 0: expected the same text on both sides"):
        main(["--compare", str(pieces), str(folders["other"])])


@pytest.mark.parametrize(("a", "b", "alike"), [
    ("", "", True), ("", "ab", True), ("a", "the model reads many bytes", False),
    ("themodelreadsmanybytesofthetextandmore", "themodelreadsmanybytesoftmthetextandmore", True),
    ("themodelreadsmanybytesofthetextandmore", "anothermodelwritesfewtokensofthecorpus", False),
    ("themodelreadsmanybytesofthetextandmore", "themodelreadsmany", False),
])  # fmt: skip
def test_what_tokenizers_lose_makes_no_other_document(a, b, alike):
    """A sign that one tokenizer spells out and another drops is not another text; half a text is."""
    assert are_alike(a, b) == are_alike(b, a) == alike


@pytest.mark.parametrize("mode", ["chunked", "sliding", "doc", "sgd-ttt", "lora-ttt", "phased"])
def test_a_breakdown_adds_up(make_run, capsys, mode):
    """Every table is the same total, cut another way; without tails nothing is left over either."""
    args = ["--mode", mode, "--set", "keep_tail=0", "lora_rank=2", "lora_chunk_tokens=8", "lora_sites=mlp",
            "phase_docs=3", "lora_batch_docs=2", "--switch-at", "2"]  # fmt: skip
    facts = evaluate(capsys, make_run("run"), "--breakdown", *args)
    tables = facts["breakdown"]
    assert len(tables) == 4
    bits = facts["val_loss"] * facts["num_tokens"] / np.log(2)
    for rows in tables.values():
        assert sum(row["targets"] for row in rows) == pytest.approx(facts["num_tokens"])
        assert sum(row["num_bytes"] for row in rows) == pytest.approx(facts["num_bytes"])
        assert sum(row["bits"] for row in rows) == pytest.approx(bits, rel=1e-6)


def test_a_breakdown_equals_a_loop_over_targets(lossless_codec):
    """Context, place, length and kind of byte of each target, counted one by one."""
    texts = ["caf\u00e9 42, x\n" * 30, "a", "", "the model reads bytes 1024\n" * 3]
    bos = lossless_codec.bos_id
    parts = [np.concatenate([[bos], lossless_codec.encode(text)]) for text in texts]
    tokens = np.concatenate([*parts, [bos]]).astype(np.uint16)
    sizes = lossless_codec.token_bytes(tokens)[1:]
    nats = np.random.default_rng(0).uniform(0, 5, len(sizes)).astype(np.float32)
    costs = get_costs(nats, sizes)
    tables = break_down(costs, tokens, lossless_codec, Windows(EvalConfig(), 16, 64, 0))
    expected: dict[str, dict[str, float]] = {title: {} for title in tables}
    documents = plan_documents(tokens, bos)
    octaves = [1, 3, 7, 15, 31, 63, 127, 255, 511, 1023]
    for lo, hi in documents:
        for i in range(lo, hi):
            bits, last = costs.bits[i], f"{octaves[np.searchsorted(octaves, i - lo + 1)]}"
            seen = f"{octaves[np.searchsorted(octaves, i % 16 + 1)]}"
            length = sizes[lo:hi].sum()
            kinds = [(last, "tokens of the document"), (seen, "tokens in the window")]
            kinds.append(("256-1,023" if length >= 256 else "0-255", "bytes of the document"))
            for name, title in kinds:
                expected[title][name] = expected[title].get(name, 0.0) + bits
            piece = lossless_codec.decode(tokens[i + 1 : i + 2])
            table = expected["bytes of the target"]
            for name in [BYTE_CLASSES[get_class(byte)] for byte in piece] or ["no bytes"]:
                table[name] = table.get(name, 0.0) + bits / max(len(piece), 1)
    for title, rows in tables.items():
        if title.startswith("tokens"):  # names end in the longest context that there is
            assert [row.bits for row in rows] == pytest.approx(list(expected[title].values()))
        else:
            assert {row.name: row.bits for row in rows} == pytest.approx(expected[title])


class Counter(torch.nn.Module):
    """A model whose cost says how many tokens it saw: an entry that no text holds has the logit ln seen."""

    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Parameter(torch.zeros(()))  # what optimizers ask for

    def forward(self, tokens, starts_doc, first):
        seen = torch.arange(first + 1, tokens.size(1) + 1).log().expand(len(tokens), -1)
        return torch.cat([torch.zeros(*seen.shape, 12), seen.unsqueeze(-1)], dim=-1) + 0 * self.idle


@pytest.mark.parametrize("switch_at", [-1, 0, 2])
@pytest.mark.parametrize("mode", ["chunked", "sliding", "doc", "sgd-ttt", "lora-ttt"])
def test_the_tokens_in_a_targets_window_are_those_that_the_model_saw(mode, switch_at, alone):
    """Read off the costs of a model that counts, adapting scorers included, also past their switch."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[1, *rng.integers(2, 12, length)] for length in (40, 3, 0, 25, 70, 9)] + [[1]])
    settings = dataclasses.replace(
        EvalConfig(), mode=mode, stride=4, lora_rank=0, lora_chunk_tokens=6, lora_batch_docs=2,
        lora_short_chunks=((10, 2),), lora_max_doc_tokens=50, sgd_lr=0.0,
    )  # fmt: skip
    session = ScoringRun(
        tokens, WindowSettings(16, 4, 0.0, switch_at), ScoreOptions(1, 64), alone, Callbacks()
    )
    outcome = score_session(Counter(), session, settings)
    seen = visible_tokens(tokens, 1, Windows(settings, 16, 64, outcome.switch_at))
    assert np.array_equal(seen, np.rint(np.exp(outcome.nats.double().numpy()) - 12))


def test_kinds_of_bytes_are_the_same_for_every_tokenizer(codecs, normalising_case_ops):
    """Shares come from decoded pieces: byte tokens, leading spaces and operators included."""
    for codec in (*codecs.values(), normalising_case_ops):
        shares = byte_shares(codec)
        assert shares.sum(1) == pytest.approx(1)
        assert shares[codec.bos_id, BYTE_CLASSES.index("no bytes")] == 1
        ids = codec.encode("a 7")
        assert (shares[ids].sum(0)[:3] > 0).all() and shares[ids][:, 3:5].sum() == 0
    assert [BYTE_CLASSES[get_class(byte)] for byte in b"aZ7 \n.\xc3\x00"] == [
        "letters", "letters", "digits", "whitespace", "whitespace", "punctuation", "non-ASCII", "punctuation",
    ]  # fmt: skip


def test_documents_of_no_bytes_cost_bits_all_the_same():
    """Empty documents have no bits per byte of their own, and may not vanish from the sum."""
    tokens = np.array([1, 5, 1, 1, 6, 7, 1], dtype=np.uint16)
    costs = document_costs(np.ones(6, np.float32), np.array([1, 0, 0, 2, 2, 0]), tokens, 1)
    assert (costs.bits * np.log(2)).tolist() == pytest.approx([2, 1, 3])
    assert costs.num_bytes.tolist() == [1, 0, 4]
    assert [ids.tolist() for ids in costs.tokens] == [[5], [], [6, 7]]


def test_taken_documents_keep_their_bytes(tiny_config):
    """Tokens and byte counts are cut at the same places."""
    text = load_validation(tiny_config.data)
    part = take_documents(text, slice(2, 4))
    lo, hi = plan_documents(text.tokens, text.bos_id)[[2, 3], [0, 1]]
    assert np.array_equal(part.tokens, text.tokens[lo : hi + 1])
    assert np.array_equal(part.target_bytes, text.target_bytes[lo:hi])


# ---- Fresh processes ---------------------------------------------------------------------------------

OFFLINE = """
import runpy, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo") or (event == "open" and "_train_" in str(args[0])):
        raise RuntimeError(f"{event} {args[0]}")
sys.addaudithook(refuse)
"""


@pytest.mark.slow
def test_packed_program_source_and_command_agree_offline_without_training_shards(make_run, tmp_path):
    """One artifact, one validation shard, three programs in fresh processes: one number, bit for bit."""
    folder = make_run("run", ADAPTIVE)
    recorded = read_json(folder / "result.json")
    data = tmp_path / "validation only"
    data.mkdir()
    for path in Path(recorded["places"]["data.data_path"]).iterdir():
        if "_train_" not in path.name:
            shutil.copy(path, data)
    program = tmp_path / "elsewhere" / "train_gpt.py"
    program.parent.mkdir()
    packed = run_python("-m", "pack", "--recipe", folder / "recipe.toml", "--out", program)
    assert packed.returncode == 0, packed.stderr
    live = [f"data.data_path={data}", f"data.tokenizer_path={data / 'tokenizer.model'}"]
    live.append("run.val_batch_tokens=512")
    command = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    settings = ["--recipe", folder / "recipe.toml"]
    found = []
    for path, recipe in ((program, []), (Path(train_gpt.__file__), settings)):
        arguments = [path, *recipe, "--score", folder / "artifact.bin", *live]
        result = run_python("-c", OFFLINE + command, *arguments, cwd=path.parent)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout)["val_bpb"])
    arguments = [folder / "artifact.bin", "--val", data / "fineweb_val_*.bin", "--json"]
    arguments += ["--tokenizer", data / "tokenizer.model", "--set", live[-1]]
    arguments.append("run.compile=off")
    command = "runpy.run_module('eval', run_name='__main__', alter_sys=True)"
    result = run_python("-c", OFFLINE + command, *arguments)
    assert result.returncode == 0, result.stderr
    assert [*found, json.loads(result.stdout)["val_bpb"]] == [recorded["score"]["val_bpb"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", CHANGES)
def test_two_and_four_ranks_give_the_score_of_one(make_run, tmp_path, mode):
    """torchrun -m eval: plain scores bitwise, adaptive ones to 1e-5; one object, one log a rank."""
    folder = make_run("run", CHANGES[mode])
    recorded = read_json(folder / "result.json")["score"]["val_bpb"]
    for world_size in (2, 4):
        score, rows = evaluate_on_ranks(world_size, tmp_path, folder)
        assert score["val_bpb"] == pytest.approx(recorded, abs=1e-5 if CHANGES[mode] else 0)
        events = [Event(row["kind"], row["lo"], row["hi"]) for row in rows if row["kind"] == "score"]
        assert coverage(sorted(events, key=lambda event: event.lo), score["num_tokens"]).verdict == "PASS"


@pytest.mark.slow
def test_a_switch_by_the_clock_of_two_ranks_is_replayed_on_one(make_run, tmp_path, capsys):
    """Rank 0's clock decides for all; what it decided is in the result, and the number needs no clock."""
    folder = make_run("run", HINTED)
    cut, rows = evaluate_on_ranks(2, tmp_path, folder, "--set", "deadline_s=0.12")
    assert 0 <= cut["switch_at"] <= cut["num_units"] == 4
    assert {(row["rank"], row["kind"]) for row in rows} >= {
        (r, k) for r in (0, 1) for k in ("load", "precompute")
    }
    assert any(row["kind"] == "update" for row in rows) == (cut["switch_at"] > 0)
    again = evaluate(capsys, folder, "--switch-at", cut["switch_at"])
    assert again["val_bpb"] == pytest.approx(cut["val_bpb"], abs=1e-5)


def test_domains_are_files_of_text_scored_a_row_each(make_run, tiny_data, tmp_path, capsys):
    """System E's validation: the same artifact on several kinds of text, without shards of them."""
    (tmp_path / "web.txt").write_text("\n\n".join(make_documents(4, seed=5)))
    line = json.dumps({"question": "what is abc", "answer": "abc"})
    (tmp_path / "sums.jsonl").write_text(f"{line}\n" * 3)
    choices = [f"web={tmp_path}/web.txt", f"sums={tmp_path}/sums.jsonl"]
    assert main([str(make_run("domains")), "--domains", *choices, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["domain"] for row in rows] == ["web", "sums"] and rows[1]["documents"] == 3
    assert sum(row["surprise_ratio"] for row in rows) == pytest.approx(2.0)
    with pytest.raises(UserError, match="NAME=FILE"):
        main([str(make_run("domains2")), "--domains", "web"])
    other = tmp_path / "other.model"
    other.write_bytes((tiny_data / "tokenizer.model").read_bytes() + b"\x1a\x00")
    with pytest.raises(UserError, match="expected the tokenizer with sha256"):
        main([str(make_run("domains3")), "--tokenizer", str(other), "--domains", *choices])


@pytest.mark.parametrize(
    ("computed", "device", "dtype", "tolerance"),
    [
        ("device:cpu compute_dtype:float32 compile:False", "cpu", "float32", 1e-6),
        ("device:cpu compute_dtype:bfloat16 compile:True", "cpu", "bfloat16", 2e-5),
        ("device:cuda compute_dtype:bfloat16 compile:True", "cpu", "", 2e-5),
        ("device:cpu compute_dtype:int7", "cpu", "", 1e-6),
        ("", "cpu", "", 1e-6),
    ],
)
def test_a_score_is_reproduced_in_the_arithmetic_of_the_recorded_one(computed, device, dtype, tolerance):
    """auto is float32 on one CPU and bfloat16 on another: 5e-5 apart."""
    target = Target(Path("artifact.bin"), Config(), computed=computed)
    assert target.recorded_dtype(device) == dtype
    assert target.tolerance("chunked") == tolerance


def test_the_arithmetic_of_a_run_is_read_from_its_log(make_run, alone, capsys):
    """compute_dtype=auto is what it was when the run was scored, whatever it would be on this machine."""
    folder, found = make_run("auto", {"model.compute_dtype": "auto"}), {}
    target = find_target(folder)
    for dtype in ("float32", "bfloat16"):
        (folder / "train.log").write_text(f"seed:1\ndevice:cpu compute_dtype:{dtype} compile:False\n")
        main([str(folder), "--json"])
        found[dtype] = json.loads(capsys.readouterr().out)["val_bpb"]
        model, cfg, _ = load_artifact(target.artifact, target.live, alone.device, dtype)
        assert found[dtype] == score_model(model, cfg, load_validation(cfg.data), alone).val_bpb
    assert found["float32"] != found["bfloat16"]
