"""The training clock: what follows training is timed before, reserved, and done in what is left."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from common import read_json
from formats.recipe import with_values
from train_gpt import (
    Clock,
    Environment,
    Log,
    Training,
    count_ngrams,
    do_jobs,
    expected_seconds,
    fit_scales,
    timed_batches,
    training_ms,
    warm_up,
)

CALIBRATED = {
    "quant.method": "gptq",
    "quant.calib_batches": 16,
    "quant.float16_numel": 0,
    "run.max_wallclock_seconds": 20.0,
    "run.val_loss_every": -1,
}


class SlowMachine:
    """A clock that only moves when a piece of work says what it took."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        ticks = itertools.count(0.0, 1e-9)
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: self.now + next(ticks))

    def slow(self, seconds, function):
        """Return the function, with each call taking so long; seconds may be a function of its arguments."""

        def taking(*args, **keywords):
            self.now += seconds(*args) if callable(seconds) else seconds
            return function(*args, **keywords)

        return taking


@pytest.fixture
def machine(monkeypatch):
    return SlowMachine(monkeypatch)


@pytest.fixture
def training(tiny_config, alone):
    return Training(with_values(tiny_config, CALIBRATED, "test"), alone, bos_id=1)


class Card:
    """Ranks on a device whose clock should not be read often."""

    device = torch.device("cuda")

    def __init__(self):
        self.readings = 0

    def synchronize(self) -> None:
        self.readings += 1

    def agree(self, value: float) -> float:
        return value


@pytest.mark.parametrize("tick_ms", [3.0, 140.0, 4000.0])
def test_a_gpus_clock_is_read_once_a_second_and_never_passes_the_limit(tick_ms, machine):
    """Ticks of one pace: at most one of them is over; what the clock shows in between is right, too."""
    card, limit_ms = Card(), 20_000.0
    clock = Clock(card, 0.0, limit_ms)
    clock.start()
    shown, ticks = 0.0, 0
    while shown < limit_ms:
        machine.now += tick_ms / 1000
        ticks += 1
        shown = clock.tick()
        assert shown == pytest.approx(ticks * tick_ms, rel=1e-4)
    assert clock.ticks == 0 and ticks == math.ceil(limit_ms / tick_ms)
    assert card.readings <= 2 + min(ticks, 20 + math.log2(limit_ms / tick_ms) + 2)


def test_a_gpus_clock_holds_its_limit_when_steps_become_slower(machine):
    """Between readings at most half of what is left is spent at the pace so far; time does not run back."""
    clock = Clock(Card(), 0.0, 10_000.0)
    clock.start()
    shown, spent = [0.0], 0.0
    while shown[-1] < 10_000.0:
        step = 0.010 if spent < 5 else 0.018
        machine.now, spent = machine.now + step, spent + step
        shown.append(clock.tick())
    assert shown == sorted(shown) and spent == pytest.approx(10.0, abs=0.02)


def test_losses_are_reported_after_every_reading_of_the_clock(tiny_config, alone, monkeypatch, tmp_path):
    """Wherever in a step it was read: with four micro-batches a step its end may never be the moment."""
    reported = []
    monkeypatch.setattr(
        train_gpt, "report_losses", lambda *args: (reported.append(len(args[2])), args[2].clear())
    )
    read_at = {2, 9, 18, 31}

    def tick(self):
        self.ticks += 1
        self.has_waited |= self.ticks in read_at
        return 0.0

    monkeypatch.setattr(Clock, "tick", tick)
    fields = {
        "data.micro_batches": 4,
        "run.iterations": 9,
        "run.train_log_every": 0,
        "run.val_loss_every": -1,
    }
    training = Training(with_values(tiny_config, fields, "test"), alone, bos_id=1)
    train_gpt.train(training, Log(tmp_path, True), lambda: None)
    assert reported == [1, 2, 2, 3, 1]


def test_a_cpus_clock_is_read_at_every_tick(machine, alone):
    clock = Clock(alone)
    clock.start()
    for i in range(1, 6):
        machine.now += i
        assert clock.tick() == pytest.approx(500 * i * (i + 1), rel=1e-3) and clock.ticks == 0


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 2), (2.5, 2), (7.2, 7), (99.0, 16), (math.inf, 16)])
def test_batches_end_within_their_seconds(training, machine, seconds, expected):
    """The next one is taken only if it ends in time at the pace so far; two are the least."""
    taken = 0
    for _ in timed_batches(training, seconds):
        machine.now += 1.0
        taken += 1
    assert taken == expected


def test_a_job_gets_what_is_left_of_the_clock(training, machine, monkeypatch, tmp_path):
    """A machine that became half as fast since the warm-up calibrates on fewer batches and is in time."""
    monkeypatch.setattr(train_gpt, "mean_loss", machine.slow(0.5, train_gpt.mean_loss))
    training.job_seconds = expected_seconds(training)
    assert training.job_seconds == pytest.approx({"batches": 8.0}, rel=1e-3)
    training.reserve_ms, training.train_ms = 8800.0, 11_900.0
    machine.now = 100.0
    monkeypatch.setattr(train_gpt, "mean_loss", machine.slow(0.5, train_gpt.mean_loss))  # 1 s each now
    found = do_jobs(training, Log(tmp_path, True))
    assert len(found["batches"]) > 4
    assert training.calibration_ms == pytest.approx(8000.0, rel=1e-3)
    assert "calibration_time:8000ms reserve:8800ms batches:8/16" in (tmp_path / "train.log").read_text()


