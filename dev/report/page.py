"""The sections of a report: each where there are facts for it, else what is missing and how to get it."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from audit.table import CHECKS
from common import UserError, parse_json
from dev.desk import charts
from dev.desk.extras import require
from dev.desk.runs import TEMPLATE, RunFacts, read_audit
from dev.report import pictures
from dev.report.compare import LEVEL, Group, differences, judge, say_limits, weaknesses
from dev.report.costs import LEVELS, MOST_BITS, Costs
from dev.report.pictures import Drawn
from dev.report.series import PHASE_TITLES, decile_speeds
from dev.report.sizes import TensorSize
from eval.stats import summarize
from formats.recipe import format_toml
from scoring.budget import Ledger
from train_gpt import draw_ledgers

QUANT_REPORT = "quant_report.json"  # that dev.quant_report --json wrote into a run folder
NO_VALUE = "-"
SAMPLE_LINES = 6  # of a log's samples


class Table(NamedTuple):
    """Titles and rows of cells; of words, which are set to the left, or of numbers."""

    head: list[str]
    rows: list[list]
    words: bool = False


class Block(NamedTuple):
    """A part of a section; kind says how the template shows the value."""

    kind: str  # figures | legend | table | heat | text | title | folded | missing | warning | pale | plain
    value: Any


class Section(NamedTuple):
    """A titled part of the page."""

    key: str
    title: str
    blocks: list[Block]


class Facts(NamedTuple):
    """All that a page is made from."""

    rows: list[Drawn]
    groups: list[Group]
    notes: list[str]
    sizes: dict[str, list[TensorSize] | str]  # by run: bytes by tensor, or why they are not there
    costs: dict[str, Costs | str]  # by run: what tokens cost, or why that is not there

    @property
    def runs(self) -> list[RunFacts]:
        return [row.run for row in self.rows]


def render(facts: Facts) -> str:
    """Return the report as HTML."""
    names = [group.name for group in facts.groups]
    title = names[0] if len(names) == 1 else f"{len(facts.rows)} runs of {len(names)} recipes"
    kinds = {run.kind == "weights" for run in facts.runs if run.result}
    source = "float weights" if kinds == {True} else "the artifact"
    source = (
        "artifacts, or from float weights where a run is said to be of weights" if len(kinds) > 1 else source
    )
    subtitle = f"val_bpb is in bits a byte and was measured from {source}; lower is better."
    return render_page(title, subtitle, [build(facts) for build in SECTIONS])


def render_page(title: str, subtitle: str, sections: list[Section]) -> str:
    """Return a page of sections as HTML; those without blocks are left out."""
    environment = require("jinja2").Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        sections=[section for section in sections if section.blocks],
        light=charts.variables(False),
        dark=charts.variables(True),
        levels=LEVELS,
        most_bits=MOST_BITS,
    )


def number(value, spec: str = ",.0f") -> str:
    """Spell a number, or that there is none."""
    return format(value, spec) if isinstance(value, (int, float)) else NO_VALUE


def by_run(facts: Facts, build: Callable[[Drawn], list[Block]]) -> list[Block]:
    """Show a part for each run; beyond the first they are folded."""
    parts = [(row.name, blocks) for row in facts.rows if (blocks := build(row))]
    folded = [Block("folded", part) for part in parts[1:]]
    return [Block("title", parts[0][0]), *parts[0][1], *folded] if parts else []


def summary(facts: Facts) -> Section:
    """List the runs with their scores, and what makes them weak."""
    head = [
        "run",
        "state",
        "seed",
        "val_bpb",
        "val_loss",
        "bytes",
        "steps",
        "training s",
        "tokens/s",
        "limits",
    ]
    rows = []
    for run in facts.runs:
        result = run.result or {}
        seconds = (
            (result["train_ms"] + result.get("calibration_ms", 0)) / 1000 if "train_ms" in result else None
        )
        state = f"{run.state}, of weights" if run.kind == "weights" else run.state
        rows.append(
            [run.name, state, NO_VALUE if run.seed is None else run.seed, number(run.val_bpb, ".5f"),
             number(run.score.get("val_loss"), ".5f"), number(sum(run.ledger.values()) or None),
             number(result.get("steps")), number(seconds, ",.1f"),
             number(result.get("tokens_per_second")), say_limits(run) or NO_VALUE]
        )  # fmt: skip
    said = [*weaknesses(facts.groups), *facts.notes, *(note for run in facts.runs for note in run.notes)]
    warnings = [Block("warning", text) for text in dict.fromkeys(said)]
    return Section("runs", "Runs", [Block("table", Table(head, rows)), *warnings])


def comparison(facts: Facts) -> Section:
    """Compare recipes: what differs, and how sure a difference of scores is."""
    if len(facts.groups) < 2:
        return Section("comparison", "Comparison", [])
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(facts.groups))]
    legend = [[letter, group.name] for letter, group in zip(letters, facts.groups)]
    rows = [[name, *values] for name, values in differences(facts.groups)]
    blocks = [Block("table", Table(["", "runs of"], legend, words=True)), *statistics(facts, letters)]
    blocks.append(Block("title", "Fields that differ"))
    alike = Block("pale", "None: the recipes are the same.")
    blocks.append(Block("table", Table(["field", *letters], rows, words=True)) if rows else alike)
    return Section("comparison", "Comparison", blocks)


def statistics(facts: Facts, letters: list[str]) -> list[Block]:
    """Test every recipe's scores against those of the first."""
    verdicts = {row.group.name: row for row in judge(facts.groups)}
    head = ["", "n", "mean val_bpb", "std", f"minus {letters[0]}", f"{LEVEL:.0%} interval", "p, Welch"]
    head += ["p, paired seeds", "seeds a side to show it"]
    rows = []
    for letter, group in zip(letters, facts.groups):
        scores = [row.val_bpb for row in group.scores]
        if not scores:
            rows.append([letter, 0, *[NO_VALUE] * (len(head) - 2)])
            continue
        sample, verdict = summarize(scores), verdicts.get(group.name)
        row = [letter, sample.n, f"{sample.mean:.5f}", number(sample.std, ".5f")]
        if verdict:
            span = verdict.interval and f"{verdict.interval[0]:+.5f} to {verdict.interval[1]:+.5f}"
            chances = [number(p, ".3g") for p in (verdict.welch, verdict.paired)]
            row += [f"{verdict.difference:+.5f}", span or NO_VALUE, *chances, number(verdict.seeds_needed)]
        rows.append(row + [NO_VALUE] * (len(head) - len(row)))
    said = (
        f"p is one-sided: the chance of such scores if the recipe were no better than {letters[0]}. Seeds "
        "are counted for p < 0.01 with power 0.8. `python -m eval.stats` knows the contest's margin, too."
    )
    return [Block("title", "Scores"), Block("table", Table(head, rows)), Block("pale", said)]


