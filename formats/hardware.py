"""What a recipe would do on a machine: memory, milliseconds a step, steps, seconds of scoring, the command.

All of it is projected by a small model: products at a share of the card's peak, bytes at a share of its
bandwidth, launches that the CPU makes, what ranks exchange, and what a visit of a block keeps in memory.
`found` is what `--describe` finds of a recipe. Results of the GPU battery, once entered, are shown beside it
(dev/gpu_battery/measurements.py). Packed programs leave this out.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from common import UserError, format_table, read_json
from formats.memory import legal_counts

MEASUREMENTS = Path(__file__).resolve().parent.parent / "docs" / "gpu_measurements.json"
CARDS_A_MACHINE = 8


class Card(NamedTuple):
    """What a card can do, by its maker's data sheet."""

    title: str
    known_as: str  # part of the name that its driver gives it
    tflops: float  # dense products in the number format of a run
    gb_s: float  # of its memory
    gb: float  # of memory, 10^9 bytes
    link_gb_s: float  # to the next card of the machine, in one direction
    item_bytes: int = 2  # of an activation: bfloat16, or float32 where the card has no native bfloat16


# Data sheets of NVIDIA and AMD; products of bfloat16 summed in float32, without sparsity. The first whose
# known_as is part of a name is meant. cpu: worked back from the CPU track's naive run, 2,170 ms a step.
CARDS = {
    "b200": Card("NVIDIA B200", "B200", 2250, 8000, 180, 900),
    "h200": Card("NVIDIA H200", "H200", 989, 4800, 141, 450),
    "h100pcie": Card("NVIDIA H100 PCIe", "H100 PCIe", 756, 2000, 80, 64),
    "h100nvl": Card("NVIDIA H100 NVL", "H100 NVL", 835, 3900, 94, 300),
    "h100": Card("NVIDIA H100 SXM", "H100", 989, 3350, 80, 450),
    "a100-40": Card("NVIDIA A100 40 GB", "A100-SXM4-40GB", 312, 1555, 40, 300),
    "a100": Card("NVIDIA A100 80 GB", "A100", 312, 2039, 80, 300),
    "l40s": Card("NVIDIA L40S", "L40S", 362, 864, 48, 32),
    "l40": Card("NVIDIA L40", "L40", 181, 864, 48, 32),
    "l4": Card("NVIDIA L4", "NVIDIA L4", 121, 300, 24, 32),
    "5090": Card("NVIDIA RTX 5090", "RTX 5090", 209, 1792, 32, 64),
    "4090": Card("NVIDIA RTX 4090", "RTX 4090", 165, 1008, 24, 32),
    "3090": Card("NVIDIA RTX 3090", "RTX 3090", 71, 936, 24, 32),
    "v100": Card("NVIDIA V100, float32", "V100", 15.7, 900, 32, 150, 4),
    "t4": Card("NVIDIA T4, float32", "Tesla T4", 8.1, 320, 16, 16, 4),
    "mi300x": Card("AMD MI300X", "MI300X", 1307, 5300, 192, 448),
    "cpu": Card("two CPU cores", "CPU", 0.132, 20, 8, 10, 4),
}


class Link(NamedTuple):
    """What carries an exchange between ranks."""

    title: str
    gb_s: float  # in one direction
    latency_us: float  # of a collective operation; assumed


LINKS = {  # between machines, one port each, which the cards of a machine share
    "ib400": Link("400 Gb/s InfiniBand", 50.0, 50),
    "eth25": Link("25 Gb/s Ethernet", 3.125, 200),
}
INSIDE_LATENCY_US = 20

