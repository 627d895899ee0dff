"""System B, BESE-288: its data path, its compat fields, and what an audit says of its claim."""

import heapq
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fixtures_audit import SOURCE, evidence, score_line, verdicts, write_folder
from fixtures_data import needs_corpora, shared, shared_texts, titled_texts
from fixtures_model import TINY, recipe
from fixtures_reference import contest_windows

import data.prepare
import data.tokenizer
import train_gpt
from audit.__main__ import audit_data, audit_folder
from common import UserError, read_json
from data.codecs import load_codec
from data.codecs.bese import to_base
from data.prepare import Document, write_dataset
from data.selection import difficulty, is_good
from data.shards import read_manifest, read_shard
from data.train_tokenizer import train_tokenizer
from eval.__main__ import main as evaluate
from eval.logs import classify_bytes
from formats.recipe import with_values
from scoring.modes import LEGACY_TAIL, broken_rules, plan_tail
from scoring.ngram import LEGACY_ALIGNMENT
from scoring.sliding import ScoreOptions, plan_windows, score_windows
from train_gpt import Config, Environment, check_config, load_validation, run, score_model

LOSS = "drops case, most signs and all that is not ASCII"
SLIDING = {"eval.mode": "sliding", "eval.stride": 4, "eval.keep_tail": False}


# Data


def test_the_data_path_of_system_b(tmp_path, capsys):
    """The commands of its README: tokenizer of filtered text, shards of filtered, sorted, cut text."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"Word{n}" for n in rng.integers(0, 60, size)) + "." for size in range(60, 100)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ["short", *texts]))
    (tmp_path / "val.jsonl").write_text(json.dumps({"text": "Two words."}) + "\n")
    source, tokenizer, out = (str(tmp_path / name) for name in ("train.jsonl", "bese.json", "shards"))
    chosen = ["--input", source, "--train-filter", "quality", "--train-docs"]
    data.tokenizer.main(["train", "--kind", "bese", "--vocab-size", "60", *chosen, "9", "--out", tokenizer])
    train_tokenizer(texts[:9], 60, tmp_path / "same.json", "bese")
    assert read_json(tokenizer) == read_json(tmp_path / "same.json")
    paths = ["--val-input", str(tmp_path / "val.jsonl"), "--tokenizer", tokenizer, "--out", out]
    data.prepare.main([*chosen, "20", "--train-order", "difficulty", *paths, "--num-threads", "1"])
    codec, manifest = load_codec(tokenizer), read_manifest(out)
    kept = sorted(filter(is_good, texts), key=difficulty)[:20]
    expected = [np.concatenate([[codec.bos_id], codec.encode(text)]) for text in kept]
    tokens = read_shard(tmp_path / "shards" / "fineweb_train_000000.bin")
    assert np.array_equal(tokens, np.concatenate(expected)) and kept != texts[:20]
    assert manifest["train"]["token_bytes"] == sum(len(text.encode()) for text in kept)
    assert manifest["val"]["documents"] == [0, 1] and not manifest["tokenizer"]["lossless"]
    with pytest.raises(UserError, match="validation documents are scored whole"):
        data.prepare.main([*chosen, "20", "--val-filter", "quality", *paths])
    with pytest.raises(SystemExit):
        data.prepare.main([*chosen, "0", *paths])
    assert "argument --train-docs: expected a whole number from 1 on" in capsys.readouterr().err


def encode_stale(ids: list[int], merged: dict[tuple[int, int], int]) -> list[int]:
    """Encode as the original did: a heap of pairs, in which those of consumed symbols stay."""
    ids, count = list(ids), len(ids)
    after, before = list(range(1, count + 1)), list(range(-1, count - 1))
    heap = [(merged[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merged]
    heapq.heapify(heap)
    while heap:
        new, i = heapq.heappop(heap)
        right = after[i]
        if right == count or merged.get((ids[i], ids[right])) != new:
            continue
        ids[i], after[i] = new, after[right]
        if after[i] < count:
            before[after[i]] = i
        for left, other in ((i, after[i]), (before[i], i)):
            pair = (ids[left], ids[other]) if left >= 0 and other < count else None
            if pair in merged:
                heapq.heappush(heap, (merged[pair], left))
    found, i = [], 0
    while i < count:
        found.append(ids[i])
        i = after[i]
    return found


@needs_corpora
@pytest.mark.slow
@pytest.mark.reference("B3")
def test_the_published_counts_of_c4_documents():
    """150 documents: none comes back; our tokens are canonical, the original's were 0.6 % more."""
    codec = load_codec(shared("bese_288/tokenizer.json"), 288)
    texts = shared_texts()[:150]
    encoded = codec.encode_batch(texts)
    assert sum(len(text.encode()) for text in texts) == 346_895
    assert sum(map(len, encoded)) == 176_708
    assert all(codec.decode(ids) != text.encode() for ids, text in zip(encoded, texts))
    merged = {(left, right): new for left, right, new in codec._merges}
    stale = [encode_stale(to_base([text], codec._table)[1:].tolist(), merged) for text in texts]
    assert sum(map(len, stale)) == 177_817
    assert sum(found != ids.tolist() for found, ids in zip(stale, encoded)) == 132
    assert sum(int(codec.token_bytes(np.array(found)).sum()) for found in stale) == 346_895


