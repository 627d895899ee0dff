"""What a sweep has found: a table, the best setting or the trade-offs, importance, pictures, one page."""

import math
import shlex
from collections import Counter
from collections.abc import Callable
from itertools import chain, count, islice
from pathlib import Path

from common import UserError, atomic_file, format_table, write_json
from dev.desk import charts
from dev.desk.extras import require
from dev.sweep.board import LAST, REASON, RUNS, Board
from dev.sweep.spec import Dimension, Spec, spell
from dev.trial.plan import SEEDS

RESULTS_NAME, PAGE_NAME, TEMPLATE_NAME = "results.json", "results.html", "results.html.jinja"
ORDER = ("complete", "over a limit", "pruned", "running", "waiting", "diverged", "failed")
TRIALS_A_FIELD, MORE_TRIALS = 3, 4  # finished trials without which importance is chance
LEAST_FOR_RANKS = 5
NEAR_END = 0.05  # of a range
NUM_NEW_SEEDS = 3
SAME_ORIGIN = {  # of all runs, else trials are not comparable; and what to say where it is not
    "code": "were trained by more than one version of the code",
    "data": "saw more than one set of training data",
    "validation": "were scored on more than one validation text",
    "machine": "ran on machines that differ: with a clock, the slower one trained less",
}
MOST_REASON = 90  # characters of why a trial failed, in the table


def collect(board: Board) -> dict:
    """Return all that is known of a sweep, as one JSON object."""
    spec, trials = board.spec, board.trials()
    rows = sorted((describe_trial(spec, trial) for trial in trials), key=sort_key)
    front = pareto_front([row for row in rows if row["state"] == "complete"], spec.objectives)
    best, notes = front[0] if front else None, find_notes(spec, rows)
    notes += find_ends(spec, best["params"]) if best else []
    known = [t for t in trials if t.state == board.states.COMPLETE]
    importance, why = find_importance(board, known)
    ranks, why_no_ranks = find_rank_correlation(trials) if spec.prune["kind"] != "none" else (None, "")
    notes += [reason for reason in (why, why_no_ranks) if reason]
    return {
        "sweep": spec.name,
        "recipe": str(spec.recipe),
        "storage": board.place,
        "folder": str(board.folder),
        "budget": {"seconds": spec.seconds} if spec.seconds else {"steps": spec.steps},
        "measure": spec.measure,
        "seeds": spec.seeds,
        "objectives": spec.objectives,
        "wanted": spec.trials,
        "states": dict(Counter(row["state"] for row in rows)),
        "best": best,
        "front": [row["trial"] for row in front],
        "importance": importance,
        "importance_trials": len(known) if importance else 0,
        "rank_correlation": ranks,
        "notes": notes,
        "verify": verify_command(spec, best["params"]) if best else "",
        "trials": rows,
    }


def describe_trial(spec: Spec, trial) -> dict:
    """Return a trial as a row of the results."""
    runs = trial.user_attrs.get(RUNS, [])
    over = [name for name, share in trial.constraints.items() if share > 0]
    word, reason = trial.state.name.lower(), trial.user_attrs.get(REASON, "")
    state = {"complete": "over a limit" if over else "complete", "fail": "failed"}
    state |= {"pruned": "diverged"} if reason else {}
    losses = [value for _, value in sorted(trial.intermediate_values.items())]
    last = trial.user_attrs.get(LAST, {})
    return {
        "trial": trial.number,
        "state": state.get(word, word),
        "val_bpb": mean_bpb(runs) if runs else None,
        "bytes": max(run["num_bytes"] for run in runs) if runs else None,
        "train_s": max(run["train_s"] for run in runs) if runs else None,
        "steps": min(run["steps"] for run in runs) if runs else last.get("step"),
        "params": trial.params,
        "over": over,
        "reason": reason,
        "last_loss": last.get("loss", losses[-1] if losses else None),
        "rungs": len(losses),
        "runs": runs,
    }


def mean_bpb(runs: list[dict]) -> float:
    """Average the scores of a trial's seeds."""
    return sum(run["val_bpb"] for run in runs) / len(runs)


def sort_key(row: dict) -> tuple:
    """Order trials: the best first, then those without a score."""
    unknown = row["val_bpb"] is None
    return ORDER.index(row["state"]), unknown, 0.0 if unknown else row["val_bpb"], row["trial"]


def pareto_front(rows: list[dict], objectives: list[str]) -> list[dict]:
    """Keep the rows that no other row beats in every objective; of one objective, the best row."""
    front: list[dict] = []
    for row in sorted(rows, key=lambda row: [row[name] for name in objectives]):
        if all(any(row[name] < other[name] for name in objectives) for other in front):
            front.append(row)
    return front


