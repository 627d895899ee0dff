"""The report: sections from real facts, runs compared, bad input named, a page that fits a phone."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fixtures_model import ROOT, TINY
from fixtures_packing import leave_stand_in
from fixtures_runs import ORIGIN, write_run

import train_gpt
from common import UserError, parse_json
from dev.desk.runs import read_run, read_runs
from eval.breakdown import BreakdownRow
from formats.codes_encode import encode_codes
from formats.recipe import with_values
from scoring.sliding import ScoreOptions, plan_windows, score_windows
from train_gpt import Config, Environment

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from dev.report import __main__ as report
from dev.report import compare, costs, page, series, sizes

pytestmark = pytest.mark.desk

RECORD = ROOT / "records" / "track_cpu" / "2026-11-21_NaiveBaseline"
SECTIONS = ["runs", "loss", "schedule", "bytes", "quantization", "bits", "clocks", "environment", "audit"]
SECTIONS += ["samples", "recipes"]
VOID = {"meta", "link", "br", "img", "use", "path", "rect"}


@pytest.fixture(scope="module")
def trained_run(tiny_data, tmp_path_factory) -> Path:
    """A real run of six steps, with its artifact."""
    out = tmp_path_factory.mktemp("report")
    places = {"data.data_path": str(tiny_data), "data.tokenizer_path": str(tiny_data / "tokenizer.model")}
    values = {"run.out_dir": str(out), "run.run_id": "tiny", "run.val_loss_every": 3, "watch.sample_every": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "weigh_code", leave_stand_in)
        train_gpt.run(with_values(Config(), TINY | places | values, "test"), Environment({}))
    return out / "tiny"


class Page(HTMLParser):
    """A page's ids, texts by tag, and what it would load; tags must close."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.loads, self.open, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loads += [attrs[key] for key in ("src", "href", "xlink:href") if key in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def make(tmp_path: Path, *args) -> str:
    out = tmp_path / "page.html"
    report.main([*map(str, args), "--out", str(out)])
    return out.read_text(encoding="utf-8")


def test_a_run_fills_every_section(trained_run, tmp_path, capsys):
    """Nothing is missing but what was not measured; nothing is loaded from anywhere; ids are unique."""
    text = make(tmp_path, trained_run, "--tokens", "400")
    found = Page(text)
    assert [name for name in found.ids if name in SECTIONS] == SECTIONS
    assert all(place.startswith("#") for place in found.loads) and "script" not in found.tags
    assert "url(http" not in text and "@import" not in text
    assert len(set(found.ids)) == len(found.ids)
    run = read_run(trained_run)
    assert f"{run.val_bpb:.5f}" in text and "blocks.0.mlp.up.weight" in text
    assert "in training, step:3" in text and "Cost of quantization" in text
    assert len(text.encode()) < 3_000_000 and "made in" in capsys.readouterr().out


def test_every_chart_has_words_and_follows_the_page(trained_run, tmp_path):
    """A title and a description a chart; no colour but the page's own."""
    text = make(tmp_path, trained_run, "--tokens", "300")
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) > 9
    for svg in charts:
        assert re.search(r'role="img"><title>.+?</title><desc>.+?</desc>', svg, re.DOTALL)
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that dark paper hides"
        assert "viewBox" in svg and not re.search(r"<svg[^>]* width=", svg)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_costs_are_those_of_the_model(trained_run):
    """Against a plain scoring of the same windows; bits add up by every table."""
    run = read_run(trained_run)
    found = costs.measure_costs(run, None, 300, math.inf)
    model = costs.open_model(run)
    tokens = train_gpt.load_validation(model.cfg.data).tokens[:301]
    options = ScoreOptions(model.codec.bos_id, 512)
    nats = score_windows(model.gpt, tokens, plan_windows(300, 16), options).numpy()
    bits = nats / math.log(2)
    assert [piece.bits for piece in found.pieces] == pytest.approx(bits.tolist(), rel=1e-4)
    text = "".join(piece.text for piece in found.pieces).replace("\u00b6\n", "")
    assert text == model.codec.decode(tokens[1:].tolist()).decode("utf-8", "replace")
    totals = {title: sum(row.bits for row in rows) for title, rows in found.tables.items()}
    assert list(totals.values()) == pytest.approx([bits[: found.num_tokens].sum()] * 4, rel=1e-4)
    assert not found.is_cut


