"""Shared fixtures: tiny shards with a lossless tokenizer, a tiny configuration, a tiny model."""

import os
from pathlib import Path

import pytest
import torch
from fixtures_data import SIZES, titled_texts, train_small_kind, train_small_tokenizer
from fixtures_model import TINY, TINY_VOCAB, make_documents
from fixtures_packing import leave_stand_in
from hypothesis import settings

import train_gpt
from data.codecs import load_codec
from data.codecs.caseops import CASE_OPERATORS, to_case_operators
from data.prepare import Document, write_dataset
from data.train_tokenizer import CONTEST_OPTIONS, train_sentencepiece, train_tokenizer
from formats.recipe import with_values
from train_gpt import Config, Environment, Ranks, build_model

# The same examples in every run; --hypothesis-profile=default draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


# Torch takes a new device only before it first computes gradients: these tests have processes of their own.
collect_ignore = [] if "EMULATED_GPU" in os.environ else ["test_emulator.py"]


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Which numbers a test draws must not depend on the tests that its worker ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def lossless_model(tmp_path_factory):
    """The path of a lossless tokenizer, trained once."""
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def lossless_codec(lossless_model):
    """The same, loaded."""
    return load_codec(lossless_model)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The path of a small tokenizer of each kind but SentencePiece's own."""
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: train_small_kind(kind, folder) for kind in SIZES}


@pytest.fixture(scope="session")
def codecs(trained):
    """The same, loaded."""
    return {kind: load_codec(path, SIZES[kind]) for kind, path in trained.items()}


@pytest.fixture(scope="session")
def normalising_case_ops(tmp_path_factory):
    """A CaseOps model as the contest trains one: NFKC, spaces trimmed."""
    path = tmp_path_factory.mktemp("caseops") / "contest.model"
    options = CONTEST_OPTIONS | {"user_defined_symbols": list(CASE_OPERATORS)}
    path.write_bytes(train_sentencepiece([to_case_operators(text) for text in titled_texts()], 400, options))
    return load_codec(path)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with a lossless tokenizer (tokenizer.model), training and validation shards, a manifest."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = make_documents(120, seed=1)
    train_tokenizer(texts, TINY_VOCAB, folder / "tokenizer.model")
    train = [Document(text, f"train:{i}") for i, text in enumerate(texts)]
    val = [Document(text, f"val:{i}") for i, text in enumerate(make_documents(8, seed=2))]
    write_dataset(
        folder, load_codec(folder / "tokenizer.model"), train, val, {"made_by": "tests"}, num_threads=1
    )
    return folder


@pytest.fixture
def tiny_config(tiny_data, tmp_path) -> Config:
    """The smallest configuration that trains: 3 layers of 32 channels on the tiny data."""
    paths = {
        "data.data_path": str(tiny_data),
        "data.tokenizer_path": str(tiny_data / "tokenizer.model"),
        "run.out_dir": str(tmp_path / "runs"),
        "run.run_id": "tiny",
        "run.overwrite": True,
    }
    return with_values(Config(), TINY | paths, "test")


@pytest.fixture
def stand_in_program(monkeypatch) -> None:
    """Let runs in this process weigh a stand-in: without this fixture each packs its source, for seconds."""
    monkeypatch.setattr(train_gpt, "weigh_code", leave_stand_in)


@pytest.fixture
def alone() -> Ranks:
    """One CPU process without a process group."""
    return Ranks(Environment({}), "cpu")


@pytest.fixture
def tiny_model(tiny_config, alone):
    """A tiny model whose every weight is random, so that no branch is silent."""
    model = build_model(tiny_config, alone.device)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model.eval()