# Assumed: what long copies reach of a bandwidth.
BANDWIDTH_SHARE, LINK_SHARE = 0.8, 0.8
# Fitted to the published milliseconds below, by least squares of the relative errors.
PRODUCT_SHARE = 0.49  # of the peak that products reach, attention's included
BUBBLE_MS = 8.0  # a step: the device waits for the host
# Milliseconds a step that the contest's logs state for 8xH100 SXM, and a LoRA scoring with SGD phases.
PUBLISHED = {"1.0611 recipe, 11 visits": 95.9, "1.0611 recipe, 17 visits": 140.8, "naive recipe": 43.5}
PUBLISHED_SCORING_S = (455, 509)
ADAPTIVE_PASSES = 185  # forward passes a token that such a scoring takes: the middle of it, worked back
# Bytes a token and visit of the code that torch.compile generates for the 1.0611 recipe: 142 GB of 98,304
# tokens in 17 visits, 27 GB of them the mlp's activation, some 10 GB the head. By the bytes of a number.
MOVED_CHANNELS, MOVED_HIDDEN, MOVED_LOGITS = 61.5, 4.0, 6.0
# Memory that a compiled step keeps, a token: model_dims a visit, mlp sizes in model_dims, vocabularies.
# From three peaks that torch's allocator stated with kernels that did nothing: 29.6 GB (11 visits) and
# 44.2 GB (17 visits) of 98,304 tokens, 10.5 GB of the naive recipe's 65,536. formats/memory.py: eager.
COMPILED_CHANNELS, COMPILED_HIDDEN, COMPILED_LOGITS = 8.9, 3.83, 1.3
TRAINED_BYTES = 20  # a parameter: float32 weight, gradient, two moments, average
FIT_SHARE = 0.9  # of a card's memory; the rest is the driver's, the libraries' and lost between blocks
# Launches counted there: 792 of 11 visits, an update without and with clipping 126 and 171; 6 ms for 566.
VISIT_LAUNCHES, UPDATE_LAUNCHES, CLIP_LAUNCHES, LAUNCH_US = 72, 126, 45, 10.6
DOCUMENT_SHARE = 0.5  # of attention's operations that are left where rows are cut at documents; assumed
GRADIENT_BYTES, UPDATE_BYTES = 4, 2  # of a number on its way between ranks
# Tokens of the contest's validation text by vocabulary, as its logs state them.
CONTEST_TOKENS = {260: 151_080_000, 1024: 62_021_632, 4096: 45_508_608, 8192: 40_540_160}
CASEOPS_TOKENS = 47_851_520


class Machine(NamedTuple):
    """Cards of one kind; more than CARDS_A_MACHINE stand in machines of so many."""

    name: str
    key: str  # of CARDS
    count: int
    link: Link  # between machines

    @property
    def card(self) -> Card:
        """Look up the kind."""
        return CARDS[self.key]

    @property
    def exchange(self) -> Link:
        """Return what a ring over all cards is as fast as: its slowest part."""
        inside = Link("within a machine", self.card.link_gb_s, INSIDE_LATENCY_US)
        return inside if self.count <= CARDS_A_MACHINE else min(inside, self.link, key=lambda one: one.gb_s)


class Work(NamedTuple):
    """What a recipe asks of a machine."""

    stages: tuple  # the shapes of its steps
    curriculum: tuple  # schedule.stages
    model_dim: int
    mlp_dim: float
    vocab_size: int
    head_flops: float  # a token, forward and backward
    visit_flops: float  # a token and visit
    recomputed: float  # share of the visits whose forward pass runs twice
    num_params: int
    matrices: tuple[tuple[int, int, int], ...]  # (count, rows, columns) of each stack
    clips: bool
    parts: tuple[tuple[float, int], ...]  # (share of the clock, visits), in order
    clock_s: float  # 0: none
    iterations: int
    scoring: tuple[float, int]  # (forward passes a token, tokens)
    gradient_bytes: int = GRADIENT_BYTES
    pads: bool = True  # stacks are filled up until every rank has an equal share

    @property
    def visits(self) -> int:
        """Return the visits of the longest plan."""
        return max(visits for _, visits in self.parts)


