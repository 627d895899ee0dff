"""Seeds to a verdict: mean, deviation, one-sided Welch test, the 0.005-nat margin, how many seeds it takes.

    python -m eval.stats NEW... --against OLD...     logs, submission.json, result.json or folders of them
    python -m eval.stats NEW... --against 1.0810     one number: a one-sample test
    python -m eval.stats NEW REPRODUCTION...         scores of two folders are pooled, each source shown

Lower is better everywhere: a small p says that NEW beats OLD by more than the margin. Nothing is rounded
before it is printed.
"""

import json
import math
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import CommandParser, UserError, parse_json, read_json, run_command
from eval.logs import headlines, parse_log, read_seed, settings_hash
from formats.checkpoints import RESULT_NAME

MARGIN_NATS = 0.005  # a token; the contest's README asks records to beat the last one by it
ALPHA = 0.01  # the README's; the late leaderboard used 0.25 between neighbouring rows
FRONTIER_ALPHA = 0.25
POWER = 0.8  # chance of showing a gain that is there
SAME_BPB = 5e-5  # half a unit of the fourth decimal, to which claims and some logs are rounded
SOURCES_ALPHA = 0.05  # two-sided: below, sources of one configuration do not agree
FRACTION_TERMS = 300  # exact to 1e-13 for df up to some thousands
POWER_STEPS = 400  # of Simpson's rule, over 10 deviations to each side
MAX_SEEDS = 1000  # where minimum_seeds gives up
UNEVEN = 1.1  # most steps over least, of one recipe: beyond, by a clock, the machine was not as fast
LOG_NAME, BROKEN = "train.log", "NOT A VALID RUN"
# What a result says of where it comes from, and what it means that two differ in it.
ORIGINS = {
    "data": "were trained on different data",
    "tokenizer": "have different tokenizers: nats a token do not compare, bits a byte do",
    "code": "were trained by different code",
    "ranks": "had different numbers of ranks",
    "machine": "ran on different machines or library versions: by the clock, they had different budgets",
}


class Sample(NamedTuple):
    """Scores of one configuration; std is the sample deviation, None below two scores."""

    n: int
    mean: float
    std: float | None


class TestResult(NamedTuple):
    """A one-sided test of "new is lower than old - margin": p is the chance of such a t without it."""

    __test__ = False  # pytest collects classes of this name

    t: float
    df: float
    p: float


class Interval(NamedTuple):
    """The central `level` of a resampled difference; p is the share of resamples that are not below 0."""

    low: float
    high: float
    p: float
    level: float
    resamples: int


class SeedScore(NamedTuple):
    """One seed's score; nats and hash are None and "" where the file does not state them."""

    file: str
    seed: int | None
    val_bpb: float
    val_loss: float | None
    config: str
    source: str  # the folder it was named with: one machine's runs, or one reproduction's


def summarize(values: list[float]) -> Sample:
    """Return n, mean and sample standard deviation (n - 1) of at least one value."""
    n = len(values)
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Sample(n, mean, std)


