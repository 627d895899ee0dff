"""What a sweep has found: a table, the best setting or the trade-offs, importance, pictures, one page."""

import math
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import UserError, atomic_file, format_table, write_json
from dev.desk import charts
from dev.desk.extras import require
from dev.sweep.board import REASON, RUNS, Board
from dev.sweep.spec import Spec, spell

RESULTS_NAME, PAGE_NAME, TEMPLATE_NAME = "results.json", "results.html", "results.html.jinja"
ORDER = ("complete", "over a limit", "pruned", "running", "waiting", "diverged", "failed")
LEAST_FOR_IMPORTANCE = 4  # finished trials
LEAST_FOR_RANKS = 5
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
    try:
        importance = find_importance(board)
    except UserError as error:  # a package is missing; the trials are what matters
        importance = {}
        notes.append(f"no importance: {error}")
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
        "rank_correlation": find_rank_correlation(trials),
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
    return {
        "trial": trial.number,
        "state": state.get(word, word),
        "val_bpb": mean_bpb(runs) if runs else None,
        "bytes": max(run["num_bytes"] for run in runs) if runs else None,
        "train_s": max(run["train_s"] for run in runs) if runs else None,
        "steps": min(run["steps"] for run in runs) if runs else None,
        "params": trial.params,
        "over": over,
        "reason": reason,
        "last_loss": losses[-1] if losses else None,
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


def find_importance(board: Board) -> dict[str, float]:
    """Return which share of the variance of val_bpb each field explains; none where too little is known."""
    optuna, spec = board.optuna, board.spec
    known = [t for t in board.trials() if t.state == board.states.COMPLETE]
    if len(known) < LEAST_FOR_IMPORTANCE or "val_bpb" not in spec.objectives:
        return {}
    require("sklearn")
    study = optuna.create_study(directions=board.study.directions)
    study.add_trials(known)
    at = spec.objectives.index("val_bpb")
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: trial.values[at]
        )
    except (ValueError, RuntimeError):  # all scores alike, or no field that all trials have
        return {}
    return {field: round(float(share), 4) for field, share in found.items() if math.isfinite(share)}


def find_rank_correlation(trials: list) -> dict | None:
    """Say how well the loss at half of the rungs ordered the trials that were trained to the end."""
    done = [t for t in trials if RUNS in t.user_attrs and t.intermediate_values]
    rung = max((rung for t in done for rung in t.intermediate_values), default=0) // 2
    pairs = [
        (t.intermediate_values[rung], mean_bpb(t.user_attrs[RUNS]))
        for t in done
        if rung in t.intermediate_values
    ]
    if len(pairs) < LEAST_FOR_RANKS:
        return None
    return {"rung": rung, "trials": len(pairs), "spearman": spearman(*map(list, zip(*pairs)))}


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


def verify_command(spec: Spec, params: dict) -> str:
    """Spell out the trial that compares a setting with the recipe on several seeds."""
    budget = ["--seconds", f"{spec.seconds:g}"] if spec.seconds else ["--steps", str(spec.steps)]
    twins = {name: value for name, value in spec.changes(params).items() if name not in spec.fixed}
    words = ["python", "-m", "dev.trial", "--recipe", str(spec.recipe), "--set", *spell(twins)]
    words += ["--both", *spell(spec.fixed)] if spec.fixed else []
    return shlex.join([*words, "--seeds", "3", *budget, "--measure", spec.measure])


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


def table_of(found: dict, spec: Spec) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table, as text."""
    names = short_names(spec)
    titles = ["trial", "state", "val_bpb", "bytes", "seconds", "steps", *names.values()]
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
        ]
        rows.append(facts + [spell_value(row["params"].get(field)) for field in names])
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
        lines.append(f"importance for val_bpb: {shares}")
    if ranks := found["rank_correlation"]:
        lines.append(
            f"loss at rung {ranks['rung']} of {spec.prune['rungs']} and final score: rank correlation "
            f"{ranks['spearman']:.2f} (n = {ranks['trials']}, of trials that were not pruned)"
        )
    lines += [f"note: {note}" for note in found["notes"]]
    if found["verify"]:
        lines.append(f"verify: {found['verify']}")
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
    about = f"val_bpb of {len(rows)} finished trials by number, with the best so far as a line"
    with charts.chart("Trials", "val_bpb", about) as drawn:
        draw_dots(drawn.ax, rows, lambda row: row["trial"])
        best, xs, ys = math.inf, [], []
        for row in rows:
            if not row["over"]:
                best = min(best, row["val_bpb"])
                xs.append(row["trial"])
                ys.append(best)
        drawn.ax.plot(xs, ys, drawstyle="steps-post", color=charts.colour(1), label="best so far")
        drawn.ax.set_xlabel("trial")
        drawn.ax.locator_params(axis="x", integer=True)
    return drawn.svg


def draw_importance(found: dict) -> str:
    """Draw the share of each field."""
    shares = list(found["importance"].items())[::-1]
    about = "Importance for val_bpb: " + ", ".join(f"{field} {share:.0%}" for field, share in shares[::-1])
    height = 1.2 + 0.28 * len(shares)
    with charts.chart("Share of the variance of val_bpb (fANOVA)", "", about, height) as drawn:
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