class StepShape(NamedTuple):
    """The shape of a step."""

    seq_len: int
    batch_tokens: int
    micro_batches: int


def parse_machine(text: str) -> Machine:
    """Read NAME, NAMExN or NAMExN@LINK; raises naming what is known."""
    match = re.fullmatch(r"([a-z0-9-]+?)(?:x([1-9]\d{0,5}))?(?:@(\w+))?", text.strip().lower())
    name, count, link = match.groups() if match else ("", None, None)
    number = int(count or 1)
    if name not in CARDS or (link or "ib400") not in LINKS:
        raise UserError(
            f"--hardware {text:.60}: expected a name of {', '.join(CARDS)}, with xN for N cards, as h100x8, "
            f"and @{' or @'.join(LINKS)} for what joins machines of {CARDS_A_MACHINE}; found another."
        )
    if number > CARDS_A_MACHINE and number % CARDS_A_MACHINE:
        raise UserError(
            f"--hardware {text}: expected at most {CARDS_A_MACHINE} cards or a multiple of that, found "
            f"{number}. Machines of {CARDS_A_MACHINE} are joined."
        )
    if link and number <= CARDS_A_MACHINE:
        raise UserError(
            f"--hardware {text}: expected more than {CARDS_A_MACHINE} cards before @{link}, which joins "
            f"machines, found {number}. Leave @{link} out."
        )
    return Machine(text.strip().lower(), name, number, LINKS[link or "ib400"])


def find_card(name: str) -> str:
    """Return the key of a card by the name that its driver gives it; empty for one that nobody entered."""
    return next((key for key, card in CARDS.items() if card.known_as in name), "")


def read_work(found: dict) -> Work:
    """Collect from a description what the model of a machine asks for."""
    config, plan = found["config"], found["layer_plan_recurring"]
    data, model, run = config["data"], config["model"], config["run"]
    dim, vocab, visits = model["model_dim"], data["vocab_size"], len(plan)
    stages = [StepShape(*row[1:4]) for row in config["schedule"]["stages"]]
    stages = stages or [StepShape(data["seq_len"], data["batch_tokens"], data["micro_batches"])]
    head_flops = 6.0 * dim * vocab
    attention = 6.0 * dim * data["seq_len"]
    visit_flops = (found["flops_per_token"] - head_flops) / visits
    visit_flops -= attention * (1 - DOCUMENT_SHARE) if model["attn_in_document"] else 0.0
    every = model["checkpoint_every"]
    is_muon = config["optim"]["matrix_optimizer"] == "muon"
    shapes = found["matrix_shapes"] if is_muon else {}
    return Work(
        stages=tuple(stages),
        curriculum=tuple(config["schedule"]["stages"]),
        model_dim=dim,
        mlp_dim=dim * model["mlp_mult"],
        vocab_size=vocab,
        head_flops=head_flops,
        visit_flops=visit_flops,
        recomputed=visits // every / visits if every else 0.0,
        num_params=found["num_params"],
        matrices=tuple((count, *map(int, shape.split("x"))) for shape, count in shapes.items()),
        clips=config["optim"]["grad_clip_norm"] > 0,
        parts=tuple(clock_parts(config, len(found["layer_plan"]), visits)),
        clock_s=max(run["max_wallclock_seconds"] - config["quant"]["reserve_seconds"], 0.0),
        iterations=run["iterations"],
        scoring=(scoring_passes(config), contest_tokens(data)),
    )


def clock_parts(config: dict, layers: int, visits: int) -> list[tuple[float, int]]:
    """List (share of the clock, visits of a pass) in order."""
    starts = list(config["schedule"]["recur_start_fracs"])
    passes = config["model"]["recur_passes"]
    if not starts or passes < 2:
        return [(1.0, visits)]
    each = (visits - layers) // (passes - 1)
    ends = zip([0.0, *starts], [*starts, 1.0])
    return [(end - start, layers + i * each) for i, (start, end) in enumerate(ends) if end > start]


