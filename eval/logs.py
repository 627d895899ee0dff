"""Read what a training log says: scores, sizes, times, seed, configuration.

Understands the contest's old (`key:value`) and new (`key: value`, a dump of all hyperparameters) formats and
this harness's own, each line with or without a unix time before it. Logs are untrusted text: nothing is run,
lines that are source code (old logs print the whole script first) match no pattern.
"""

import hashlib
import re
from typing import NamedTuple

MAX_LINE = 1000  # characters; a log line with a fact is far shorter
NUMBER = r"(\d+(?:\.\d+)?)"
SCORE = re.compile(rf"(.*?)\s*val_loss[:=]\s*{NUMBER}\s+val_bpb[:=]\s*{NUMBER}(.*)")
SECONDS = re.compile(rf"(?:eval_time|elapsed)[:=]\s*{NUMBER}(ms|s)")
STEP = re.compile(r"step:|\d+/\d+\b")
PREFIX = re.compile(r"\d{10}\.\d+ ")  # unix time
PAIRS = re.compile(r"(?!projected_)[a-z_0-9]+:[^\s:]+(?: [a-z_0-9]+:[^\s:]+)*")  # a projection is no setting
DUMPED = re.compile(r"  ([a-z_0-9]+): (.*)")
SOURCE = re.compile(r"""[{}"']""")  # a score's label holds none of these
# (field, pattern); the value is the last match of the log.
FACTS = (
    ("seed", re.compile(r"\s*seed:\s*(\d{1,12})$")),
    ("val_tokens", re.compile(r"(?:val_loader:.*\btokens|val_tokens):\s*(\d+)$")),
    ("train_shards", re.compile(r"(?:train_loader:.*\b)?train_shards:\s*(\d+)$")),
    ("stop_ms", re.compile(rf"stopping_early: wallclock_cap train_time:\s*{NUMBER}ms")),
    ("hessian_s", re.compile(rf"GPTQ:collected \d+ Hessians in {NUMBER}s")),
    ("calibration_ms", re.compile(rf"calibration_time:\s*{NUMBER}ms")),
    ("eval_s", re.compile(rf"total_eval_time:\s*{NUMBER}s")),
    ("model_bytes", re.compile(r"Serialized model \S.*?: (\d+) bytes")),
    ("total_bytes", re.compile(r"Total submission size \S.*?: (\d+) bytes")),
    ("code_bytes", re.compile(r"Code size(?: \((?:compressed)\))?: (\d+) bytes")),
    ("val_bytes", re.compile(r"val_bytes:(\d+) raw_bytes:")),
    ("raw_bytes", re.compile(r"val_bytes:\d+ raw_bytes:(\d+)$")),
    ("scored_bytes", re.compile(r"eval_mode:.* bytes:(\d+) adapted:")),
    ("within_gate", re.compile(r"ngram_tilt:hints .*\bwithin_gate[:=](\d+)")),
    ("word_gate", re.compile(r"ngram_tilt:hints .*\bword_gate[:=](\d+)")),
)
# Bytes of the contest's validation text that a log implies: val_loss / ln 2 * val_tokens / val_bpb.
RIGHT_BYTES = (151_000_000, 151_132_000)  # from a dropped tail at long context to losses printed per byte
KNOWN_BYTES = (
    (155_770_000, "the export at launch"),
    (176_330_000, "a leading space counted twice (#1545, #1698, #1734)"),
    (157_320_000, "byte-fallback tokens counted as three bytes (#1143, #1184)"),
    (164_590_000, "case sentinels counted as text (#2071, #2138)"),
    (146_965_620, "validation documents that a quality filter dropped (#1666)"),
    (32_760_000, "10,000 documents instead of 50,000 (#1854, #2039)"),
)
KNOWN_TOLERANCE = 0.004
TRAIN_LINE = re.compile(rf"step:(\d+)/\d+ (?:train_loss|loss):{NUMBER} train_time:{NUMBER}ms")
VAL_LINE = re.compile(rf"step:(\d+)/\d+ val_loss:{NUMBER} val_bpb:{NUMBER} train_time:{NUMBER}ms")
TABLE_ROW = re.compile(r"  (\S.*?)  +([\d,]+(?:\.\d+)?) (?:bytes|s)")
TABLE_SUMS = ("total", "limit", "left")
# What a log says against its own score.
RESERVATION = re.compile(r"(invalid|not_comparable):(.+)")
ACCOUNT = "byte_account:"
# Keys of the configuration that differ between honest runs of one configuration.
VOLATILE = re.compile(
    r"seed|run_id|logfile|rank|config_hash|total_eval_time|iters_each|.*(?:_dir|_path|_files|_pattern|dataset)|model_params"
)


