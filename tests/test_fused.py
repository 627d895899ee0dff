"""Fused operations: their plain twins, the choice of kernels, and what a packed program keeps of them."""

import json
import math
import re

import pytest
import torch
from fixtures_fused import compare, gate_case, loss_case, mlp_case, norm_case, write_project
from fixtures_model import ROOT, run_python
from fixtures_numbers import assert_close_at_scale

import train_gpt
from common import UserError, read_json
from dev.kernels import TABLE, kernel_name, launches_of
from formats.recipe import with_values
from kernels import fused_choice
from kernels.fused import exclude_and_gate
from kernels.fused_choice import TRIALS, FusedShape, largest_error, lost_race, resolve_fused, why_always_plain
from pack.program import pack, unwrap

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
FLOAT32 = torch.float32
CASES = {
    "qk": lambda dtype: norm_case(37, 3, (16, 6), True, dtype),
    "qk, whole head, no gain": lambda dtype: norm_case(5, 2, (8, 8), False, dtype),
    "xsa": lambda dtype: gate_case(37, (6, 3, 16), "value gate", dtype),
    "xsa, no gate": lambda dtype: gate_case(5, (4, 1, 8), "value", dtype),
    "gate alone": lambda dtype: gate_case(5, (4, 4, 8), "gate", dtype),
    "mlp": lambda dtype: mlp_case(37, (24, 48), 0.5, dtype),
    "mlp, ReLU": lambda dtype: mlp_case(5, (24, 48), 0.0, dtype),
    "loss": lambda dtype: loss_case(37, (50, 24), 30.0, dtype),
    "loss, no cap": lambda dtype: loss_case(37, (50, 24), 0.0, dtype),
}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", CASES)
def test_plain_twins_are_their_formulas(name, dtype):
    """Outputs and gradients against float64; a twin in bfloat16 rounds after each of a few steps."""
    for found, expected in compare(CASES[name](dtype), fused=False):
        assert_close_at_scale(found, expected, 8, dtype)


def test_without_value_and_gate_nothing_happens():
    """Not even a copy."""
    y = torch.randn(1, 2, 3, 4)
    assert exclude_and_gate(y, None, None) is y


# The choice


def test_a_cpu_computes_plainly_at_no_cost(monkeypatch):
    """Nothing is tried; the log can say why."""
    monkeypatch.setattr(fused_choice, "largest_error", pytest.fail)
    assert resolve_fused("off", CPU, BF16, FusedShape(), True) == ((), {})
    choice = resolve_fused("auto", CPU, BF16, FusedShape(), True)
    assert choice == ((), dict.fromkeys(("qk", "mlp", "xsa", "loss"), "a cpu runs no such kernels"))


def test_what_was_asked_for_by_name_and_cannot_be_stops_the_run():
    """As with attention: a person who names a kernel wants it."""
    with pytest.raises(
        UserError, match=r"model\.fused=qk,xsa: .* on cpu .*\n  qk: a cpu .*\n  xsa: (.*\n)+Use"
    ):
        resolve_fused("qk,xsa", CPU, BF16, FusedShape(), True)
    for wanted, found in (("qk,qv", "'qv'"), ("", "''"), ("qk,,mlp", "''")):
        with pytest.raises(UserError, match=f"expected off, auto or some of qk,mlp,xsa,loss, found {found}"):
            resolve_fused(wanted, CPU, BF16, FusedShape(), True)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qk", {}, ""),
        ("mlp", {"heads": (6, 3, 48)}, ""),
        ("qk", {"heads": (6, 3, 48)}, "a head's dimension of 48 is no power of two"),
        ("xsa", {"heads": (6, 3, 48)}, "a head's dimension of 48 is no power of two"),
        ("xsa", {"gate_width": 512}, "its gates read 512 channels, at most 32"),
        ("mlp", {"mlp_dim": 1364}, "a hidden size of 1364 is no multiple of 8"),
        ("mlp", {"absent": ("mlp",)}, "the recipe has no such operation"),
        ("loss", {"vocab_size": 100_000}, "a vocabulary of 100,000 is larger than 65,536"),
    ],
)
def test_shapes_that_kernels_cannot_do_are_refused(monkeypatch, name, changes, reason):
    """Before anything is compiled."""
    monkeypatch.setattr(fused_choice, "find_spec", lambda name: True)
    assert why_always_plain(name, GPU, BF16, FusedShape()._replace(**changes)) == reason
    assert "bfloat16" in why_always_plain(name, GPU, torch.float32, FusedShape())
    monkeypatch.setattr(fused_choice, "find_spec", lambda name: None)
    assert why_always_plain(name, GPU, BF16, FusedShape()) == "Triton is not installed"