def scoring_passes(config: dict) -> float:
    """Return the forward passes that a scored token takes: of documents that adapt, the contest's number."""
    options = config["eval"]
    if options["mode"] in ("lora-ttt", "phased"):
        return ADAPTIVE_PASSES
    windows = (options["context_len"] or config["data"]["seq_len"]) / max(options["stride"], 1)
    return 1.0 if options["mode"] == "chunked" else windows


def contest_tokens(data: dict) -> int:
    """Return the tokens of the contest's validation text: of the nearest vocabulary that its logs know."""
    if data["tokenizer_kind"] == "caseops":
        return CASEOPS_TOKENS
    entries = data["vocab_size"]
    nearest = min(CONTEST_TOKENS, key=lambda size: max(size / entries, entries / size))
    return CONTEST_TOKENS[nearest]


# Memory


def memory_gb(work: Work, tokens: float, item_bytes: int) -> float:
    """Return the memory that training takes with micro-batches of so many tokens, 10^9 bytes."""
    visits = work.visits * (1 - work.recomputed)
    kept = visits * (COMPILED_CHANNELS * work.model_dim + COMPILED_HIDDEN * work.mlp_dim)
    activations = tokens * item_bytes * (kept + COMPILED_LOGITS * work.vocab_size)
    return (activations + TRAINED_BYTES * work.num_params) / 1e9


def fitting_counts(work: Work, machine: Machine) -> tuple[int, ...] | None:
    """Return the smallest number of micro-batches a step that fits, for each stage; None: none does."""
    limit, counts = FIT_SHARE * machine.card.gb, []
    for stage in work.stages:
        fitting = (
            count
            for count in legal_counts(stage, machine.count)
            if memory_gb(work, stage.batch_tokens / count, machine.card.item_bytes) <= limit
        )
        counts.append(next(fitting, 0))
    return tuple(counts) if all(counts) else None


# Time


def kernel_ms(work: Work, card: Card, tokens: float, visits: int) -> float:
    """Return the milliseconds of forward and backward of so many tokens by products and bytes."""
    flops = work.head_flops + work.visit_flops * visits * (1 + work.recomputed / 3)
    moved = visits * (MOVED_CHANNELS * work.model_dim + MOVED_HIDDEN * work.mlp_dim)
    moved = card.item_bytes * (moved + MOVED_LOGITS * work.vocab_size)
    seconds = flops / (PRODUCT_SHARE * card.tflops * 1e12) + moved / (BANDWIDTH_SHARE * card.gb_s * 1e9)
    return 1000 * tokens * seconds