class ScoreLine(NamedTuple):
    """One printed score: `label` is the text before it, `exact` says whether it has 8 decimals."""

    label: str
    val_loss: float  # nats a token
    val_bpb: float
    exact: bool
    seconds: float | None

    @property
    def bytes_per_token(self) -> float:
        return self.val_loss / (0.6931471805599453 * self.val_bpb) if self.val_bpb else 0.0


class RunLog(NamedTuple):
    """What one log says. A fact that it does not state is None."""

    name: str
    scores: list[ScoreLine]  # finals in printed order, without those of training steps
    facts: dict[str, float]  # by the names of FACTS
    config: dict[str, str]
    text: str

    @property
    def seed(self) -> int | None:
        return int(self.facts["seed"]) if "seed" in self.facts else None

    def implied_bytes(self, score: ScoreLine) -> float | None:
        """The bytes of text that a score divides by."""
        tokens = self.facts.get("val_tokens")
        return score.bytes_per_token * tokens if tokens and score.exact else None


def read_seed(value: object) -> int | None:
    """Return a seed as JSON files state them, as a number or a key; None for anything else."""
    return int(str(value)) if re.fullmatch(r"[0-9]{1,12}", str(value)) else None


def parse_log(name: str, text: str) -> RunLog:
    """Read a log; unknown lines are passed over."""
    scores: list = []
    facts: dict = {}
    config: dict = {}
    has_started = False
    for raw in text.splitlines():
        line = PREFIX.sub("", raw[:MAX_LINE], count=1).rstrip()
        if score := _score(line):
            scores.append(score)
        has_started = has_started or STEP.match(line) is not None
        _read_facts(line, facts)
        if not has_started:
            _read_config(line, config)
    return RunLog(name, scores, facts, config, text)


def reservations(log: RunLog, kind: str) -> list[str]:
    """Return the reasons, in printed order, for which a log calls its score invalid or not_comparable."""
    found = [RESERVATION.fullmatch(line) for line in plain_lines(log)]
    return [match[2] for match in found if match and match[1] == kind]


def byte_accounts(log: RunLog) -> list[str]:
    """Return what a log says of the bytes of its text, as data/accounts.py words it."""
    return [line.removeprefix(ACCOUNT) for line in plain_lines(log) if line.startswith(ACCOUNT)]


def logged_events(log: RunLog) -> list[dict]:
    """Return the events that metrics.jsonl holds as far as a log's lines tell them: to four digits, fewer."""
    events = []
    for line in plain_lines(log):
        if found := TRAIN_LINE.match(line):
            step, loss, spent = found.groups()
            events.append(
                {"kind": "train", "step": int(step), "train_loss": float(loss), "train_ms": float(spent)}
            )
        elif found := VAL_LINE.match(line):
            step, loss, bpb, spent = found.groups()
            facts = {"val_loss": float(loss), "val_bpb": float(bpb), "train_ms": float(spent)}
            events.append({"kind": "val", "step": int(step)} | facts)
    return events


