"""Checkpoints: sealed, of one run, finite; which stay; what a run goes on from and where."""

import json
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from common import UserError, append_text, read_json
from data.shards import read_shard, write_shard
from durable.seals import append_event, last_seal, read_events, write_events, write_sealed
from durable.stops import Stopped, Stops
from formats import checkpoints
from formats.checkpoints import (
    NUMBERED,
    RESULT_NAME,
    cut_metrics,
    drop_checkpoints,
    newest_checkpoint,
    numbered_steps,
    read_newest,
    steps_to_keep,
)
from formats.recipe import with_values
from formats.state import read_facts, read_state, write_state
from train_gpt import Environment, Start, Training

ALONE = Environment({})


@pytest.fixture
def sealed(tmp_path) -> Path:
    """A small state with arrays, numbers and text."""
    path = tmp_path / NUMBERED.format(7)
    state = {"weights": {"a": np.arange(12.0).reshape(3, 4), "b": np.arange(5)}, "step": 7, 3: ["x", 0.5]}
    write_state(path, state, {"seed": "1337", "run_id": "tiny"})
    return path


def run_to_end(cfg, start: Start | None = None) -> Path:
    """Run and return the folder."""
    train_gpt.run(cfg, ALONE, start)
    return Path(cfg.run.out_dir) / cfg.run.run_id


def saving(tiny_config, values: dict | None = None):
    """A config that saves every second of six steps, of no clock."""
    usual = {"run.save_every": 2, "run.val_loss_every": 2, "run.max_wallclock_seconds": 0.0}
    return with_values(tiny_config, usual | (values or {}), "test")


# The file


def test_a_sealed_state_comes_back(sealed):
    """With its facts, and integers as keys."""
    state, facts = read_state(sealed)
    assert (
        state["step"] == 7 and state[3] == ["x", 0.5] and np.array_equal(state["weights"]["b"], np.arange(5))
    )
    assert facts == {"seed": "1337", "run_id": "tiny"} == read_facts(sealed)


def test_every_flipped_bit_is_refused(sealed):
    """In the length, the header, the seal itself and the arrays: one sentence, no state."""
    whole = sealed.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        sealed.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or foreign"):
            read_state(sealed)


@pytest.mark.parametrize("seed", range(40))
def test_a_mangled_header_is_refused_in_a_sentence(sealed, seed):
    """Cut off, overwritten, doubled, with other lengths: never another exception."""
    rng, whole = random.Random(seed), sealed.read_bytes()
    at = rng.randrange(300)
    sealed.write_bytes(
        rng.choice(
            [
                whole[:at],
                whole[:at] + rng.randbytes(9) + whole[at + 9 :],
                rng.randbytes(8) + whole[8:],
                whole[:8] + b"[" * 100_000,
                whole[:8] + b'{"__metadata__":[]}' + whole[8:],
                whole[:8] + b'{"__metadata__":{"sha256":7}}' + whole[8:],
                whole + b"\0",
                b"",
            ]
        )
    )
    with pytest.raises(UserError, match=r"^[^\n]*damaged or foreign[^\n]*$"):
        read_state(sealed)
    read_facts(sealed)  # says nothing false, but never raises


# Which stay


@pytest.mark.parametrize(
    "losses, kept",
    [
        ({}, {7, 6, 5}),
        ({2: 1.0, 7: 2.0}, {2, 7, 6}),
        ({7: 1.0}, {7, 6, 5}),
        ({1: 3.0, 2: 3.0}, {1, 7, 6}),
        ({99: 0.1}, {7, 6, 5}),
    ],
)
def test_the_best_and_the_newest_stay(losses, kept):
    """A lost best one, ties and unknown losses too."""
    assert steps_to_keep(list(range(1, 8)), losses, 3) == kept
    assert steps_to_keep([3, 5], losses, 3) == {3, 5}


