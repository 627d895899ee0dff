"""`--describe`: one JSON object that says what a recipe means, without data or memory."""

import json

import pytest
from fixtures_model import RECIPES, ROOT, run_python

import train_gpt
from common import UserError

B = ROOT / "records/reference_systems/B_bese288/recipe.toml"
C = ROOT / "records/reference_systems/C_pr281/recipe.toml"


@pytest.fixture
def describe(capsys):
    """Run the command in this process; returns its JSON object."""

    def command(*args) -> dict:
        capsys.readouterr()
        train_gpt.main(["--describe", *map(str, args)])
        return json.loads(capsys.readouterr().out)

    return command


def test_the_command_prints_one_line_of_json():
    """Programs read standard output: nothing else may reach it, from the first import on."""
    result = run_python("train_gpt.py", "--describe", "model.num_layers=7")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout)["config"]["model"]["num_layers"] == 7


@pytest.mark.reference("B10")
@pytest.mark.reference("B11")
def test_schedule_rows_follow_the_published_log_of_system_b(describe):
    """Learning-rate factor by elapsed time, momentum by step; overrides apply."""
    steps, times = "2500,2600,5000", "205038,255143,548881"
    found = describe("--recipe", B, "--steps", steps, "--elapsed-ms", times, "data.vocab_size=300")
    assert [row["lr_mul"] for row in found["schedule"]] == pytest.approx([0.9631, 0.7028, 0.0931], abs=5e-5)
    assert [row["recur_passes"] for row in found["schedule"]] == [1, 3, 3]
    assert found["num_params"] == 26_522_716 + 12 * (512 + 128)
    assert len(found["layer_plan"]) == 11 and len(found["layer_plan_recurring"]) == 17
    momentum = describe("--recipe", B, "--steps", "0,375,750,1500")["schedule"]
    assert [row["momentum"] for row in momentum] == pytest.approx([0.92, 0.9375, 0.955, 0.99])


@pytest.mark.reference("C5")
def test_schedule_rows_follow_the_published_log_of_system_c(describe):
    """Warmdown of 3,000 steps at the average pace."""
    found = describe(
        "--recipe", C, "--steps", "7000,7500,8000,9000", "--elapsed-ms", "459392,492293,525214,591423"
    )
    multipliers = [row["lr_mul"] for row in found["schedule"]]
    assert multipliers == pytest.approx([0.7142, 0.5470, 0.3797, 0.0435], abs=5e-5)
    assert sum(found["params_by_rule"].values()) == found["num_params"] == 26_829_913
    assert found["estimated_artifact_bytes"] > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_is_described(path):
    """--describe is where a reader starts: no recipe may break it."""
    found = train_gpt.describe(train_gpt.load_config(str(path), {}, []), [0, 10], [0.0, 0.0])
    assert 0 < found["estimated_artifact_bytes"] < 4 * found["num_params"]
    assert found["num_params"] == sum(found["params_by_rule"].values())


def test_estimated_bytes_follow_the_codes():
    """Before entropy coding: bits a code; water-filled codes cost about a bit less for a doubled step."""

    def estimate(**fields) -> int:
        cfg = train_gpt.with_values(train_gpt.Config(), {f"quant.{k}": v for k, v in fields.items()}, "test")
        return train_gpt.estimate_artifact_bytes(cfg)

    weights = 17_059_912 - 36_680  # less the scalars
    assert estimate(matrix_bits=6) < estimate() < 1.02 * weights
    filled = [estimate(method="water_fill", codec="rans", step=step) for step in (0.2, 0.4)]
    assert filled[0] - filled[1] == pytest.approx(weights / 8, rel=1e-2)
    assert estimate(method="water_fill", codec="rans", target_bytes=12_345_678) == 12_345_678


@pytest.mark.reference("D11")
def test_a_large_model_is_described_without_memory(describe):
    """373 million parameters on the meta device: no weight is allocated."""
    folder = ROOT / "records/reference_systems/D_exp01/recipe.toml"
    found = describe("--recipe", folder, "--steps", "0,4000,4999,5000")
    assert found["num_params"] == 372_904_960
    rates = [row["lr"] for row in found["schedule"]]
    assert rates[:2] == [0.0, 1e-3] and rates[1] == rates[2] > rates[3]


def test_schedule_rows_follow_the_stages(describe):
    """Row length, tokens and clip of a curriculum by step."""
    folder = ROOT / "records/reference_systems/E_yxanul197_ultra10/recipe.toml"
    rows = describe("--recipe", folder, "--steps", "1999,2000,139999,140000")["schedule"]
    assert [row["seq_len"] for row in rows] == [8, 16, 1536, 2048]
    assert [row["batch_tokens"] for row in rows] == [32_768, 16_384, 73_728, 65_536]
    assert [row["grad_clip_norm"] for row in rows] == [0.5, 0.5, 1, 1]


def test_times_must_match_steps():
    """A silent zip would drop rows."""
    with pytest.raises(UserError, match="expected 2 times"):
        train_gpt.main(["--describe", "--steps", "1,2", "--elapsed-ms", "5"])