def t_tail(t: float, df: float) -> float:
    """Return P(T > t) of Student's t: half a regularized incomplete beta function."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return half if t > 0 else 1 - half


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for k in range(FRACTION_TERMS, 0, -1):
        m = k // 2
        top = m * (b - m) if k % 2 == 0 else -(a + m) * (a + b + m)
        fraction = 1 + top * x / ((a + k - 1) * (a + k)) / fraction
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_scale) / (a * fraction)


def result(difference: float, error: float, df: float) -> TestResult:
    """Test difference < 0 given its standard error; without any spread t is infinite."""
    t = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return TestResult(t, df, t_tail(-t, df))


def welch(new: list[float], old: list[float], margin: float = 0.0) -> TestResult:
    """Test mean(new) < mean(old) - margin with unequal variances; both need two values."""
    a, b = summarize(new), summarize(old)
    if a.n < 2 or b.n < 2:
        raise UserError(
            f"Welch's test: expected two scores on each side, found {a.n} and {b.n}. Run more seeds."
        )
    return result(a.mean - b.mean + margin, *welch_error(a, b))


def welch_error(a: Sample, b: Sample) -> tuple[float, float]:
    """Return the standard error of a difference of means of two values each at least, and its df."""
    parts = a.std**2 / a.n, b.std**2 / b.n
    spread = parts[0] + parts[1]
    weights = parts[0] ** 2 / (a.n - 1) + parts[1] ** 2 / (b.n - 1)
    return math.sqrt(spread), spread**2 / weights if weights else float(a.n + b.n - 2)


def one_sample(new: list[float], reference: float, margin: float = 0.0) -> TestResult:
    """Test mean(new) < reference - margin, the reference taken as free of noise."""
    sample = summarize(new)
    if sample.n < 2:
        raise UserError("one-sample test: expected two scores, found one. Run more seeds.")
    return result(sample.mean - reference + margin, sample.std / math.sqrt(sample.n), sample.n - 1)


def paired(new: dict[int, float], old: dict[int, float], margin: float = 0.0) -> TestResult:
    """Test the differences of the seeds that both sides have."""
    return one_sample([new[seed] - old[seed] for seed in sorted(new.keys() & old.keys())], 0.0, margin)


def bootstrap_difference(
    new: np.ndarray, old: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Draw the same documents again for both sides: the interval of bpb(new) - bpb(old).

    new and old are (D, 2) rows of bits and bytes; a score is the ratio of their sums. The percentile
    bootstrap: it knows of no error but that of the choice of documents.
    """
    columns, rng = np.hstack([new, old]).astype(np.float64), np.random.default_rng(seed)
    differences = np.empty(resamples)
    for i in range(resamples):
        times = np.bincount(rng.integers(0, len(new), len(new)), minlength=len(new))
        bits, num_bytes, old_bits, old_bytes = times @ columns
        differences[i] = bits / max(num_bytes, 1) - old_bits / max(old_bytes, 1)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), float((differences >= 0).mean()), level, resamples)


def nats_to_bpb(nats: float, bytes_per_token: float) -> float:
    """Convert nats a token to bits a byte."""
    return nats / (math.log(2) * bytes_per_token)


def minimum_seeds(std: float, gain: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return how many seeds a side make a gain over the margin show at p < alpha with this power.

    Both sides get as many and share one deviation. None: not below MAX_SEEDS.
    """
    if gain <= 0:
        return None
    effect = gain / std if std else math.inf
    high = next((n for n in (8, 64, MAX_SEEDS) if chance_to_show(effect, n, alpha) >= power), None)
    return high and bisect_left(range(high), power, lo=2, key=lambda n: chance_to_show(effect, n, alpha))


def chance_to_show(effect: float, n: int, alpha: float) -> float:
    """Return the chance that n seeds a side show a gain of `effect` deviations at p < alpha; rises with n."""
    df = 2 * (n - 1)
    return shifted_tail(critical_t(alpha, df), df, effect * math.sqrt(n / 2))


def shifted_tail(t: float, df: float, shift: float) -> float:
    """Return P((Z + shift) / S > t), Z standard normal, S^2 chi-squared over df: the noncentral t's tail."""
    width = 10 / math.sqrt(2 * df)
    low, high = max(0.0, 1 - width), 1 + width
    step = (high - low) / POWER_STEPS
    log_scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)

    def integrand(s: float) -> float:
        density = math.exp(log_scale + (df - 1) * math.log(s) - df * s * s / 2) if s else 0.0
        return density * math.erfc((t * s - shift) / math.sqrt(2)) / 2

    weights = (1 if k in (0, POWER_STEPS) else 4 if k % 2 else 2 for k in range(POWER_STEPS + 1))
    return step / 3 * math.fsum(weight * integrand(low + k * step) for k, weight in enumerate(weights))


