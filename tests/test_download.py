"""The downloader against a hub on this machine that damages, loses and interrupts files."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_data import FakeHub, serve_fake_hub
from fixtures_model import ROOT

from common import UserError
from data.download import Hub, download, find_source, hub_from_environment, local_path, plan_items
from data.shards import write_shard
from durable.lock import lock_folder

DATASET = "datasets/fineweb10B_sp1024"
VAL = f"{DATASET}/fineweb_val_000000.bin"
TRAIN = f"{DATASET}/fineweb_train_000000.bin"
MODEL = "tokenizers/fineweb_1024_bpe.model"
MANIFEST = {
    "datasets": [
        {
            "name": "fineweb10B_sp1024",
            "tokenizer_name": "sp_bpe_1024",
            "stats": {"files_train": 3, "files_val": 1},
        },
    ],
    "tokenizers": [
        {
            "name": "sp_bpe_1024",
            "model_path": MODEL,
            "vocab_path": "tokenizers/fineweb_1024_bpe.vocab",
        },
    ],
}


@pytest.fixture
def hub(tmp_path):
    """A hub with the contest's layout: three training shards, one of validation, a tokenizer."""
    with serve_fake_hub() as fake_hub:
        names = [VAL] + [f"{DATASET}/fineweb_train_{i:06d}.bin" for i in range(3)]
        for seed, name in enumerate(names):
            shard = tmp_path / "shard.bin"
            write_shard(shard, np.random.default_rng(seed).integers(0, 1024, 5000))
            fake_hub.files[f"root/{name}"] = shard.read_bytes()
        fake_hub.files[f"root/{MODEL}"] = b"model" * 100
        fake_hub.files["root/tokenizers/fineweb_1024_bpe.vocab"] = b"<unk>\t0\n"
        fake_hub.files["root/manifest.json"] = json.dumps(MANIFEST).encode()
        yield fake_hub


def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "MATCHED_FINEWEB_REPO_ID": "someone/contest",
        "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "root",
    }


def command(tmp_path: Path, num_train_shards: int, *more: str) -> list[str]:
    out = str(tmp_path / "out")
    return [
        sys.executable,
        "-m",
        "data.download",
        "--train-shards",
        str(num_train_shards),
        "--out",
        out,
        *more,
    ]


