"""Seeds to a verdict: mean, deviation, one-sided Welch test, the 0.005-nat margin, how many seeds it takes.

    python -m eval.stats NEW... --against OLD...     logs, submission.json, result.json or folders of them
    python -m eval.stats NEW... --against 1.0810     one number: a one-sample test

Lower is better everywhere: a small p says that NEW beats OLD by more than the margin. Nothing is rounded
before it is printed.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import CommandParser, UserError, run_command
from data.shards import read_json
from eval.logs import config_hash, headlines, parse_log, read_seed

MARGIN_NATS = 0.005  # a token; the contest's README asks records to beat the last one by it
ALPHA = 0.01  # the README's; the late leaderboard used 0.25 between neighbouring rows
FRONTIER_ALPHA = 0.25
FRACTION_TERMS = 300  # exact to 1e-13 for df up to some thousands
MAX_SEEDS = 1000  # where minimum_seeds gives up


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
    """One seed's score; nats and hash are None and "" where the source does not state them."""

    source: str
    seed: int | None
    val_bpb: float
    val_loss: float | None
    config: str


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
    parts = a.std**2 / a.n, b.std**2 / b.n
    spread = parts[0] + parts[1]
    weights = parts[0] ** 2 / (a.n - 1) + parts[1] ** 2 / (b.n - 1)
    df = spread**2 / weights if weights else float(a.n + b.n - 2)
    return result(a.mean - b.mean + margin, math.sqrt(spread), df)


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


def minimum_seeds(std: float, gain: float, alpha: float = ALPHA, power: float = 0.8) -> int | None:
    """Return how many seeds a side make a gain over the margin show at p < alpha with this power.

    Both sides get as many and share one deviation. The chance is that of a shifted t, slightly below the
    exact noncentral one. None: not below MAX_SEEDS.
    """
    if gain <= 0:
        return None
    for n in range(2, MAX_SEEDS):
        df = 2 * (n - 1)
        shift = gain / (std * math.sqrt(2 / n)) if std else math.inf
        if t_tail(critical_t(alpha, df) - shift, df) >= power:
            return n
    return None


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
    """Read one score per seed from logs, JSON files and folders of them (their logs; else their JSON)."""
    files = [file for path in paths for file in (_score_files(path) if path.is_dir() else [path])]
    logs = [file for file in files if file.suffix != ".json"]
    parsed = [parse_log(str(file), file.read_text(encoding="utf-8", errors="replace")) for file in logs]
    lines = headlines(parsed)
    scores = [
        SeedScore(log.name, log.seed, lines[log.name].val_bpb, lines[log.name].val_loss, config_hash(log))
        for log in parsed
        if log.name in lines
    ]
    scores += [score for file in files if file.suffix == ".json" for score in _json_scores(file)]
    scores = list(
        {(row.seed, row.val_bpb, row.val_loss): row for row in scores}.values()
    )  # a log filed twice
    if not scores:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: expected scores (val_loss, val_bpb), found none. Name logs or JSON files.")
    return scores


def _score_files(folder: Path) -> list[Path]:
    logs = [*sorted(folder.glob("*.log")), *sorted(folder.glob("*.txt"))]
    logs = [file for file in logs if "val_bpb" in file.read_text(encoding="utf-8", errors="replace")]
    return logs or [file for file in sorted(folder.glob("*.json")) if file.stat().st_size < 1_000_000]


def _json_scores(file: Path) -> list[SeedScore]:
    """Read `seed_results` of a submission.json, `score` of a result.json, or a bare val_bpb."""
    facts = read_json(file)
    if not isinstance(facts, dict):
        return []
    results = facts.get("seed_results")
    if isinstance(results, dict):
        rows = [(read_seed(seed), row) for seed, row in results.items() if read_seed(seed) is not None]
    else:
        rows = [(facts.get("seed"), facts.get("score", facts))]
    return [
        SeedScore(str(file), seed, row["val_bpb"], row.get("val_loss"), "")
        for seed, row in rows
        if isinstance(row, dict) and isinstance(row.get("val_bpb"), float)
    ]


def bytes_per_token(scores: list[SeedScore]) -> float | None:
    """The mean bytes of a scored token, from scores that state nats and bpb."""
    ratios = [row.val_loss / (math.log(2) * row.val_bpb) for row in scores if row.val_loss and row.val_bpb]
    return math.fsum(ratios) / len(ratios) if ratios else None