def critical_t(alpha: float, df: float) -> float:
    """Return the t that is exceeded with chance alpha, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > alpha:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > alpha else (low, middle)
    return high


# ----------------------------------------------------------------------------------------------------------
# Read scores, compare, report
# ----------------------------------------------------------------------------------------------------------


def read_scores(paths: list[Path]) -> list[SeedScore]:
    """Read one score per seed from logs, JSON files and folders of them (their logs; else their JSON).

    The same score of the same seed counts once, wherever it is filed.
    """
    files = {}  # file -> its source
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file. Expected logs, JSON files, folders of them, or a number.")
        files |= {file: _source(file) for file in (_score_files(path) if path.is_dir() else [path])}
    logs = [file for file in files if file.suffix != ".json"]
    parsed = [parse_log(str(file), file.read_text(encoding="utf-8", errors="replace")) for file in logs]
    lines = headlines(parsed)
    scores = [
        SeedScore(log.name, log.seed, line.val_bpb, line.val_loss, settings_hash(log), files[file])
        for file, log in zip(logs, parsed)
        if (line := lines.get(log.name))
    ]
    for file in (file for file in files if file.suffix == ".json"):
        scores += _json_scores(file, files[file])
    scores = list({(row.seed, row.val_bpb, row.val_loss): row for row in reversed(scores)}.values())[::-1]
    if not scores:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: expected scores (val_loss, val_bpb), found none. Name logs or JSON files.")
    return scores


def _source(file: Path) -> str:
    """Name the folder of a file; run folders of this harness, a seed each, belong to the one around them."""
    folder = file.parent
    is_run = file.name == "train.log" and (folder / "result.json").is_file()
    return str(folder.parent if is_run else folder)


def _score_files(folder: Path) -> list[Path]:
    logs = [*sorted(folder.glob("*.log")), *sorted(folder.glob("*.txt"))]
    logs = [file for file in logs if "val_bpb" in file.read_text(encoding="utf-8", errors="replace")]
    return logs or [file for file in sorted(folder.glob("*.json")) if file.stat().st_size < 1_000_000]


def _json_scores(file: Path, source: str) -> list[SeedScore]:
    """Read `scores` of this command's --json, `seed_results`, `score` of a result.json, or a bare val_bpb."""
    facts = read_json(file)
    if not isinstance(facts, dict):
        return []
    results, scores = facts.get("seed_results"), facts.get("scores")
    if isinstance(scores, list):
        rows = [(read_seed(row.get("seed")), row) for row in scores if isinstance(row, dict)]
    elif isinstance(results, dict):
        rows = [(read_seed(seed), row) for seed, row in results.items() if read_seed(seed) is not None]
    else:
        rows = [(read_seed(facts.get("seed")), facts.get("score", facts))]
    recipe = facts.get("config_hash", "")
    known = {"file": str(file), "val_loss": None, "config": "", "source": source}
    known |= {"config": recipe} if isinstance(recipe, str) else {}
    return [
        SeedScore(**known | {name: row[name] for name in SeedScore._fields if name in row} | {"seed": seed})
        for seed, row in rows
        if isinstance(row, dict) and _is_score(row)
    ]


def _is_score(row: dict) -> bool:
    """Tell whether a row of JSON states a score, and in a score's fields nothing of another kind."""
    kinds = {"val_loss": float | None, "file": str, "config": str, "source": str}
    return isinstance(row.get("val_bpb"), float) and all(
        isinstance(row[name], kind) for name, kind in kinds.items() if name in row
    )


def by_source(scores: list[SeedScore]) -> dict[str, list[SeedScore]]:
    """Group scores by the folder they came from, in order."""
    sources = dict.fromkeys(row.source for row in scores)
    return {source: [row for row in scores if row.source == source] for source in sources}


def by_seed(scores: list[SeedScore]) -> dict[int, float]:
    """Return seed -> its mean score over reproductions."""
    seeds = sorted({row.seed for row in scores if row.seed is not None})
    return {seed: summarize([row.val_bpb for row in scores if row.seed == seed]).mean for seed in seeds}


def bytes_per_token(scores: list[SeedScore]) -> float | None:
    """The mean bytes of a scored token, from scores that state nats and bpb."""
    ratios = [row.val_loss / (math.log(2) * row.val_bpb) for row in scores if row.val_loss and row.val_bpb]
    return math.fsum(ratios) / len(ratios) if ratios else None