def test_auto_keeps_what_passes_its_test_and_wins_its_race(monkeypatch):
    """The others say what beat them; a name that was asked for is not raced."""
    errors = {"qk": 1e-3, "mlp": 1e-3, "xsa": 0.5, "loss": math.nan}
    times = {"qk": (1.0, 2.0), "mlp": (2.0, 1.5)}

    def fake_test(name, *_):
        if name == "loss":
            raise RuntimeError("no such instruction\nat line 3")
        return errors[name]

    monkeypatch.setattr(fused_choice, "find_spec", lambda name: True)
    monkeypatch.setattr(fused_choice, "largest_error", fake_test)
    monkeypatch.setattr(fused_choice, "race", lambda name, *_: times[name])
    choice = resolve_fused("auto", GPU, BF16, FusedShape(), True)
    assert choice.names == ("qk",)
    assert choice.refused == {
        "mlp": "2 ms, plain 1.5",
        "xsa": "it differs from the plain form by 0.5 of the largest element",
        "loss": "RuntimeError: no such instruction",
    }
    assert resolve_fused("mlp,qk", GPU, BF16, FusedShape(), True) == (("mlp", "qk"), {})


def test_a_form_that_lacks_memory_loses():
    """Its time is infinite."""
    assert lost_race((1.0, math.inf)) == ""
    assert lost_race((math.inf, 1.0)) == "inf ms, plain 1"


@pytest.mark.parametrize("name", TRIALS)
def test_trials_take_gradients_of_every_input(monkeypatch, name):
    """The plain form passes its own test; one that is wrong by a tenth does not."""
    shape = FusedShape(64, 48, (4, 2, 16), 8, 64, 100, 12)
    make = TRIALS[name]

    def scaled(factor: float):
        def make_plain(*args):
            trial = make(*args)
            return trial._replace(
                run=lambda fused, *leaves: trial.run(False, *leaves) * (factor if fused else 1.0)
            )

        return make_plain

    for factor, passes in ((1.0, True), (1.1, False)):
        monkeypatch.setitem(TRIALS, name, scaled(factor))
        assert (largest_error(name, CPU, BF16, shape) <= fused_choice.TOLERANCE) is passes


# Packed and compiled


def test_a_packed_program_keeps_kernels_only_where_its_recipe_wants_them(tmp_path):
    """Where no GPU is, the plain twins run, Triton is not imported, and every number stays."""
    entry = write_project(tmp_path)
    sources = {}
    for fused in ("auto", "off"):
        out = tmp_path / f"packed_{fused}.py"
        pack(tmp_path / f"{fused}.toml", out, entry, "lzma")
        sources[fused] = unwrap(out.read_bytes())
        assert ("tl.constexpr" in sources[fused]) is (fused == "auto")
    assert 5 * len(sources["off"]) < len(sources["auto"])
    found, expected = (json.loads(run_python(one).stdout) for one in (tmp_path / "packed_auto.py", entry))
    assert found == expected
    assert found[-1] is False


def test_the_table_of_registers_has_every_kernel_and_no_spills_on_the_contests_gpu():
    """What `python -m dev.kernels --write` found; to look at it needs no Triton."""
    table = read_json(TABLE)
    assert list(table) == [kernel_name(launch) for launch in launches_of(FusedShape(), BF16)]
    for name, found in table.items():
        assert found["sm_90"]["spill_bytes"] == 0, name
        assert found["sm_90"]["shared_bytes"] <= 227 << 10, name


def test_the_documented_registers_are_those_of_the_table():
    """A kernel that changes is compiled and written down again."""
    rows = re.findall(
        r"\n\| `(\w+_kernel\w*)` \| (.*) \|", (ROOT / "docs" / "gpu-and-multi-node.md").read_text()
    )
    columns = ("registers", "spill_bytes", "shared_bytes", "num_warps")
    assert dict(rows) == {
        name: " | ".join(f"{found['sm_90'][column]:,}" for column in columns)
        for name, found in read_json(TABLE).items()
    }


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, {"xsa"}),
        ({"model.xsa_last": 1}, set()),
        ({"model.attn_gate": "sparse", "model.mlp": "swiglu"}, {"mlp"}),
        ({"model.attn_gate": "sparse", "model.biases": "all", "model.qk_norm": False}, {"mlp", "qk"}),
        ({"model.xsa_last": 1, "model.asymmetric_softcap": True, "model.fp8": "emulate"}, {"mlp", "loss"}),
    ],
)
def test_only_what_a_model_has_can_be_a_kernel(changes, absent, tiny_config, alone, monkeypatch):
    """The log's line fused: names what runs."""
    asked = []

    def resolve(wanted, device, dtype, shape, compiled):
        asked.append(shape)
        return fused_choice.FusedChoice((), {})

    monkeypatch.setattr(train_gpt, "resolve_fused", resolve)
    cfg = with_values(tiny_config, changes | {"model.fused": "auto", "model.logit_softcap": 30.0}, "test")
    training = train_gpt.Training(cfg, alone, bos_id=1)
    assert set(asked[0].absent) == absent
    assert train_gpt.fused_lines(training) == "fused:none\n"