@pytest.mark.reference("E14")
@pytest.mark.parametrize("best", range(1, 8))
def test_seven_checkpoints_become_the_best_and_two_others(tmp_path, best):
    """Saved, then validated, seven times with at most three kept, whichever is the best by the log."""
    for step in range(1, 8):
        (tmp_path / NUMBERED.format(step)).write_bytes(b"state")
        drop_checkpoints(tmp_path, 3)
        loss = abs(step - best) + 1.0
        append_event(tmp_path / "metrics.jsonl", {"kind": "val", "step": step, "val_loss": loss})
    drop_checkpoints(tmp_path, 3)
    others = [step for step in (7, 6, 5) if step != best][:2]
    assert numbered_steps(tmp_path) == sorted([best, *others])


def test_the_log_is_cut_to_the_step_that_goes_on(tmp_path):
    """Half a line, later steps and the validation that is due again go: none is there twice later."""
    lines = [
        {"kind": kind, "step": step}
        for step in (0, 1, 2, 3)
        for kind in (("val", "train") if step else ("val",))
    ]
    path = tmp_path / "metrics.jsonl"
    write_events(path, lines)
    append_text(path, '{"kind": "tr')
    assert cut_metrics(tmp_path, 2) == ""
    kept = [(event["kind"], event["step"]) for event in read_events(path)]
    assert kept == [("val", 0), ("val", 1), ("train", 1), ("train", 2)]


def test_events_are_all_that_the_result_counts(tmp_path):
    """A log cut off at the end of a line looks whole; a record has no log, older results do not count."""
    write_events(tmp_path / "metrics.jsonl", [{"kind": "train", "step": step} for step in (1, 2, 3)])
    for stated in ({}, {"metrics_crc32": last_seal(tmp_path / "metrics.jsonl")}):
        write_sealed(tmp_path / RESULT_NAME, stated)
        assert len(checkpoints.read_metrics(tmp_path)) == 3
    write_events(tmp_path / "metrics.jsonl", [{"kind": "train", "step": step} for step in (1, 2)])
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected the events that result\.json beside"):
        checkpoints.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert checkpoints.read_metrics(tmp_path) == []


# Whose they are


@pytest.mark.parametrize(
    "values, said",
    [
        ({"run.seed": 7}, "Another seed"),
        ({"optim.beta1": 0.5}, "Another recipe"),
        ({"run.iterations": 900, "run.max_wallclock_seconds": 77.0, "run.save_every": 9}, ""),
    ],
)
def test_a_checkpoint_goes_on_in_its_own_run_only(tiny_config, alone, tmp_path, values, said):
    """Seed 7 from seed 1337's file would falsify a record of three seeds; a longer run is the same run."""
    path = tmp_path / NUMBERED.format(0)
    train_gpt.save_checkpoint(Training(tiny_config, alone, bos_id=1), path)
    other = Training(with_values(tiny_config, values, "test"), alone, bos_id=1)
    if not said:
        train_gpt.restore(other, read_newest(path))
        assert other.resumed_at == [0]
        return
    with pytest.raises(UserError, match=said):
        train_gpt.restore(other, read_newest(path))


def test_a_checkpoint_of_other_data_is_refused(tiny_config, alone, tmp_path):
    """A shard of another length under the same name is other data."""
    path = tmp_path / NUMBERED.format(0)
    training = Training(tiny_config, alone, bos_id=1)
    train_gpt.save_checkpoint(training, path)
    training.identity = training.identity | {"data": "other"}
    with pytest.raises(UserError, match="Another training data"):
        train_gpt.restore(training, read_newest(path))


def test_weights_that_are_not_finite_are_not_saved(tiny_config, alone, tmp_path):
    """Nor averages; the file before stays as it is."""
    cfg = with_values(tiny_config, {"average.ema_decay": 0.9}, "test")
    training, path = Training(cfg, alone, bos_id=1), tmp_path / NUMBERED.format(0)
    train_gpt.save_checkpoint(training, path)
    before = path.read_bytes()
    for tensor in (next(training.model.parameters()).data, training.average.averages[0]):
        kept = tensor.flatten()[0].item()
        tensor.view(-1)[0] = float("nan")
        with pytest.raises(UserError, match="diverged"):
            train_gpt.save_checkpoint(training, path)
        tensor.view(-1)[0] = kept
    assert path.read_bytes() == before