def update_ms(work: Work, machine: Machine) -> float:
    """Return the milliseconds of an update: orthogonalization of a rank's share, or its launches."""
    flops = 0.0
    for count, rows, columns in work.matrices:
        short, long = min(rows, columns), max(rows, columns)
        flops += 5 * -(-count // machine.count) * (4 * short**2 * long + 2 * short**3)
    launches = UPDATE_LAUNCHES + CLIP_LAUNCHES * work.clips
    return max(flops / (PRODUCT_SHARE * machine.card.tflops * 1e9), launches * LAUNCH_US / 1000)


def exchanged_bytes(work: Work, ranks: int) -> dict[str, float]:
    """Return the bytes that a rank sends a step: a ring passes (n - 1) / n of what is shared."""
    share = (ranks - 1) / ranks
    owners = ranks if work.pads else min(ranks, CARDS_A_MACHINE)
    stacked = sum(count * rows * cols for count, rows, cols in work.matrices)
    padded = sum(-(-count // owners) * owners * rows * cols for count, rows, cols in work.matrices)
    return {
        "gradients of matrices": share * padded * work.gradient_bytes,
        "updates of matrices": share * padded * UPDATE_BYTES,
        "gradients of the rest": 2 * share * (work.num_params - stacked) * work.gradient_bytes,
    }


def exchange_ms(work: Work, machine: Machine) -> float:
    """Return the milliseconds that a step waits for other ranks: updates travel while others are computed."""
    if machine.count == 1:
        return 0.0
    link, sent = machine.exchange, exchanged_bytes(work, machine.count)
    ms = {name: size / (LINK_SHARE * link.gb_s * 1e6) for name, size in sent.items()}
    hidden = min(ms["updates of matrices"], update_ms(work, machine))
    return sum(ms.values()) - hidden + (2 * len(work.matrices) + 3) * link.latency_us / 1000


def step_parts(work: Work, machine: Machine, count: int, visits: int) -> dict[str, float]:
    """Return the milliseconds of the largest step by what takes them; count: micro-batches of all ranks."""
    stage = max(work.stages, key=lambda one: one.batch_tokens)
    mine = count / machine.count
    kernels = kernel_ms(work, machine.card, stage.batch_tokens / count, visits)
    launches = VISIT_LAUNCHES * visits * LAUNCH_US / 1000
    return {
        "kernels": mine * max(kernels, launches),
        "update": update_ms(work, machine),
        "exchange": exchange_ms(work, machine),
        "waiting for the host": BUBBLE_MS,
    }


def step_ms(work: Work, machine: Machine, count: int, visits: int) -> float:
    """Return the milliseconds of a step."""
    return sum(step_parts(work, machine, count, visits).values())


def count_steps(work: Work, ms: dict[int, float]) -> tuple[int, float]:
    """Return steps and seconds of training from the milliseconds of a step by its visits."""
    if not work.clock_s:
        return work.iterations, work.iterations * sum(share * ms[n] for share, n in work.parts) / 1000
    steps = int(sum(share * work.clock_s * 1000 / ms[visits] for share, visits in work.parts))
    if steps <= work.iterations:
        return steps, work.clock_s
    return work.iterations, work.clock_s * work.iterations / steps


def scoring_seconds(work: Work, machine: Machine) -> float:
    """Return the seconds of scoring the contest's validation text; forward is a third of a step's kernels."""
    passes, tokens = work.scoring
    return passes * kernel_ms(work, machine.card, tokens, work.visits) / 3 / machine.count / 1000


# What is shown


def command_line(work: Work, machine: Machine, words: list[str], counts: tuple[int, ...]) -> str:
    """Write the line that starts the run; words: what a person typed of recipe and fields."""
    whole = machine.count // CARDS_A_MACHINE
    start = f"torchrun --standalone --nproc_per_node={machine.count}"
    if machine.count == 1:
        start = "python"
    elif whole > 1:
        place = "--rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
        start = f"torchrun --nnodes={whole} --nproc_per_node={CARDS_A_MACHINE} {place}"
    replaced = ("data.micro_batches=", "schedule.stages=", "run.device=")
    kept = [word for word in words if not word.startswith(replaced)]
    device = ["run.device=cpu"] if machine.key == "cpu" else []
    number = f"data.micro_batches={counts[0]}"
    if work.curriculum:
        rows = ([*row[:3], count, *row[4:]] for row, count in zip(work.curriculum, counts))
        number = f"schedule.stages={','.join(':'.join(map(str, row)) for row in rows)}"
    return f"{start} train_gpt.py {shlex.join([*kept, number, *device])}"


def project(found: dict, names: str, words: list[str]) -> dict:
    """Project a described recipe onto machines, named "a,b"; beside each what was measured on its card."""
    work, entries = read_work(found), read_measurements()
    rows = []
    for machine in map(parse_machine, names.split(",")):
        measured = [entry for entry in entries if find_card(entry["card"]) == machine.key]
        rows.append(project_machine(work, machine, words) | {"measured": measured})
    return {"kind": "projected", "fitted_to": PUBLISHED, "machines": rows}


def project_machine(work: Work, machine: Machine, words: list[str]) -> dict:
    """Project one machine; a row without a command says why there is none."""
    row = {"hardware": machine.name, "card": machine.card.title, "cards": machine.count}
    for stage in work.stages:
        if not legal_counts(stage, machine.count):
            rows = stage.batch_tokens // stage.seq_len
            return row | {"refused": f"{machine.count} ranks cannot share the {rows} rows of a step"}
    counts = fitting_counts(work, machine)
    if counts is None:
        least = max(memory_gb(work, stage.seq_len, machine.card.item_bytes) for stage in work.stages)
        need = f"one row takes {least:.1f} of {machine.card.gb:g} GB"
        return row | {"refused": f"{need}: model.checkpoint_every=1 keeps less"}
    main = max(range(len(counts)), key=lambda i: work.stages[i].batch_tokens)
    ms = {visits: step_ms(work, machine, counts[main], visits) for _, visits in work.parts}
    steps, seconds = count_steps(work, ms)
    tokens = [stage.batch_tokens / count for stage, count in zip(work.stages, counts)]
    return row | {
        "micro_batches": counts[main],
        "command": command_line(work, machine, words, counts),
        "memory_gb": max(memory_gb(work, one, machine.card.item_bytes) for one in tokens),
        "card_gb": machine.card.gb,
        "step_ms": {str(visits): value for visits, value in ms.items()},
        "step_parts_ms": step_parts(work, machine, counts[main], work.visits),
        "steps": steps,
        "seconds": seconds,
        "scoring_seconds": scoring_seconds(work, machine),
    }


COLUMNS = ("hardware", "micro_batches", "GB a card", "ms a step", "steps", "in s", "scoring s")


def format_hardware(found: dict) -> list[str]:
    """Lay a projection out for people: a table, the commands, what is known of the cards."""
    lines = ["projected, not measured: a model fitted to the contest's 8xH100 (docs/scaling.md)"]
    shown = [table_cells(row) for row in found["machines"] if "command" in row]
    widths = [max(map(len, cells)) for cells in zip(COLUMNS, *shown)]
    specs = (f"{side}{width + 2}" for side, width in zip("<>>>>>>", widths))
    lines += [f"  {line}" for line in format_table(dict(zip(COLUMNS, specs)), shown).splitlines()]
    lines += [f"  {row['hardware']:<14}{row['refused']}" for row in found["machines"] if "refused" in row]
    lines += ["", "commands"]
    lines += [f"  {row['command']}" for row in found["machines"] if "command" in row]
    for row in found["machines"]:
        lines += [f"  measured on {row['card']}: {measured_line(one)}" for one in row["measured"]]
    return lines


def table_cells(row: dict) -> tuple[str, ...]:
    """Write the numbers of a machine."""
    ms = " to ".join(f"{value:,.0f}" for value in row["step_ms"].values())
    memory = f"{row['memory_gb']:.1f} of {row['card_gb']:g}"
    numbers = (f"{row[name]:,.0f}" for name in ("steps", "seconds", "scoring_seconds"))
    return row["hardware"], str(row["micro_batches"]), memory, ms, *numbers


def measured_line(entry: dict) -> str:
    """Say in one line what was measured on a card, one card alone."""
    facts = [f"{entry['date']}, commit {entry['commit']}"]
    if entry.get("step_1061_ms"):
        facts.append(f"1.0611 recipe {entry['step_1061_ms']:,.0f} ms a step on one card, 17 visits")
    if entry.get("step_naive_ms"):
        facts.append(f"naive recipe {entry['step_naive_ms']:,.0f} ms")
    return "; ".join(facts)


def read_measurements(path: Path = MEASUREMENTS) -> list[dict]:
    """Return what was entered of batteries on GPUs, one a run; nothing where there is no file."""
    return read_json(path)["entries"] if path.is_file() else []
