"""The trainer as torchrun's tests need it: a rank that fails, collectives that give up soon, a slow rank 0.

    RANKS_PLAN='{"fail": {"1": "user"}}' torchrun --nproc_per_node=2 tests/fixtures_peers.py OVERRIDES

As a script it is train_gpt.py with a stand-in for the packed program; a rank fails at its third update. What
torchrun does to the others when one is gone must not end them before they have spoken.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from fixtures_packing import leave_stand_in

import train_gpt
from common import UserError, run_command

SCRIPT = Path(__file__)


def follow(plan: dict, rank: str) -> None:
    """Change the trainer as a plan says: fail {rank: kind}, timeout_s, quantize_s."""
    train_gpt.weigh_code = leave_stand_in
    train_gpt.PEER_TIMEOUT_S = plan.get("timeout_s", train_gpt.PEER_TIMEOUT_S)
    update, quantize = train_gpt.Training.update, train_gpt.quantize_model
    errors = {"user": UserError("expected luck, found none. Try again."), "bug": KeyError("a bug")}

    def update_or_fail(training, elapsed_ms):
        if training.step == 2 and rank in plan.get("fail", {}):
            raise errors[plan["fail"][rank]]
        update(training, elapsed_ms)

    def quantize_slowly(*args):
        time.sleep(plan.get("quantize_s", 0))
        return quantize(*args)

    train_gpt.Training.update, train_gpt.quantize_model = update_or_fail, quantize_slowly


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("told to stop", file=sys.stderr))
    follow(json.loads(os.environ["RANKS_PLAN"]), os.environ["RANK"])
    run_command(train_gpt.main)