def test_fewer_tokens_are_counted_in_less_time(tiny_config, alone, machine, monkeypatch):
    """A sixteenth tells the pace; the whole is counted where there is time for it."""
    changes = {"eval.tilt_static_entries": 16, "eval.tilt_static_tokens": 1600}
    training = Training(with_values(tiny_config, changes, "test"), alone, bos_id=1)
    slow = machine.slow(lambda settings, vocab_size, shards, count: count / 100, train_gpt.build_scorer_state)
    monkeypatch.setattr(train_gpt, "build_scorer_state", slow)
    for seconds, expected in ((0.0, 100), (1.5, 100), (9.81, 400), (36.3, 1600), (math.inf, 1600)):
        started = machine.now
        state, done, whole = count_ngrams(training, seconds)
        assert (done, whole) == (expected, 1600)
        assert len(state.table.keys) > 0
        if 0 < seconds < math.inf:
            assert machine.now - started <= seconds


@pytest.mark.parametrize("seconds", [3.0, 9.81, 20.0])
def test_counting_ends_in_time_where_many_tokens_take_twice_as_long(
    seconds, tiny_config, alone, machine, monkeypatch
):
    """As on a processor with small caches: the pace of a sixteenth is not that of the whole."""
    changes = {"eval.tilt_static_entries": 16, "eval.tilt_static_tokens": 1600}
    training = Training(with_values(tiny_config, changes, "test"), alone, bos_id=1)
    slow = machine.slow(
        lambda settings, vocab_size, shards, count: count / 100 * (1 + (count > 100)),
        train_gpt.build_scorer_state,
    )
    monkeypatch.setattr(train_gpt, "build_scorer_state", slow)
    started = machine.now
    assert count_ngrams(training, seconds)[1] >= 100 and machine.now - started <= seconds


def test_scales_are_fitted_to_as_many_batches_as_there_is_time_for(training, machine, monkeypatch):
    """All Newton steps read the same batches."""
    seen, forward = [], training.model.forward

    def watched(tokens, starts_doc):
        seen.append(tokens)
        return forward(tokens, starts_doc)

    training.model.forward = machine.slow(1.0, watched)
    scales, done, whole = fit_scales(training, 10.1)
    assert (done, whole, len(seen)) == (5, 16, 10)
    assert all(np.isfinite(scales))
    for first, again in zip(seen[:5], seen[5:], strict=True):
        assert first is again


def test_the_reserve_is_at_least_the_recipes_and_at_most_half(tiny_config):
    """Without a clock there is nothing to reserve."""
    cfg = with_values(tiny_config, {"run.max_wallclock_seconds": 100.0}, "test")
    assert [training_ms(cfg, reserve) for reserve in (0.0, 7e3, 70e3)] == [100e3, 93e3, 50e3]
    cfg = with_values(cfg, {"quant.reserve_seconds": 60.0}, "test")
    assert [training_ms(cfg, reserve) for reserve in (0.0, 7e3, 70e3)] == [40e3, 40e3, 40e3]
    cfg = with_values(cfg, {"run.max_wallclock_seconds": 0.0}, "test")
    assert training_ms(cfg, 5e3) == math.inf


def test_the_warm_up_reserves_and_leaves_no_trace(training, machine, monkeypatch, tmp_path):
    """Calibration's part and one step, which may end late; the loader is back where it was."""
    before = training.loader.state_dict()
    monkeypatch.setattr(train_gpt, "mean_loss", machine.slow(0.25, train_gpt.mean_loss))
    training.loss = machine.slow(0.125, training.loss)
    warm_up(training, Log(tmp_path, True))
    assert training.loader.state_dict() == before
    assert training.job_seconds == pytest.approx({"batches": 4.0}, rel=1e-3)
    assert training.reserve_ms == pytest.approx(1.1 * 4000 + 125, rel=1e-3)


@pytest.mark.usefixtures("stand_in_program")
def test_a_whole_run_is_within_its_clock(tiny_config):
    """Two seconds of real time: training and calibration end within them."""
    changes = {"run.max_wallclock_seconds": 2.0, "run.iterations": 100_000, "run.train_log_every": 0}
    cfg = with_values(tiny_config, CALIBRATED | changes, "test")
    train_gpt.run(cfg, Environment({}))
    folder = Path(cfg.run.out_dir) / cfg.run.run_id
    result = read_json(folder / "result.json")
    assert result["over_limits"] == []
    assert result["train_ms"] + result["calibration_ms"] <= 2000
    log = (folder / "train.log").read_text()
    assert re.search(r"^calibration_time:\d+ms reserve:\d+ms batches:\d+/16$", log, re.MULTILINE)