def test_the_recipe_tilts_as_published():
    """Half of beta 0.3 a hint; room for every prefix of one and of two ids; counts of the first shard."""
    settings = recipe("reference_systems/B_bese288").eval
    assert (settings.tilt_static_lengths, settings.tilt_static_strength) == ((1, 2), 0.3 / 2)
    assert settings.tilt_static_entries == 288 + 288**2
    assert settings.tilt_static_tokens == data.prepare.SHARD_TOKENS
    assert (settings.mode, settings.stride, settings.tilt_legacy, settings.tail_legacy) == (
        "sliding", 64, False, False,
    )  # fmt: skip


# Compat fields


@pytest.mark.numeric
@pytest.mark.reference("B17")
def test_the_compat_tail_counts_what_system_b_counted(tiny_config, tiny_model, alone):
    """Each target once by default; with the compat field context - stride more, as its loop scored them."""
    cfg = with_values(tiny_config, SLIDING, "test")
    text = load_validation(cfg.data)
    text = text._replace(tokens=text.tokens[:97], target_bytes=text.target_bytes[:96])
    once = score_model(tiny_model, cfg, text, alone)
    again = score_model(tiny_model, with_values(cfg, {"eval.tail_legacy": True}, "test"), text, alone)
    assert (again.num_tokens, once.invalid, again.invalid) == (once.num_tokens + 16 - 4, "", LEGACY_TAIL)
    nats, num_bytes = 0.0, 0
    for start, end, first in contest_windows(once.num_tokens, 16, 4).tolist():
        window = np.array([[start, end, first]])
        found = score_windows(tiny_model, text.tokens, window, ScoreOptions(text.bos_id, 64))
        nats += float(found[start + first : end].double().sum())
        num_bytes += int(text.target_bytes[start + first : end].sum())
    assert again.num_bytes == num_bytes > once.num_bytes
    assert again.val_loss == pytest.approx(nats / again.num_tokens, rel=1e-6) != once.val_loss


@pytest.mark.reference("B17")
def test_the_published_text_has_1984_targets_too_many():
    """74,582,016 targets in windows of 2,048 by 64: ours and the repeated ones are the contest's list."""
    num_targets = 74_582_016
    ours, repeated = plan_windows(num_targets, 2048, 64), plan_tail(num_targets, 2048, 64)
    assert (repeated[:, 1] - repeated[:, 0] - repeated[:, 2]).sum() == 1_984
    assert np.array_equal(np.concatenate([ours, repeated]), contest_windows(num_targets, 2048, 64))