def test_scoring_ends_when_the_time_is_up(trained_run, monkeypatch):
    """At least one batch, and it says that it was cut."""
    monkeypatch.setattr(costs, "BATCH_TOKENS", 64)
    found = costs.measure_costs(read_run(trained_run), None, 100_000, -math.inf)
    assert found.is_cut and 0 < found.num_tokens <= costs.BATCH_TOKENS


def test_a_text_of_ones_own_is_the_heat_map(trained_run, tmp_path):
    """Its letters stand in the page, escaped."""
    essay = tmp_path / "essay.txt"
    essay.write_text("abba <b>&</b> cafe", encoding="utf-8")
    text = make(tmp_path, trained_run, "--tokens", "200", "--text", essay)
    spans = re.findall(r'<span class="h\d" title="[\d.]+ bits">(.*?)</span>', text, re.DOTALL)
    assert "".join(spans).strip() == "abba &lt;b&gt;&amp;&lt;/b&gt; cafe"


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b""])
def test_a_text_that_is_none_is_said(trained_run, tmp_path, content):
    """The rest of the report is made."""
    essay = tmp_path / "essay.txt"
    essay.write_bytes(content)
    assert "essay.txt: expected" in make(tmp_path, trained_run, "--tokens", "200", "--text", essay)


def test_tensors_add_up_to_the_streams(trained_run):
    """Of an artifact by a general compressor and of an entropy coded one."""
    for path in (
        trained_run / "artifact.bin",
        RECORD.parent / "2026-11-21_Sp2048_LoraScoring" / "artifact.bin",
    ):
        header, streams = sizes.read_artifact(path)
        used = [streams[name] for name in sizes.STREAM_DTYPES if name in streams]
        stored = sum(len(stream.stored) for stream in used if stream.raw_bytes)
        found = sizes.tensor_sizes(path)
        assert sum(row.num_bytes for row in found) == pytest.approx(stored, rel=1e-6)
        assert [row.name for row in found] == [row[0] for row in header["tensors"]]
        assert all(0 <= row.bits <= 33 for row in found)


def test_words_are_counted_for_the_matrix_that_they_code():
    """A matrix of noise takes its eight bits a code, one of zeros next to nothing; all words are counted."""
    noise = np.random.default_rng(0).integers(-127, 128, (64, 256)).astype(np.int8)
    matrices = [np.zeros((64, 256), np.int8), noise, np.zeros((2, 3), np.int8)]
    blob = encode_codes(matrices)
    counts = sizes.count_words(blob, [matrix.shape for matrix in matrices])
    assert 2 * counts[1] == pytest.approx(noise.size, rel=0.05) and counts[0] < 0.02 * counts[1]
    assert 2 * counts.sum() == pytest.approx(len(blob), abs=64)


def test_the_schedule_is_the_trainers(tmp_path):
    """Rates and tokens of each step, where the recipe changes the batch on its way."""
    changes = {"schedule.stages": ((0, 16, 64, 1, 0.5, 1), (0.5, 16, 128, 4, 1, 1)), "run.iterations": 40}
    run = read_run(write_run(tmp_path / "a", 1, 2.2, changes=changes))
    cfg, note = series.read_config(run)
    found = series.read_series(run, cfg)
    expected = [train_gpt.step_rates(cfg, step, 0.0).lr_mul for step in range(40)]
    assert [rate.lr_mul for rate in found.schedule.rates] == pytest.approx(expected)
    assert found.tokens[-1] == 20 * 64 + 20 * 128 and note == ""
    assert [row[0] for row in found.schedule.phases] == [1, 21]
    assert series.decile_speeds(found) == pytest.approx((640, 1280))
    assert series.find_speed(found)[1].sum() > 0


