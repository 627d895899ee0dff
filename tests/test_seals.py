"""Seals: what a file says is what was written, or a sentence says that it is not."""

import json
import re
from random import Random

import pytest

from common import UserError, append_text
from durable.reseal import main
from durable.seals import (
    append_event,
    digest_of,
    last_seal,
    read_events,
    read_sealed,
    split_events,
    write_events,
    write_sealed,
)
from formats.recipe import flatten_recipe, format_toml, get_recipe, read_recipe, seal_recipe
from train_gpt import Config

EVENTS = [{"kind": "train", "step": step, "train_loss": 2.0 / step} for step in range(1, 6)]


@pytest.fixture
def log(tmp_path):
    """A log of five events."""
    path = tmp_path / "metrics.jsonl"
    for event in EVENTS:
        append_event(path, event)
    return path


def test_facts_come_back_and_an_altered_value_is_refused(tmp_path):
    """Also one that is NaN, and one without any seal, as versions before wrote it."""
    path = tmp_path / "result.json"
    sealed = write_sealed(path, {"score": 1.25, "loss": [2.0, float("inf")], "name": "caf\u00e9"})
    assert read_sealed(path, "") == sealed and sealed["digest"] == digest_of(sealed)
    path.write_text(path.read_text().replace("1.25", "1.24"))
    with pytest.raises(UserError, match=r"result\.json: .* found another: .*Run again\. .*durable\.reseal "):
        read_sealed(path, "Run again.")
    path.write_text(json.dumps({"score": 1.25}))
    with pytest.raises(UserError, match="found none"):
        read_sealed(path, "")
    path.write_text("[1]")
    with pytest.raises(UserError, match="found none"):
        read_sealed(path, "")


def test_events_come_back_and_one_by_one_is_all_at_once(log, tmp_path):
    """A log that is written anew is the log."""
    assert read_events(log) == EVENTS
    write_events(tmp_path / "other.jsonl", EVENTS)
    assert (tmp_path / "other.jsonl").read_bytes() == log.read_bytes()
    assert last_seal(tmp_path / "none.jsonl") == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda lines: [*lines[:2], lines[2].replace("train_loss", "train_lost"), *lines[3:]], 3),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines, lines[-1]], 6),
        (lambda lines: [*lines[:4], ""], 5),
    ],
)
def test_a_log_with_a_line_altered_lost_moved_or_doubled_is_refused(log, damage, line):
    """What stood before the line is still there for who wants it."""
    log.write_text("".join(f"{text}\n" for text in damage(log.read_text().splitlines())))
    with pytest.raises(UserError, match=rf"metrics\.jsonl:{line}: expected an event as it was written"):
        read_events(log)
    assert split_events(log)[0] == EVENTS[: line - 1]


def test_what_a_kill_cut_off_is_no_fault(log):
    """The line has no end."""
    append_text(log, '{"kind": "tr')
    assert read_events(log) == EVENTS


def test_a_written_recipe_is_read_back_until_a_value_changes(tmp_path):
    """What a person changes has a line less, and is a recipe like any other."""
    path, recipe = tmp_path / "recipe.toml", get_recipe(Config())
    path.write_text(seal_recipe(recipe))
    (tmp_path / "plain.toml").write_text(format_toml(recipe))
    assert read_recipe(path) == read_recipe(tmp_path / "plain.toml")
    assert read_recipe(path).keys() == flatten_recipe(recipe, "").keys()
    changed = path.read_text().replace("beta1 = 0.9\n", "beta1 = 0.8\n")
    path.write_text(changed)
    with pytest.raises(UserError, match="remove the line of the digest"):
        read_recipe(path)
    path.write_text(re.sub(r"^digest.*\n", "", changed))
    assert read_recipe(path)["optim.beta1"] == 0.8


def test_a_recipe_of_a_run_cut_off_anywhere_is_refused(tmp_path):
    """One of a person's: where its last line does not end."""
    path, text = tmp_path / "recipe.toml", seal_recipe(get_recipe(Config()))
    dice = Random(1)
    for end in [text.index("\n[") + 1, *(dice.randrange(90, len(text) - 2) for _ in range(100))]:
        path.write_text(text[:end])
        with pytest.raises(UserError, match=r"recipe\.toml: "):
            read_recipe(path)
    path.write_text("[optim]\nmatrix_lr = 0.0")
    with pytest.raises(UserError, match=r"a last line that ends, found 'matrix_lr = 0\.0'"):
        read_recipe(path)


def test_files_that_a_person_changed_are_sealed_again(tmp_path, log, capsys):
    """Results and logs; without a seal before, too."""
    result = tmp_path / "result.json"
    result.write_text('{"score": 1.5}')
    log.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    main([str(result), str(log)])
    assert read_sealed(result, "")["score"] == 1.5 and read_events(log) == EVENTS
    assert capsys.readouterr().out.count("sealed as it is") == 2
    result.write_text("[1]")
    with pytest.raises(UserError, match=r"expected one of result\*\.json, .* found another file"):
        main([str(result)])


def test_events_may_hold_what_is_no_number(tmp_path):
    """A run whose loss becomes NaN logs it and stops; its log must stay readable."""
    path = tmp_path / "metrics.jsonl"
    append_event(path, {"kind": "train", "step": 1, "train_loss": float("nan")})
    append_event(path, {"kind": "train", "step": 2, "train_loss": 1.0})
    events, fault = split_events(path)
    assert [event["step"] for event in events] == [1, 2] and not fault


def test_lines_that_are_no_events_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for event in ({"kind": "train", "step": 1}, {"kind": "train", "step": "x"}):
        append_event(path, event)
    events, fault = split_events(path)
    assert len(events) == 1 and "metrics.jsonl:2:" in fault
