"""The leaderboard: every record with its own numbers, the best first, and what was not run said to be so."""

import json
import re
from pathlib import Path

import pytest
from fixtures_model import ROOT

from common import UserError, read_json
from dev import leaderboard

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.desk


def write_record(folder: Path, scores: dict, size: int = 900) -> None:
    folder.mkdir(parents=True)
    rows = {seed: {"val_bpb": bpb, "val_loss": 4.0, "artifact_bytes": size} for seed, bpb in scores.items()}
    (folder / "submission.json").write_text(json.dumps({"seed_results": rows}))
    (folder / "recipe.toml").write_text("[run]\nseed = 1\n")
    (folder / "README.md").write_text("# a record\n")
    lines = f"bytes of the submission\n  code                  {size:,} bytes\n  total       {size:,} bytes\n"
    for seed in scores:
        (folder / f"train_seed{seed}.log").write_text(lines)


def test_records_are_ranked_by_the_mean_of_their_seeds(tmp_path):
    """Tracks with scores come first; a recipe that was not run comes last and has none."""
    write_record(tmp_path / "b_track" / "2026-01-02_Better", {"1": 1.5, "2": 1.7}, 800)
    write_record(tmp_path / "b_track" / "2026-01-01_Base", {"1": 1.9})
    write_record(tmp_path / "b_track" / "2026-01-03_Waits", {})
    write_record(tmp_path / "a_track" / "Unnamed", {})
    found = leaderboard.read_entries(tmp_path)
    assert [one.name for one in found] == ["Better", "Base", "Waits", "Unnamed"]
    assert found[0].sample.mean == pytest.approx(1.6) and found[0].num_bytes == 800
    assert found[2].sample is None and found[3].day == ""


def test_the_page_shows_tables_charts_and_links(tmp_path):
    """A link a record that leads to it, the scores as they are, a chart of dates and one of bytes."""
    write_record(tmp_path / "records" / "track" / "2026-01-02_Better <&>", {"1": 1.5, "2": 1.7}, 800)
    write_record(tmp_path / "records" / "track" / "2026-99-99_Base", {"1": 1.9})
    out = tmp_path / "pages" / "board.html"
    leaderboard.main(["--records", str(tmp_path / "records"), "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    assert ">1.6000<" in text and ">0.1414<" in text and ">800<" in text and "Better &lt;&amp;&gt;" in text
    links = re.findall(r'<a href="(\.\.[^"]*)"', text)
    assert len(links) == 2 and (out.parent / links[1]).is_file()
    assert text.count("<svg") == 2 and "Progress: track" in text and "Bytes against score" in text


def test_the_repositorys_records_are_in_it(capsys):
    """Scores as the records state them."""
    leaderboard.main(["--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["records"] if row["sample"]}
    for name, row in rows.items():
        stated = read_json(ROOT / row["folder"] / "submission.json")
        assert row["sample"]["mean"] == pytest.approx(stated["val_bpb"]), name
        assert row["num_bytes"] == stated["artifact_bytes_max"], name
    assert len(rows) >= 2


def test_a_folder_without_records_is_named(tmp_path):
    """A typo in --records."""
    with pytest.raises(UserError, match="expected records"):
        leaderboard.main(["--records", str(tmp_path / "nothing")])


def test_bytes_that_nobody_weighed_are_not_zero(tmp_path, capsys):
    """None in JSON, and a page goes where it replaces nothing."""
    write_record(tmp_path / "track" / "2026-01-02_A", {"1": 1.5})
    (tmp_path / "track" / "2026-01-02_A" / "train_seed1.log").unlink()
    leaderboard.main(["--records", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["records"][0]["num_bytes"] is None
    kept = tmp_path / "track" / "2026-01-02_A" / "submission.json"
    before = kept.read_bytes()
    with pytest.raises(UserError, match=r"ends in \.html"):
        leaderboard.main(["--records", str(tmp_path), "--out", str(kept)])
    assert kept.read_bytes() == before