def test_a_long_run_is_put_into_groups(tmp_path):
    """Twenty thousand steps make a chart, not megabytes; the last step and the mean loss stay."""
    run = read_run(write_run(tmp_path / "a", 1, 2.2, steps=4000))
    found = series.read_series(run, None)
    assert len(found.steps) == series.MOST_GROUPS and found.steps[-1] == 4000
    losses = [event["train_loss"] for event in run.events if event["kind"] == "train"]
    assert np.average(found.loss, weights=np.diff(found.steps, prepend=0)) == pytest.approx(np.mean(losses))


def write_groups(tmp_path: Path) -> list:
    """Two recipes of three seeds; the second is lower by 0.05."""
    for name, shift, changes in (("old", 0.0, {}), ("new", -0.05, {"model.num_layers": 2})):
        for seed, noise in ((1, 0.0), (2, 0.004), (3, -0.003)):
            write_run(tmp_path / f"{name}_{seed}", seed, 2.2 + shift + noise, changes=changes)
    return read_runs([*sorted(tmp_path.glob("old_*")), *sorted(tmp_path.glob("new_*"))])


def test_recipes_are_told_apart_and_seeds_belong_together(tmp_path):
    """Groups by recipe, what differs, and the statistics of eval.stats."""
    runs = write_groups(tmp_path)
    configs = [series.read_config(run)[0] for run in runs]
    groups = compare.group_runs(runs, configs)
    assert [(group.name, len(group.runs)) for group in groups] == [("old", 3), ("new", 3)]
    assert compare.differences(groups) == [("model.num_layers", ["3", "2"])]
    (verdict,) = compare.judge(groups)
    assert verdict.difference == pytest.approx(-0.05)
    assert verdict.welch < 1e-4 and verdict.paired < 1e-4 and verdict.seeds_needed == 2
    low, high = verdict.interval
    assert low < -0.05 < high < 0 and high + 0.05 == pytest.approx(-0.05 - low)
    assert compare.weaknesses(groups) == []


def test_what_makes_a_comparison_weak_is_said(tmp_path):
    """Other machine and data, over a limit, unfinished, another text."""
    write_run(tmp_path / "a", 1, 2.2)
    other = ORIGIN | {"machine": {"cpu": "two"}, "data": "d2"}
    write_run(tmp_path / "b", 1, 2.1, changes={"origin": other, "over_limits": ["bytes 5 of 4"]})
    write_run(tmp_path / "c", 2, None)
    write_run(tmp_path / "d", 2, 2.3, steps=60)
    runs = read_runs([tmp_path])
    groups = compare.group_runs(runs, [series.read_config(run)[0] for run in runs])
    said = "\n".join(compare.weaknesses(groups))
    limit = "b: NOT A VALID RUN: over its limit of bytes 5 of 4"
    for expected in ("c: no score", limit, "different machines", "different data", "from 40 to 60 steps"):
        assert expected in said
    assert "different code" not in said


def test_several_runs_and_a_record_are_one_page(tmp_path):
    """Overlays, a table of differences, statistics; a run that broke off is in it."""
    folders = tmp_path / "runs"
    folders.mkdir()
    write_groups(folders)
    broken = write_run(folders / "broken <x>", 9, None)
    path = broken / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    text = make(tmp_path, folders, RECORD, "--tokens", "0")
    assert "Fields that differ" in text and "model.num_layers" in text and "p, paired seeds" in text
    assert "broken &lt;x&gt;: no score" in text and "cut off" in text and "<x>" not in text
    assert "Audit of 2026-11-21_NaiveBaseline" in text and "not scored, as --tokens 0 says" in text
    Page(text)


def test_fields_of_another_version_are_named(tmp_path):
    """A recipe of a later version is read as far as it is known."""
    folder = write_run(tmp_path / "a", 1, 2.2)
    (folder / "recipe.toml").write_text("[model]\nnum_layers = 2\nwarp = 9\n")
    text = make(tmp_path, folder, "--tokens", "0")
    assert "fields that this version does not know: model.warp" in text
    (folder / "recipe.toml").write_text('[model]\nnum_layers = "many"\n')
    assert "expected a whole number" in make(tmp_path, folder, "--tokens", "0")


