"""Run a program in a miniature world and attack it: `python -m audit --run PROGRAM`.

Programs that offer their scorer (this harness's, or `load(path)` and `score(model, tokens, note)`) are probed
token by token. Of others only what they print is known: their artifacts, their totals, their files.
"""

import ast
import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audit import probes
from audit.checks import Finding
from audit.folder import SubmissionFolder
from audit.program import HARMLESS_COMMANDS, Unwrapped
from audit.recorded import compare, compare_rows, explains, read_losses
from audit.sandbox import Box, Limits, Ran, Server, namespace_command, read_trace
from audit.world import World, make_world, target_bytes, write_world
from common import UserError, sha256_file
from eval.logs import ScoreLine, headlines, parse_log
from formats.recipe import read_recipe

NUM_TRAIN, NUM_TARGETS = 40_000, 2048  # targets: a multiple of every window in use
TOY_VOCAB = 16
BASELINE_VOCAB = 1024  # of a packed program whose recipe does not change it
TEXT_FILES = {".txt", ".log", ".json", ".jsonl", ".toml", ".py", ".md", ".tsv", ".csv"}
TOY_SETTINGS = {
    "NUM_LAYERS": "2", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "TRAIN_SEQ_LEN": "32",
    "EVAL_SEQ_LEN": "32", "EVAL_STRIDE": "16", "TRAIN_BATCH_TOKENS": "512", "WARMDOWN_ITERS": "4",
}  # fmt: skip
SETTINGS = {
    "SEED": "1337", "RUN_ID": "audit", "ITERATIONS": "8", "WARMUP_STEPS": "1", "MAX_WALLCLOCK_SECONDS": "0",
    "VAL_LOSS_EVERY": "0", "TRAIN_LOG_EVERY": "1", "VAL_BATCH_SIZE": "4096",
}  # fmt: skip
NEGATIVE = re.compile(r"val_loss[:=]\s*-\d[\d.]*")
TRAIN_TIME = re.compile(r"train_time:\s*(\d{1,9}(?:\.\d+)?)(ms|s|m)\b")
SAME_LOSS = 1e-5  # nats a token: the same program on the same machine
BYTES_TOLERANCE = 0.01  # a dropped tail moves the mean bytes of a token by less
CLOCK_RATIO, CLOCK_SLACK_S = 2.0, 0.5  # a machine shared with others
PROBE_TOKENS = 49
MAX_PROBE_S = 100.0  # seconds for the sums over the vocabulary
AS_RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}  # torchrun's words to the second of two
HARNESS_SECONDS = 900.0  # of one run: filling a byte limit takes minutes on a busy machine
RANK_LIMITS = Limits(seconds=30)
PER_TARGET = "shows no score per target: offer load(path) and score(model, tokens, note)"


class AttackPlan(NamedTuple):
    """How a program is run."""

    vocab_size: int
    settings: dict[str, str]
    argv: list[str]
    limits: Limits
    shims: bool  # stand-ins for CUDA


class Scene:
    """A program in its box, the world, and the runs that several checks share."""

    def __init__(self, box: Box, plan: AttackPlan):
        self.box, self.plan, self.count = box, plan, 0
        self.world = make_world(plan.vocab_size, NUM_TRAIN, NUM_TARGETS + 1)
        self.noise = self.world.noise(NUM_TARGETS + 1, seed=3)
        self.base = self.run(self.world.val)
        self.artifacts = find_artifacts(self.base)

    def data(self, val: np.ndarray, train: np.ndarray | None) -> Path:
        self.count += 1
        return write_world(self.box.root / "data" / str(self.count), self.world, val, train)

    def settings(self, data: Path) -> dict[str, str]:
        return self.plan.settings | {"DATA_PATH": str(data), "TOKENIZER_PATH": f"{data}/tokenizer.model"}

    def run(self, val: np.ndarray, train: np.ndarray | None = None, **more) -> Ran:
        """Run the whole program with a validation text, by default on the training text of the world."""
        data = self.data(val, self.world.train if train is None else train)
        more |= {"argv": self.plan.argv}
        if self.plan.shims:
            more["shims"] = str(self.box.root / "inside")
        return self.box.run(data, self.settings(data), self.plan.limits, **more)

    def serve(self, limits: Limits | None = None, **settings: str) -> Server:
        """Start the scorer on the artifact of the first run, in a world without training text."""
        data = self.data(self.world.val, None)
        settings = self.settings(data) | settings
        return Server(self.box, data, self.scored_artifact(), settings, limits or self.plan.limits)

    def scored_artifact(self) -> Path:
        """Return the artifact that the first run read last, else the only one there is."""
        read = [row[2] for row in self.base.trace if is_read(row)]
        known = [str(path) for path in self.artifacts]
        return Path(next((path for path in reversed(read) if path in known), known[-1]))