def test_compat_fields_add_up_in_the_label(tiny_config):
    """A score may break several rules; a tilt without hints breaks none; only whole strides repeat."""
    legacy = {"eval.tail_legacy": True, "eval.tilt_legacy": True}
    cfg = with_values(tiny_config, SLIDING | legacy, "test")
    check_config(cfg)
    assert broken_rules(cfg.eval) == LEGACY_TAIL
    hinted = with_values(cfg, {"eval.tilt_static_entries": 9}, "test")
    assert broken_rules(hinted.eval) == f"{LEGACY_ALIGNMENT}; {LEGACY_TAIL}"
    wrong = {"eval.keep_tail": True}, {"eval.mode": "chunked"}, {"eval.stride": 3}, {"eval.stride": 16}
    for values in wrong:
        with pytest.raises(UserError, match=r"eval\.tail_legacy"):
            check_config(with_values(cfg, values, "test"))


# What an audit says


RUNS = {  # seed: steps, artifact bytes, val_bpb of the reloaded weights, of sliding windows with hints
    1337: (5417, 12_635_100, 1.18169806, 1.15536509),
    42: (5645, 12_658_480, 1.18026718, 1.15387807),
    314: (5633, 12_727_756, 1.17654311, 1.14989686),
}
CODE_BYTES = 88_802
BYTES_PER_TOKEN = 1.61403749 / math.log(2) / 1.18169806


def original_log(seed: int) -> str:
    """Write the published facts of a run in the contest's lines."""
    steps, size, reloaded, sliding = RUNS[seed]
    return (
        f"val_loader:shards pattern=bese/fineweb_val_*.bin tokens:74582016\nseed:{seed}\n"
        f"stopping_early: wallclock_cap train_time:600050ms step:{steps}/20000\n"
        f"Code size: {CODE_BYTES} bytes\nSerialized model int6+lzma: {size} bytes\n"
        f"Total submission size int6+lzma: {size + CODE_BYTES} bytes\n"
        + score_line("final_int6_roundtrip_exact", reloaded, BYTES_PER_TOKEN)
        + score_line("final_int6_sliding_window_exact", sliding, BYTES_PER_TOKEN)
    )


@pytest.fixture
def original_claim(tmp_path, trained):
    """A record folder that states what the original stated, with code beside its program as there."""
    program = "import bese_fast_bpe\n" + SOURCE
    files = {f"train_seed{seed}.log": original_log(seed) for seed in RUNS} | {
        "README.md": "# BESE-288\n\nval_bpb 1.1531, mean of three seeds.\n",
        "submission.json": {
            "author": "A", "github_id": "a", "name": "BESE-288", "date": "2026-04-16", "val_bpb": 1.1531,
            "seeds": list(RUNS), "seed_results": {str(k): {"val_bpb": row[3]} for k, row in RUNS.items()},
        },
        "tokenizer.json": trained["bese"].read_text(),
        "train_gpt.py": program + "#" * (CODE_BYTES - len(program) - 1) + "\n",
        "bese_fast_bpe.py": "x = 1\n" + "#" * 26_000 + "\n",
    }  # fmt: skip
    return write_folder(tmp_path, files, name="2026-04-16_BESE288")


def test_the_audit_says_what_is_wrong_with_the_original_claim(original_claim):
    """Filtered validation text, a tokenizer that loses text, a mean of rounded scores, uncounted code."""
    found = verdicts(original_claim)
    assert {check for check, verdict in found.items() if verdict in ("SUSPECT", "FAIL")} == {"K3", "K7", "K9"}
    for seed in RUNS:
        assert f"train_seed{seed}.log: 146,965,6" in evidence(original_claim, "K3")
    assert "validation documents that a quality filter dropped (#1666)" in evidence(original_claim, "K3")
    assert "1.1531 is +0.000053 from 1.15304667, the mean of 3 logs" in evidence(original_claim, "K7")
    assert f"tokenizer.json: the tokenizer (bese) {LOSS}" in evidence(original_claim, "K9")
    sizes = evidence(original_claim, "K6")
    for total in (12_723_902, 12_747_282, 12_816_558):
        assert f"{total:,} bytes by the log, {total + 26_007:,} with the files of the folder" in sizes


