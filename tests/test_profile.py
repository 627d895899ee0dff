"""The profile of a step: its times are a step's, its operators those that ran."""

import json

import pytest

from dev import profile
from formats.recipe import format_toml, get_recipe
from train_gpt import Training, phase_at


def test_operators_are_counted_a_step(tiny_config, alone):
    """Twice as many profiled steps say the same of one; the update counts as well as the gradient."""
    training = Training(tiny_config, alone, bos_id=1)
    phase = phase_at(tiny_config, 0, 0.0)
    short, long = (profile.profile_step(training, phase, steps, by_shape=False) for steps in (1, 2))
    calls = [{one.operator: one.calls for one in found.operators} for found in (short, long)]
    assert calls[0] == calls[1]
    assert {"aten::mm", "aten::_fused_adamw_"} <= calls[0].keys()
    assert sum(one.share for one in long.operators) == pytest.approx(1)
    assert long.forward_backward_ms > 0 < long.update_ms


def test_the_command_prints_a_table_or_one_object(tiny_config, tmp_path, capsys):
    """Of any recipe, at any share of its training; in 80 columns unless shapes are asked for."""
    path = tmp_path / "recipe.toml"
    path.write_text(format_toml(get_recipe(tiny_config, live=True)))
    stages = "schedule.stages=0:16:64:1:1:1,0.5:16:128:1:1:1"
    command = ["--recipe", str(path), "--steps", "1", "run.device=cpu", stages]
    profile.main([*command, "--rows", "3", "--at", "0.6", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["batch_tokens"], len(found["operators"])) == (128, 3)
    profile.main(command)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    profile.main([*command, "--shapes"])
    said = capsys.readouterr().out
    assert said.startswith("step of 64 tokens, float32, attention blocked, eager")
    assert "[[" in said
    for wrong in ("2", "x"):
        with pytest.raises(SystemExit):
            profile.main([*command, "--at", wrong])