def curves(facts: Facts) -> Section:
    """Show the losses over time, steps and tokens, and validation."""
    rows = facts.rows
    axes = {"seconds": "seconds of training", "steps": "step", "tokens": "tokens"}
    found = [pictures.draw_losses(rows, axis, column) for column, axis in axes.items()]
    found = [svg for svg in (*found, pictures.draw_validations(rows)) if svg]
    silent = [row.name for row in rows if not len(row.series.steps)]
    blocks = [*legend(rows, has_marks=True), Block("figures", found)] if found else []
    if silent:
        said = f"No losses of {', '.join(silent)}: they are in metrics.jsonl, which a training writes."
        blocks.append(Block("missing", said))
    return Section("loss", "Loss", blocks)


def legend(rows: list[Drawn], looks: list[dict] | None = None, has_marks: bool = False) -> list[Block]:
    """Name the lines of all charts of a section once, where they are too many for each chart to do it."""
    if len(rows) <= charts.MOST_LABELS:
        return []
    marks = [charts.MARKERS[charts.marker(i)] if has_marks else "" for i in range(len(rows))]
    looks = looks or [row.look for row in rows]
    lines = [(charts.swatch(look), mark, row.name) for row, look, mark in zip(rows, looks, marks)]
    return [Block("legend", lines)]


def schedules(facts: Facts) -> Section:
    """Show learning rates, phases and speed."""
    rows = [row for row in facts.rows if row.series.schedule.steps]
    if not rows:
        said = "No schedule: it takes the events of a training and a recipe that this version reads."
        return Section("schedule", "Rates, phases, speed", [Block("missing", said)])
    rates = "Learning rates, as a factor of the recipe's"
    momentum, decay = "Momentum of Muon", "Factor of the weight decay"
    figures = [
        pictures.draw_schedule(rows, rates, "factor", lambda s: [rate.lr_mul for rate in s.schedule.rates]),
        pictures.draw_schedule(rows, momentum, "", lambda s: [rate.momentum for rate in s.schedule.rates]),
        pictures.draw_schedule(
            rows, decay, "factor", lambda s: [rate.decay_mul for rate in s.schedule.rates]
        ),
        pictures.draw_speed(rows),
    ]
    head = ["run", "tokens/s, first tenth", "last tenth", "ratio"]
    table = []
    for row in rows:
        if speeds := decile_speeds(row.series):
            first, last = speeds
            table.append(
                [row.name, f"{first:,.0f}", f"{last:,.0f}", number(last / first if first else None, ".2f")]
            )
    blocks = [
        *legend(rows),
        Block("figures", [svg for svg in figures if svg]),
        Block("table", Table(head, table)),
    ]
    return Section("schedule", "Rates, phases, speed", [*blocks, *by_run(facts, phases)])


