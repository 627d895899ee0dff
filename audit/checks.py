"""The folder checks, K1-K8 and K24.

A check returns a Finding. FAIL is an arithmetic contradiction of the folder with itself or with a limit,
SUSPECT a pattern or fingerprint that a person should look at, NOT RUN says why there is no verdict.
"""

import itertools
import math
import re
from functools import partialmethod
from typing import NamedTuple

from audit.folder import ARTIFACTS, Case
from audit.program import external_commands, suspicions, third_party_imports
from data.accounts import CONTEST, EXPANDS, LOSES, LOSSLESS
from data.codecs.bese import BESE_LOSES, BESE_TYPE
from eval.logs import (
    RunLog,
    ScoreLine,
    byte_accounts,
    classify_bytes,
    headlines,
    read_seed,
    reservations,
    settings_hash,
    stable_config,
)
from eval.stats import ALPHA, FRONTIER_ALPHA, MARGIN_NATS, nats_to_bpb, summarize, welch

VERDICTS = ("PASS", "NOT RUN", "SUSPECT", "FAIL")  # from best to worst
MAX_EVIDENCE = 8

KNOWN_VAL_TOKENS = {
    62_021_632,
    45_508_608,
    45_514_752,
    40_540_160,
    47_851_520,
    47_853_344,
    63_779_840,
    151_130_112,
}
SUBSET_VAL_TOKENS = 30_000_000  # below: hardly 50,000 documents
LOCAL_PREP_SHARDS = 1499
STOP_TOLERANCE_MS = 200  # the cap is tested after a step; merged logs overshoot by up to 137 ms
SAME_BPB = 5e-5  # half a unit of the fourth decimal
OTHER_BPB = 5e-4  # a seed's spread: further apart it is another run
STD_TOLERANCE = 2e-5
ROUNDED_MEAN = 1e-4  # how far a rounded mean of rounded scores may be from the true mean
SAME_RATIO = 0.005  # of bytes per token within one log
MINIMAL_KEYS = ("author", "github_id", "name", "date", "val_bpb")
HEADLINE_KEYS = ("val_bpb", "mean_val_bpb", "mean_bpb")
FOLDER_NAME = re.compile(r"\d{4}-\d{2}-\d{2}_[\w.+-]+")
FILE_SEED = re.compile(r"(?:seed|_s|ternary_log|log)[_-]?(\d+)")
BASE_PACKAGES = {
    "torch",
    "numpy",
    "sentencepiece",
    "tqdm",
    "huggingface_hub",
    "datasets",
    "tiktoken",
    "triton",
}
OTHER_NAMES = {
    "flash_attn_interface": ("flash_attn", "flashattention", "flash_attention", "fa3", "flash attention"),
    "python_minifier": ("pyminify",),
    "zstandard": ("zstd",),
}
NEEDS_DATA = "needs the data: --data DIR (`python -m data.doctor`), or --run PROGRAM for K9 in miniature"
# What K9 makes of a log's own account of its bytes: a good one is a claim, which the data must show.
ACCOUNT_VERDICTS = {LOSSLESS: "NOT RUN", CONTEST: "NOT RUN", LOSES: "SUSPECT", EXPANDS: "FAIL"}
DOUBLED_PATH = re.compile(r"datasets/datasets/")


class Finding(NamedTuple):
    """A verdict and the facts it rests on, the decisive ones first."""

    verdict: str
    evidence: list[str]


def worst(*verdicts: str) -> str:
    """Return the worst of some verdicts; PASS of none."""
    return max(verdicts, key=VERDICTS.index, default="PASS")


def join(*findings: Finding) -> Finding:
    """Put findings of one check together, the worst first."""
    ordered = sorted(findings, key=lambda found: -VERDICTS.index(found.verdict))
    return Finding(ordered[0].verdict, [text for found in ordered for text in found.evidence])