def test_the_original_claim_beats_no_record_of_its_day(original_claim, tmp_path):
    """The record stood near 1.07."""
    old = {f"train_seed{seed}.log": f"seed:{seed}\n" + score_line("final_exact", 1.07 + seed / 1e6)
           for seed in (1, 2, 3)}  # fmt: skip
    against = write_folder(tmp_path / "old", old)
    (finding,) = [found for check, found in audit_folder(original_claim, [against]) if check.id == "K8"]
    assert finding.verdict == "SUSPECT" and "p 1" in finding.evidence[0]


def test_bytes_of_the_filtered_text_are_known_by_name():
    """python -m eval names them too."""
    assert classify_bytes(146_965_622) == (
        "SUSPECT", ": validation documents that a quality filter dropped (#1666)",
    )  # fmt: skip


def leave_program(folder: Path) -> tuple[int, str]:
    """Put a stub where a run leaves its packed program."""
    (folder / "train_gpt.py").write_text(SOURCE)
    return len(SOURCE), ""


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A tiny run of system B with the faults of the original that a compat field has, and its folder."""
    folder, texts = tmp_path / "bese", titled_texts()
    folder.mkdir()
    train_tokenizer(texts, 120, folder / "tokenizer.json", "bese")
    train, val = (
        [Document(text, f"{i}") for i, text in enumerate(part)] for part in (texts[10:], texts[:10])
    )
    write_dataset(folder, load_codec(folder / "tokenizer.json"), train, val, {"made_by": "tests"})
    published = recipe("reference_systems/B_bese288")
    values = TINY | SLIDING | {
        "run.out_dir": str(tmp_path / "runs"), "run.run_id": "mini", "data.data_path": str(folder),
        "data.tokenizer_path": str(folder / "tokenizer.json"), "data.tokenizer_kind": "bese",
        "data.vocab_size": 120, "eval.tilt_static_entries": 500, "eval.tail_legacy": True,
        "eval.tilt_legacy": True, "eval.tilt_static_lengths": published.eval.tilt_static_lengths,
        "eval.tilt_static_strength": published.eval.tilt_static_strength,
    }  # fmt: skip
    monkeypatch.setattr(train_gpt, "weigh_code", leave_program)  # packing takes seconds
    run(with_values(Config(), values, "test"), Environment({}))
    return tmp_path / "runs" / "mini"


def test_a_miniature_trains_and_its_audit_names_each_fault(miniature, tmp_path, capsys):
    """What a compat field reproduces is labelled in result, log, table and audit; without them it scores."""
    score = read_json(miniature / "result.json")["score"]
    assert score["invalid"] == f"{LEGACY_ALIGNMENT}; {LEGACY_TAIL}" and LOSS in score["not_comparable"]
    claim = {"author": "A", "github_id": "a", "name": "B", "date": "2026-04-16", "val_bpb": score["val_bpb"]}
    (miniature / "submission.json").write_text(json.dumps(claim))
    (miniature / "README.md").write_text(f"val_bpb {score['val_bpb']:.8f}\n")
    measured = audit_data(tmp_path / "bese", None)
    found = {check.id: finding for check, finding in audit_folder(miniature, None, measured)}
    assert [found[name].verdict for name in ("K3", "K7", "K9")] == ["FAIL", "FAIL", "SUSPECT"]
    assert f"scored {score['num_bytes']:,} bytes of a text of" in found["K3"].evidence[0]
    assert found["K7"].evidence[0].endswith(f"calls its score invalid: {LEGACY_ALIGNMENT}; {LEGACY_TAIL}")
    assert f"not comparable: the tokenizer (bese) {LOSS}" in found["K9"].evidence[0]
    assert "val totals:" in found["K9"].evidence[-1]  # what the data says stands beside it
    capsys.readouterr()
    assert evaluate([str(miniature)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("INVALID ") and "NOT COMPARABLE" in table
    legal = ["--set", "tail_legacy=0", "tilt_legacy=0", "--json"]
    assert evaluate([str(miniature), *legal]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["invalid"] == "" and again["num_tokens"] == score["num_tokens"] - 12
