"""Trained models as objects: load, save, publish, sample, from artifacts, checkpoints, folders and a hub."""

import json
import os
import shutil
import sys
import xml.etree.ElementTree
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fixtures_data import serve_fake_hub
from fixtures_model import TINY, run_python
from fixtures_packing import leave_stand_in

import train_gpt
from common import UserError, sha256_file
from durable.seals import write_sealed
from eval.hub import generate, load, main, parameters, push, save, structure, summary
from formats.checkpoints import NUMBERED, read_result
from formats.recipe import config_hash, read_recipe, with_values
from scoring.generate import Sampling
from train_gpt import ARTIFACT_NAME, Config, Environment

SAMPLE_WITHOUT_PAUSES = """
import runpy, time
time.sleep = lambda seconds: None
runpy.run_module("eval.sample", run_name="__main__", alter_sys=True)
"""
CHECKPOINT = NUMBERED.format(6)  # the last step
SAVED = {"config.json", "model.safetensors", "stats.json", "loss.svg", "README.md", "tokenizer.model"}


@pytest.fixture(scope="module")
def run_folder(tiny_data, tmp_path_factory) -> Path:
    """A complete run with a checkpoint at its end."""
    out = tmp_path_factory.mktemp("hub")
    places = {"data.data_path": str(tiny_data), "data.tokenizer_path": str(tiny_data / "tokenizer.model")}
    values = {"run.out_dir": str(out), "run.run_id": "tiny", "run.save_every": 6, "run.val_loss_every": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "weigh_code", leave_stand_in)
        train_gpt.run(with_values(Config(), TINY | places | values, "test"), Environment({}))
    return out / "tiny"


@pytest.fixture(scope="module")
def saved(run_folder, tmp_path_factory) -> Path:
    """The checkpoint's model as a saved folder, with the optimizers' state."""
    return save(load(run_folder / CHECKPOINT), tmp_path_factory.mktemp("saved") / "model", True)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.numeric
@pytest.mark.reference("A8")
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_saved_weights_come_back_bit_for_bit(run_folder, tmp_path, with_optimizer):
    """The optimizers' flag changes the presence of their file and nothing else."""
    loaded = load(run_folder / CHECKPOINT)
    folder = save(loaded, tmp_path / "model", with_optimizer)
    again = load(folder)
    assert same(parameters(loaded), parameters(again))
    extra = {"optimizer.safetensors"} if with_optimizer else set()
    assert {path.name for path in folder.iterdir()} == SAVED | extra
    assert (again.optimizer is not None) == with_optimizer
    assert again.stats == loaded.stats and again.cfg.model == loaded.cfg.model
    plain = save(loaded, tmp_path / "plain")
    assert all((plain / name).read_bytes() == (folder / name).read_bytes() for name in SAVED)


@pytest.mark.numeric
def test_a_run_folder_gives_its_artifact_and_a_checkpoint_its_masters(run_folder):
    """The artifact is quantized, the checkpoint is not; both compute the same function nearly."""
    artifact, checkpoint = load(run_folder), load(run_folder / CHECKPOINT)
    assert same(parameters(artifact), parameters(load(run_folder / ARTIFACT_NAME)))
    assert not same(parameters(artifact), parameters(checkpoint))
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        ours, theirs = (loaded.model(tokens, tokens == 0) for loaded in (artifact, checkpoint))
    # int8 has 127 steps up to a row's largest weight: two of them, of logits of 5.
    torch.testing.assert_close(ours, theirs, atol=2 / 127 * theirs.abs().max().item(), rtol=0)