def test_a_run_that_diverges_leaves_no_nan_on_disk(tiny_config, stand_in_program):
    """What it leaves, if anything, is finite."""
    cfg = saving(tiny_config, {"run.save_every": 1, "optim.matrix_lr": 1e30})
    with pytest.raises(UserError):
        run_to_end(cfg)
    folder = Path(cfg.run.out_dir) / "tiny"
    for step in numbered_steps(folder):
        weights = read_state(folder / NUMBERED.format(step))[0]["model"].values()
        assert all(np.isfinite(array).all() for array in weights)


# Going on


def test_a_run_keeps_the_newest_two_and_the_best(tiny_config, stand_in_program):
    """And says whose each is."""
    more = run_to_end(saving(tiny_config, {"run.save_every": 1, "watch.keep_checkpoints": 4}))
    assert len(numbered_steps(more)) == 4
    folder = run_to_end(saving(tiny_config, {"run.save_every": 1}))
    assert len(numbered_steps(folder)) == 3 and {5, 6} <= set(numbered_steps(folder))
    facts = read_facts(newest_checkpoint(folder))
    assert facts["run_id"] == "tiny" and facts["step"] == "6" and facts["seed"] == "1337"
    assert json.loads(facts["places"])["data.data_path"] == tiny_config.data.data_path
    assert (
        facts["code"] == train_gpt.code_digest(Path(train_gpt.__file__).parent)
        and float(facts["train_ms"]) > 0
    )


def test_without_save_every_nothing_stays_of_a_run_that_ended(tiny_config, stand_in_program, monkeypatch):
    """But what a scoring that fails would lose is there until it is done."""
    cfg = saving(tiny_config, {"run.save_every": 0})
    assert numbered_steps(run_to_end(cfg)) == []
    monkeypatch.setattr(train_gpt, "score_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_to_end(cfg)
    assert numbered_steps(Path(cfg.run.out_dir) / "tiny") == [6]
    monkeypatch.undo()


@pytest.mark.parametrize("loader", ["sequential", "packed", "shuffled", "coprime"])
def test_state_then_batch_and_rate_then_losses_are_those_of_the_run_that_went_on(
    tiny_config, alone, tmp_path, loader
):
    """Three layers, each with a message of its own: what breaks first says where to look."""
    values = {
        "data.loader": loader,
        "average.ema_decay": 0.9,
        "model.dropout": 0.1,
        "optim.normuon_beta2": 0.9,
    }
    cfg, path = with_values(tiny_config, values, "test"), tmp_path / NUMBERED.format(4)

    def advance(training: Training, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            phase = train_gpt.phase_at(cfg, training.step, training.step / cfg.run.iterations)
            losses.append(training.accumulate(phase, lambda: False).item())
            training.update(0.0)
        return losses

    ours, resumed = Training(cfg, alone, bos_id=1), Training(cfg, alone, bos_id=1)
    advance(ours, 4)
    train_gpt.save_checkpoint(ours, path)
    train_gpt.restore(resumed, read_newest(path))
    again = tmp_path / NUMBERED.format(5)
    resumed.resumed_at = []
    train_gpt.save_checkpoint(resumed, again)
    assert leaves(path) == leaves(again), "the state of a resumed run is not what was saved"
    rates = [train_gpt.step_rates(cfg, training.step, 0.0) for training in (ours, resumed)]
    assert rates[0] == rates[1], "the learning rate of the next step is another"
    stage = train_gpt.get_stages(cfg)[0]
    places = [training.loader.state_dict() for training in (ours, resumed)]
    batches = [train_gpt.next_batch(training.loader, stage, alone) for training in (ours, resumed)]
    assert torch.equal(batches[0].tokens, batches[1].tokens), "the next batch is another"
    for training, place in zip((ours, resumed), places):
        training.loader.load_state_dict(place)
    assert advance(ours, 3) == advance(resumed, 3), "state, rate and batch are the same, the losses are not"


def leaves(path: Path) -> list[bytes]:
    """Every value of a checkpoint's state, spelled."""

    def spell(tree) -> list[bytes]:
        if isinstance(tree, dict):
            return [part for key, value in tree.items() for part in (str(key).encode(), *spell(value))]
        if isinstance(tree, list):
            return [part for value in tree for part in spell(value)]
        return [tree.tobytes() if isinstance(tree, np.ndarray) else str(tree).encode()]

    return spell(read_state(path)[0])


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tiny_config, stand_in_program):
    """The run ends as if nothing had been, in its folder and log, which say what was passed over."""
    cfg = saving(tiny_config)
    folder = run_to_end(cfg)
    artifact, metrics = (folder / "artifact.bin").read_bytes(), train_losses(folder)
    (folder / RESULT_NAME).unlink()
    newest = newest_checkpoint(folder)
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    found = read_newest(folder)
    assert found.state["step"] == 4 and "0000006.safetensors" in found.passed_over[0]
    run_to_end(cfg, Start(folder, found))
    assert (folder / "artifact.bin").read_bytes() == artifact and train_losses(folder) == metrics
    log = (folder / "train.log").read_text()
    assert "resume_passed_over" in log and "resumed:step 4 from" in log and log.count("warming up") == 2
    assert read_json(folder / RESULT_NAME)["resumed_at"] == [4]


def train_losses(folder: Path) -> list[tuple]:
    """Steps and losses of metrics.jsonl, in order."""
    events = read_events(folder / "metrics.jsonl")
    return [
        (event["kind"], event["step"], event.get("train_loss", event.get("val_loss"))) for event in events
    ]


def test_no_whole_checkpoint_left_is_an_error(tiny_config, alone, tmp_path):
    """Not a silent start from step 0."""
    path = tmp_path / NUMBERED.format(3)
    path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="No whole checkpoint is left"):
        read_newest(tmp_path)