class Notes:
    """Collects evidence with its verdict; the finding shows the worst first."""

    def __init__(self):
        self.rows: list[tuple[str, str]] = []

    def add(self, verdict: str, text: str) -> None:
        self.rows.append((verdict, text))

    fail = partialmethod(add, "FAIL")
    suspect = partialmethod(add, "SUSPECT")
    good = partialmethod(add, "PASS")

    def finding(self, nothing: str) -> Finding:
        """Sum up; `nothing` is the reason when there was nothing to look at."""
        if not self.rows:
            return Finding("NOT RUN", [nothing])
        ordered = sorted(self.rows, key=lambda row: -VERDICTS.index(row[0]))
        texts = list(dict.fromkeys(text for _, text in ordered))
        hidden = [f"and {len(texts) - MAX_EVIDENCE} more"] if len(texts) > MAX_EVIDENCE else []
        return Finding(ordered[0][0], texts[:MAX_EVIDENCE] + hidden)


# Program


def check_unwrapped(case: Case) -> Finding:
    """K1: the whole program can be read, and which files it is."""
    program, notes = case.program, Notes()
    for text in program.opaque:
        notes.suspect(text)
    for text in program.newer:
        notes.add("NOT RUN", f"{text}: needs the parser of Python 3.12")
    if program.layers:
        files = ", ".join(f"{path} {size:,} bytes" for path, size in program.code.items())
        notes.good(f"{len(program.layers)} layers; code: {files}")
    for path, size in program.data.items():
        notes.suspect(f"the program names {path}, {size:,} bytes that no ledger counts")
    return notes.finding(program.error or "no program")


def check_reachable(case: Case) -> Finding:
    """K2: suspicious patterns in code that the configuration leaves alive."""
    program, notes = case.program, Notes()
    for found in suspicions(program):
        notes.suspect(f"{found.what} ({found.where}); {found.rule}")
    declared = case.declared
    for command in sorted(external_commands(program)):
        if command != "?" and command not in declared:
            notes.suspect(f"starts the program `{command}`, which README and requirements do not mention")
    for log in case.logs:
        gates = [name for name in ("within_gate", "word_gate") if log.facts.get(name)]
        if gates:
            notes.suspect(f"{log.name}: {', '.join(gates)} > 0: hints gated by the token to predict (C1)")
    if program.newer:
        notes.add("NOT RUN", f"{program.newer[0]}: needs the parser of Python 3.12")
    if program.live:
        basis = "the configuration in the log" if case.logs and case.logs[0].config else "the defaults"
        notes.good(f"{len(program.live):,} live nodes, {program.num_dead:,} dead under {basis}")
    return notes.finding(program.error or "no program")


# Logs


def check_implied_bytes(case: Case) -> Finding:
    """K3: the bytes that the printed scores divide by."""
    notes = Notes()
    for log in case.logs:
        ratios = [score.bytes_per_token for score in log.scores if score.bytes_per_token]
        if ratios and max(ratios) > min(ratios) * (1 + SAME_RATIO):
            text = f"{min(ratios):.4f} and {max(ratios):.4f} bytes a token in one log: two denominators"
            notes.fail(f"{log.name}: {text}")
        scored, whole = (log.facts.get(name, 0) for name in ("scored_bytes", "val_bytes"))
        if scored > whole > 0:
            text = f"scored {scored:,.0f} bytes of a text of {whole:,.0f}: targets count more than once (C4)"
            notes.fail(f"{log.name}: {text}")
    if not case.track.has_contest_text:
        return notes.finding(f"{case.track.name} does not score the contest's validation text")
    for log in case.logs:
        for score in log.scores[-1:]:
            implied = log.implied_bytes(score)
            if implied is not None:
                verdict, text = classify_bytes(implied)
                notes.add(verdict, f"{log.name}: {implied:,.0f} bytes{text}")
    return notes.finding("no log states val_tokens and a score with 6 decimals or more")


