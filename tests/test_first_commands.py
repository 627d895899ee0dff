"""What people type first, from the contest, from nanoGPT or with a typo: it works, or says what does."""

import re

import pytest

import train_gpt
from common import UserError
from data import download

EMPTY = "no such tokenizer file"  # the command was understood; there are no data in an empty folder
COMMANDS = [
    # the contest's README
    ("", {}, r"`make run` makes the built-in corpus.*data.download --variant sp1024"),
    ("", {"RUN_ID": "baseline_sp1024", "VOCAB_SIZE": "1024"}, EMPTY),
    (
        "",
        {"DATA_PATH": "./data/datasets/fineweb10B_sp1024/", "MAX_WALLCLOCK_SECONDS": "0"},
        r"fineweb10B_sp1024/: no such folder.*data.download --variant sp1024",
    ),
    ("", {"ITERATIONS": "200", "VAL_LOSS_EVERY": "0", "VAL_BATCH_SIZE": "8192"}, EMPTY),
    ("", {"NUM_LAYER": "3"}, r"NUM_LAYER is not read; did you mean NUM_LAYERS\?"),
    ("", {"ITERATION": "200"}, r"ITERATION is not read; did you mean ITERATIONS\?"),
    (
        "",
        {"NUM_LAYERS": "three"},
        r"model.num_layers \(NUM_LAYERS\): expected a whole number, found .three.",
    ),
    ("", {"MODEL_DIM": "500"}, r"model.model_dim=500|model.num_heads=8|even head"),
    ("", {"VOCAB_SIZE": "2048"}, r"make data VOCAB=2048"),
    # nanoGPT and its kin
    ("--lr 0.1", {}, r"--lr: fields are written optim.matrix_lr=\S+ or optim.embed_lr=\S+"),
    ("--seed=3", {}, r"--seed: fields are written run.seed=3$"),
    ("--num-layers=4", {}, r"--num-layers: fields are written model.num_layers=4$"),
    ("--num_layers 4", {}, r"--num_layers: fields are written model.num_layers=VALUE$"),
    ("--batch_tokens=8192", {}, r"fields are written data.batch_tokens=8192$"),
    ("--batch_size=12", {}, r"fields are written data.batch_tokens=12$"),
    ("--block_size=256", {}, r"fields are written data.seq_len=256$"),
    ("--device=cpu", {}, r"fields are written run.device=cpu$"),
    ("--compile=off", {}, r"fields are written run.compile=off$"),
    ("config/train_shakespeare_char.py", {}, r"expected section.key=value, found 'config/train"),
    # typos
    ("num_layers=4", {}, r"unknown field 'num_layers'. Did you mean model.num_layers\?"),
    ("lr=0.1", {}, r"unknown field 'lr'. Did you mean optim.matrix_lr or optim.embed_lr"),
    ("model.num_layer=4", {}, r"unknown field 'model.num_layer'. Did you mean model.num_layers\?"),
    ("run.seed=abc", {}, r"run.seed \(SEED\): expected a whole number, found 'abc'"),
    ("run.attention=flash", {}, r"run.attention=flash must be one of auto, fa3"),
    ("optim.matrix_lr=-1", {}, r"optim.matrix_lr=-1.0 must be at least 0"),
    ("--recipe missing.toml", {}, r"missing.toml: no such recipe"),
    ("--recipes x", {}, r"--recipes.*Did you mean --recipe\?"),
    ("--resume missing.safetensors", {}, r"missing.safetensors: expected a run folder.*run.save_every"),
]


@pytest.mark.parametrize(("words", "environment", "answer"), COMMANDS)
def test_a_first_command_is_answered_in_one_sentence(
    words, environment, answer, tmp_path, monkeypatch, capsys
):
    """Each ends before any work, with what was wrong and what to type; nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((UserError, SystemExit)) as caught:
        train_gpt.main(words.split())
    said = "\n".join([capsys.readouterr().err.strip(), str(caught.value)])
    assert re.search(answer, said.removesuffix("\n2"), re.MULTILINE), said
    assert not list(tmp_path.iterdir())


def test_names_of_other_programs_are_no_misspellings(monkeypatch):
    """A warning that is mostly false is not read."""
    for name in ("SEEDS", "HOME", "PATH", "DATA_DIR", "LOCAL_RANK", "MASTER_PORT", "NUM_LAYERS"):
        monkeypatch.setenv(name, "1")
    assert not [line for line in train_gpt.read_environment().misspelled if "NUM" in line or "SEED" in line]


def test_the_contests_name_of_the_download_is_the_download(capsys):
    """Its README says `python3 data/cached_challenge_fineweb.py --variant sp1024 --train-shards 10`."""
    from data import cached_challenge_fineweb

    assert cached_challenge_fineweb.main is download.main


def test_people_get_a_table_and_programs_json(monkeypatch, capsys):
    """What --describe prints depends on who reads it."""
    train_gpt.main(["--describe"])
    assert capsys.readouterr().out.startswith('{"config"')
    monkeypatch.setattr(train_gpt.sys.stdout, "isatty", lambda: True, raising=False)
    train_gpt.main(["--describe", "--json"])
    assert capsys.readouterr().out.startswith('{"config"')
    train_gpt.main(["--describe", "--steps", "0,1000"])
    said = capsys.readouterr().out
    assert re.search(r"^parameters +17,059,912$", said, re.MULTILINE)
    assert re.search(r"^  seq_len +1024 throughout$", said, re.MULTILINE)
    assert said.splitlines()[-2].split()[0] == "0" and said.splitlines()[-1].split()[0] == "1000"
    assert max(map(len, said.splitlines())) <= 80