def planned(words: list[str], overrides: dict | None = None) -> tuple:
    """What the command line plans."""
    args = type("Args", (), {"resume": None, "recipe": None, "overrides": words})()
    if words and words[0] == "--resume":
        args.resume, args.overrides = words[1], words[2:]
    return train_gpt.plan_run(args, Environment(overrides or {}))


def test_resume_takes_recipe_and_places_from_the_folder(tiny_config, stand_in_program, tmp_path):
    """By its path, by its id, by a file in it; the command line wins."""
    cfg = saving(tiny_config, {"optim.beta1": 0.8})
    folder = run_to_end(cfg)
    names = (str(folder), "tiny", str(newest_checkpoint(folder)))
    for name in names:
        out = [f"run.out_dir={cfg.run.out_dir}"] if name == "tiny" else []
        resumed, start = planned(["--resume", name, "run.iterations=9", *out])
        assert resumed.optim.beta1 == 0.8 and resumed.run.iterations == 9
        assert resumed.data == cfg.data and resumed.model == cfg.model
        assert start.folder.resolve() == folder.resolve() and start.found.state["step"] == 6
    elsewhere, start = planned(["--resume", str(folder), "run.run_id=other"])
    assert start.folder is None and elsewhere.run.run_id == "other"
    with pytest.raises(UserError, match="expected a run folder, the id of a run"):
        planned(["--resume", "nobody"])


def test_an_older_checkpoint_begins_a_run_of_its_own(tiny_config, stand_in_program):
    """In the folder it would stand beside the later ones, which would win the next time."""
    folder = run_to_end(saving(tiny_config))
    cfg, start = planned(["--resume", str(folder / NUMBERED.format(4))])
    assert start.folder is None and start.found.state["step"] == 4
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_to_end(with_values(cfg, {"run.overwrite": False}, "test"), start)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (folder.with_name("tiny_2") / RESULT_NAME).is_file()


def test_damaged_checkpoints_do_not_count_among_the_newest(tiny_config, stand_in_program):
    """They are set aside: else new whole ones, of lower numbers, would be the ones to drop."""
    cfg = saving(tiny_config, {"run.save_every": 1})
    folder = run_to_end(cfg)
    for step in (5, 6):
        (folder / NUMBERED.format(step)).write_bytes(b"rubbish")
    (folder / NUMBERED.format(7).replace("0000007", "7")).write_bytes(b"not ours")
    found = read_newest(folder)
    assert found.state["step"] < 5
    run_to_end(cfg, Start(folder, found))
    assert read_state(folder / NUMBERED.format(6))[0]["step"] == 6
    assert len(list(folder.glob("*.damaged"))) == 2