def test_measured_quantization_is_shown(tmp_path):
    """What dev.quant_report wrote; a file that is none is named."""
    folder = write_run(tmp_path / "a", 1, 2.2)
    rows = [{"name": "embed.weight", "val_bpb_cost": 0.01}, {"name": "head", "val_bpb_cost": -0.001}]
    facts = {"step": 6, "val_bpb": 2.1, "quantized_val_bpb": 2.2, "tokens": 2000, "tensors": rows}
    (folder / page.QUANT_REPORT).write_text(json.dumps(facts))
    text = make(tmp_path, folder, "--tokens", "0")
    assert "2.10000 with float weights" in text and "Dearest: embed.weight: +0.01000" in text
    (folder / page.QUANT_REPORT).write_text("{}")
    assert "not what dev.quant_report writes" in make(tmp_path, folder, "--tokens", "0")


def test_a_damaged_artifact_is_a_sentence(trained_run, tmp_path):
    """The rest of the report is made."""
    folder = shutil.copytree(trained_run, tmp_path / "copy")
    blob = bytearray((folder / "artifact.bin").read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / "artifact.bin").write_bytes(blob)
    text = make(tmp_path, folder, "--tokens", "100")
    assert "no: another, or it is not there" in text and "the folder holds no artifact of this seed" in text


