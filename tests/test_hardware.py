"""Projections of hardware: what the model was fitted to it meets, and its commands are those that run."""

import json
import re
import shlex

import pytest
from fixtures_model import RECIPES, ROOT, recipe

import train_gpt
from common import UserError
from formats import hardware
from formats.hardware import (
    CARDS,
    FIT_SHARE,
    PUBLISHED,
    PUBLISHED_SCORING_S,
    contest_tokens,
    count_steps,
    exchanged_bytes,
    find_card,
    fitting_counts,
    format_hardware,
    memory_gb,
    parse_machine,
    project,
    read_work,
    scoring_seconds,
    step_ms,
    step_parts,
)
from pack.program import pack
from train_gpt import Environment, Optimizers, Ranks, build_model, check_world_size, describe, load_config

R1061 = "track_10min_16mb/2026-04-27_SparseGate_TwoLane_SmearGate"
NAIVE = "track_10min_16mb/2026-03-17_NaiveBaseline"
CURRICULUM = "track_cpu/2026-11-21_Sp2048_LoraScoring"


def described(name: str, **changes) -> dict:
    """Describe a recipe of records/."""
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return describe(load_config(str(ROOT / "records" / name / "recipe.toml"), values, []), [0], [0.0])


def work_of(name: str, **changes):
    return read_work(described(name, **changes))


# What the model was fitted to


def test_the_model_meets_the_published_milliseconds():
    """Two constants were fitted to three numbers; docs/scaling.md says how well."""
    machine, low, full, naive = parse_machine("h100x8"), *PUBLISHED.values()
    record, baseline = work_of(R1061), work_of(NAIVE)
    found = [
        step_ms(record, machine, 8, 11),
        step_ms(record, machine, 8, 17),
        step_ms(baseline, machine, 8, 9),
    ]
    assert found == pytest.approx([low, full, naive], rel=0.02)
    page = (ROOT / "docs" / "scaling.md").read_text()
    stated = re.findall(r"(\d+\.\d) for (\d+\.\d)", page)
    assert stated == [(f"{ours:.1f}", str(theirs)) for ours, theirs in zip(found, (low, full, naive))]


def test_the_model_meets_the_memory_that_the_allocator_stated():
    """Compiled steps on kernels that do nothing: 29.6, 44.2 and 10.5 GB."""
    record = work_of(R1061)
    shallow = record._replace(parts=((1.0, 11),))
    found = [
        memory_gb(shallow, 98_304, 2),
        memory_gb(record, 98_304, 2),
        memory_gb(work_of(NAIVE), 65_536, 2),
    ]
    assert found == pytest.approx([29.6, 44.2, 10.5], rel=0.01)


def test_the_model_meets_the_published_scoring_time():
    """Its number of forward passes was worked back from the middle of the contest's."""
    low, high = PUBLISHED_SCORING_S
    assert scoring_seconds(work_of(R1061), parse_machine("h100x8")) == pytest.approx(
        (low + high) / 2, rel=0.01
    )


def test_the_model_meets_the_naive_run_of_the_cpu_track():
    """2,170 ms a step, in the log of its record."""
    log = (ROOT / "records/track_cpu/2026-11-21_NaiveBaseline/train_seed42.log").read_text()
    measured = float(re.search(r"step_avg:([\d.]+)ms", log)[1])
    found = step_ms(work_of("track_cpu/2026-11-21_NaiveBaseline"), parse_machine("cpu"), 8, 6)
    assert found == pytest.approx(measured, rel=0.05)


# What it is made of