def test_the_folder_that_is_named_goes_on_whatever_the_environment_says(
    tiny_config, stand_in_program, monkeypatch, tmp_path
):
    """By ".", by a link, beside another RUN_ID, from another working folder with relative data."""
    monkeypatch.chdir(Path(tiny_config.data.data_path).parent)
    name = Path(tiny_config.data.data_path).name
    relative = {"data.data_path": name, "data.tokenizer_path": f"{name}/tokenizer.model"}
    folder = run_to_end(saving(tiny_config, relative))
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    for named in (".", str(tmp_path / "link"), newest_checkpoint(Path(".")).name):
        cfg, start = planned(["--resume", named], overrides={"run.run_id": "zzz"})
        assert start.folder.resolve() == folder.resolve() and cfg.run.run_id == "tiny"
        assert Path(cfg.data.data_path).is_dir() and Path(cfg.data.tokenizer_path).is_file()
    with pytest.raises(UserError, match="expected a run folder"):
        planned(["--resume", ""])


def test_a_finished_run_of_another_seed_is_not_this_one(tiny_config, stand_in_program):
    """A sweep that uses one name would lose seeds; nor is a run over its limits a success."""
    cfg = saving(tiny_config, {"run.resume": "auto"})
    folder = run_to_end(cfg)
    with pytest.raises(UserError, match=r"seed 99, found a finished one .* and seed 1337"):
        train_gpt.find_start(with_values(cfg, {"run.seed": 99}, "test"))
    result = read_json(folder / RESULT_NAME)
    write_sealed(folder / RESULT_NAME, result | {"over_limits": ["bytes"]})
    with pytest.raises(UserError, match="NOT A VALID RUN"):
        train_gpt.find_start(cfg)
    (folder / RESULT_NAME).write_text("")
    with pytest.raises(UserError, match="not valid JSON"):
        train_gpt.find_start(cfg)


def test_a_resumed_run_tells_the_speed_of_all_its_steps(tiny_config, stand_in_program):
    """Also one that had nothing left to train."""
    cfg = saving(tiny_config)
    folder = run_to_end(cfg)
    run_to_end(cfg, Start(folder, read_newest(folder)))
    assert read_json(folder / RESULT_NAME)["tokens_per_second"] > 0


def test_a_longer_run_keeps_the_old_result_until_it_has_its_own(tiny_config, stand_in_program):
    """result.json of the shorter one stays, under the name of its steps."""
    folder = run_to_end(saving(tiny_config))
    old = (folder / RESULT_NAME).read_bytes()
    run_to_end(saving(tiny_config, {"run.iterations": 8}), Start(folder, read_newest(folder)))
    assert (folder / "result_step0000006.json").read_bytes() == old
    assert (folder / "artifact_step0000006.bin").is_file()
    assert read_json(folder / RESULT_NAME)["steps"] == 8


def test_auto_goes_on_with_the_unfinished_run_of_the_same_recipe_seed_and_data(
    tiny_config, stand_in_program, monkeypatch
):
    """Of its id or, without one, the newest; a finished one is left alone; damage hides no run."""
    cfg = saving(tiny_config, {"run.overwrite": False})
    words = [
        f"{section}.{key}={value}"
        for section, keys in {
            "run": {"out_dir": cfg.run.out_dir},
            "data": {"data_path": cfg.data.data_path},
        }.items()
        for key, value in keys.items()
    ]
    monkeypatch.setattr(train_gpt, "load_config", lambda *_: changed)
    changed = with_values(cfg, {"run.resume": "auto"}, "test")
    assert planned(words)[1] == Start()  # nothing there yet
    folder = run_to_end(cfg)
    with pytest.raises(SystemExit) as ended:
        planned(words)
    assert ended.value.code == 0
    (folder / RESULT_NAME).unlink()
    assert planned(words)[1].folder == folder
    changed = with_values(cfg, {"run.run_id": ""}, "test")
    assert planned(words)[1] == Start()
    changed = with_values(cfg, {"run.run_id": "", "run.resume": "auto"}, "test")
    assert planned(words)[1].found.path == newest_checkpoint(folder)
    newest = newest_checkpoint(folder)
    newest.write_bytes(b"")
    assert planned(words)[1].found.path == folder / NUMBERED.format(4)
    changed = with_values(changed, {"run.resume": "auto", "run.seed": 7}, "test")
    assert planned(words)[1] == Start()