def find_importance(board: Board, known: list) -> tuple[dict[str, float], str]:
    """Return which share of the variance of val_bpb each field explains; or none, and why."""
    optuna, spec = board.optuna, board.spec
    least = TRIALS_A_FIELD * len(spec.space) + MORE_TRIALS
    if "val_bpb" not in spec.objectives or not known:
        return {}, ""
    if len(known) < least:
        return (
            {},
            f"no importance: {len(known)} trials are finished, {len(spec.space)} fields need {least}",
        )
    try:
        require("sklearn")
    except UserError as error:  # the trials are what matters
        return {}, f"no importance: {error}"
    study = optuna.create_study(directions=board.study.directions)
    study.add_trials(known)
    at = spec.objectives.index("val_bpb")
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: trial.values[at]
        )
    except (ValueError, RuntimeError) as error:  # all scores alike, or no field that all trials have
        return {}, f"no importance: {error}"
    return {field: round(float(share), 4) for field, share in found.items() if math.isfinite(share)}, ""


def find_rank_correlation(trials: list) -> tuple[dict | None, str]:
    """Say how well the loss at half of the rungs ordered the trials that reached the end; or why not."""
    done = [t for t in trials if RUNS in t.user_attrs and t.intermediate_values]
    rung = max((rung for t in done for rung in t.intermediate_values), default=0) // 2
    pairs = [
        (t.intermediate_values[rung], mean_bpb(t.user_attrs[RUNS]))
        for t in done
        if rung in t.intermediate_values
    ]
    if len(pairs) < LEAST_FOR_RANKS:
        return None, (
            f"no rank correlation of losses half-way and final scores: it needs {LEAST_FOR_RANKS} trials "
            f"that reached the end and have both, found {len(pairs)}"
        )
    return {"rung": rung, "trials": len(pairs), "spearman": spearman(*map(list, zip(*pairs)))}, ""


def spearman(xs: list[float], ys: list[float]) -> float:
    """Return the correlation of ranks; 0 where all are alike."""
    xs, ys = ([sorted(values).index(value) for value in values] for values in (xs, ys))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    both = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys))
    spread = sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys)
    return round(both / math.sqrt(spread), 3) if spread else 0.0


def find_notes(spec: Spec, rows: list[dict]) -> list[str]:
    """Say what makes a comparison of these trials weak."""
    origins = [run["origin"] for row in rows for run in row["runs"]]
    notes = [
        f"trials {said}"
        for name, said in SAME_ORIGIN.items()
        if len({repr(o.get(name)) for o in origins}) > 1
    ]
    complete = [row for row in rows if row["state"] == "complete"]
    if not complete and any(row["state"] == "over a limit" for row in rows):
        notes.append("every finished trial is over a limit: vary a field that makes the artifact smaller")
    if len(complete) > 1:
        several = f"the mean of {len(spec.seeds)} seeds" if len(spec.seeds) > 1 else "one seed"
        notes.append(f"the best of {len(complete)} is also the luckiest of {several}: verify it on new seeds")
    return notes


def find_ends(spec: Spec, params: dict) -> list[str]:
    """Say which values of the best setting lie at an end of their range, behind which better ones may be."""
    ends = [(d, params[d.field], end_of(d, params[d.field])) for d in spec.space if d.field in params]
    return [
        f"the best {d.field}, {spell_value(value)}, is at the {end} end of its range, "
        f"{spell_value(d.options['low'])} to {spell_value(d.options['high'])}: widen it?"
        for d, value, end in ends
        if end
    ]


def end_of(dimension: Dimension, value) -> str:
    """Name the end of a range near which a value is, "" for none."""
    low, high = dimension.options.get("low"), dimension.options.get("high")
    if dimension.kind == "categorical" or low == high:
        return ""
    if dimension.options.get("log"):
        low, high, value = map(math.log, (low, high, value))
    share = (value - low) / (high - low)
    return "lower" if share <= NEAR_END else "upper" if share >= 1 - NEAR_END else ""


def verify_command(spec: Spec, params: dict) -> str:
    """Spell out the trial that compares a setting with the recipe on seeds that the sweep did not see."""
    budget = ["--seconds", f"{spec.seconds:g}"] if spec.seconds else ["--steps", str(spec.steps)]
    twins = {name: value for name, value in spec.changes(params).items() if name not in spec.fixed}
    words = ["python", "-m", "dev.trial", "--recipe", str(spec.recipe), "--set", *spell(twins)]
    words += ["--both", *spell(spec.fixed)] if spec.fixed else []
    seeds = ",".join(map(str, new_seeds(spec.seeds)))
    return shlex.join([*words, "--seeds", seeds, *budget, "--measure", spec.measure])