def test_bytes_between_ranks_are_those_that_the_optimizers_exchange(tiny_config, monkeypatch):
    """Counted in the calls of a step of two ranks: padded gradients, updates, and the rest in one message."""
    sent = {"scatter": 0, "gather": 0, "average": 0}
    ranks = Ranks(Environment({}), "cpu")
    ranks.world_size = 2
    work = train_gpt.AsyncWork

    def scatter(stack):
        sent["scatter"] += stack.numel()
        return work(stack[: len(stack) // 2])

    def gather(share):
        sent["gather"] += 2 * share.numel()
        return work(share.repeat(2, 1, 1))

    monkeypatch.setattr(ranks, "start_scatter_average", scatter)
    monkeypatch.setattr(ranks, "start_gather", gather)
    monkeypatch.setattr(
        ranks, "average", lambda tensors: sent.update(average=sum(t.numel() for t in tensors))
    )
    model = build_model(tiny_config, ranks.device)
    for param in model.parameters():
        param.grad = param.detach().clone()
    Optimizers(model, tiny_config, ranks).step(train_gpt.StepRates(1.0, 0.9))
    found = exchanged_bytes(read_work(describe(tiny_config, [0], [0.0])), 2)
    assert found["gradients of matrices"] == 4 * sent["scatter"] / 2
    assert found["updates of matrices"] == 2 * sent["gather"] / 2
    assert found["gradients of the rest"] == 2 * 4 * sent["average"] / 2


def test_one_rank_exchanges_nothing_and_more_ranks_more():
    """And what travels through a slower link takes longer."""
    work = work_of(R1061)
    assert step_parts(work, parse_machine("h100"), 8, 17)["exchange"] == 0
    sizes = [sum(exchanged_bytes(work, count).values()) for count in (2, 8, 16, 64)]
    assert sizes == sorted(sizes)
    times = [step_parts(work, parse_machine(name), 64, 17)["exchange"]
             for name in ("h100x8", "h100x16", "h100x16@eth25")]  # fmt: skip
    assert times == sorted(times) and times[2] > 10 * times[1]


def test_small_micro_batches_wait_for_their_launches():
    """A card cannot be faster than the CPU that feeds it."""
    work, machine = work_of(R1061), parse_machine("b200")
    small, smaller = (step_parts(work, machine, count, 17)["kernels"] for count in (192, 384))
    assert smaller == pytest.approx(2 * small)


def test_recomputed_activations_take_less_memory_and_more_time():
    """model.checkpoint_every trades one for the other."""
    usual, kept = work_of(R1061), work_of(R1061, model__checkpoint_every="1")
    machine = parse_machine("h100x8")
    assert memory_gb(kept, 98_304, 2) < memory_gb(usual, 98_304, 2) / 2
    assert (
        1.1
        < step_parts(kept, machine, 8, 17)["kernels"] / step_parts(usual, machine, 8, 17)["kernels"]
        < 1.34
    )


def test_steps_follow_the_clock_the_recurrence_and_the_limit_of_steps():
    """35 % of 596 s at 11 visits, the rest at 17; at most run.iterations."""
    work = work_of(R1061)
    assert count_steps(work, {11: 100.0, 17: 200.0}) == (int(596 * (0.35 / 0.1 + 0.65 / 0.2)), 596.0)
    short = work._replace(iterations=1000)
    steps, seconds = count_steps(short, {11: 100.0, 17: 200.0})
    assert (steps, seconds) == (1000, pytest.approx(596 * 1000 / 4023))
    untimed = work._replace(clock_s=0.0, iterations=10)
    assert count_steps(untimed, {11: 100.0, 17: 200.0}) == (10, pytest.approx(1.65))


def test_the_contest_s_text_is_counted_in_the_recipe_s_tokens():
    """By the nearest vocabulary of the contest's logs; CaseOps has its own."""
    assert contest_tokens({"tokenizer_kind": "sentencepiece", "vocab_size": 1000}) == 62_021_632
    assert contest_tokens({"tokenizer_kind": "caseops", "vocab_size": 8192}) == 47_851_520


# Names


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [("h100x8", "h100", 8), ("4090", "4090", 1), ("mi300x", "mi300x", 1), ("MI300Xx8", "mi300x", 8),
     ("a100-40x4", "a100-40", 4), ("h100x64@eth25", "h100", 64)],
)  # fmt: skip
def test_names_are_read(name, key, count):
    """Names of cards hold digits and an x themselves."""
    machine = parse_machine(name)
    assert (machine.key, machine.count) == (key, count)


@pytest.mark.parametrize("name", ["h101", "h100x0", "x8", "", "h100@wifi", "h100x8x8"])
def test_an_unknown_name_lists_the_known(name):
    """Whoever mistypes one finds theirs."""
    with pytest.raises(UserError, match=r"expected a name of b200, .*t4.*, cpu, with xN"):
        parse_machine(name)


def test_machines_hold_eight_cards():
    """Twelve would be one and a half of them."""
    with pytest.raises(UserError, match="at most 8 cards or a multiple of that, found 12"):
        parse_machine("h100x12")


@pytest.mark.parametrize(
    ("said", "key"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100pcie"), ("NVIDIA H200", "h200"),
     ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L40S", "l40s"),
     ("NVIDIA L40", "l40"), ("NVIDIA L4", "l4"), ("NVIDIA GeForce RTX 4090", "4090"),
     ("Tesla T4", "t4"), ("Voodoo 2", "")],
)  # fmt: skip
def test_cards_are_known_by_what_their_driver_calls_them(said, key):
    """The battery holds its numbers against the peak of the card that it finds."""
    assert find_card(said) == key


# What is shown


@pytest.mark.parametrize("name", ["h100x8", "h100", "4090x2", "t4", "h100x16"])
@pytest.mark.parametrize("folder", [R1061, NAIVE, CURRICULUM])
def test_commands_are_accepted_and_fit_with_the_fewest_micro_batches(folder, name):
    """The fields load, the ranks divide the micro-batches, and one count less would not fit or divide."""
    path = str(ROOT / "records" / folder / "recipe.toml")
    machine, work = parse_machine(name), work_of(folder)
    row = project(described(folder), name, ["--recipe", path, "run.seed=7"])["machines"][0]
    if "refused" in row:
        assert folder == CURRICULUM and machine.count > 2  # rows of its first steps
        return
    words = shlex.split(row["command"])
    assert words[0] == ("python" if machine.count == 1 else "torchrun")
    cfg = load_config(path, {}, [word for word in words if re.match(r"[a-z]+\.[a-z_]+=", word)])
    check_world_size(cfg, machine.count)
    assert cfg.run.seed == 7
    for stage, ours in zip(work.stages, train_gpt.get_stages(cfg), strict=True):
        assert ours.batch_tokens == stage.batch_tokens
        rows = stage.batch_tokens // stage.seq_len
        for count in range(machine.count, rows + 1, machine.count):
            size = memory_gb(work, stage.batch_tokens / count, machine.card.item_bytes)
            if rows % count == 0 and size <= FIT_SHARE * machine.card.gb:
                assert ours.micro_batches == count
                break


def test_several_machines_are_joined_by_the_launcher():
    """As docs/gpu-and-multi-node.md has it."""
    command = project(described(R1061), "h100x16", [])["machines"][0]["command"]
    assert command.startswith("torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d")
    assert command.endswith("train_gpt.py data.micro_batches=16")


def test_what_does_not_fit_says_so():
    """A row that is too long for a small card, and ranks without a row each."""
    tiny = CARDS["t4"]._replace(gb=1)
    machine = parse_machine("t4")
    assert fitting_counts(work_of(R1061), machine) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CARDS, "t4", tiny)
        row = project(described(R1061), "t4", [])["machines"][0]
    assert row["refused"] == "one row takes 2.5 of 1 GB: model.checkpoint_every=1 keeps less"
    row = project(described(CURRICULUM), "h100x64", [])["machines"][0]
    assert row["refused"] == "64 ranks cannot share the 2 rows of a step"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_is_projected_on_every_card(path):
    """Whatever is switched on: a table, numbers above 0."""
    found = describe(load_config(str(path), {}, []), [0], [0.0])
    rows = project(found, ",".join(CARDS), [])
    for row in rows["machines"]:
        assert "refused" in row or min(row["memory_gb"], row["scoring_seconds"], *row["step_ms"].values()) > 0
    assert len(format_hardware(rows)) >= len(CARDS)