def test_an_old_run_of_the_name_is_not_touched(tiny_config, stand_in_program):
    """The new one takes the next name; with run.overwrite=1 it takes the place."""
    cfg = saving(tiny_config, {"run.overwrite": False})
    folder = run_to_end(cfg)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_to_end(with_values(cfg, {"run.seed": 7}, "test"))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert read_json(folder.with_name("tiny_2") / RESULT_NAME)["seed"] == 7
    run_to_end(with_values(cfg, {"run.overwrite": True, "run.seed": 42, "run.save_every": -1}, "test"))
    assert read_json(folder / RESULT_NAME)["seed"] == 42 and numbered_steps(folder) == []


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b", "end.", "x" * 300])
def test_a_run_id_is_a_name(tiny_config, name):
    """A path would write anywhere."""
    with pytest.raises(UserError, match="must be a name"):
        train_gpt.check_config(with_values(tiny_config, {"run.run_id": name}, "test"))


@pytest.mark.parametrize("text", ["a\nval_bpb:0.1", "a\x1b[2K", "a\x00", "a\u2028b", "a\x7f"])
def test_control_characters_are_refused_in_every_text(tiny_config, text):
    """They would forge lines of a log."""
    for name in ("run.run_id", "data.data_path", "model.softcap"):
        with pytest.raises(UserError):
            with_values(tiny_config, {name: text}, "test")


# Stops


def stopping(cfg, when: int, monkeypatch, during: str = "update") -> Stops:
    """Run until a signal comes in step `when`; returns what it leaves."""
    stops = Stops()
    whole = getattr(Training, during)

    def interrupted(training, *args):
        if training.step == when:
            stops.note(15, None)
        return whole(training, *args)

    monkeypatch.setattr(Training, during, interrupted)
    with pytest.raises(Stopped) as stopped:
        train_gpt.run_or_explain(cfg, ALONE._replace(stops=stops))
    monkeypatch.undo()
    assert stopped.value.code == 128 + 15
    return stops


@pytest.mark.parametrize("during, left", [("update", 4), ("micro_step", 3)])
def test_a_stop_saves_the_last_whole_step_and_goes_on_bitwise(
    tiny_config, stand_in_program, monkeypatch, capsys, during, left
):
    """In a micro-batch the step is given up: its batches come again."""
    cfg = saving(tiny_config, {"run.save_every": 0, "run.val_loss_every": 4, "data.loader": "shuffled"})
    folder = run_to_end(cfg)
    whole, losses = (folder / "artifact.bin").read_bytes(), train_losses(folder)
    monkeypatch.setattr(train_gpt, "weigh_code", lambda folder: (9, ""))
    stops = stopping(cfg, 3, monkeypatch, during)
    assert numbered_steps(folder) == [left]
    assert f"stopped: SIGTERM. {folder / NUMBERED.format(left)} is kept" in capsys.readouterr().err
    assert stops.said() in (folder / "train.log").read_text()
    monkeypatch.setattr(train_gpt, "weigh_code", leave)
    run_to_end(cfg, Start(folder, read_newest(folder)))
    assert (folder / "artifact.bin").read_bytes() == whole and train_losses(folder) == losses


def leave(folder):
    """Stand in for the packed program."""
    (folder / "train_gpt.py").write_text("")
    return 9, ""