def logged_tables(log: RunLog) -> dict[str, dict[str, float]]:
    """Return title -> {row: number} of the tables of bytes and seconds, without their sums and limits."""
    tables: dict[str, dict[str, float]] = {}
    title = ""
    for line in plain_lines(log):
        found = TABLE_ROW.fullmatch(line)
        if not found:
            title = line
        elif found[1] not in TABLE_SUMS:
            tables.setdefault(title, {})[found[1]] = float(found[2].replace(",", ""))
    return tables


def plain_lines(log: RunLog) -> list[str]:
    """Return the lines of a log without a time before them."""
    return [PREFIX.sub("", line[:MAX_LINE], count=1).rstrip() for line in log.text.splitlines()]


def _score(line: str) -> ScoreLine | None:
    found = SCORE.match(line)
    if not found or STEP.match(line) or SOURCE.search(found[1]):
        return None
    label = " ".join(found[1].split()).removesuffix(":done")
    exact = all(len(number.partition(".")[2]) >= 6 for number in (found[2], found[3]))
    spent = SECONDS.search(line)
    seconds = float(spent[1]) / (1000 if spent[2] == "ms" else 1) if spent else None
    return ScoreLine(label, float(found[2]), float(found[3]), exact, seconds)


def _read_facts(line: str, facts: dict[str, float]) -> None:
    for field, pattern in FACTS:
        found = pattern.match(line)
        if found:
            facts[field] = float(found[1])


def _read_config(line: str, config: dict[str, str]) -> None:
    dumped = DUMPED.fullmatch(line)
    if dumped:
        config[dumped[1]] = dumped[2].strip()
    elif PAIRS.fullmatch(line):
        config |= dict(pair.split(":", 1) for pair in line.split(" "))


def stable_config(log: RunLog) -> dict[str, str]:
    """Return the settings that runs of one configuration share."""
    return {key: value for key, value in sorted(log.config.items()) if not VOLATILE.fullmatch(key)}


def settings_hash(log: RunLog) -> str:
    """Hash the stable configuration, 12 hexadecimal digits; "" for a log that states none."""
    stable = stable_config(log)
    return hashlib.sha256(repr(stable).encode()).hexdigest()[:12] if stable else ""


def _by_label(scores: list[ScoreLine]) -> dict[str, ScoreLine]:
    """Merge each label with its `_exact` twin: the digits of one, the seconds of the other."""
    named: dict[str, ScoreLine] = {}
    for score in scores:
        label = score.label.removesuffix("_exact")
        twin = named.get(label, score)
        digits = twin if twin.exact and not score.exact else score
        seconds = twin.seconds if score.seconds is None else score.seconds
        named[label] = digits._replace(seconds=seconds)
    return named


def headlines(logs: list[RunLog]) -> dict[str, ScoreLine]:
    """Return each log's headline by log name: the last label that all logs with scores share.

    A label counts with its `_exact` twin, whose digits win. Without a shared label: each log's last line.
    """
    scored = [log for log in logs if log.scores]
    named = [_by_label(log.scores) for log in scored]
    shared = [label for label in named[0] if all(label in other for other in named)] if named else []
    last = {log.name: log.scores[-1] for log in scored}
    if not shared:
        return last
    order = [score.label.removesuffix("_exact") for score in scored[0].scores]
    label = max(shared, key=lambda name: len(order) - order[::-1].index(name))
    return {log.name: scores[label] for log, scores in zip(scored, named)}


def classify_bytes(implied: float) -> tuple[str, str]:
    """Return (verdict, remark) about the bytes that a log implies; per-byte losses imply tokens = bytes."""
    if RIGHT_BYTES[0] <= implied <= RIGHT_BYTES[1]:
        return "PASS", ""
    for known, name in KNOWN_BYTES:
        if abs(implied / known - 1) < KNOWN_TOLERANCE:
            return ("PASS" if "launch" in name else "SUSPECT"), f": {name}"
    return "SUSPECT", f", {implied / 151_080_000 - 1:+.2%} off the 50,000 documents"