def find_artifacts(ran: Ran) -> list[Path]:
    """Return the files that a run left in its folder and that are no text, oldest first."""
    files = (path for path in ran.folder.rglob("*") if path.is_file() and not path.is_symlink())
    found = [path for path in files if path.stat().st_size]  # empty ones mark something, as a lock does
    outside = {ran.folder / "home", ran.folder / "tmp"}
    found = [path for path in found if path.suffix not in TEXT_FILES and not outside & set(path.parents)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def printed_score(ran: Ran) -> ScoreLine | None:
    """Return the headline that a run printed."""
    return headlines([parse_log("run", ran.text)]).get("run")


def plan_run(box: Box, recipe: Path | None) -> AttackPlan:
    """Decide the vocabulary and the settings from what the program says about itself; nothing is executed."""
    folder = SubmissionFolder(box.root / "program")
    found = Unwrapped(folder)
    found.follow(box.entry.name)
    if found.error:
        raise UserError(f"{box.entry.name}: expected a Python program, found {found.error}.")
    fields = [found_fields for tree in found.layers.values() if (found_fields := harness_fields(tree))]
    if not fields:
        settings = SETTINGS | TOY_SETTINGS | {"VOCAB_SIZE": str(TOY_VOCAB)}
        needs_shims = any("torch" in ast.unparse(tree) for tree in found.layers.values())
        return AttackPlan(TOY_VOCAB, settings, [], Limits(seconds=240), needs_shims)
    facts = fields[0]
    argv = ["run.compile=off"] if "compile" in facts else []  # a recipe may have fixed it
    if recipe:
        argv = ["--recipe", str(box.add(recipe)), *argv]
        facts |= {name.partition(".")[2]: value for name, value in read_recipe(recipe).items()}
    is_free = facts["PACKED_RECIPE"] is None and not recipe  # the baseline: every field can be made small
    packed = (facts["PACKED_RECIPE"] or {}).get("data", {})
    vocab_size = TOY_VOCAB if is_free else {"vocab_size": BASELINE_VOCAB, **facts, **packed}["vocab_size"]
    settings = SETTINGS | (TOY_SETTINGS | {"VOCAB_SIZE": str(vocab_size)} if is_free else {})
    if facts.get("reserve_seconds", 0):  # needs a clock; this one never ends
        settings["MAX_WALLCLOCK_SECONDS"] = "10000000"
    return AttackPlan(vocab_size, settings, argv, Limits(seconds=HARNESS_SECONDS), False)


def harness_fields(tree: ast.Module) -> dict[str, object]:
    """Return PACKED_RECIPE and the defaults of the settings of a program of this harness; {} for others."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        name = targets[0].id if isinstance(targets[0], ast.Name) else ""
        if name == "PACKED_RECIPE" and isinstance(node.value, ast.Dict | ast.Constant):
            found[name] = ast.literal_eval(node.value)
        match node:
            case ast.AnnAssign(value=ast.Call(args=[ast.Constant(value=default), *_])) if name:
                found[name] = default
    return found if "PACKED_RECIPE" in found else {}


def say(text: str) -> None:
    """Write a line to standard error."""
    print(text, file=sys.stderr, flush=True)


def run_program(
    program: Path, recipe: Path | None = None, settings: dict[str, str] | None = None
) -> dict[str, Finding]:
    """Attack a program; returns check id -> finding for every dynamic check.

    `settings` go into its environment, over those that make it small.
    """
    with Box(program) as box:
        plan = plan_run(box, recipe)
        say(f"audit: {program.name} trains on a small text of ours, watched; half a minute for most programs")
        scene = Scene(box, plan._replace(settings=plan.settings | (settings or {})))
        score = printed_score(scene.base)
        if scene.base.failure or score is None:
            return explain_failure(scene.base)
        say("audit: it trains on noise, and its scorer meets changed texts; about twice as long")
        with ThreadPoolExecutor(2) as pool:
            noisy = pool.submit(scene.run, scene.noise)
            served = pool.submit(serve_probes, scene, score)
            found = served.result()
            found |= noise_checks(scene, score, noisy.result())
        found |= {"K9": check_bytes(scene.world, score), "K23": check_clock(scene.base)}
        found = {"K18": check_files(scene, found.pop("trace", []))} | found
        return excuse_length(found)


def explain_failure(ran: Ran) -> dict[str, Finding]:
    """Say why there is no score to judge; a loss below zero is a verdict of its own."""
    why = ran.failure or "it prints no line with val_loss and val_bpb"
    found = dict.fromkeys(DYNAMIC, Finding("NOT RUN", [f"the program did not run through: {why}"]))
    if negative := NEGATIVE.search(ran.text):
        found |= {"K22": Finding("FAIL", [f"prints {negative[0]}: no probability is above one"])}
    return found


DYNAMIC = ("K9", *(f"K{number}" for number in range(11, 24) if number != 21))


# From whole runs


def check_bytes(world: World, score: ScoreLine) -> Finding:
    """K9: the printed bits per byte divide by the bytes that the text has."""
    sizes = target_bytes(world.val, world.vocab_size)
    found, true = score.bytes_per_token, float(sizes.mean())
    text = f"{found:.4f} bytes a token by the printed score, {true:.4f} in the miniature text"
    return Finding("FAIL" if not abs(found / true - 1) <= BYTES_TOLERANCE else "PASS", [text])


def digests(ran: Ran) -> dict[str, str]:
    """Return the hashes of a run's artifacts by their paths in its folder."""
    return {str(path.relative_to(ran.folder)): sha256_file(path)[:12] for path in find_artifacts(ran)}


def noise_checks(scene: Scene, score: ScoreLine, noisy: Ran) -> dict[str, Finding]:
    """K11 and K22 from a run whose validation text is noise."""
    found = {"K22": check_floor(scene, score, printed_score(noisy))}
    with_text, with_noise = digests(scene.base), digests(noisy)
    if noisy.failure or not with_text:
        why = noisy.failure or "the program left no artifact"
        return found | {"K11": Finding("NOT RUN", [f"with noise for validation text: {why}"])}
    named = ", ".join(f"{name} {digest}" for name, digest in with_text.items())
    if with_text == with_noise:
        return found | {"K11": Finding("PASS", [f"{named}: the same with noise for validation text"])}
    if digests(scene.run(scene.world.val)) != with_text:
        return found | {"K11": Finding("NOT RUN", ["two runs on the same data differ: nothing to compare"])}
    moved = [name for name in with_text if with_text[name] != with_noise.get(name)]
    text = f"{', '.join(moved) or 'the set of files'} changes when the validation text is replaced by noise"
    return found | {"K11": Finding("FAIL", [text, f"with the text: {named}"])}


def check_floor(scene: Scene, score: ScoreLine, noisy: ScoreLine | None) -> Finding:
    """K22: nobody pays less than the source of the text, nor less than the noise itself."""
    pairs = [("Markov text", score, scene.world.source_nats(scene.world.val))]
    if noisy:
        pairs.append(("noise", noisy, scene.world.noise_nats(scene.noise)))
    verdict, texts = "PASS", []
    for name, printed, owed in pairs:
        error = NUM_TARGETS * print_error(printed)
        if owed - printed.val_loss * NUM_TARGETS > math.log(1 / probes.LUCK) + error:
            verdict = "FAIL"
        texts.append(f"{name}: {printed.val_loss:.4f} nats a token, the source pays {owed / NUM_TARGETS:.4f}")
    return Finding(verdict, [*texts, f"{NUM_TARGETS} targets each"])


def print_error(score: ScoreLine) -> float:
    """How far a printed loss may be from the true one."""
    return 1e-8 if score.exact else 1e-4


def check_clock(ran: Ran) -> Finding:
    """K23: the training time that the log claims, against the times at which its lines arrived."""
    steps = [(at, line) for at, line in ran.lines if "train_loss" in line and TRAIN_TIME.search(line)]
    ledger = f"the whole run took {ran.seconds:.1f} s"
    if len(steps) < 2:
        return Finding("NOT RUN", ["fewer than two lines with train_loss and train_time", ledger])
    (first_at, first), (last_at, last) = steps[0], steps[-1]
    claimed = (claimed_ms(last) - claimed_ms(first)) / 1000
    measured = last_at - first_at
    text = f"first to last step: {claimed:.2f} s by the log, {measured:.2f} s by our clock; {ledger}"
    is_off = measured > CLOCK_RATIO * claimed + CLOCK_SLACK_S
    return Finding("FAIL" if is_off else "PASS", [text])


def claimed_ms(line: str) -> float:
    """Read the train_time of a log line; in minutes where it says so."""
    number, unit = TRAIN_TIME.search(line).groups()
    return float(number) * {"ms": 1, "s": 1000, "m": 60_000}[unit]


def check_files(scene: Scene, served: list[list]) -> Finding:
    """K18: what the program opened, started and called, and when."""
    root, trace = str(scene.box.root), scene.base.trace
    own = tuple(f"{root}/{name}" for name in ("program", "data", "inside", "run"))
    fails, doubts = [], []
    for _, event, argument, _ in trace + served:
        name = argument.rpartition("/")[2]
        if event.startswith("socket"):
            fails.append(f"a network call ({event} {argument[:60]})")
        elif event == "open" and not argument.startswith(own):
            doubts.append(f"opens {argument[:100]}, outside its folder")
        elif event != "open" and name not in HARMLESS_COMMANDS and "python" not in name:
            doubts.append(f"starts {argument[:60]}")
    late = [row[2].rpartition("/")[2] for row in after_training(scene) + served if row[1] == "open"]
    fails += [f"{name} is opened after the artifact" for name in late if "fineweb_train_" in name]
    opened = {row[2] for row in trace if row[1] == "open" and row[2].startswith(own[0])}
    code = sum(Path(path).stat().st_size for path in opened if Path(path).is_file())
    kinds = sorted(Path(path).name for path in opened)
    ledger = f"{len(opened)} files of the program's folder opened, {code:,} bytes: {', '.join(kinds[:6])}"
    verdict = "FAIL" if fails else "SUSPECT" if doubts else "PASS"
    return Finding(verdict, [*dict.fromkeys(fails + doubts)][:6] + [ledger])


def is_read(row: list) -> bool:
    """Whether a traced event opens a file for reading."""
    return row[1] == "open" and "r" in row[3] and "+" not in row[3]


def after_training(scene: Scene) -> list[list]:
    """Return what was traced after the artifact was written for the last time, or else first read."""
    trace, known = scene.base.trace, {str(path) for path in scene.artifacts}
    own = [number for number, row in enumerate(trace) if row[2] in known]
    written = [number for number in own if not is_read(trace[number])]
    start = max(written) if written else min((n for n in own if is_read(trace[n])), default=len(trace))
    return trace[start:]


# From the scorer


def serve_probes(scene: Scene, score: ScoreLine) -> dict[str, Finding]:
    """Start the scorer and probe it; without one, judge by totals and by a replay."""
    if not scene.artifacts:
        return absent("the program left no artifact")
    try:
        with contextlib.closing(scene.serve()) as server:
            judge = probe_server if server.facts["protocol"] else judge_outputs
            found = judge(scene, server, score)
    except UserError as error:
        found = absent(str(error))
        found["K17"] = Finding("FAIL", [f"the artifact alone gives no score: {error}"])
    if not namespace_command():
        found["K17"] = Finding("NOT RUN", ["no network namespace can be had here"])
    return found


def absent(why: str, numbers: Iterable[int] = (*range(12, 18), 19, 20)) -> dict[str, Finding]:
    """Return NOT RUN for every check that needs scores of targets."""
    return {f"K{number}": Finding("NOT RUN", [why]) for number in numbers}


def probe_server(scene: Scene, server: Server, printed: ScoreLine) -> dict[str, Finding]:
    """Every probe of a scorer that answers streams."""
    world, facts = scene.world, server.facts
    window, whole = facts.get("window", 0), facts.get("whole", 1)
    nats, events = server.ask(world.val)
    if len(nats) != NUM_TARGETS:
        text = f"{len(nats)} scores for {NUM_TARGETS} targets"
        return absent(text) | {"K16": Finding("FAIL", [text])}

    def score(stream: np.ndarray) -> np.ndarray:
        return server.ask(stream)[0]

    size = 1 + -(-(PROBE_TOKENS - 1) // whole) * whole
    if facts["protocol"] == "harness" and whole == 1:
        size = max(size, 1 + 2 * window)
    stream = world.draw(size, seed=5)
    edges = (16, 32, *(range(window, size, max(size // 4, 1)) if window else ()))
    cuts = [cut for cut in probes.cut_points(size, edges) if 0 < cut < size][:12]
    heads = [cut for cut in cuts if (cut - 1) % whole == 0] or [1 + size // 2 // whole * whole]
    no_log = Finding("NOT RUN", ["no event log"])
    found = {
        "K17": check_reproduced(nats, printed, facts["protocol"]),
        "K15": probes.order_of_events(events, NUM_TARGETS) if events else no_log,
        "K16": probes.coverage(events, NUM_TARGETS) if events else no_log,
        "K12": sums_in_time(score, world.draw(size if whole > 1 else PROBE_TOKENS, seed=6), scene.plan),
        "K13": probes.future_flip(score, stream, cuts),
        "K14": probes.prefix_truncation(score, stream, heads, tail=window),
        "K19": Finding("NOT RUN", [f"scores whole windows of {whole} tokens only"]),
        "K20": probes.memory_of_a_copy(score, stream, tail=window),
    }  # fmt: skip
    if whole == 1:
        documents = [world.draw(size - 1, seed=7), world.draw(size - 1, seed=8), world.draw(size, seed=9)]
        found["K19"] = probes.document_order(score, documents)
    again = score(world.val)
    if len(again) != len(nats) or np.abs(again - nats).max() > probes.NATS_TOLERANCE:
        found["K13"] = Finding("FAIL", ["the same text has other scores after other texts: state is kept"])
    if facts["protocol"] != "harness" and found["K17"].verdict == "PASS":
        found["K17"] = check_rank(scene, nats, found["K17"])
    found["trace"] = read_trace(server.folder)
    return found


def check_rank(scene: Scene, nats: np.ndarray, found: Finding) -> Finding:
    """K17: the same scores where the environment says that this is one of several ranks?

    A scorer that waits for the other ranks gives no answer in time, and no verdict.
    """
    try:
        with contextlib.closing(scene.serve(RANK_LIMITS, **AS_RANK)) as server:
            other = server.ask(scene.world.val)[0]
    except UserError:
        return found
    if len(other) == len(nats) and np.abs(other - nats).max() <= probes.NATS_TOLERANCE:
        return Finding(found.verdict, [*found.evidence, "the same scores as rank 1 of 2"])
    return Finding("FAIL", ["other scores of the same text and artifact as rank 1 of 2", *found.evidence])


def check_reproduced(nats: np.ndarray, printed: ScoreLine, protocol: str) -> Finding:
    """K17: a fresh process without training text gives the printed loss."""
    loss = float(nats.sum()) / max(len(nats), 1)
    text = f"{loss:.8f} nats a token from the artifact alone ({protocol}), {printed.val_loss:.8f} printed"
    allowed = SAME_LOSS + print_error(printed)
    return Finding("FAIL" if not abs(loss - printed.val_loss) <= allowed else "PASS", [text])


def sums_in_time(score: Callable, stream: np.ndarray, plan: AttackPlan) -> Finding:
    """K12 at as many positions as time allows."""
    started = time.perf_counter()
    score(stream)
    seconds = (time.perf_counter() - started) * plan.vocab_size
    positions = [p for p in (17, 30, 5, 46) if p < len(stream)][: max(int(MAX_PROBE_S / seconds), 0)]
    if not positions:
        return Finding("NOT RUN", [f"one sum over {plan.vocab_size} candidates would take {seconds:.0f} s"])
    return probes.sums_to_one(score, stream, positions, plan.vocab_size)


def judge_outputs(scene: Scene, _: Server, printed: ScoreLine) -> dict[str, Finding]:
    """K12-K17 of a program of which only its output, its files and its calls of F.cross_entropy are known."""
    found = absent(PER_TARGET)
    found |= recorded_checks(scene, printed) if scene.plan.shims else {}
    if found["K12"].verdict == "NOT RUN":
        found["K12"] = check_totals(scene)
    return found | {"K17": check_replay(scene, printed)}


def recorded_checks(scene: Scene, printed: ScoreLine) -> dict[str, Finding]:
    """K12-K16 from the recorded costs of this run and of two with another second half, or none."""
    val = scene.world.val
    losses = read_losses(scene.base.folder, val)
    if not losses.is_complete or not explains(losses, printed.val_loss):
        return absent("the printed loss is not made of costs that F.cross_entropy computes", range(12, 17))
    cut = NUM_TARGETS // 2 + 8  # within a window
    other = np.concatenate([val[:cut], scene.world.draw(len(val) - cut, seed=8)])
    other[cut] = val[cut] % (scene.plan.vocab_size - 3) + 3  # another word
    flipped = read_losses(scene.run(other).folder, other)
    head = val[: NUM_TARGETS // 2 + 1]
    short = read_losses(scene.run(head).folder, head)
    learned = f"{losses.num_learned} targets of the text had gradients taken on them"
    unordered = Finding("NOT RUN", [f"{learned}; whether after their scores, K13 says"])
    return {
        "K12": compare_rows(losses, flipped, cut - 1),
        "K13": compare(losses, flipped, cut - 1, f"another text from {cut} on"),
        "K14": compare(losses, short, len(head) - 1, f"the first {len(head)} tokens alone"),
        "K15": unordered if losses.num_learned else Finding("PASS", [learned]),
        "K16": Finding("PASS", [f"{NUM_TARGETS} targets have costs whose mean is the printed loss"]),
    }


def excuse_length(found: dict[str, Finding]) -> dict[str, Finding]:
    """Turn a failed K14 into a suspicion where K13 passes: scores know the length of the text, no word of it.

    Learning rates that fall over the chunks of the text do; the contest accepted them (#549).
    """
    verdict, evidence = found["K14"]
    if verdict == "FAIL" and found["K13"].verdict == "PASS":
        note = "K13 passes: scores depend on the length of the text, as schedules over its chunks do (#549)"
        return found | {"K14": Finding("SUSPECT", [*evidence, note])}
    return found


def check_replay(scene: Scene, printed: ScoreLine) -> Finding:
    """K17: train again on other text, but let reads of the artifact get the first run's: same score?"""
    other = np.random.default_rng(4).permutation(scene.world.train)
    other[0] = scene.world.train[0]
    kept = {path.name: str(path) for path in scene.artifacts}
    readable = [str(scene.base.folder), str(scene.box.root / "data")]
    ran = scene.run(scene.world.val, other, redirected=kept, more_readable=readable)
    again = printed_score(ran)
    if ran.failure or again is None:
        return Finding("NOT RUN", [f"the replay did not run through: {ran.failure or 'no score'}"])
    if "redirected_reads:0" in ran.text:
        follows = abs(again.val_loss - printed.val_loss) > SAME_LOSS
        text = "no read of an artifact was seen, so none could be replaced"
        text += "; the score follows the training text" if follows else ""
        return Finding("SUSPECT" if follows else "NOT RUN", [text])
    text = f"{again.val_loss:.8f} nats a token with the first run's artifact after training on other text"
    allowed = SAME_LOSS + print_error(printed)
    verdict = "PASS" if abs(again.val_loss - printed.val_loss) <= allowed else "FAIL"
    return Finding(verdict, [f"{text}, {printed.val_loss:.8f} printed"])


def check_totals(scene: Scene) -> Finding:
    """K12 from the printed losses of short texts and of all their continuations."""
    losses: dict[bytes, ScoreLine] = {}

    def total(tokens: np.ndarray) -> float:
        ran = scene.run(tokens)
        score = printed_score(ran)
        if ran.failure or score is None:
            raise UserError(f"no loss of a text of {len(tokens)} tokens: {ran.failure}")
        losses[tokens.tobytes()] = score
        return score.val_loss * (len(tokens) - 1)

    prefix = scene.world.draw(120, seed=6)
    try:
        found = probes.totals_are_consistent(total, prefix, scene.plan.vocab_size, len(prefix) * 1e-8)
    except UserError as error:
        return Finding("NOT RUN", [str(error)])
    if not all(score.exact for score in losses.values()):
        return Finding("NOT RUN", ["the printed loss has too few digits for sums over the vocabulary"])
    return found