def phases(row: Drawn) -> list[Block]:
    """List a run's phases."""
    found = [
        [f"{step:,}", f"{seconds:.1f}", f"{seq_len:,}", f"{batch:,}", passes, "yes" if qat else "no"]
        for step, seconds, seq_len, batch, passes, qat in row.series.schedule.phases
    ]
    return [Block("table", Table(list(PHASE_TITLES), found))] if found else []


def sizes(facts: Facts) -> Section:
    """Show bytes by part and by tensor against the limit."""
    weighed = [run for run in facts.runs if run.ledger]
    blocks = []
    if weighed:
        limits = [row.cfg.quant.limit_bytes for row in facts.groups if row.cfg]
        blocks.append(Block("figures", [pictures.draw_parts(weighed, max(limits, default=0))]))
        names = dict.fromkeys(name for run in weighed for name in run.ledger)
        rows = [[name, *(number(run.ledger.get(name)) for run in weighed)] for name in names]
        rows.append(["total", *(f"{sum(run.ledger.values()):,}" for run in weighed)])
        table = Block("table", Table(["part", *(run.name for run in weighed)], rows))
        blocks.append(Block("folded", ("Bytes by part, exactly", [table])))
    figures = [
        pictures.draw_tensors(name, row) for name, row in facts.sizes.items() if not isinstance(row, str)
    ]
    if figures:
        blocks.append(Block("figures", figures))
        said = (
            "A stream that holds several tensors is divided by the words that each was read from; where a "
            "general compressor stored it, by the entropy of the codes."
        )
        blocks.append(Block("pale", said))
    blocks += why_not(facts.sizes, "Bytes by tensor")
    return Section("bytes", "Bytes", blocks)