def warnings(scores: list[SeedScore]) -> list[str]:
    """Say what makes the scores of one side a weak basis."""
    found, n = [], len(scores)
    if n < 3:
        few = f"{n} score{'s' * (n > 1)}"
        found.append(f"{few}: the contest expects three seeds, a deviation from two means little")
    groups = by_source(scores)
    for source, rows in groups.items():
        seeds = [row.seed for row in rows if row.seed is not None]
        if len(set(seeds)) < len(seeds):
            found.append(f"{source}: one seed occurs twice: the scores are not independent")
        found += selection(Path(source), rows)
    found += disagreement(groups)
    for kind, files in (("logs", False), ("results", True)):
        hashes = sorted({row.config for row in scores if row.config and row.file.endswith(".json") == files})
        if len(hashes) > 1:
            found.append(f"the {kind} state {len(hashes)} different configurations: {', '.join(hashes)}")
    found += [text for row in scores for text in doubts(row)]
    results = [result for row in scores if (result := result_beside(Path(row.file)))]
    return found + unequal(results) + uneven(results)


def result_beside(file: Path) -> dict | None:
    """Return what the run of a log, or a result itself, says of itself; None where there is none to read."""
    path = file.with_name(RESULT_NAME)
    if file.name not in (LOG_NAME, RESULT_NAME) or not path.is_file():
        return None
    try:
        facts = parse_json(path.read_bytes(), path, strict=False)
    except (UserError, OSError):
        return None
    return facts if isinstance(facts, dict) else None


def doubts(row: SeedScore) -> list[str]:
    """Say what speaks against one score in the files that it is from."""
    file, found = Path(row.file), []
    if not file.is_file():
        return []
    if file.suffix != ".json" and BROKEN in file.read_text(encoding="utf-8", errors="replace"):
        found.append(f"{file}: says {BROKEN}: it is over a limit")
    result = result_beside(file)
    if file.name == LOG_NAME and result is None:
        found.append(f"{file}: no {RESULT_NAME} beside it that can be read: the run is not finished")
    if result is None:
        return found
    if limits := result.get("over_limits"):
        said = ", ".join(map(str, limits)) if isinstance(limits, list) else str(limits)
        found.append(f"{file}: over its limit of {said}: not a valid run")
    score = result.get("score") if isinstance(result.get("score"), dict) else {}
    stated, seed = score.get("val_bpb"), result.get("seed")
    if isinstance(stated, float) and abs(stated - row.val_bpb) > SAME_BPB:
        found.append(f"{file}: states val_bpb {row.val_bpb:.8f}, {RESULT_NAME} beside it {stated:.8f}")
    if row.seed is not None and seed not in (None, row.seed):
        found.append(f"{file}: states seed {row.seed}, {RESULT_NAME} beside it {seed}: another run's log")
    reasons = (score.get(key) for key in ("invalid", "not_comparable"))
    return found + [f"{file}: {reason}" for reason in reasons if reason]


def unequal(results: list[dict]) -> list[str]:
    """Say in what else than their recipes runs differ, as far as their results tell."""
    origins = [result["origin"] for result in results if isinstance(result.get("origin"), dict)]
    found = [
        f"the runs {meaning}"
        for key, meaning in ORIGINS.items()
        if len({repr(origin[key]) for origin in origins if key in origin}) > 1
    ]
    scores = [result["score"] for result in results if isinstance(result.get("score"), dict)]
    sizes = sorted({score["num_bytes"] for score in scores if isinstance(score.get("num_bytes"), int)})
    if len(sizes) > 1:
        found.append(f"the runs scored different texts, of {', '.join(f'{size:,}' for size in sizes)} bytes")
    return found


def uneven(results: list[dict]) -> list[str]:
    """Say whether runs of one configuration took clearly different numbers of steps."""
    steps = [result["steps"] for result in results if isinstance(result.get("steps"), int)]
    if not steps or max(steps) <= UNEVEN * min(steps):
        return []
    return [f"the runs took from {min(steps):,} to {max(steps):,} steps: they are not equally long"]