def test_what_was_entered_for_a_card_is_beside_its_projection(monkeypatch):
    """The other cards stay projected."""
    entry = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "commit": "abc", "step_1061_ms": 1050.0}
    monkeypatch.setattr(hardware, "read_measurements", lambda: [entry])
    found = project(described(R1061), "h100x8,a100", [])
    assert [row["measured"] for row in found["machines"]] == [[entry], []]
    said = "\n".join(format_hardware(found))
    assert "measured on NVIDIA H100 SXM: 2026-12-01, commit abc; 1.0611 recipe 1,050 ms a step" in said
    assert said.startswith("projected, not measured") and "measured on NVIDIA A100" not in said


def test_the_command_prints_it_with_or_without_describe(capsys, monkeypatch):
    """--hardware implies --describe; JSON where output is no terminal, a table where it is one."""
    train_gpt.main(["--hardware", "h100x8,4090"])
    found = json.loads(capsys.readouterr().out)["hardware"]
    assert [row["hardware"] for row in found["machines"]] == ["h100x8", "4090"]
    assert found["kind"] == "projected"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train_gpt.main(["--describe", "--hardware", "h100x8"])
    said = capsys.readouterr().out
    assert "parameters by rule" in said and "projected, not measured" in said
    assert "  torchrun --standalone --nproc_per_node=8 train_gpt.py data.micro_batches=8" in said
    with pytest.raises(UserError, match="--hardware pentium: expected a name of"):
        train_gpt.main(["--hardware", "pentium"])


@pytest.mark.slow
def test_packed_programs_leave_it_out(tmp_path):
    """What a packed program cannot describe must not cost it bytes."""
    pack(ROOT / "records" / NAIVE / "recipe.toml", tmp_path / "packed.py", method="none")
    text = (tmp_path / "packed.py").read_text()
    assert "h100pcie" not in text and "matrix_shapes" not in text and "class " in text


def test_shapes_of_a_description_are_those_of_the_stacks():
    """The model of the exchange pads them."""
    assert work_of(R1061).matrices == ((22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048))
    assert recipe("reference_systems/D_exp01").optim.matrix_optimizer == "adamw"
    assert work_of("reference_systems/D_exp01").matrices == ()