def test_statistics_are_the_runs_own(run_folder):
    """Six steps of 128 tokens, a loss each, validations at 0, 3 and the end."""
    stats = load(run_folder).stats
    assert stats["name"] == "tiny" and stats["total_tokens"] == 6 * 128
    assert [step for step, _ in stats["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in stats["val_loss"]] == [0, 3, 6]
    assert stats["num_params"] == sum(param.numel() for param in parameters(load(run_folder)).values())


def test_the_picture_shows_both_curves(saved):
    """A point of the polyline for every loss, and well-formed XML."""
    tree = xml.etree.ElementTree.fromstring((saved / "loss.svg").read_text())
    lines = [node for node in tree.iter() if node.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [6, 3]


def test_summary_and_structure_say_what_the_model_is(run_folder):
    """Counts by part, their total, and the tree of modules."""
    loaded = load(run_folder)
    assert f"{loaded.stats['num_params']:,}" in summary(loaded) and "blocks.2.mlp" in summary(loaded)
    assert "(blocks): ModuleList" in structure(loaded)


@pytest.mark.numeric
def test_text_is_reproducible_and_streams_as_it_is_returned(saved):
    """One seed, one text; pieces join to it; another seed differs."""
    loaded, pieces = load(saved), []
    text = generate(loaded, "ab", Sampling(20, seed=1), pieces.append)
    assert text and "".join(pieces) == text == generate(loaded, "ab", Sampling(20, seed=1))
    assert text != generate(loaded, "ab", Sampling(20, seed=2))


def test_the_dtype_of_activations_can_be_chosen(saved):
    """Weights stay what they are."""
    wide, narrow = load(saved), load(saved, "bfloat16")
    assert narrow.model.compute_dtype == torch.bfloat16 and same(parameters(wide), parameters(narrow))


def hub_environment(hub, tmp_path: Path) -> dict[str, str]:
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    return os.environ | home | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_hub_id_downloads_loads_and_generates(saved, tmp_path):
    """In a process of its own: the hub's client reads its settings when it is imported."""
    with serve_fake_hub() as hub:
        hub.files = {path.name: path.read_bytes() for path in saved.iterdir()}
        arguments = ("-m", "eval.sample", "someone/tiny", "--prompt", "ab", "--max-tokens", "5")
        result = run_python(*arguments, env=hub_environment(hub, tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ab" + generate(load(saved), "ab", Sampling(5)) + "\n"
    assert hub.bodies["model.safetensors"] == 1 and not hub.bodies["optimizer.safetensors"]


def test_a_published_model_comes_back_with_its_card(run_folder, saved, tmp_path):
    """Both ways over a hub of this machine: the client uploads, another process fetches and generates."""
    with serve_fake_hub() as hub:
        env = hub_environment(hub, tmp_path) | {"HF_TOKEN": "hf_none"}
        pushed = run_python("-m", "eval.hub", "push", run_folder, "someone/tiny", env=env)
        assert pushed.returncode == 0, pushed.stderr
        assert set(hub.files) == SAVED
        arguments = ("someone/tiny", "--prompt", "ab", "--max-tokens", "5")
        result = run_python("-m", "eval.sample", *arguments, env=env)
    assert result.stdout == "ab" + generate(load(run_folder), "ab", Sampling(5)) + "\n", result.stderr
    assert "eval.sample someone/tiny " in hub.files["README.md"].decode()


def test_the_card_says_what_the_run_says(run_folder, tmp_path):
    """Its front matter is the hub's own format; score, bytes and digests are those of result.json."""
    result = read_result(run_folder)
    path = save(load(run_folder), tmp_path / "model") / "README.md"
    card = huggingface_hub.ModelCard.load(path)
    (scored,) = card.data.eval_results
    assert scored.metric_value == pytest.approx(result["score"]["val_bpb"], abs=1e-8)
    assert (scored.metric_type, card.data.library_name) == ("bits_per_byte", "parameter-golf")
    total = sum(size for _, size in result["ledger"])
    for text in (f"{total:,}", result["artifact_sha256"], result["config_hash"], result["origin"]["data"]):
        assert text in card.text
    assert "| audit | not audited |" in card.text
    recipe = card.text.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "recipe.toml").write_text(recipe)
    again = with_values(Config(), read_recipe(tmp_path / "recipe.toml"), "card")
    assert config_hash(again) == result["config_hash"]


def test_a_card_claims_no_score_of_weights_that_nobody_scored(run_folder, tmp_path):
    """The checkpoint's are not those of the artifact; a copied artifact beside another result neither."""
    other = shutil.copytree(run_folder, tmp_path / "other")
    result = read_result(other)
    write_sealed(other / "result.json", result | {"artifact_sha256": "0" * 64})
    for source in (run_folder / CHECKPOINT, other / ARTIFACT_NAME):
        text = (save(load(source), tmp_path / "saved" / source.parent.name) / "README.md").read_text()
        assert "val_bpb | unknown" in text and "model-index" not in text


def test_the_card_of_a_record_sums_up_its_audit(run_folder, tmp_path):
    """With the sha256 of the whole, so that nobody has to take the sum on trust."""
    record = shutil.copytree(run_folder, tmp_path / "record")
    verdicts = ["PASS", "PASS", "NOT RUN"]
    (record / "audit.json").write_text(json.dumps({"checks": [{"verdict": verdict} for verdict in verdicts]}))
    text = (save(load(record), tmp_path / "model") / "README.md").read_text()
    assert f"2 PASS, 1 NOT RUN; audit.json has sha256 {sha256_file(record / 'audit.json')}" in text
    (record / "audit.json").write_text('{"checks": [3]}')
    with pytest.raises(UserError, match=r"audit\.json: expected an audit"):
        load(record)


@pytest.mark.parametrize("state", ["unknown", "offline", "unreachable"])
def test_a_hub_without_the_model_is_one_error_that_says_what_helps(tmp_path, state):
    """An unknown id, no network by choice, no server: the client's five tries go without their pauses."""
    extra = {"offline": {"HF_HUB_OFFLINE": "1"}, "unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    with serve_fake_hub() as hub:
        env = hub_environment(hub, tmp_path) | extra.get(state, {})
        result = run_python("-c", SAMPLE_WITHOUT_PAUSES, "someone/none", env=env)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert ("Check the spelling" if state == "unknown" else "HF_ENDPOINT") in result.stderr


def test_push_uploads_a_saved_folder(run_folder, monkeypatch):
    """The client of the hub is given a repository and the files, no more."""
    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(load(run_folder), "me/tiny") == "https://hub/me/tiny"
    assert calls == [("create", "me/tiny", True), ("upload", "me/tiny", SAVED)]


def test_a_refused_push_names_the_login(run_folder, monkeypatch):
    """No token is what goes wrong first."""

    def refuse():
        raise OSError("401")

    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)
    with pytest.raises(UserError, match="hf auth login"):
        push(load(run_folder), "me/tiny")


@pytest.mark.parametrize("source", ["nowhere/at/all", "none.bin", "-"])
def test_a_source_that_is_nothing_is_an_error(source):
    """Neither a path nor an id."""
    with pytest.raises(UserError, match="OWNER/NAME"):
        load(source)


def test_a_missing_vocabulary_names_the_option(run_folder, saved, tmp_path):
    """A model without its tokenizer still has a summary, but cannot speak."""
    for source in (shutil.copytree(saved, tmp_path / "saved"), run_folder):
        loaded = load(source, tokenizer=str(tmp_path / "none.model"))
        assert summary(loaded)
        with pytest.raises(UserError, match=r"vocabulary of 300 entries.*--tokenizer"):
            generate(loaded, "ab")


def test_another_tokenizer_is_refused(saved, tmp_path):
    """Its ids would mean other text."""
    other = Path(shutil.copy(saved / "tokenizer.model", tmp_path / "other.model"))
    other.write_bytes(other.read_bytes() + b"\x0a\x00")  # an empty piece more
    with pytest.raises(UserError):
        generate(load(saved, tokenizer=str(other)), "ab")


def test_a_checkpoint_beside_another_recipe_is_refused(run_folder, tmp_path):
    """Its shapes may fit and its meaning not."""
    shutil.copy(run_folder / CHECKPOINT, tmp_path)
    with pytest.raises(UserError, match=r"recipe\.toml beside it"):
        load(tmp_path / CHECKPOINT)
    recipe = (run_folder / "recipe.toml").read_text().replace("beta1 = 0.9", "beta1 = 0.8")
    (tmp_path / "recipe.toml").write_text(recipe)
    with pytest.raises(UserError, match="remove the line of the digest"):
        load(tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe.partition("\n")[2])
    with pytest.raises(UserError, match="expected a checkpoint of recipe"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "cut", "config", "path", "empty", "value", "stats"])
def test_a_damaged_saved_folder_is_refused(saved, tmp_path, damage):
    """It may come from a stranger."""
    folder = shutil.copytree(saved, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    if damage == "weights":
        config["recipe"]["model"]["model_dim"] = 48
    if damage == "path":
        config["tokenizer_files"] = ["../tokenizer.model"]
    write_sealed(folder / "config.json", config)
    if damage == "config":
        (folder / "config.json").write_text("[]")
    if damage == "value":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"model_dim": 3', '"model_dim": 4'))
    if damage == "stats":
        (folder / "stats.json").write_text("{}")
    if damage == "cut":
        (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:500])
    if damage == "empty":
        (folder / "config.json").unlink()
    with pytest.raises(UserError):
        load(folder)


def test_the_optimizers_of_an_artifact_cannot_be_saved(run_folder, tmp_path):
    """It has none."""
    with pytest.raises(UserError, match="expected a checkpoint's model"):
        save(load(run_folder), tmp_path / "model", True)


def test_the_command_line_saves_and_sums_up(run_folder, tmp_path, capsys):
    """The same from a shell."""
    main(["save", str(run_folder), str(tmp_path / "out")])
    main(["summary", str(tmp_path / "out")])
    assert "total" in capsys.readouterr().out
    with pytest.raises(UserError, match="expected a target"):
        main(["save", str(run_folder)])
    assert "pickle" not in sys.modules["eval.hub"].__dict__


def test_files_of_others_are_not_replaced(run_folder, saved, tmp_path):
    """A dataset, a run folder, a folder with another config.json; a saved model may be saved again."""
    model = load(run_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    dataset = Path(model.cfg.data.tokenizer_path).parent
    for folder in (tmp_path / "mine", run_folder, dataset):
        with pytest.raises(UserError):
            save(model, folder)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    again = shutil.copytree(saved, tmp_path / "again")
    assert save(model, again) == again