def test_json_is_one_object(tmp_path, capsys):
    """For programs."""
    write_run(tmp_path / "a", 1, 2.2)
    report.main([str(tmp_path / "a"), "--out", str(tmp_path / "r.html"), "--json", "--tokens", "0"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"][0]["val_bpb"] == 2.2 and facts["bytes"] == (tmp_path / "r.html").stat().st_size


def test_bad_input_is_a_sentence(tmp_path, monkeypatch):
    """Nothing to read, nothing to write to, a package that is not there."""
    run = write_run(tmp_path / "a", 1, 2.2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected a run"):
        report.main([str(tmp_path / "empty")])
    kept = (run / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"ends in \.html"):
        report.main([str(run), "--out", str(run / "result.json")])
    assert (run / "result.json").read_bytes() == kept
    (tmp_path / "text.html").write_text("a text")
    with pytest.raises(UserError, match="a file that is read"):
        report.main([str(run), "--text", str(tmp_path / "text.html"), "--out", str(tmp_path / "text.html")])
    for option, value in (("--tokens", "-3"), ("--seconds", "nan"), ("--seconds", "soon")):
        with pytest.raises(SystemExit):
            report.main([str(run), option, value])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="pip install"):
        report.main([str(run), "--out", str(tmp_path / "r.html")])
    assert not (tmp_path / "r.html").exists()


def test_an_odd_folder_does_not_end_the_page(tmp_path):
    """Fields of other kinds are noted; JSON has null where a score is no number."""
    odd = write_run(
        tmp_path / "runs" / "odd", 1, 2.2, changes={"over_limits": 7, "steps": "many", "places": [1]}
    )
    (odd / "recipe.toml").write_text("[run]\nmax_wallclock_seconds = 'NaN'\n")
    write_run(tmp_path / "runs" / "nan", 2, math.nan)
    text = make(tmp_path, tmp_path / "runs", "--tokens", "0")
    assert "something else than expected: steps, places, over_limits" in text


def test_json_has_no_word_for_nan(tmp_path, capsys):
    write_run(tmp_path / "a", 1, math.nan)
    report.main([str(tmp_path / "a"), "--out", str(tmp_path / "r.html"), "--json", "--tokens", "0"])
    assert parse_json(capsys.readouterr().out, "stdout")["runs"][0]["val_bpb"] is None


def test_scores_of_weights_are_said_to_be(tmp_path):
    """In the subtitle, and they keep no limit of bytes."""
    folder = write_run(tmp_path / "a", 1, 2.2)
    (folder / "result.json").rename(folder / "weights.json")
    text = make(tmp_path, folder, "--tokens", "0")
    assert "measured from float weights" in text and ">kept<" not in text
    write_run(tmp_path / "b", 1, 2.3)
    assert "where a run is said to be of weights" in make(tmp_path, folder, tmp_path / "b", "--tokens", "0")


def test_many_runs_have_one_legend_a_section(tmp_path):
    """Each chart of lines is without its own; every run is named in it once."""
    for i in range(5):
        write_run(tmp_path / "runs" / f"run{i}", i, 2.2 + i / 100)
    text = make(tmp_path, tmp_path / "runs", "--tokens", "0")
    loss = text[text.index('id="loss"') : text.index('id="schedule"')]
    assert loss.count('class="legend"') == 1 and loss.count("<li>") == 5
    assert "run3</li>" in loss and ">run3<" not in loss


def stub_costs(text: str, num_bytes: int) -> costs.Costs:
    rows = [BreakdownRow("letters", 10, 30.0, num_bytes)]
    pieces = [costs.Piece("a", 3.0, 1)]
    return costs.Costs(9, num_bytes, (text,), 3.0, {"kind": rows}, "a text", pieces, 2, ("a", "b"), False)


def test_only_what_scored_the_same_text_shares_a_chart(tmp_path):
    """Two of one text are in one chart, the third has its own; bytes are told."""
    for name in "abc":
        write_run(tmp_path / name, 1, 2.2)
    facts = report.collect(read_runs([tmp_path / name for name in "abc"]), None, 0, 0.0)
    facts = facts._replace(
        costs={"a": stub_costs("x", 10), "b": stub_costs("x", 10), "c": stub_costs("y", 12)}
    )
    blocks = page.bits(facts).blocks
    assert [len(block.value) for block in blocks if block.kind == "figures"] == [1, 1]
    said = " ".join(str(block.value) for block in blocks)
    assert "do not compare" in said and "12 bytes" in said and "letters (n 12)" in said
    assert "1 tokens, 2 bytes, 3 bits, 1.5000 bits a byte" in said


def test_clocks_are_spelled_without_a_negative_nothing():
    assert [page.spell_left(one) for one in (0.0, -0.0004, -0.061, 1234.5)] == [
        "0.00",
        "-0.0004",
        "-0.06",
        "1,234.50",
    ]


def test_the_same_data_at_two_places_are_no_difference(tmp_path):
    """By digest, else by where the path leads; a version keeps its colons."""
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    groups = [compare.Group(name, [read_run(write_run(tmp_path / name, 1, 2.2))], None) for name in "ab"]
    places = [str(tmp_path / "data"), str(tmp_path / "link")]
    assert len(set(compare.identities("data.data_path", ["x", "y"], groups))) == 1
    silent = [group._replace(runs=[group.runs[0]._replace(result=None)]) for group in groups]
    assert len(set(compare.identities("data.data_path", places, silent))) == 1
    assert len(set(compare.identities("data.data_path", ["x", "y"], silent))) == 2
    log = (
        groups[0].runs[0].log._replace(text="Running Python 3.11.7 (May  9 2026, 07:35:25)\ndevice:cpu x:1\n")
    )
    said = page.describe_origin(silent[0].runs[0]._replace(log=log))
    assert said["python"] == "3.11.7 (May  9 2026, 07:35:25)" and said["device"] == "cpu x:1"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser")
def test_no_page_is_wider_than_a_phone(trained_run, tmp_path):
    """At 390 and at 1280 pixels, light and dark: no overflow, no error, no request."""
    playwright = pytest.importorskip("playwright.sync_api")
    make(tmp_path, trained_run, RECORD, "--tokens", "400")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "light")):
            tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            said, asked = [], []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto((tmp_path / "page.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert said == [] and len(asked) == 1
        browser.close()


@pytest.mark.slow
def test_the_command_runs_from_outside(trained_run, tmp_path):
    """As somebody types it."""
    command = [
        sys.executable,
        "-m",
        "dev.report",
        str(trained_run),
        "--out",
        str(tmp_path / "r.html"),
        "--json",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["seconds"] > 0
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
