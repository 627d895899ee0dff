"""Scores by domain: what is counted, what is not, and system E's numbers."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_data import corpora, needs_corpora, small_texts
from fixtures_model import bigram_logits

from common import UserError
from eval.domains import domain_documents, format_domains, parse_domains, read_domain, score_domains
from scoring.sliding import ScoreOptions

pytestmark = pytest.mark.numeric


def write_lines(path: Path, values: list) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """One small file of each layout, the last compressed."""
    code = [{"prompt": f"def f{i}():\n", "canonical_solution": f"    return {i}\n"} for i in range(3)]
    packed = tmp_path / "code.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in code).encode()))
    return {
        "web": write_lines(tmp_path / "web.jsonl", [{"text": text} for text in small_texts(6)]),
        "sums": write_lines(tmp_path / "sums.jsonl", [{"question": "1 + 1?", "answer": "2"}] * 4),
        "code": packed,
    }


def score(files: dict[str, Path], codec, batch_tokens: int = 4096, context_len: int = 16) -> list:
    domains = [read_domain(name, path, codec) for name, path in files.items()]
    options = ScoreOptions(codec.bos_id, batch_tokens)
    return score_domains(domains, bigram_logits(codec.vocab_size), context_len, 5, options)


def test_layouts_are_system_es(files):
    """GSM8K is asked and answered as system E writes it; HumanEval is prompt and solution."""
    assert [document.text for document in domain_documents(files["sums"])] == [
        "Question: 1 + 1?\nAnswer: 2"
    ] * 4
    assert next(domain_documents(files["code"])).text == "def f0():\n    return 0\n"


def test_a_domain_costs_what_its_documents_cost_one_by_one(files, codecs, lossless_codec):
    """The slow sum: every token after each BOS, and the BOS that ends the document, once."""
    for codec in (lossless_codec, codecs["caseops"]):
        table = bigram_logits(codec.vocab_size)
        for name, row in zip(files, score(files, codec)):
            nats, texts = 0.0, [document.text for document in domain_documents(files[name])]
            tokens = 0
            for text in texts:
                ids = [codec.bos_id, *codec.encode(text).tolist(), codec.bos_id]
                costs = -torch.log_softmax(table(torch.tensor([ids[:-1]]), None, 0)[0].double(), 1)
                nats += sum(float(costs[i, token]) for i, token in enumerate(ids[1:]))
                tokens += len(ids) - 1
            raw_bytes = sum(len(text.encode()) for text in texts)
            assert (row.documents, row.tokens, row.bytes) == (len(texts), tokens, raw_bytes)
            assert row.val_loss == pytest.approx(nats / tokens, rel=1e-6)
            assert row.val_bpb == pytest.approx(nats / math.log(2) / raw_bytes, rel=1e-6)
            assert row.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.reference("E13")
def test_batching_pads_nothing_and_documents_see_only_themselves(files, lossless_codec):
    """Padding counted as targets made system E's domain losses depend on the longest document of a batch."""
    alone = score(files, lossless_codec, batch_tokens=1)
    together = score(files, lossless_codec)
    np.testing.assert_allclose([row[2:] for row in alone], [row[2:] for row in together], rtol=1e-6)

    def spy(tokens, starts_doc, first):
        assert starts_doc[:, 1:].sum() == 0  # no window reaches into another document
        seen.append(tokens[:, first:].numel())
        return torch.zeros(*tokens[:, first:].shape, lossless_codec.vocab_size)

    for name, path in files.items():
        seen = []
        domain = read_domain(name, path, lossless_codec)
        (row,) = score_domains([domain], spy, 16, 5, ScoreOptions(lossless_codec.bos_id, 64))
        assert sum(seen) == row.tokens == domain.tokens.size - 1
        assert row.val_loss == pytest.approx(math.log(lossless_codec.vocab_size), rel=1e-6)


@pytest.mark.reference("E17")
def test_surprise_ratios_average_to_one(files, lossless_codec):
    """A ratio over 1 is a domain that the model finds harder than its others."""
    rows = score(files, lossless_codec)
    assert sum(row.surprise_ratio for row in rows) / len(rows) == pytest.approx(1.0)
    hardest = max(rows, key=lambda row: row.val_loss)
    assert hardest.surprise_ratio == max(row.surprise_ratio for row in rows) > 1
    assert [line.split()[0] for line in format_domains(rows).splitlines()] == ["domain", *files]


@needs_corpora
@pytest.mark.reference("E17")
@pytest.mark.parametrize(
    ("file", "count"), [("c4_val.jsonl", 2000), ("gsm8k_test.jsonl", 1319), ("HumanEval.jsonl.gz", 164)]
)
def test_system_es_domains_have_their_counts(file, count):
    """All documents of the three files, not a sample."""
    assert sum(1 for _ in domain_documents(corpora() / file)) == count


def test_a_normalising_case_ops_model_counts_the_original_bytes(normalising_case_ops, tmp_path):
    """The tokens alone cannot tell what normalisation took away."""
    text = "Caf\ufb01  NASA  x"
    domain = read_domain("x", write_lines(tmp_path / "x.jsonl", [{"text": text}]), normalising_case_ops)
    assert domain.target_bytes.sum() == len(text.encode())


@pytest.mark.parametrize("choices", [["web"], ["=x.txt"], ["web="], ["a=x.txt", "a=y.txt"]])
def test_choices_without_name_or_file_are_refused(choices):
    """Two domains of one name would show one row."""
    with pytest.raises(UserError, match="NAME=FILE"):
        parse_domains(choices)


def test_bad_domain_files_are_errors_that_name_file_and_line(tmp_path, lossless_codec):
    """A missing file is found before a model is loaded; a line of unknown keys when it is read."""
    with pytest.raises(UserError, match="no such file"):
        parse_domains([f"web={tmp_path}/none.jsonl"])
    path = write_lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"title": "b"}])
    assert parse_domains([f"bad={path}"]) == {"bad": path}
    with pytest.raises(UserError, match=r"bad.jsonl:2: .*question and answer.*\['title'\]"):
        read_domain("bad", path, lossless_codec)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="found none"):
        read_domain("empty", tmp_path / "empty.jsonl", lossless_codec)