def test_a_stop_while_validating_leaves_the_validation(tiny_config, stand_in_program, monkeypatch):
    """It saves the step that was to be validated; the score of zeros is in no log."""
    cfg = saving(tiny_config, {"run.save_every": 0})
    stops, whole = Stops(), train_gpt.score_windows

    def interrupted(*args):
        stops.note(2, None)
        return whole(*args)

    monkeypatch.setattr(train_gpt, "score_windows", interrupted)
    with pytest.raises(Stopped):
        train_gpt.run_or_explain(cfg, ALONE._replace(stops=stops))
    folder = Path(cfg.run.out_dir) / "tiny"
    assert numbered_steps(folder) == [] and not (folder / "metrics.jsonl").exists()
    assert "No checkpoint is kept" in stops.said()


def test_a_step_that_is_given_up_changes_nothing(tiny_config, alone):
    """Loader, gradients and 8-bit scales are as before it."""
    training = Training(with_values(tiny_config, {"model.fp8": "emulated"}, "test"), alone, bos_id=1)
    phase = train_gpt.phase_at(training.cfg, 0, 0.0)
    assert phase.stage.micro_batches > 1
    before = training.loader.state_dict()
    assert training.accumulate(phase, lambda: True) is None
    assert training.loader.state_dict() == before and not training.fp8.seen.any()
    assert all(param.grad is None or not param.grad.any() for param in training.model.parameters())


def test_a_stop_while_shards_are_verified_saves(tiny_config, stand_in_program, monkeypatch):
    """Hashing may take longer than a signal waits: the step is saved, whenever the shards are verified."""
    stops, let_go = Stops(), threading.Event()
    monkeypatch.setattr("data.intact.sha256_slowly", lambda path, hurry: let_go.wait(60) and "")
    cfg = saving(tiny_config, {"run.save_every": 0, "run.val_loss_every": -1})
    whole = train_gpt.await_verified

    def interrupted(*args):
        stops.note(15, None)
        whole(*args)

    monkeypatch.setattr(train_gpt, "await_verified", interrupted)
    with pytest.raises(Stopped):
        train_gpt.run_or_explain(cfg, ALONE._replace(stops=stops))
    let_go.set()
    assert numbered_steps(Path(cfg.run.out_dir) / "tiny") == [6]


def test_damaged_data_end_the_run_and_are_not_saved(tiny_config, stand_in_program, tmp_path):
    """The background check finds a shard that is not the manifest's: no checkpoint of it stays."""
    data = Path(shutil.copytree(tiny_config.data.data_path, tmp_path / "data"))
    cfg = saving(tiny_config, {"data.data_path": str(data)})
    folder = run_to_end(cfg)
    assert "val_shards_verified:1 of 1 by manifest.json" in (folder / "train.log").read_text()
    assert "train_shards_verified:1 of 1 by manifest.json" in (folder / "train.log").read_text()
    shard = next(data.glob("fineweb_train_*.bin"))
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=f"{shard.name}.*sha256"):
        run_to_end(cfg)
    assert numbered_steps(folder) == []


def test_a_validation_text_that_is_replaced_in_the_run_is_noticed(
    tiny_config, stand_in_program, tmp_path, monkeypatch
):
    """The run began with one text; a score on another would stand beside its log."""
    data = Path(shutil.copytree(tiny_config.data.data_path, tmp_path / "data"))
    whole = train_gpt.store_model

    def replaced(*args):
        shard, manifest = next(data.glob("fineweb_val_*.bin")), data / "manifest.json"
        write_shard(shard, np.array(read_shard(shard))[:-40])
        manifest.unlink()
        return whole(*args)

    monkeypatch.setattr(train_gpt, "store_model", replaced)
    with pytest.raises(UserError, match="replaced in the meantime"):
        run_to_end(saving(tiny_config, {"data.data_path": str(data)}))


def test_the_sources_that_are_hashed_are_the_trainers(monkeypatch):
    """A module that training can import and the hash leaves out would change a run unseen."""
    from test_layout import TRAINER, below

    rooms = {name for name in below(TRAINER) if name not in (TRAINER, "common")}
    assert {room.partition("/")[0] for room in train_gpt.ROOMS} == rooms
    assert torch is not None and checkpoints.IDENTITY.keys() == {"config_hash", "seed", "data", "tokenizer"}