def new_seeds(used: list[int]) -> list[int]:
    """Return seeds by which no setting was chosen."""
    return list(islice((seed for seed in chain(SEEDS, count(len(SEEDS))) if seed not in used), NUM_NEW_SEEDS))


# ----------------------------------------------------------------------------------------------------------
# For terminals
# ----------------------------------------------------------------------------------------------------------


def short_names(spec: Spec) -> dict[str, str]:
    """Map fields to their keys, where no other field of the space has the same."""
    keys = Counter(d.field.partition(".")[2] for d in spec.space)
    return {d.field: key if keys[key := d.field.partition(".")[2]] == 1 else d.field for d in spec.space}


def spell_value(value) -> str:
    """Write a parameter's value for a table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def has_ended_early(row: dict) -> bool:
    """Whether the last loss is all that a trial came to."""
    return row["val_bpb"] is None and row["last_loss"] is not None


def table_of(found: dict, spec: Spec) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table, as text."""
    names = short_names(spec)
    titles = ["trial", "state", "val_bpb", "bytes", "seconds", "steps", "last loss", *names.values()]
    rows = []
    for row in found["trials"]:
        number = f"{row['trial']}{' *' if row['trial'] in found['front'] else ''}"
        facts = [
            number,
            row["state"],
            "" if row["val_bpb"] is None else f"{row['val_bpb']:.4f}",
            f"{row['bytes']:,}" if row["bytes"] else "",
            "" if row["train_s"] is None else f"{row['train_s']:.1f}",
            "" if row["steps"] is None else f"{row['steps']:,}",
            f"{row['last_loss']:.4f}" if has_ended_early(row) else "",
        ]
        rows.append(facts + [spell_value(row["params"].get(field)) for field in names])
    if not any(map(has_ended_early, found["trials"])):
        at = titles.index("last loss")
        titles, *rows = ([*cells[:at], *cells[at + 1 :]] for cells in (titles, *rows))
    return titles, rows