def why_not(found: dict[str, Any], what: str) -> list[Block]:
    """Say why a part is not there, runs of one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, value in found.items():
        if isinstance(value, str):
            reasons.setdefault(value, []).append(name)
    return [Block("missing", f"{what} of {', '.join(names)}: {why}") for why, names in reasons.items()]


def quantization(facts: Facts) -> Section:
    """Show what quantizing each tensor costs, where somebody measured it."""
    blocks: list[Block] = []
    for run in facts.runs:
        path = run.folder / QUANT_REPORT
        if run.kind == "run" and path.is_file():
            try:
                report = parse_json(path.read_bytes(), path)
                figure = pictures.draw_quantization(run.name, report)
                said = (
                    f"{run.name}, step {report['step']}: {report['val_bpb']:.5f} with float weights, "
                    f"{report['quantized_val_bpb']:.5f} quantized, on {report['tokens']:,} tokens."
                )
                blocks += [Block("figures", [figure]), Block("plain", said)]
            except (UserError, LookupError, TypeError, ValueError) as error:
                blocks.append(Block("missing", f"{path}: not what dev.quant_report writes ({error})."))
    if not blocks:
        said = (
            "Not measured. It takes float weights: train with run.save_every=N, then python -m "
            f"dev.quant_report RUN --json > RUN/{QUANT_REPORT} and make this report again."
        )
        blocks.append(Block("missing", said))
    return Section("quantization", "Cost of quantization", blocks)


def bits(facts: Facts) -> Section:
    """Show where the bits go: by position, document and byte, and a text as a heat map."""
    scored = [
        (row, facts.costs[row.name]) for row in facts.rows if isinstance(facts.costs.get(row.name), Costs)
    ]
    blocks: list[Block] = []
    if scored:
        lines = [
            f"{row.name}: {costs.bpb:.4f} bits a byte over the first {costs.num_tokens:,} tokens of its "
            f"validation text, {costs.num_bytes:,} bytes"
            f"{', as far as the time went' if costs.is_cut else ''}."
            for row, costs in scored
        ]
        said = "Scored plainly, windows side by side, no adaptation, no hints: above the score of a run."
        blocks += [Block("pale", said), *(Block("plain", line) for line in lines)]
        blocks += breakdowns(scored)
        blocks += by_run(facts, lambda row: heat(facts.costs.get(row.name)))
    return Section("bits", "Where the bits go", blocks + why_not(facts.costs, "Costs by token"))


def breakdowns(scored: list[tuple[Drawn, Costs]]) -> list[Block]:
    """Draw the tables of costs, those together that are of the same tokens: others do not compare."""
    texts = dict.fromkeys(costs.text for _, costs in scored)
    blocks: list[Block] = []
    if len(texts) > 1:
        said = (
            "Not all scored the same tokens, for tokenizers, texts or the time differ: these do not compare."
        )
        blocks.append(Block("warning", said))
    for text in texts:
        alike = [one for one in scored if one[1].text == text]
        rows = [row for row, _ in alike]
        looks = [{"color": colour, "linestyle": "-"} for colour in pictures.bar_colours(rows)]
        figures = [pictures.draw_breakdown(title, alike) for title in alike[0][1].tables]
        names = [Block("title", ", ".join(row.name for row in rows))] if len(texts) > 1 else []
        blocks += [*names, *legend(rows, looks), Block("figures", [svg for svg in figures if svg])]
    return blocks


def heat(costs: Costs | str | None) -> list[Block]:
    """Show a text with the cost of every token, and the tables of what bits are spent on."""
    if not isinstance(costs, Costs):
        return []
    total = sum(piece.bits for piece in costs.pieces)
    bpb = number(total / costs.shown_bytes if costs.shown_bytes else None, ".4f")
    said = (
        f"{costs.source}: {len(costs.pieces):,} tokens, {costs.shown_bytes:,} bytes, {total:,.0f} bits, "
        f"{bpb} bits a byte. With another tokenizer as many tokens are "
        "another stretch of it. Point at a token to read its cost."
    )
    head = ["", "targets", "bytes", "bits", "bits a byte"]
    tables = []
    for title, rows in costs.tables.items():
        lines = [
            [
                row.name,
                f"{row.targets:,.0f}",
                f"{row.num_bytes:,.0f}",
                f"{row.bits:,.0f}",
                number(row.bpb, ".3f"),
            ]
            for row in rows
        ]
        tables.append(Block("table", Table([title, *head[1:]], lines)))
    return [Block("plain", said), Block("heat", costs.pieces), Block("folded", ("Tables", tables))]


def clocks(facts: Facts) -> Section:
    """Show what was spent of the clocks."""
    ledgers = {run.name: read_ledgers(run, group) for group in facts.groups for run in group.runs}
    head = ["run", "clock", "seconds", "limit", "left", "parts"]
    rows = [
        [name, row.title, f"{row.total:,.2f}", number(row.limit or None, ",.2f"),
         spell_left(row.limit - row.total) if row.limit else NO_VALUE,
         " + ".join(f"{part} {amount:,.2f}" for part, amount in row.parts)]
        for name, found in ledgers.items()
        for row in found
    ]  # fmt: skip
    blocks = [Block("table", Table(head, rows, words=True))] if rows else []
    if any(row.limit and row.total > row.limit for found in ledgers.values() for row in found):
        said = "Left is below 0 where a clock was overrun: a step that has begun is finished."
        blocks.append(Block("pale", said))
    timed = [run for run in facts.runs if run.result and run.result.get("seconds")]
    if timed:
        blocks.insert(0, Block("figures", [pictures.draw_seconds(timed)]))
    return Section(
        "clocks", "Clocks", blocks or [Block("missing", "No finished run: no clock was drawn up.")]
    )


def spell_left(seconds: float) -> str:
    """Spell what is left of a clock; what rounds to nothing keeps its first digit, and its sign."""
    return f"{seconds:,.2f}" if abs(seconds) >= 0.005 or not seconds else f"{seconds:.1g}"


def read_ledgers(run: RunFacts, group: Group) -> list[Ledger]:
    """Draw up the clocks of a run as the trainer does, where it says what they take."""
    result, score = run.result or {}, run.score
    if not (group.cfg and "train_ms" in result and score.get("seconds")):
        return []
    facts = {"calibration_ms": 0.0} | result
    ledgers = draw_ledgers(group.cfg, facts, score["seconds"], score.get("num_bytes", 0))
    clocks = [row for row in ledgers if row.title.endswith("clock")]
    return clocks if "num_bytes" in score else clocks[:1]  # the limit of scoring depends on the text


def environment(facts: Facts) -> Section:
    """Say on what the runs were made, as far as they tell."""
    columns = [describe_origin(run) for run in facts.runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, NO_VALUE) for column in columns)] for name in names]
    head = ["", *(run.name for run in facts.runs)]
    missing = [Block("missing", "The runs do not tell: train them again for that.")]
    return Section(
        "environment", "Environment", [Block("table", Table(head, rows, words=True))] if rows else missing
    )


def describe_origin(run: RunFacts) -> dict[str, str]:
    """Collect what a run says of machine, versions, data and code."""
    origin = dict(run.origin)
    machine = origin.pop("machine", {})
    found = {
        key: str(value) for key, value in (machine | origin).items() if key not in ("seed", "config_hash")
    }
    result = run.result or {}
    places = result.get("places", {})
    found |= {key.partition(".")[2]: str(places[key]) for key in places if key.startswith("data.")}
    found |= {"recipe": str(result["config_hash"])} if "config_hash" in result else {}
    for line in run.log.text.splitlines() if run.log and not machine else ():
        if line.startswith(("Running ", "device:", "world_size:", "attention_mode:")):
            is_version = line.startswith("Running ")
            key, _, value = line.removeprefix("Running ").partition(" " if is_version else ":")
            found[key.lower()] = value
    resumed = result.get("resumed_at")
    return found | ({"resumed at steps": ", ".join(map(str, resumed))} if resumed else {})


def verdicts(facts: Facts) -> Section:
    """Show a record's audit; of a run, what its own folder shows."""
    blocks: list[Block] = []
    titles = {check.id: check.title for check in CHECKS}
    folders = dict.fromkeys(run.folder for run in facts.runs if run.kind == "record")
    for folder in folders:
        checks = read_audit(folder)
        if checks:
            rows = [
                [
                    c.get("id"),
                    titles.get(c.get("id"), ""),
                    c["verdict"],
                    "; ".join(map(str, c.get("evidence", [])[:2])),
                ]
                for c in checks
            ]
            blocks += [Block("title", f"Audit of {folder.name}")]
            blocks.append(Block("table", Table(["check", "of", "verdict", "evidence"], rows, words=True)))
        else:
            said = f"{folder}: no audit.json. python -m audit {folder} audits it."
            blocks.append(Block("missing", said))
    own = [run for run in facts.runs if run.kind == "run" and run.result]
    if own:
        rows = [[run.name, *check_run(run)] for run in own]
        head = ["run", "artifact is the scored one", "bytes of the text", "limits", "altered files"]
        blocks += [Block("title", "Run folders"), Block("table", Table(head, rows, words=True))]
        blocks.append(
            Block("pale", "python -m eval RUN scores an artifact again; make record audits a record.")
        )
    return Section("audit", "Audit", blocks)