def check_fingerprint(case: Case) -> Finding:
    """K4: validation tokens, training shards, data paths."""
    notes = Notes()
    if not case.track.has_contest_text:
        return notes.finding(f"{case.track.name} does not use the contest's shards")
    for log in case.logs:
        tokens, shards = log.facts.get("val_tokens"), log.facts.get("train_shards")
        if tokens is not None:
            is_subset = tokens < SUBSET_VAL_TOKENS
            known = "" if tokens in KNOWN_VAL_TOKENS else ", of no known tokenizer (K3 decides)"
            remark = ": hardly the 50,000 documents" if is_subset else known
            notes.add("SUSPECT" if is_subset else "PASS", f"{log.name}: val_tokens {tokens:,.0f}{remark}")
        if shards == LOCAL_PREP_SHARDS:
            notes.suspect(f"{log.name}: train_shards {shards:.0f}: a local preparation may train on "
                      "validation documents (#2127); show the shard hashes")  # fmt: skip
        if any(DOUBLED_PATH.search(value) for value in log.config.values()):
            notes.suspect(f"{log.name}: a doubled datasets/datasets path, as local preparations leave it")
    return notes.finding("no log states val_tokens")


def check_clock(case: Case) -> Finding:
    """K5: training and scoring time against the track's limits."""
    notes, track = Notes(), case.track
    lines, claimed = headlines(case.logs), claimed_logs(case)
    for log in case.logs:
        stop, limit = log.facts.get("stop_ms"), track.train_s
        if stop is not None and limit is not None:
            over = stop > 1000 * limit + STOP_TOLERANCE_MS
            verdict = "PASS" if not over else "FAIL" if log in claimed else "SUSPECT"
            notes.add(verdict, f"{log.name}: training stopped at {stop / 1000:.3f} s of {limit:.0f}")
            hessians = log.facts.get("hessian_s", 0.0)
            if hessians and stop + 1000 * hessians > 1000 * limit + STOP_TOLERANCE_MS:
                spent = f"{stop / 1000:.1f} s + {hessians:.1f} s of Hessians on training data"
                notes.suspect(f"{log.name}: {spent}: over {limit:.0f}")
        score = lines.get(log.name)
        spent = log.facts.get("eval_s") or (score and score.seconds)
        limit = track.eval_limit(score and log.implied_bytes(score))
        if spent and limit is not None:
            verdict = "PASS" if spent <= limit else "FAIL" if log in claimed else "SUSPECT"
            notes.add(verdict, f"{log.name}: scoring took {spent:.1f} s of {limit:.0f}")
        if re.search(r"precompute_outside:?\s*True", log.text):
            notes.suspect(f"{log.name}: hints precomputed outside the timer")
    reason = "no log states times" if track.train_s else f"{track.name} has no time limit"
    return notes.finding(reason)


def claimed_logs(case: Case) -> list[RunLog]:
    """Return the logs that print a claimed number; all with a score where only their mean is claimed."""
    headline = [value for _, value in headline_claims(case)]
    found = []
    for log in case.logs:
        own = [value for seed, value in seed_claims(case) if log.seed in (None, seed)]
        if any(is_same(value, score) for score in log.scores for value in headline + own):
            found.append(log)
    return found or [log for log in case.logs if log.scores]


def is_same(claim: float, score: ScoreLine) -> bool:
    """Whether a claim is a printed score, to the digits that both have."""
    digits = len(repr(claim).partition(".")[2])
    return abs(claim - score.val_bpb) <= min(SAME_BPB, 10.0**-digits) + (0 if score.exact else SAME_BPB)


