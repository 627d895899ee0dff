"""dev.track: each event reaches the tracker once, however often it is called; read back from disk."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from fixtures_live import finish_run, grow_run, leave_run, loss_at, train_event
from test_events import read_events

from common import UserError
from dev.desk.runs import read_run
from dev.track import STATE_NAME, Tracked, config_of, main, name_of, summary_of
from durable.seals import write_events
from formats.events import EVENTS_NAME

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {step: loss_at(step) for step in range(1, 6)}


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """An unfinished run of three steps."""
    return leave_run(tmp_path / "runs" / "a", 3)


@pytest.fixture
def no_network(monkeypatch) -> list:
    """Refuse and note connections to other machines."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **named: connect(None, words))
    return tried


def follow_up(folder: Path, *words: str) -> None:
    """Send a run, let it grow, send it again, finish it, send it twice."""
    main([str(folder), *words])
    grow_run(folder, 4)
    grow_run(folder, 5)
    main([str(folder), *words])
    finish_run(folder)
    main([str(folder), *words])
    main([str(folder), *words])


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a name in the TensorBoard events of a run folder."""
    events = read_events((folder / EVENTS_NAME).read_bytes())[1:]
    return [(event[2], pytest.approx(event[5][name], abs=1e-5)) for event in events if name in event[5]]


def test_tensorboard_gets_every_event_once(run_folder):
    follow_up(run_folder, "--to", "tensorboard")
    assert scalars(run_folder, "train/train_loss") == [*LOSSES.items()]
    assert scalars(run_folder, "val/val_bpb") == [(3, 2.0)]
    assert scalars(run_folder, "final/val_bpb") == [(5, 1.25)]
    assert scalars(run_folder, "final/bytes") == [(5, 930_000)]


def test_all_is_sent_again_without_the_note(run_folder):
    main([str(run_folder), "--to", "tensorboard"])
    (run_folder / STATE_NAME).unlink()
    main([str(run_folder), "--to", "tensorboard"])
    assert [step for step, _ in scalars(run_folder, "train/train_loss")] == [1, 2, 3]


def test_a_run_that_writes_tensorboard_events_is_left_alone(run_folder):
    recipe = run_folder / "recipe.toml"
    text = "".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("digest"))
    recipe.write_text(text + "\n[watch]\ntensorboard = true\n")
    with pytest.raises(UserError, match="writes TensorBoard events itself"):
        main([str(run_folder), "--to", "tensorboard"])


def test_steps_that_a_resumed_run_does_again_are_not_sent_again(run_folder):
    """The trainer cuts events after the checkpoint and writes the same ones again."""
    main([str(run_folder), "--to", "tensorboard"])
    write_events(run_folder / "metrics.jsonl", [train_event(step) for step in (1, 2)])
    main([str(run_folder), "--to", "tensorboard"])
    for step in (3, 4):
        grow_run(run_folder, step)
    main([str(run_folder), "--to", "tensorboard"])
    assert [step for step, _ in scalars(run_folder, "train/train_loss")] == [1, 2, 3, 4]


def test_another_run_in_the_folder_is_sent_from_its_start(run_folder):
    """run.overwrite=1 takes a folder again; the note in it is of another training."""
    main([str(run_folder), "--to", "tensorboard"])
    note = (run_folder / STATE_NAME).read_text()
    shutil.rmtree(run_folder)
    leave_run(run_folder, 2, batch_tokens=999)
    (run_folder / STATE_NAME).write_text(note)
    main([str(run_folder), "--to", "tensorboard"])
    assert [step for step, _ in scalars(run_folder, "train/train_loss")] == [1, 2]


def test_a_kill_loses_no_event(run_folder):
    """What was sent is noted once the tracker has had time to store it: better twice than never."""
    tracked = Tracked(run_folder, "x/y")
    rows = tracked.news(read_run(run_folder), False)
    assert [row.kind for row in rows] == ["train", "train", "train", "val"]
    assert Tracked(run_folder, "x/y").news(read_run(run_folder), False) == rows
    tracked.save(rows[:2])
    assert Tracked(run_folder, "x/y").news(read_run(run_folder), False) == rows[2:]
    assert Tracked(run_folder, "another").news(read_run(run_folder), False) == rows, (
        "another tracker has none"
    )


def test_a_run_keeps_its_name_and_no_two_share_one(run_folder, tmp_path):
    name = name_of(read_run(run_folder))
    grow_run(run_folder, 4)
    shutil.copytree(run_folder, tmp_path / "copy" / "a")
    assert name_of(read_run(run_folder)) == name == name_of(read_run(tmp_path / "copy" / "a"))
    assert name_of(read_run(leave_run(tmp_path / "b" / "a", 3, batch_tokens=999))) != name
    strange = leave_run(tmp_path / ("x/y [\u00e9] " + "long" * 30), 3)
    assert len(name_of(read_run(strange)).encode()) < 64 and not set(name_of(read_run(strange))) & set("/ []")


def test_config_and_summary_are_those_of_the_run(run_folder):
    config = config_of(read_run(finish_run(run_folder)))
    assert config["run.iterations"] == 100 and config["run.seed"] == 7 and config["machine.cores"] == 2
    summary = summary_of(read_run(run_folder))
    assert summary["final/val_bpb"] == 1.25 and summary["final/over_limits"] == 0
    assert all(isinstance(value, (int, float)) for value in summary.values())


def test_json_is_one_object(run_folder, capsys):
    main([str(run_folder), "--to", "tensorboard", "--json"])
    (facts,) = json.loads(capsys.readouterr().out)["runs"]
    assert facts["sent"] == 4 and facts["state"] == "unfinished"


def test_two_senders_of_one_run_are_told_apart(run_folder):
    with FileLock(run_folder / f"{STATE_NAME}.lock"), pytest.raises(UserError, match="another sender"):
        main([str(run_folder), "--to", "tensorboard"])


@pytest.mark.parametrize("text", ["[1]", "{", '{"tensorboard/parameter-golf": 3}'])
def test_a_damaged_note_is_refused_in_a_sentence(run_folder, text):
    (run_folder / STATE_NAME).write_text(text)
    with pytest.raises(UserError, match=STATE_NAME):
        main([str(run_folder), "--to", "tensorboard"])


def test_bad_choices_are_refused_before_anything_is_sent(run_folder):
    record = ROOT / "records/track_cpu/2026-11-21_NaiveBaseline"
    with pytest.raises(UserError, match="found a record"):
        main([str(record), "--to", "tensorboard"])
    with pytest.raises(UserError, match="expected one run, found 2"):
        main([str(run_folder), str(leave_run(run_folder.parent / "b", 1)), "--to", "tensorboard", "--follow"])
    with pytest.raises(SystemExit):
        main([str(run_folder), "--to", "tensorboard", "--artifact"])
    assert not (run_folder / EVENTS_NAME).exists()


def test_a_missing_package_names_its_extra(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"expected the package trackio, found none.*make desk"):
        main([str(run_folder), "--to", "trackio"])
    assert not (run_folder / STATE_NAME).exists()


def test_following_ends_with_the_run(run_folder):
    """From before its first event until its result."""
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / ".lock.json").write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
    command = [sys.executable, "-m", "dev.track", str(run_folder), "--to", "tensorboard", "--follow"]
    sender = subprocess.Popen([*command, "--every", "0.1"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for step in LOSSES:
        time.sleep(0.2)
        grow_run(run_folder, step)
    finish_run(run_folder)
    said, _ = sender.communicate(timeout=30)
    assert sender.returncode == 0 and "6 events" in said
    assert scalars(run_folder, "train/train_loss") == [*LOSSES.items()]
    assert scalars(run_folder, "final/val_bpb") == [(5, 1.25)]


@pytest.mark.desk
def test_trackio_gets_every_event_once_without_network(run_folder, tmp_path, monkeypatch, no_network):
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in (trackio, trackio.utils, storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "db")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/elsewhere")
    follow_up(run_folder, "--to", "trackio", "--offline", "--project", "desk")
    rows = storage.SQLiteStorage.get_logs("desk", name_of(read_run(run_folder)))
    assert [(row["step"], row["train/train_loss"]) for row in rows if "train/train_loss" in row] == [
        *LOSSES.items()
    ]
    assert [(row["step"], row["final/val_bpb"]) for row in rows if "final/val_bpb" in row] == [(5, 1.25)]
    config = storage.SQLiteStorage.get_run_config("desk", name_of(read_run(run_folder)))
    assert config["run.iterations"] == 100
    assert not no_network


def read_wandb(path: Path) -> list[bytes]:
    """Read the records of a .wandb file: 7 bytes, then blocks of 32 KiB in the framing of LevelDB's logs.

    A record is in one chunk (1), or in a first (2), middle ones (3) and a last (4).
    """
    data, at, records, parts = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            records.append(parts)
            parts = b""
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
    return records


@pytest.mark.slow
@pytest.mark.desk
def test_wandb_gets_every_event_once_in_offline_files(run_folder):
    """Each call leaves a file of one run, which `wandb sync` joins by the run's id."""
    pytest.importorskip("wandb")
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (run_folder / "artifact.bin").write_bytes(b"weights")
    follow_up(run_folder, "--to", "wandb", "--offline", "--artifact")
    rows, ids, configs, files = [], set(), [], []
    for path in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        for data in read_wandb(path):
            record = proto.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
            elif kind == "run":
                ids.add(record.run.run_id)
                configs += [{item.key: item.value_json for item in record.run.config.update}]
            elif kind == "artifact":
                files += [entry.path for entry in record.artifact.manifest.contents]
    assert [(row["step"], row["train/train_loss"]) for row in rows if "train/train_loss" in row] == [
        *LOSSES.items()
    ]
    assert [(row["step"], row["final/val_bpb"]) for row in rows if "final/val_bpb" in row] == [(5, 1.25)]
    assert ids == {name_of(read_run(run_folder))}
    assert any(json.loads(config.get("run.iterations", "0")) == 100 for config in configs)
    assert files == ["artifact.bin"], "once, and not before there is a result"


@pytest.mark.desk
def test_wandb_without_a_key_is_an_error_in_a_sentence(run_folder, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(UserError, match="wandb login"):
        main([str(run_folder), "--to", "wandb"])
    assert not (run_folder / STATE_NAME).exists()