def check_run(run: RunFacts) -> list[str]:
    """Say what a run's folder shows of its own score."""
    account = run.result.get("byte_account")
    altered = "; ".join(note for note in run.notes if "altered" in note or "not the events" in note)
    text = account.get("said", NO_VALUE) if isinstance(account, dict) else NO_VALUE
    is_own = "yes" if run.artifact else "no: another, or it is not there"
    return [is_own, text, say_limits(run) or NO_VALUE, altered or "none"]


def samples(facts: Facts) -> Section:
    """Show text that the models wrote: in training, where it was asked for, and now from the artifact."""
    return Section(
        "samples", "Samples", by_run(facts, lambda row: sample_blocks(row, facts.costs.get(row.name)))
    )


def sample_blocks(row: Drawn, costs: Costs | str | None) -> list[Block]:
    """Show one model's text."""
    blocks = []
    if isinstance(costs, Costs):
        prompt, written = costs.sample
        said = "After the start of the text above, drawn at temperature 0.8 from the artifact:"
        blocks += [Block("pale", said), Block("text", f"{prompt} [...] {written or '(ended the document)'}")]
    lines = row.run.log.text.splitlines() if row.run.log else []
    found = [line.removeprefix("sample: ") for line in lines if line.startswith("sample: ")][-SAMPLE_LINES:]
    for line in found:
        step, _, text = line.partition(" text:")
        with suppress(UserError):  # a line that was cut off
            blocks += [
                Block("text", parse_json(text, "sample")),
                Block("pale", f"Above: in training, {step}."),
            ]
    return blocks


def recipes(facts: Facts) -> Section:
    """Show the recipes, folded."""
    blocks = []
    for group in facts.groups:
        table: dict[str, dict] = {}
        for name, value in group.runs[0].recipe.items():
            section, _, key = name.partition(".")
            table.setdefault(section, {})[key] = value
        if table:
            blocks.append(Block("folded", (group.name, [Block("text", format_toml(table))])))
    return Section("recipes", "Recipes", blocks)


SECTIONS: tuple[Callable[[Facts], Section], ...] = (
    summary, comparison, curves, schedules, sizes, quantization, bits, clocks, environment, verdicts, samples,
    recipes,
)  # fmt: skip
