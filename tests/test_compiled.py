"""A compiled step: the numbers of the eager one, one graph a phase, no recompilation in the clock.

Graphs are captured as on a GPU and run by PyTorch's operators: kernels are not what is tested.
"""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import train_gpt
from formats.recipe import with_values
from train_gpt import Training, get_phases

PACKED = {"model.attn_in_document": True, "data.loader": "packed"}
# What a recipe changes -> graphs that its steps need.
CASES = {
    "plain": ({}, 1),
    "8-bit": ({"model.fp8": "emulate"}, 1),
    "8-bit after two steps": ({"model.fp8": "emulate", "model.fp8_calibration_steps": 2}, 2),
    "documents": (PACKED, 2),  # and room for twice as many
    "recurrence": (
        {"model.recur_layers": (0, 1), "model.recur_passes": 2, "schedule.recur_start_fracs": (0.5,)},
        2,
    ),
    "longer rows": ({"schedule.stages": ((0, 16, 64, 2, 1.0, 0.0), (0.5, 32, 64, 2, 1.0, 0.0))}, 2),
    "quantized gradients": ({"quant.qat_start": 0.5}, 1),
}


@pytest.fixture
def captured(monkeypatch):
    """Let graphs be run by PyTorch's operators, and be counted from zero."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(train_gpt.torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_eager_program_in_as_few_graphs_as_known(name, tiny_config, alone, captured):
    """Eight steps through every phase; fullgraph forbids breaks, each further graph is a recompilation."""
    changes, num_graphs = CASES[name]
    values = {"run.iterations": 8, "model.compute_dtype": "float32"} | changes
    losses = {}
    for compiled in ("off", "on"):
        cfg = with_values(tiny_config, values | {"run.compile": compiled}, "test")
        training = Training(cfg, alone, bos_id=1)
        assert training.is_compiled == (compiled == "on")
        losses[compiled] = []
        for step in range(8):
            phase = train_gpt.phase_at(cfg, step, step / 8)
            assert phase in get_phases(cfg)
            losses[compiled].append(float(training.accumulate(phase, lambda: False)))
            training.update(0.0)
    assert losses["on"] == pytest.approx(losses["off"], rel=5e-4)
    assert counters["stats"]["unique_graphs"] == num_graphs