def disagreement(groups: dict[str, list[SeedScore]]) -> list[str]:
    """Say which source of a pool differs from the others by more than its noise."""
    found = []
    for source, rows in list(groups.items())[len(groups) == 2 :]:  # of two sources one says it
        rest = [row.val_bpb for other in groups if other != source for row in groups[other]]
        if len(rows) > 1 and len(rest) > 1:
            p = welch([row.val_bpb for row in rows], rest).p
            two_sided = 2 * min(p, 1 - p)
            if two_sided < SOURCES_ALPHA:
                found.append(f"{source} differs from the other sources, two-sided p {two_sided:.3g}")
    return found


def selection(folder: Path, scores: list[SeedScore]) -> list[str]:
    """Say whether a folder's submission.json claims the best of its scores instead of their mean."""
    path = folder / "submission.json"
    claims = read_json(path) if path.is_file() else None
    claim = claims.get("val_bpb") if isinstance(claims, dict) else None
    values = sorted(row.val_bpb for row in scores)
    if not isinstance(claim, float) or abs(claim - summarize(values).mean) <= SAME_BPB:
        return []
    best = [k for k in range(1, len(values)) if abs(summarize(values[:k]).mean - claim) <= SAME_BPB]
    mean = summarize(values).mean
    return [
        f"{path}: val_bpb {claim} is of the best {k} of {len(values)} scores; their mean is {mean:.8f}"
        for k in best[:1]
    ]


def describe(scores: list[SeedScore]) -> dict:
    """Summarize one side: in bits a byte, in nats a token where it states them, and by source."""
    groups = {None: scores} | by_source(scores)
    samples = {name: summarize([row.val_bpb for row in rows])._asdict() for name, rows in groups.items()}
    return samples.pop(None) | {"bytes_per_token": bytes_per_token(scores), "sources": samples}


def compare(new: list[SeedScore], old: list[SeedScore] | float, alpha=ALPHA, power=POWER) -> dict:
    """Test new against old (scores, or one number) at margin 0 and at MARGIN_NATS; returns a JSON object.

    The margin's bits a byte are of the new side's tokens.
    """
    values, side = [row.val_bpb for row in new], describe(new)
    margins = {"0": 0.0}
    if side["bytes_per_token"]:
        margins[f"{MARGIN_NATS} nats"] = nats_to_bpb(MARGIN_NATS, side["bytes_per_token"])
    report, tests = {"new": side, "warnings": warnings(new)}, {}
    if isinstance(old, float):
        report |= {"old": {"n": 1, "mean": old, "std": None, "bytes_per_token": None, "sources": {}}}
        others, pairs = [old], 0
    else:
        report |= {"old": describe(old)}
        report["warnings"] += [f"against: {text}" for text in warnings(old)]
        report["warnings"] += [f"new and old: {text}" for text in across(new, old)]
        others, pairs = [row.val_bpb for row in old], len(by_seed(new).keys() & by_seed(old).keys())
    if len(values) > 1 and len(others) > 1:
        tests["Welch"] = lambda margin: welch(values, others, margin)
    elif len(values) > 1:
        tests["one-sample"] = lambda margin: one_sample(values, others[0], margin)
    if pairs > 1:
        tests["paired by seed"] = lambda margin: paired(by_seed(new), by_seed(old), margin)
    report["tests"] = [
        {"test": name, "margin": label, "margin_bpb": margin} | test(margin)._asdict()
        for name, test in tests.items()
        for label, margin in margins.items()
    ]
    gain = report["old"]["mean"] - side["mean"]
    report |= {"alpha": alpha, "power": power}
    report["minimum_seeds"] = {
        label: minimum_seeds(side["std"], gain - margin, alpha, power) if side["std"] is not None else None
        for label, margin in margins.items()
    }
    return report


def across(new: list[SeedScore], old: list[SeedScore]) -> list[str]:
    """Say what differs between two sides and not within them."""
    sides = [[result for row in side if (result := result_beside(Path(row.file)))] for side in (new, old)]
    within = {text for side in sides for text in unequal(side)}
    return [text for text in unequal([*sides[0], *sides[1]]) if text not in within]


