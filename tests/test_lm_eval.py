"""Tasks of lm-evaluation-harness on a tiny model, from files of this machine, against the model itself."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fixtures_model import TINY
from fixtures_packing import leave_stand_in

import train_gpt
from common import UserError
from eval import lm_eval as command
from eval.hub import load
from eval.likelihood import Scorer
from formats.recipe import with_values
from scoring.generate import Sampling
from train_gpt import Config, Environment

pytestmark = pytest.mark.desk
harness = pytest.importorskip("lm_eval")

ROWS = [
    {"question": "a bead and", "choices": ["a cafe", "face", "a deed of dead bees"], "answer": 0},
    {
        "question": "be",
        "choices": ["ad", "ef and more words than a short context can hold at once"],
        "answer": 1,
    },
]
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
"""
TASKS = {
    "multiple_choice": """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
    "generate_until": """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def run_folder(tiny_data, tmp_path_factory) -> Path:
    """A complete run."""
    out = tmp_path_factory.mktemp("downstream")
    places = {"data.data_path": str(tiny_data), "data.tokenizer_path": str(tiny_data / "tokenizer.model")}
    values = {"run.out_dir": str(out), "run.run_id": "tiny"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "weigh_code", leave_stand_in)
        train_gpt.run(with_values(Config(), TINY | places | values, "test"), Environment({}))
    return out / "tiny"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of each kind; their rows lie beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for kind, body in TASKS.items():
        (folder / f"{kind}.yaml").write_text(HEAD.format(name=f"golf_{kind}", rows=rows, kind=kind) + body)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No task here needs a network, and none may wait for one."""
    import datasets.config

    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def results(run_folder, tasks, kind: str, capsys, *options) -> dict:
    """Run the command on one task; returns the row of results."""
    name = f"golf_{kind}"
    command.main([str(run_folder), "--tasks", name, "--include-path", str(tasks), "--json", *options])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["source"] == str(run_folder) and found["context_len"] == 16
    return found["results"][name]


@torch.no_grad()
def log_prob(scorer: Scorer, context: str, text: str) -> float:
    """The chain rule, a token at a time: each is predicted from all before it, of which there are few."""
    codec = scorer.codec
    tokens, known = [codec.bos_id, *codec.encode(context + text).tolist()], codec.encode(context).tolist()
    start = 1 + next((i for i, pair in enumerate(zip(known, tokens[1:])) if pair[0] != pair[1]), len(known))
    total = 0.0
    for place in range(start, len(tokens)):
        row = torch.tensor([tokens[:place][-16:]])
        total += scorer.model(row, row == codec.bos_id)[0, -1].double().log_softmax(-1)[tokens[place]].item()
    return total


def test_the_choice_is_the_likeliest_text(run_folder, tasks, capsys):
    """The accuracy of argmax over the choices, by brute force; long texts fit in the model's context."""
    scorer = Scorer.of(load(run_folder))
    rows = [row | {"choices": [text[:12] for text in row["choices"]]} for row in ROWS]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = 0
    for row in rows:
        costs = [log_prob(scorer, row["question"], " " + choice) for choice in row["choices"]]
        right += max(range(len(costs)), key=costs.__getitem__) == row["answer"]
    assert results(run_folder, tasks, "multiple_choice", capsys)["acc,none"] == right / len(rows)


def test_rolling_likelihood_is_that_of_the_whole_text(run_folder, tasks, capsys):
    """Bits a byte of all rows, their own UTF-8 bytes counted by the harness."""
    scorer = Scorer.of(load(run_folder))
    texts = [f"{row['question']} {row['choices'][0][:12]}" for row in ROWS]
    assert all(len(scorer.codec.encode(text)) <= 16 for text in texts)
    bits = -sum(log_prob(scorer, "", text) for text in texts) / math.log(2)
    found = results(run_folder, tasks, "loglikelihood_rolling", capsys)["bits_per_byte,none"]
    assert found == pytest.approx(bits / sum(len(text.encode()) for text in texts), rel=1e-4)


def test_generation_stops_where_the_task_says(run_folder, tasks, capsys, monkeypatch):
    """The harness gets what the model writes up to a stop, and counts it."""
    written = []
    whole = Scorer.continue_prompts

    def note(self, prompts, sampling, stops=()):
        written.append((list(prompts), sampling, stops))
        return whole(self, prompts, sampling, stops)

    monkeypatch.setattr(Scorer, "continue_prompts", note)
    assert results(run_folder, tasks, "generate_until", capsys)["exact_match,none"] == 0.0
    assert written == [([row["question"] for row in ROWS], Sampling(4, 0.0), ["\n", "e"])]


def test_the_limit_and_the_table(run_folder, tasks, capsys):
    """For people: one row a metric."""
    arguments = ["--tasks", "golf_multiple_choice,golf_generate_until", "--include-path", str(tasks)]
    command.main([str(run_folder), *arguments, "--limit", "1"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in said[1:]] == [
        ["golf_multiple_choice", "0", "acc"], ["golf_generate_until", "0", "exact_match"],
    ]  # fmt: skip


def test_a_record_folder_and_a_moved_artifact_are_scored(run_folder, tasks, tmp_path, capsys):
    """The artifact alone names its tokenizer's sha256; the file is named by an option."""
    shutil.copy(run_folder / "artifact.bin", tmp_path / "mine.bin")
    tokenizer = load(run_folder).cfg.data.tokenizer_path
    options = ["--tasks", "golf_multiple_choice", "--include-path", str(tasks), "--json"]
    command.main([str(tmp_path / "mine.bin"), "--tokenizer", tokenizer, *options])
    found = json.loads(capsys.readouterr().out)["results"]
    assert found["golf_multiple_choice"] == results(run_folder, tasks, "multiple_choice", capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["--tasks", "golf_multiple_choise"],
            "no such task. Did you mean golf_multiple_choice",
            marks=pytest.mark.slow,
        ),
        (["--tasks", ","], "expected names"),
        (["--tasks", "golf_generate_until", "--num-fewshot", "-1"], "from 0 on"),
        (["--tasks", "golf_gone"], r"cannot be loaded \(\w+: .*the network"),
        (["--tasks", "golf_odd"], r"generation_kwargs: .*num_beams"),
    ],
)
def test_bad_input_is_one_sentence(run_folder, tasks, tmp_path, words, message):
    """An unknown task, data that are not there, settings that this model has not."""
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    odd = (tasks / "generate_until.yaml").read_text()
    (folder / "odd.yaml").write_text(
        odd.replace("golf_generate_until", "golf_odd").replace("do_sample: false", "num_beams: 4")
    )
    gone = (tasks / "multiple_choice.yaml").read_text().replace("golf_multiple_choice", "golf_gone")
    (folder / "gone.yaml").write_text(gone.replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(UserError, match=message):
        command.main([str(run_folder), *words, "--include-path", str(folder)])


def test_settings_of_generation_are_read_as_the_harness_reads_them():
    """Greedy unless a task samples; the names of other backends for the length."""
    assert command.read_settings({}) == (Sampling(256, 0.0), [])
    assert command.read_settings({"until": "x", "max_new_tokens": 3}) == (Sampling(3, 0.0), ["x"])
    asked = {"until": ["x", ""], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 8}
    assert command.read_settings(asked) == (Sampling(8, 0.5, top_p=0.9), ["x"])
    assert command.read_settings(asked | {"do_sample": False})[0].temperature == 0.0


def test_spaces_at_the_end_of_a_context_are_the_texts():
    """As for every other model of the harness."""
    assert command.move_spaces("a: ", "b") == ("a:", " b")
    assert command.move_spaces("  ", "b") == ("", "  b")


def test_without_the_package_the_sentence_names_the_extra(monkeypatch):
    """What it says is what has to be typed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install '\.\[lm-eval\]'"):
        command.main(["runs/none", "--tasks", "any"])
