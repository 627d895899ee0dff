"""Ranks that are gone, stopped or late: who notices, who says it, and how often."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from fixtures_model import ROOT, as_overrides, run_python
from fixtures_packing import UNPACKED_ENVIRONMENT
from fixtures_peers import SCRIPT

import train_gpt
from common import UserError, read_json
from durable import peers
from durable.peers import LOST, OWN, PeerError, Peers, message, phase_of, speaks
from formats.recipe import with_values
from train_gpt import Environment, Ranks, read_environment

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


class FakeStore:
    """A launcher's store in one process."""

    def __init__(self):
        self.texts: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.texts[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.texts[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.texts for key in keys)


@pytest.fixture
def three() -> list[Peers]:
    """Three ranks on two hosts."""
    store = FakeStore()
    found = [Peers(store, rank, 3) for rank in range(3)]
    for peer, place in zip(found, ("host:a device:cuda:0", "host:a device:cuda:1", "host:b device:cuda:0")):
        peer.tell("place", place)
    return found


# Without processes


def test_ranks_meet_when_all_are_there(three):
    """Each waits for the others, once a meeting; the last one waits for nobody."""
    for peer in three[:2]:
        with pytest.raises(PeerError, match=r"waited 0 s for .*rank 2 \(host:b device:cuda:0\)"):
            peer.meet(0.0)
    three[2].meet(0.0)
    with pytest.raises(PeerError):  # the second meeting is another one
        three[2].meet(0.0)


def test_nobody_waits_for_a_rank_that_ended(three):
    """Where rank 0 works alone its error would leave the others waiting for an hour."""
    three[0].tell("error", OWN)
    with pytest.raises(PeerError, match="another rank ended with an error"):
        three[1].meet(60.0)


def test_who_does_not_beat_is_missing(three):
    """A rank that never began to beat too; a living one is not, whatever it computes."""
    three[2].tell("beat", "7")
    three[0].start(silence_s=1000.0)
    try:
        assert three[1].missing(0.1 + peers.BEAT_S) == [2]
    finally:
        three[0].stop()
    assert three[1].missing(0.1) == [0, 2]
    assert three[1].names([0, 2]) == "rank 0 (host:a device:cuda:0) and rank 2 (host:b device:cuda:0)"


def test_the_rank_that_knows_best_speaks():
    """Errors of one's own explain broken connections; of equals the lowest speaks."""
    assert [rank for rank in (0, 2, 3) if speaks({0: LOST, 2: OWN, 3: OWN}, rank)] == [2]
    assert [rank for rank in (1, 2) if speaks({1: LOST, 2: LOST}, rank)] == [1]


def test_messages_name_rank_phase_and_what_to_do():
    """One sentence on who is missing; a mistake of the user without a traceback, a bug with one."""
    broken, late = RuntimeError("gloo: reset by peer"), RuntimeError("gloo: Timed out waiting 120000ms")
    assert message(broken, LOST, "rank 1 (host:b)", "training").startswith(
        "rank 1 (host:b) no longer answers (training; its connection broke)."
    )
    assert "it was silent for too long" in message(late, LOST, "rank 1 (host:b)", "training")
    assert "--resume" in message(late, LOST, "rank 1", "training")
    assert "all ranks live" in message(broken, LOST, "", "scoring") and "reset by peer" in message(
        broken, LOST, "", "scoring"
    )
    assert message(UserError("no."), OWN, "rank 1 (host:b)", "training") == "rank 1 (host:b) (training): no."
    assert "KeyError" in message(KeyError("x"), OWN, "rank 1", "training")
    assert phase_of(["main", "run", "train", "update"]) == "training"
    assert phase_of(["main", "run"]) == "setting up"


def test_each_start_has_names_of_its_own(monkeypatch):
    """A restarted rank that finds the address of one that is gone waits for it, or fails to connect."""
    shared = train_gpt.dist.HashStore()
    monkeypatch.setattr(train_gpt.dist, "rendezvous", lambda *args, **rest: iter([(shared, 0, 2)]))
    first, same, second = (
        train_gpt.open_store(Environment({}, world_size=2, restarts=restarts)) for restarts in (0, 0, 1)
    )
    first.set("address", "gone")
    assert same.check(["address"]) and not second.check(["address"])


def test_the_environment_says_who_started_us_and_how_often(monkeypatch):
    """torchrun's words; without them one process that nobody launched; other launchers end their own."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    for name in (*names, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    alone = read_environment()
    assert (alone.launched, alone.restarts, alone.world_size, alone.local_world_size) == (False, 0, 1, 1)
    launch = {"RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (launch | {"TORCHELASTIC_RESTART_COUNT": "2"}).items():
        monkeypatch.setenv(name, value)
    assert not read_environment().launched
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    found = read_environment()
    assert (found.launched, found.restarts, found.local_world_size) == (True, 2, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert read_environment().local_world_size == 8


def test_one_process_has_no_layout_and_raises_its_errors():
    """No store, no thread, no other rank that would speak."""
    ranks = Ranks(Environment({}), "cpu")
    assert ranks.layout() == "" and not hasattr(ranks, "peers")
    train_gpt.speak_once(RuntimeError("gloo"), Environment({}))


# With processes


class Ended(NamedTuple):
    """What a launched run left."""

    status: int
    said: str  # by our processes, both streams
    seconds: float  # since the signal


def without_launcher(text: str) -> str:
    """Drop what torchrun says of itself."""
    return re.sub(
        r"Traceback \(most recent call last\):\n  File \"<frozen runpy>.*", "", text, flags=re.DOTALL
    )


def launch(cfg, plan: dict, *options: str) -> subprocess.Popen:
    """Start the trainer on two ranks by torchrun, both streams in one pipe."""
    env = UNPACKED_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "RANKS_PLAN": json.dumps(plan)}
    command = [sys.executable, *LAUNCHER, *options, str(SCRIPT), *as_overrides(cfg)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def signal_rank(cfg, process: subprocess.Popen, rank: int, number: int) -> None:
    """Send one rank a signal once a few steps are done."""
    log = Path(cfg.run.out_dir) / cfg.run.run_id / "train.log"
    ends_at = time.monotonic() + 60
    while not (log.is_file() and "\nstep:5/" in log.read_text()):
        assert time.monotonic() < ends_at and process.poll() is None
        time.sleep(0.02)
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            os.kill(int(pid), number)


def end(process: subprocess.Popen, timeout_s: float = 60) -> Ended:
    """Wait for a run."""
    started = time.monotonic()
    said, _ = process.communicate(timeout=timeout_s)
    return Ended(process.returncode, without_launcher(said), time.monotonic() - started)


@pytest.fixture
def long_config(tiny_config):
    """A run that goes on until somebody ends it."""
    return with_values(tiny_config, {"run.iterations": 100_000, "run.val_loss_every": -1}, "test")


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds ranks in /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(long_config, rank):
    """The other one says so, once, and ends."""
    process = launch(long_config, {})
    signal_rank(long_config, process, rank, signal.SIGKILL)
    status, said, seconds = end(process)
    assert status == 1 and seconds < 20
    named = re.findall(r"error: rank (\d) \(host:\S+ device:cpu\) no longer answers \(training", said)
    assert named == [str(rank)]
    assert said.count("--resume") == 1 and "Traceback" not in said


@needs_proc
@pytest.mark.slow
def test_a_stopped_rank_is_named(long_config):
    """Its connections live on: only its silence tells."""
    process = launch(long_config, {"timeout_s": 12.0})
    signal_rank(long_config, process, 1, signal.SIGSTOP)
    status, said, seconds = end(process)
    assert status == 1 and seconds < 55  # torchrun takes 30 s to end what is stopped
    assert re.findall(r"rank (\d) \(\S+ \S+\) no longer answers \(training; it was silent", said) == ["1"]
    assert "Traceback" not in said


@needs_proc
@pytest.mark.slow
def test_a_restart_finds_its_own_peers(long_config):
    """The launcher's store holds addresses of processes that are gone: each start has its own names."""
    cfg = with_values(long_config, {"run.iterations": 300}, "test")
    process = launch(cfg, {}, "--max-restarts=1")
    signal_rank(cfg, process, 1, signal.SIGKILL)
    status, said, _ = end(process, 120)
    assert status == 0, said
    assert "failed to connect" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        ({"1": "user"}, r"^error: rank 1 \(\S+ \S+\) \(training\): expected luck, found none\. Try again\.$"),
        ({"0": "user", "1": "user"}, r"^error: expected luck, found none\. Try again\.$"),
        ({"1": "bug"}, r"^KeyError: 'a bug'$"),
        ({"0": "bug", "1": "bug"}, r"KeyError: 'a bug'$"),
    ],
)
def test_an_error_is_said_once(long_config, fail, expected):
    """Of one rank alone it was said never; what follows from it, a lost connection, is not said."""
    status, said, _ = end(launch(long_config, {"fail": fail}))
    assert status == 1
    assert len(re.findall(expected, said, re.MULTILINE)) == 1, said
    assert len(re.findall(r"expected luck|KeyError: ", said)) == 1
    assert "no longer answers" not in said and "ranks live" not in said


@pytest.mark.slow
def test_work_of_rank_0_alone_may_take_longer_than_a_collective(tiny_config):
    """To quantize and compress takes minutes; the others wait without a collective that gives up."""
    status, said, _ = end(launch(tiny_config, {"timeout_s": 12.0, "quantize_s": 16.0}))
    assert status == 0, said
    assert re.search(r"^rank:1 host:\S+ device:cpu$", said, re.MULTILINE)
    folder = Path(tiny_config.run.out_dir) / "tiny"
    assert read_json(folder / "result.json")["steps"] == 6
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    scored = run_python(*LAUNCHER, "-m", "eval", folder, "--json", env=env)
    assert scored.returncode == 0, scored.stderr