def passed_over(paths: list[Path]) -> list[str]:
    """Name the files and folders among several that hold no score."""
    found = []
    for path in paths if len(paths) > 1 else []:
        try:
            read_scores([path])
        except UserError:
            found.append(f"{path}: no score in it, left out: a run that is not finished?")
    return found


def format_side(name: str, side: dict) -> list[str]:
    """Lay out one side: in both units, then each source where there are several."""

    def line(label: str, sample: dict) -> str:
        deviation = "no deviation" if sample["std"] is None else f"std {sample['std']:.8f}"
        nats = side["bytes_per_token"] and side["bytes_per_token"] * math.log(2) * sample["mean"]
        both = f" = {nats:.8f} nats a token" if nats else ""
        return f"{label} n {sample['n']}  mean {sample['mean']:.8f} bpb{both}  {deviation}"

    sources = side["sources"] if len(side["sources"]) > 1 else {}
    return [line(f"{name:<4}", side), *(line(f"  of {key}:", sample) for key, sample in sources.items())]


def format_report(report: dict) -> str:
    """Lay out a comparison for a terminal."""
    lines = [line for name in ("new", "old") if name in report for line in format_side(name, report[name])]
    if "old" in report:
        gain, per_token = report["old"]["mean"] - report["new"]["mean"], report["new"]["bytes_per_token"]
        both = f" = {gain * per_token * math.log(2):.8f} nats a token" if per_token else ""
        lines.append(f"gain {gain:.8f} bpb{both}")
    for row in report.get("tests", []):
        lines.append(
            f"{row['test']}, margin {row['margin']} ({row['margin_bpb']:.8f} bpb): "
            f"t {row['t']:.4f}  df {row['df']:.2f}  one-sided p {row['p']:.3g}"
        )
    for label, n in report.get("minimum_seeds", {}).items():
        wanted = f"p < {report['alpha']} with power {report['power']}"
        lines.append(f"seeds a side for {wanted}, margin {label}: {n or 'out of reach'}")
    return "\n".join(lines + [f"warning: {text}" for text in report["warnings"]])


def json_text(facts: object) -> str:
    """Spell facts as JSON, which has no word for what is no finite number: null."""
    return json.dumps(null_for_nan(facts), allow_nan=False)


def null_for_nan(value):
    """Replace what is no finite number by None, also in objects and lists."""
    if isinstance(value, dict):
        return {name: null_for_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_against(names: list[str]) -> list[SeedScore] | float:
    """Read the old side: one number, else files and folders."""
    if len(names) == 1 and names[0].replace(".", "", 1).isdigit():
        if not 0 < float(names[0]) < 1000:
            raise UserError(f"--against {names[0]:.40}: expected bits per byte above 0, as 1.2244.")
        return float(names[0])
    return read_scores([Path(name) for name in names])


def main(argv: list[str] | None = None) -> int:
    """Compare seeds."""
    parser = CommandParser(prog="python -m eval.stats", description=__doc__)
    add = parser.add_argument
    add("new", nargs="+", type=Path, help="logs, JSON files or folders of the new scores")
    add("--against", nargs="+", default=[], help="the old scores, or one number")
    add("--alpha", type=float, default=ALPHA, help="p to reach in the minimum n (%(default)s)")
    add("--power", type=float, default=POWER, help="chance to reach it (%(default)s)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    if not (0 < args.alpha < 1 and 0 < args.power < 1):
        raise UserError(f"--alpha, --power: expected chances, found {args.alpha} and {args.power}.")
    new = read_scores(args.new)
    if args.against:
        report = compare(new, read_against(args.against), args.alpha, args.power)
    else:
        report = {"new": describe(new), "warnings": warnings(new)}
    report["warnings"] += passed_over(args.new)
    if len(args.against) > 1:
        report["warnings"] += [f"against: {text}" for text in passed_over(list(map(Path, args.against)))]
    report["scores"] = [row._asdict() for row in new]
    print(json_text(report) if args.json else format_report(report))
    return 0


if __name__ == "__main__":
    run_command(main)