def warnings(scores: list[SeedScore]) -> list[str]:
    """Say what makes the scores of one side a weak basis."""
    found, n = [], len(scores)
    if n < 3:
        found.append(
            f"{n} score{'s' * (n > 1)}: the contest expects three seeds, a deviation from two means little"
        )
    if len({row.seed for row in scores if row.seed is not None}) < len(
        [r for r in scores if r.seed is not None]
    ):
        found.append("one seed occurs twice: the scores are not independent")
    hashes = sorted({row.config for row in scores if row.config})
    if len(hashes) > 1:
        found.append(f"the logs state {len(hashes)} different configurations: {', '.join(hashes)}")
    return found


def compare(new: list[SeedScore], old: list[SeedScore] | float) -> dict:
    """Test new against old (scores, or one number) at margin 0 and at MARGIN_NATS; returns a JSON object."""
    values = [row.val_bpb for row in new]
    per_token = bytes_per_token(new)
    margins = {"0": 0.0}
    if per_token:
        margins[f"{MARGIN_NATS} nats"] = nats_to_bpb(MARGIN_NATS, per_token)
    report = {"new": summarize(values)._asdict(), "bytes_per_token": per_token, "warnings": warnings(new)}
    if isinstance(old, float):
        tests = {"one-sample": lambda margin: one_sample(values, old, margin)}
        report |= {"old": {"n": 1, "mean": old, "std": None}}
    else:
        others = [row.val_bpb for row in old]
        report |= {"old": summarize(others)._asdict()}
        report["warnings"] += [f"against: {text}" for text in warnings(old)]
        tests = {}
        if len(values) > 1 and len(others) > 1:
            tests["Welch"] = lambda margin: welch(values, others, margin)
        elif len(values) > 1:
            tests["one-sample"] = lambda margin: one_sample(values, others[0], margin)
        by_seed = [{row.seed: row.val_bpb for row in rows if row.seed is not None} for rows in (new, old)]
        if len(by_seed[0].keys() & by_seed[1].keys()) > 1:
            tests["paired by seed"] = lambda margin: paired(*by_seed, margin)
    report["tests"] = [
        {"test": name, "margin": label, "margin_bpb": margin} | test(margin)._asdict()
        for name, test in tests.items()
        for label, margin in margins.items()
    ]
    std = report["new"]["std"]
    gain = report["old"]["mean"] - report["new"]["mean"]
    report["minimum_seeds"] = {
        label: minimum_seeds(std, gain - margin) if std is not None else None
        for label, margin in margins.items()
    }
    return report


def format_report(report: dict) -> str:
    """Lay out a comparison for a terminal."""
    nats = report["bytes_per_token"] and report["bytes_per_token"] * math.log(2)
    lines = []
    for side in ("new", "old"):
        if side in report:
            n, mean, std = (report[side][key] for key in ("n", "mean", "std"))
            deviation = "no deviation" if std is None else f"std {std:.8f}"
            lines.append(f"{side:<5}n {n}  mean {mean:.8f} bpb  {deviation}")
    if "old" in report:
        gain = report["old"]["mean"] - report["new"]["mean"]
        both = f" = {gain * nats:.8f} nats a token" if nats else ""
        lines.append(f"gain {gain:.8f} bpb{both}")
    for row in report.get("tests", []):
        lines.append(
            f"{row['test']}, margin {row['margin']} ({row['margin_bpb']:.8f} bpb): "
            f"t {row['t']:.4f}  df {row['df']:.2f}  one-sided p {row['p']:.3g}"
        )
    for label, n in report.get("minimum_seeds", {}).items():
        lines.append(f"seeds a side for p < {ALPHA} with power 0.8, margin {label}: {n or 'out of reach'}")
    return "\n".join(lines + [f"warning: {text}" for text in report["warnings"]])


def main(argv: list[str] | None = None) -> int:
    """Compare seeds."""
    parser = CommandParser(prog="python -m eval.stats", description=__doc__)
    parser.add_argument("new", nargs="+", type=Path, help="logs, JSON files or folders of the new scores")
    parser.add_argument("--against", nargs="+", default=[], help="the old scores, or one number")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    missing = [path for path in [*args.new, *map(Path, args.against)] if not path.exists()]
    number = (
        args.against[0] if len(args.against) == 1 and args.against[0].replace(".", "", 1).isdigit() else None
    )
    missing = [path for path in missing if str(path) != number]
    if missing:
        raise UserError(
            f"{missing[0]}: no such file. Expected logs, JSON files, folders of them, or one number."
        )
    new = read_scores(args.new)
    if args.against:
        report = compare(new, float(number) if number else read_scores([Path(name) for name in args.against]))
    else:
        report = {"new": summarize([row.val_bpb for row in new])._asdict()}
        report |= {"bytes_per_token": bytes_per_token(new), "warnings": warnings(new)}
    report["scores"] = [row._asdict() for row in new]
    print(json.dumps(report) if args.json else format_report(report))
    return 0


if __name__ == "__main__":
    run_command(main)