def check_sizes(case: Case) -> Finding:
    """K6: bytes by the log, by submission.json and on disk, against the limit."""
    notes, limit, program = Notes(), case.track.limit_bytes, case.program
    logged = {log.name: log.facts for log in case.logs if "model_bytes" in log.facts}
    on_disk = {path: case.folder.files[path].size for path in case.folder.named(ARTIFACTS)}
    models = [facts["model_bytes"] for facts in logged.values()] + list(on_disk.values())
    for name, facts in logged.items():
        total = facts.get("total_bytes", facts["model_bytes"] + facts.get("code_bytes", 0))
        shipped = facts["model_bytes"] + program.code_bytes
        text = f"{name}: {total:,.0f} bytes by the log, {shipped:,.0f} with the files of the folder"
        if total > limit:
            is_over = shipped > limit or not program.code
            notes.add("FAIL" if is_over else "SUSPECT", f"{text}: over {limit:,}")
        elif shipped > limit:
            code = facts.get("code_bytes", total - facts["model_bytes"])
            notes.suspect(f"{text}: the log counts {code:,.0f} bytes of code, which no file here has")
        else:
            notes.good(text)
    for key, value in size_claims(case):
        if value > limit:
            notes.fail(f"submission.json: {key} {value:,.0f} is over {limit:,}")
        elif key.startswith("bytes_total") and models:
            names = ("total_bytes", "model_bytes")
            totals = [facts[name] for facts in logged.values() for name in names if name in facts]
            totals += [model + program.code_bytes for model in models]
            near = min(abs(value / total - 1) for total in totals)
            text = f"submission.json: {key} {value:,.0f}, {near:.2%} from the nearest logged size"
            notes.add("PASS" if near <= 0.001 else "SUSPECT", text)
    for path, size in on_disk.items():
        total = size + program.code_bytes
        notes.add("FAIL" if total > limit else "PASS", f"{path} and code on disk: {total:,} bytes")
    return notes.finding("no log states the size of the compressed model and no artifact is here")


def size_claims(case: Case) -> list[tuple[str, float]]:
    """Return (key, bytes) of the sizes that submission.json states."""
    facts = case.submission or {}
    found = [(key, facts.get(key)) for key in ("bytes_total", "artifact_bytes_mean", "artifact_bytes_max")]
    found += [(f"seed {key} artifact_bytes", row.get("artifact_bytes")) for key, row in seed_rows(case)]
    return [(key, float(value)) for key, value in found if isinstance(value, int | float) and value > 0]


# Tokenizer


def check_tokenizer(case: Case) -> Finding:
    """K9: tokenizers that lose text, by the logs or by a BESE file of the folder; others need the data."""
    notes = Notes()
    for path in case.folder.named("*.json"):
        if f'"{BESE_TYPE}"' in case.folder.text(path):
            notes.suspect(f"{path}: {BESE_LOSES}: no text comes back, scores compare with none")
    for log in case.logs:
        for reason in reservations(log, "not_comparable"):
            notes.suspect(f"{log.name}: not comparable: {reason}")
        raw, counted = log.facts.get("raw_bytes", math.inf), log.facts.get("val_bytes", 0)
        if counted > raw:
            notes.fail(f"{log.name}: counts {counted:,.0f} bytes of a text of {raw:,.0f}")
        for said in byte_accounts(log):
            verdict = ACCOUNT_VERDICTS.get(re.split("[:;]", said)[0], "SUSPECT")
            notes.add(verdict, f"{log.name} says: {said}")
    return notes.finding(NEEDS_DATA)


# Claims


def headline_claims(case: Case) -> list[tuple[str, float]]:
    """Return (key, value) of the headline scores of submission.json."""
    facts = case.submission or {}
    return [(key, facts[key]) for key in HEADLINE_KEYS if isinstance(facts.get(key), float)]


def seed_rows(case: Case) -> list[tuple[str, dict]]:
    """Return (key, facts) of the seeds whose results submission.json lists."""
    results = (case.submission or {}).get("seed_results")
    rows = results.items() if isinstance(results, dict) else ()
    return [(key, row) for key, row in rows if isinstance(row, dict)]