def run_download(
    hub: FakeHub, tmp_path: Path, num_train_shards: int = 1, *more: str
) -> subprocess.CompletedProcess:
    """Run the command in a process of its own: the hub's client reads its settings when imported."""
    return subprocess.run(
        command(tmp_path, num_train_shards, *more),
        env=environment(hub, tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def assert_files_are_the_hubs(hub: FakeHub, out: Path, num_train_shards: int = 1) -> None:
    names = [VAL, MODEL, "tokenizers/fineweb_1024_bpe.vocab", "manifest.json"]
    names += [f"{DATASET}/fineweb_train_{i:06d}.bin" for i in range(num_train_shards)]
    for name in names:
        found, expected = (out / name).read_bytes(), hub.files[f"root/{name}"]
        assert json.loads(found) == json.loads(expected) if name == "manifest.json" else found == expected
    extra = {path.name for path in out.rglob("*") if path.is_file()} - {Path(name).name for name in names}
    assert extra == {"download.json", ".lock"}


def test_files_take_the_contests_layout_and_a_second_run_fetches_nothing(hub, tmp_path):
    """Programs of the contest look in datasets/ and tokenizers/; a 200 MB shard is fetched once only."""
    first = run_download(hub, tmp_path, num_train_shards=2)
    assert first.returncode == 0, first.stderr
    assert "5 files fetched, 0 checked and kept" in first.stdout
    assert_files_are_the_hubs(hub, tmp_path / "out", num_train_shards=2)
    fetched = dict(hub.bodies)
    assert all(count == 1 for count in fetched.values())
    second = run_download(hub, tmp_path, num_train_shards=2)
    assert "0 files fetched, 5 checked and kept" in second.stdout
    assert dict(hub.bodies) == fetched


def test_a_byte_flipped_once_is_fetched_again(hub, tmp_path):
    """The hub's client checks only the size; one bad transfer must not end a long download."""
    hub.flips[f"root/{TRAIN}"] = 1
    result = run_download(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert hub.bodies[f"root/{TRAIN}"] == 2
    assert_files_are_the_hubs(hub, tmp_path / "out")


def test_a_byte_flipped_twice_is_an_error_with_both_hashes_and_leaves_no_file(hub, tmp_path):
    """Training on damaged tokens would be noticed by nobody."""
    name = f"root/{TRAIN}"
    hub.flips[name] = 99
    result = run_download(hub, tmp_path)
    body = hub.files[name]
    damaged = body[:-1] + bytes([body[-1] ^ 1])
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    for part in (TRAIN, hashlib.sha256(body).hexdigest(), hashlib.sha256(damaged).hexdigest()):
        assert part in result.stderr
    assert hub.bodies[name] == 2
    assert not (tmp_path / "out" / TRAIN).exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unrecorded"])
def test_a_damaged_destination_is_replaced(hub, tmp_path, damage):
    """A file that a full disk or another tool left behind is not trusted because it has the right name."""
    target = tmp_path / "out" / TRAIN
    if damage == "unrecorded":
        target.parent.mkdir(parents=True)
        target.write_bytes(b"left by something else")
    else:
        assert run_download(hub, tmp_path).returncode == 0
        body = target.read_bytes()
        target.write_bytes(body[:3000] if damage == "truncated" else body[:-1] + b"?")
    result = run_download(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert_files_are_the_hubs(hub, tmp_path / "out")


def test_a_shard_whose_header_is_wrong_at_the_source_is_an_error(hub, tmp_path):
    """A right hash proves the transfer, not that the file is a shard."""
    hub.files[f"root/{TRAIN}"] = b"<html>" * 1000
    result = run_download(hub, tmp_path)
    assert result.returncode == 1
    assert "not a token shard" in result.stderr and TRAIN in result.stderr


def test_a_missing_file_is_an_error_that_names_it(hub, tmp_path):
    """A wrong repository or prefix is the usual cause; the message names their variables."""
    del hub.files[f"root/{TRAIN}"]
    result = run_download(hub, tmp_path)
    assert result.returncode == 1
    assert TRAIN in result.stderr and "not found" in result.stderr
    assert "MATCHED_FINEWEB_REPO_ID" in result.stderr and "Traceback" not in result.stderr


def test_a_download_killed_half_way_completes_when_run_again(hub, tmp_path):
    """Rented machines vanish; what is finished stays, what is half done never has a file's name."""
    hub.stalled_path = f"root/{TRAIN}"
    process = subprocess.Popen(
        command(tmp_path, 1), env=environment(hub, tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        assert hub.stalled.wait(30)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    hub.released.set()
    assert not (tmp_path / "out" / TRAIN).exists()
    result = run_download(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert_files_are_the_hubs(hub, tmp_path / "out")


def test_a_second_download_of_a_dataset_is_refused_by_name(hub, tmp_path):
    """Two of them would enter their files in each other's record."""
    with lock_folder(tmp_path / "out" / DATASET):
        result = run_download(hub, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"in use by process {os.getpid()} on " in result.stderr
    assert not (tmp_path / "out" / TRAIN).exists()


def assert_unreachable_hub_is_explained(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert "make data" in result.stderr and "HF_ENDPOINT" in result.stderr


def test_a_hub_that_may_not_be_asked_is_one_error_that_says_what_to_do(hub, tmp_path, monkeypatch):
    """Most machines of the harness have no network, and many say so in HF_HUB_OFFLINE."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_unreachable_hub_is_explained(run_download(hub, tmp_path))


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_error_that_says_what_to_do(hub, tmp_path):
    """The hub's client tries five times before it gives up, which takes half a minute."""
    hub.server.shutdown()
    hub.server.server_close()
    assert_unreachable_hub_is_explained(run_download(hub, tmp_path))


@pytest.mark.parametrize(
    ("variant", "repo_id", "name"),
    [
        ("sp1024", "willdepueoai/parameter-golf", "sp1024"),
        ("byte260", "willdepueoai/parameter-golf", "byte260"),
        ("sp4096", "kevclark/parameter-golf", "sp4096"),
        ("sp8192", "kevclark/parameter-golf", "sp8192"),
        ("caseops8192", "romeerp/parameter-golf-caseops-v1", "sp8192_lossless_caps_caseops_v1_reserved"),
    ],
)
def test_variants_come_from_where_records_took_them(variant, repo_id, name, monkeypatch):
    """The contest's own repository lacks the larger vocabularies; the contest's variables come first."""
    for key in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"):
        monkeypatch.delenv(key, raising=False)
    source = find_source(variant)
    assert source.name == name
    assert hub_from_environment(source.repo_id) == Hub(repo_id, "datasets")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "someone/else")
    assert hub_from_environment(source.repo_id).repo_id == "someone/else"


def publish_case_ops(hub: FakeHub) -> str:
    """Put a CaseOps dataset with its byte sidecar on the hub; returns its folder."""
    name = f"fineweb10B_{find_source('caseops8192').name}"
    entry = MANIFEST["datasets"][0] | {"name": name, "stats": {"files_train": 1, "files_val": 1}}
    hub.files["root/manifest.json"] = json.dumps(MANIFEST | {"datasets": [entry]}).encode()
    for split in ("val", "val_bytes", "train"):
        hub.files[f"root/datasets/{name}/fineweb_{split}_000000.bin"] = hub.files[f"root/{VAL}"]
    return f"datasets/{name}"


def test_case_ops_brings_its_byte_sidecar(hub, tmp_path):
    """Without it the bytes of the validation tokens cannot be counted: a missing one is an error."""
    folder = publish_case_ops(hub)
    done = run_download(hub, tmp_path, 1, "--variant", "caseops8192")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out" / folder).glob("*.bin")}
    assert names == {f"fineweb_{split}_000000.bin" for split in ("val", "val_bytes", "train")}
    del hub.files[f"root/{folder}/fineweb_val_bytes_000000.bin"]
    missing = run_download(hub, tmp_path / "again", 1, "--variant", "caseops8192")
    assert missing.returncode == 1 and "fineweb_val_bytes_000000.bin: not found" in missing.stderr


def publish_docs(hub: FakeHub, **changes) -> bytes:
    """Put the contest's text with its description on the hub."""
    docs = b'{"text": "a document"}\n' * 3
    stated = {"num_docs": 3, "docs_val": 50_000, "docs_sha256": hashlib.sha256(docs).hexdigest()} | changes
    hub.files["root/docs_selected.jsonl"] = docs
    hub.files["root/docs_selected.source_manifest.json"] = json.dumps(stated).encode()
    return docs


def test_the_text_comes_with_its_description(hub, tmp_path):
    """It is what another tokenizer is trained on and validated with."""
    docs = publish_docs(hub)
    done = run_download(hub, tmp_path, 0, "--with-docs")
    assert "5 files fetched" in done.stdout, done.stderr
    assert (tmp_path / "out" / "docs_selected.jsonl").read_bytes() == docs


@pytest.mark.parametrize("changes", [{"docs_sha256": "0" * 64}, {"docs_val": 10_000}])
def test_a_text_that_is_not_the_described_one_is_refused(hub, tmp_path, changes):
    """Another text, or a text whose validation set has another size, gives a score of its own."""
    publish_docs(hub, **changes)
    done = run_download(hub, tmp_path, 0, "--with-docs")
    assert done.returncode == 1 and f"expected {next(iter(changes))}" in done.stderr


@pytest.mark.parametrize("variant", ["sp", "gpt2", "../sp1024", "sp1024/..", "byte261", ""])
def test_only_known_kinds_of_variant_are_asked_for(tmp_path, variant):
    """The variant becomes part of a path."""
    with pytest.raises(UserError, match="sp1024, sp8192 or byte260"):
        download(Hub("someone/contest", "root"), variant, 1, tmp_path)


@pytest.mark.parametrize(("num_shards", "message"), [(4, "has 3 training shards"), (-1, "from 0 to 3")])
def test_more_shards_than_there_are_is_an_error(num_shards, message):
    """Training on fewer tokens than asked for, silently, would spoil a comparison."""
    with pytest.raises(UserError, match=message):
        plan_items(MANIFEST, "fineweb10B_sp1024", num_shards)


def test_an_unpublished_dataset_is_an_error_that_lists_the_published():
    """The reader sees what can be asked for."""
    with pytest.raises(UserError, match="fineweb10B_sp1024"):
        plan_items(MANIFEST, "fineweb10B_sp77", 1)


@pytest.mark.parametrize("path", ["/etc/x", "tokenizers/../../x", ".."])
def test_a_manifest_cannot_place_files_outside_the_data_folder(path):
    """The manifest comes from the network."""
    with pytest.raises(UserError, match="leads out of"):
        local_path(path)