def format_results(found: dict, spec: Spec) -> str:
    """Lay the results out for a terminal."""
    titles, rows = table_of(found, spec)
    widths = [max(map(len, column)) + 2 for column in zip(titles, *rows)]
    lines = [format_table({title: f">{width}" for title, width in zip(titles, widths)}, rows)] if rows else []
    counts = ", ".join(f"{count} {state}" for state, count in found["states"].items()) or "none yet"
    lines.append(f"{spec.name}: {counts}; {spec.trials} wanted. Folder: {found['folder']}")
    for row in found["trials"]:
        if row["reason"]:
            lines.append(
                f"trial {row['trial']} {row['state']}: {' '.join(row['reason'].split())[-MOST_REASON:]}"
            )
    if found["importance"]:
        shares = ", ".join(f"{field} {share:.0%}" for field, share in found["importance"].items())
        lines.append(f"importance for val_bpb, from {found['importance_trials']} trials: {shares}")
    if ranks := found["rank_correlation"]:
        lines.append(
            f"loss at rung {ranks['rung']} of {spec.prune['rungs']} and final score: rank correlation "
            f"{ranks['spearman']:.2f} (n = {ranks['trials']}, of trials that were not pruned)"
        )
    lines += [f"note: {note}" for note in found["notes"]]
    if found["verify"]:
        lines.append(f"verify on new seeds: {found['verify']}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def scored(found: dict) -> list[dict]:
    """List the trials with a score in the order of their numbers."""
    rows = [row for row in found["trials"] if row["val_bpb"] is not None]
    return sorted(rows, key=lambda row: row["trial"])


def draw_dots(ax, rows: list[dict], x_of: Callable[[dict], float]) -> None:
    """Draw trials as dots by their val_bpb: full ones within limits, hollow ones over."""
    for is_over, label in ((False, None), (True, "over a limit")):
        group = [row for row in rows if bool(row["over"]) == is_over]
        fill = "none" if is_over else charts.colour(0)
        xs, ys = [x_of(row) for row in group], [row["val_bpb"] for row in group]
        ax.plot(
            xs,
            ys,
            "o",
            color=charts.colour(0),
            markerfacecolor=fill,
            markersize=5,
            label=label if xs else None,
        )


def draw_history(found: dict) -> str:
    """Draw each trial's score in the order of the trials, and the best one so far."""
    rows = scored(found)
    pruned = [row["trial"] for row in found["trials"] if row["state"] == "pruned"]
    about = f"val_bpb of {len(rows)} finished trials by number, with the best so far as a line"
    about += f"; crosses for {len(pruned)} pruned ones" if pruned else ""
    with charts.chart("Trials", "val_bpb", about) as drawn:
        draw_dots(drawn.ax, rows, lambda row: row["trial"])
        best, xs, ys = math.inf, [], []
        for row in rows:
            if not row["over"]:
                best = min(best, row["val_bpb"])
                xs.append(row["trial"])
                ys.append(best)
        drawn.ax.plot(xs, ys, drawstyle="steps-post", color=charts.colour(1), label="best so far")
        if pruned:  # at the upper edge: they have no score
            edge = drawn.ax.get_xaxis_transform()
            drawn.ax.plot(
                pruned, [0.98] * len(pruned), "x", color=charts.colour(2), transform=edge, label="pruned"
            )
        drawn.ax.set_xlabel("trial")
        drawn.ax.locator_params(axis="x", integer=True)
    return drawn.svg


def draw_importance(found: dict) -> str:
    """Draw the share of each field."""
    shares = list(found["importance"].items())[::-1]
    about = "Importance for val_bpb: " + ", ".join(f"{field} {share:.0%}" for field, share in shares[::-1])
    height = 1.2 + 0.28 * len(shares)
    title = f"Share of the variance of val_bpb (fANOVA, {found['importance_trials']} trials)"
    with charts.chart(title, "", about, height) as drawn:
        drawn.ax.barh([field for field, _ in shares], [share for _, share in shares], color=charts.colour(0))
        drawn.ax.set_xlim(0, 1)
    return drawn.svg


def draw_pareto(found: dict) -> str:
    """Draw bytes against val_bpb, and the front that no trial beats in both."""
    rows = scored(found)
    front = pareto_front([row for row in rows if not row["over"]], ["bytes", "val_bpb"])
    about = f"Bytes against val_bpb of {len(rows)} trials; {len(front)} of them are beaten by none in both"
    with charts.chart("Bytes against val_bpb", "val_bpb", about) as drawn:
        draw_dots(drawn.ax, rows, lambda row: row["bytes"])
        xs, ys = [row["bytes"] for row in front], [row["val_bpb"] for row in front]
        drawn.ax.plot(xs, ys, drawstyle="steps-post", color=charts.colour(1), label="beaten by none in both")
        drawn.ax.set_xlabel("bytes of code and artifact")
        drawn.ax.xaxis.set_major_formatter("{x:,.0f}")
        drawn.ax.locator_params(axis="x", nbins=5)
    return drawn.svg


def draw_slice(found: dict, spec: Spec, field: str) -> str:
    """Draw a field's values against val_bpb."""
    dimension = next(d for d in spec.space if d.field == field)
    rows = [row for row in scored(found) if field in row["params"]]
    with charts.chart(field, "val_bpb", f"{field} against val_bpb of {len(rows)} trials") as drawn:
        named = dimension.kind == "categorical"
        draw_dots(drawn.ax, rows, lambda row: str(row["params"][field]) if named else row["params"][field])
        if dimension.options.get("log"):
            ticker = require("matplotlib.ticker")
            drawn.ax.set_xscale("log")
            drawn.ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            drawn.ax.xaxis.set_major_formatter("{x:g}")
            drawn.ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    return drawn.svg


def draw_all(found: dict, spec: Spec) -> dict[str, str]:
    """Draw what can be drawn: name of the file -> SVG for a page."""
    rows = scored(found)
    drawn = {"history": draw_history(found)} if rows else {}
    if len(found["importance"]) > 1:
        drawn["importance"] = draw_importance(found)
    if any(row["bytes"] for row in rows):
        drawn["pareto"] = draw_pareto(found)
    if len(rows) > 1:
        drawn |= {f"by_{d.field}": draw_slice(found, spec, d.field) for d in spec.space}
    return drawn


def write_results(found: dict, spec: Spec, folder: Path) -> Path:
    """Write results.json, a picture a file, and the page with all of it; returns the page."""
    write_json(folder / RESULTS_NAME, found)
    pictures = draw_all(found, spec)
    for name, svg in pictures.items():
        with atomic_file(folder / f"{name}.svg") as file:
            file.write(charts.standalone(svg).encode())
    jinja2 = require("jinja2")
    source = Path(__file__).with_name(TEMPLATE_NAME).read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    titles, rows = table_of(found, spec)
    page = template.render(found=found, spec=spec, titles=titles, rows=rows, pictures=pictures, charts=charts)
    with atomic_file(folder / PAGE_NAME) as file:
        file.write(page.encode())
    return folder / PAGE_NAME


def try_to_write(found: dict, spec: Spec, folder: Path, tell: Callable[[str], None]) -> None:
    """Write the results' files; a missing package or a full disk is told, the results stay in the study."""
    try:
        tell(f"page: {write_results(found, spec, folder)}")
    except UserError as error:
        tell(f"note: no pictures: {error}")