def seed_claims(case: Case) -> list[tuple[int, float]]:
    """Return (seed, val_bpb) as submission.json lists them."""
    found = [(read_seed(key), row.get("val_bpb")) for key, row in seed_rows(case)]
    return [(seed, value) for seed, value in found if seed is not None and isinstance(value, float)]


def listed_seeds(case: Case) -> set[int]:
    """Return the seeds that submission.json lists, as a list or as the keys of an object."""
    seeds = (case.submission or {}).get("seeds")
    found = {read_seed(seed) for seed in seeds} if isinstance(seeds, list | dict) else set()
    return found - {None}


def check_claims(case: Case) -> Finding:
    """K7: README = submission.json = logs, seeds and configuration included."""
    notes = Notes()
    scored = [log for log in case.logs if log.scores]
    if case.submission is None:
        notes.suspect(case.submission_error)
    claims = headline_claims(case)
    if case.submission is not None and not claims:
        notes.suspect("submission.json states no val_bpb")
    if not scored:
        notes.suspect("no log with a final score: nothing supports the claim")
    for key, value in claims:
        if scored:
            notes.add(*support(case, key, value, scored))
        if case.readme and not stated(value, case.readme):
            notes.suspect(f"README.md does not state {key} {value}")
    for seed, value in seed_claims(case) if scored else []:
        notes.add(*support_seed(seed, value, scored))
    for log in claimed_logs(case):
        for reason in reservations(log, "invalid"):
            notes.fail(f"{log.name} calls its score invalid: {reason}")
    _check_seeds(case, scored, notes)
    _check_configs(case, notes)
    return notes.finding("no claim and no log")


def support(case: Case, key: str, value: float, scored: list[RunLog]) -> tuple[str, str]:
    """Say how the logs support a headline: as a mean over seeds, as one run, or not."""
    num_seeds = len(listed_seeds(case) or seed_claims(case)) or len(scored)
    means = [
        (abs(mean - value), mean, f"{len(names)} logs ({label})")
        for label, rows in label_means(scored, num_seeds).items()
        for mean, names in rows
        if len(names) > 1
    ]
    distance, mean, logs = min(means, default=(math.inf, 0.0, ""))
    if distance <= SAME_BPB:
        return "PASS", f"{key} {value} is the mean of {logs}"
    if distance <= ROUNDED_MEAN:
        text = f"{key} {value} is {value - mean:+.6f} from {mean:.8f}, the mean of {logs}"
        return "SUSPECT", f"{text}: a mean of rounded scores?"
    printed = [(abs(score.val_bpb - value), score, log.name) for log in scored for score in log.scores]
    distance, score, name = min(printed, key=lambda row: row[0])
    if distance <= SAME_BPB:
        others = [line.val_bpb for line in headlines(scored).values()]
        if len(others) == 1 or score.val_bpb > min(others) + SAME_BPB:
            return "PASS", f"{key} {value} is {name}"
        chosen = f"the best of {len(others)} runs, not their mean {summarize(others).mean:.8f}"
        return "SUSPECT", f"{key} {value} is {name}: {chosen}"
    text = f"{key} {value}: the nearest score in the logs is {score.val_bpb} ({name}, {score.label})"
    if distance <= OTHER_BPB or stated(score.val_bpb, case.readme):
        return "SUSPECT", text + (", which README.md states too" if distance > OTHER_BPB else "")
    return "FAIL", text


def label_means(scored: list[RunLog], num_seeds: int) -> dict[str, list[tuple[float, tuple[str, ...]]]]:
    """Return label -> (mean, logs) over all logs with it and over each choice of num_seeds of them."""
    rows: dict[str, list[tuple[str, float]]] = {}
    for log in scored:
        for label, score in {score.label: score for score in log.scores}.items():
            rows.setdefault(label, []).append((log.name, score.val_bpb))
    found = {}
    for label, values in rows.items():
        groups = [tuple(values)]
        if 1 < num_seeds < len(values) <= 10:
            groups += itertools.combinations(values, num_seeds)
        columns = [tuple(zip(*group)) for group in groups]
        found[label] = [(math.fsum(scores) / len(scores), names) for names, scores in columns]
    return found


