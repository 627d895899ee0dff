"""Weight decay as a size knob: bisection to a size, and real runs that are not repeated."""

import json

import pytest
from fixtures_model import as_overrides

import train_gpt
from common import UserError
from dev.decay_sweep import Point, bisect_decay, format_points, main
from formats.recipe import format_toml


def size_of(decay: float) -> Point:
    """A size that falls with decay: 1,000 bytes at 0, 500 at 1."""
    return Point(decay, round(1000 / (1 + decay)), 0, 5.0, 2.0)


def test_bisection_ends_at_the_smallest_decay_that_fits():
    """900 bytes are met at 1 / 9; ten halvings of [0, 1] come within a thousandth above it."""
    best = bisect_decay(size_of, 900, 1.0, 10)
    assert best.total_bytes <= 900 and 0 <= best.decay - 1 / 9 + 0.001 < 0.002
    assert bisect_decay(size_of, 1000, 1.0, 10).decay == 0


def test_a_size_out_of_reach_is_an_error_with_both_ends():
    """What to change is named."""
    with pytest.raises(UserError, match=r"1,000 bytes at decay 0 and 500 at 1\. Raise --high"):
        bisect_decay(size_of, 499, 1.0, 3)


def test_the_table_marks_the_choice():
    """Sorted by decay, each once."""
    lines = format_points([size_of(1.0), size_of(0.0), size_of(1.0)], size_of(1.0)).splitlines()
    assert len(lines) == 3 and lines[2].endswith("<-") and not lines[1].endswith("<-")


def test_runs_are_trained_once_and_reported(tiny_config, tmp_path, monkeypatch, capsys):
    """Six steps a decay; the second call finds the runs; another step count trains again."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(format_toml({"model": {"num_layers": 3}}))
    trained, run = [], train_gpt.run
    monkeypatch.setattr(train_gpt, "weigh_code", lambda folder: (1000, ""))
    monkeypatch.setattr(train_gpt, "run", lambda cfg, env: (trained.append(cfg), run(cfg, env)))
    overrides = as_overrides(tiny_config)
    command = ["--recipe", str(recipe), "--decays", "0,30", "--json", "--out", str(tmp_path), *overrides]
    found = []
    for _ in range(2):
        main(command)
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and len(trained) == 2 and found[0]["best"] is None
    weak, strong = found[0]["points"]
    assert weak["decay"] == 0 and strong["total_bytes"] == 1000 + strong["model_bytes"]
    assert strong["model_bytes"] < weak["model_bytes"] and strong["val_loss"] != weak["val_loss"]
    assert {cfg.optim.scalar_weight_decay for cfg in trained} == {0, 30}
    main([*command, "run.iterations=2"])
    assert len(trained) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --decays or --target-bytes"),
        (["--decays", "0", "--target-bytes", "9"], "either --decays or --target-bytes"),
        (["--decays", "a,b"], "numbers from 0 on, with commas"),
        (["--decays=-1"], "numbers from 0 on"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message, tiny_config, tmp_path):
    """Before anything is trained."""
    (tmp_path / "recipe.toml").write_text("[model]\nnum_layers = 3\n")
    with pytest.raises(UserError, match=message):
        main(["--recipe", str(tmp_path / "recipe.toml"), *arguments])