def support_seed(seed: int, value: float, scored: list[RunLog]) -> tuple[str, str]:
    """Say whether a log of this seed prints this score."""
    printed = [(abs(score.val_bpb - value), log.seed) for log in scored for score in log.scores]
    own = min((distance for distance, logged in printed if logged == seed), default=None)
    distance, nearest = min(printed, key=lambda row: row[0])
    where = f"; a log of seed {nearest} prints it" if distance <= SAME_BPB else ""
    if own is None:
        verdict = "PASS" if where and nearest is None else "SUSPECT"
        return verdict, f"seed {seed}: {value}: no log of that seed{where}"
    if own <= SAME_BPB:
        return "PASS", f"seed {seed}: {value} is in a log of that seed"
    verdict = "FAIL" if own > OTHER_BPB else "SUSPECT"
    return verdict, f"seed {seed}: {value} is {own:.6f} from what the log of that seed prints{where}"


def stated(value: float, text: str) -> bool:
    """Whether a text states a value to four decimals or more."""
    return any(
        abs(float(number) - value) <= 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-12
        for number in re.findall(r"\d+\.\d{4,10}", text)
    )


def _check_seeds(case: Case, scored: list[RunLog], notes: Notes) -> None:
    """Seeds in log, file name and submission.json are the same."""
    logged = {log.seed for log in scored if log.seed is not None}
    listed = listed_seeds(case)
    for log in scored:
        named = FILE_SEED.search(log.name)
        if named and log.seed is not None and int(named[1]) != log.seed:
            claimed = int(named[1]) in listed
            lists = f"; submission.json lists {named[1]}" if claimed else ""
            verdict = "FAIL" if claimed and int(named[1]) not in logged else "SUSPECT"
            notes.add(verdict, f"{log.name} ran seed {log.seed}{lists}")
    missing = sorted(listed - logged) if logged else []
    if missing:
        notes.suspect(f"submission.json lists seeds {missing}; the logs ran {sorted(logged)}")


def _check_configs(case: Case, notes: Notes) -> None:
    """The logs behind the claim state one configuration."""
    claimed = [log for log in claimed_logs(case) if log.config]
    hashes = {settings_hash(log) for log in claimed}
    if len(hashes) > 1:
        configs = [stable_config(log) for log in claimed]
        keys = sorted({key for config in configs for key in config if len({c.get(key) for c in configs}) > 1})
        notes.suspect(f"{len(hashes)} configurations behind one claim; they differ in {', '.join(keys[:6])}")
    elif claimed:
        notes.good(f"one configuration, {hashes.pop()}, in {len(claimed)} logs")


def seed_scores(case: Case) -> dict[object, ScoreLine]:
    """Return seed -> headline over the logs with the configuration of a claimed one."""
    claimed = claimed_logs(case)
    hashes = {settings_hash(log) for log in claimed}
    like = [log for log in case.logs if log.scores and log.config and settings_hash(log) in hashes]
    family = claimed + like
    lines = headlines(family)
    return {log.name if log.seed is None else log.seed: lines[log.name] for log in reversed(family)}


def check_statistics(case: Case) -> Finding:
    """K8: enough seeds, and the test against the row to beat where it is given."""
    notes = Notes()
    if not case.track.is_record:
        return notes.finding(f"{case.track.name} rows need not beat another")
    scores = list(seed_scores(case).values())
    values = [score.val_bpb for score in scores]
    if not values:
        return notes.finding("no log with a final score")
    sample = summarize(values)
    spread = "" if sample.std is None else f", std {sample.std:.8f}"
    if sample.n < 3:
        notes.suspect(f"{sample.n} seed(s): mean {sample.mean:.8f}{spread}; the contest expects three")
    printed = (case.submission or {}).get("val_bpb_std")
    if isinstance(printed, float) and sample.std:
        population = sample.std * math.sqrt((sample.n - 1) / sample.n)
        tolerance = max(STD_TOLERANCE, 0.5 * 10.0 ** -len(repr(printed).partition(".")[2]))
        if abs(printed - sample.std) > tolerance:
            near = abs(printed - population) <= tolerance
            kind = "the population's" if near else "neither the sample's nor the population's"
            notes.add("NOT RUN" if near else "SUSPECT", f"val_bpb_std {printed} is {kind}{spread}")
    if case.against is None:
        notes.add("NOT RUN", f"n {sample.n}, mean {sample.mean:.8f}{spread}; no row to beat: give --against")
    elif sample.n > 1 and len(case.against) > 1:
        ratio = summarize([score.bytes_per_token for score in scores]).mean
        margin = nats_to_bpb(MARGIN_NATS, ratio)
        strict, plain = welch(values, case.against, margin), welch(values, case.against)
        facts = f"Welch t {strict.t:.3f}, df {strict.df:.2f}, p {strict.p:.3g}"
        remark = f", under the {FRONTIER_ALPHA} of late rows" if plain.p < FRONTIER_ALPHA else ""
        text = (
            f"margin {MARGIN_NATS} nats = {margin:.6f} bpb: {facts}; without margin p {plain.p:.3g}{remark}"
        )
        notes.add("PASS" if strict.p < ALPHA else "SUSPECT", text)
    else:
        notes.add("NOT RUN", "Welch's test needs two scores on each side")
    return notes.finding("no scores")


# Package


def check_package(case: Case) -> Finding:
    """K24: names, files, JSON keys, a program that compiles, declared packages."""
    folder, program, notes = case.folder, case.program, Notes()
    if not FOLDER_NAME.fullmatch(folder.root.name):
        notes.suspect(f"folder name {folder.root.name!r}: expected YYYY-MM-DD_Name without spaces")
    needed = ("recipe.toml",) if case.is_recipe_only else ("submission.json", "train_gpt.py")
    for name in ("README.md", *needed):
        if name not in folder.files:
            notes.suspect(f"{name} is missing")
    if case.is_recipe_only:
        notes.good("a recipe, not a record: recipe.toml and README.md")
        return notes.finding("")
    if case.submission_error and "no submission.json" not in case.submission_error:
        notes.fail(case.submission_error)
    missing = [key for key in MINIMAL_KEYS if key not in (case.submission or dict.fromkeys(MINIMAL_KEYS))]
    if missing:
        notes.suspect(f"submission.json has no {', '.join(missing)}")
    if not program.entry or program.error:
        notes.fail(f"program: {program.error}: it cannot run within the folder")
    elif folder.files[program.entry].size == 0:
        notes.fail(f"{program.entry} is empty: it cannot run within the folder")
    for name, file in folder.files.items():
        if file.kind != "file":
            notes.suspect(f"{name} is a {file.kind}: links and devices are not followed")
        if name.rpartition("/")[2] in (".DS_Store", "Thumbs.db") or "__pycache__" in name:
            notes.suspect(f"{name} does not belong into a pull request")
    loose = case.declared.lower().replace("-", "_")
    unknown = sorted(
        name
        for name in third_party_imports(program) - BASE_PACKAGES
        if not any(other in loose for other in (name.lower(), *OTHER_NAMES.get(name, ())))
    )
    if unknown:
        notes.suspect(f"imports {', '.join(unknown)}: neither requirements.txt nor README names them")
    for note in dict.fromkeys(folder.notes):
        notes.suspect(note)
    notes.good(f"{len(folder.files)} files, {sum(f.size for f in folder.files.values()):,} bytes")
    return notes.finding("")
