"""Prove that a change changes no number: run a commit and the working tree, compare to the last digit.

    python -m tests.run_unchanged                 the working tree against HEAD
    python -m tests.run_unchanged main~3 --pack   another commit, packed sizes too (half a minute a recipe)

Both sides make a small corpus, a tokenizer and shards, describe every recipe in records/, train it for twelve
steps at the size of a test, and score its artifact in every mode. Both are driven through their commands
alone, so modules may move and names may change between the two.
"""

import json
import random
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from common import CommandParser, UserError, read_json, run_command, sha256_file
from formats.recipe import format_toml

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = 12
# A recipe at the size of a test: its features stay switched on, only sizes shrink.
SIZES = {
    "run": {"compile": "off", "device": "cpu", "iterations": STEPS, "max_wallclock_seconds": 0},
    "data": {"vocab_size": 300, "seq_len": 16, "batch_tokens": 64, "micro_batches": 4},
    "model": {"model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "compute_dtype": "float32"},
    "schedule": {"warmdown_iters": 6, "stages": []},
    "quant": {"float16_numel": 0, "reserve_seconds": 0, "target_bytes": 0, "calib_batches": 1},
    "eval": {"stride": 8, "limit_text_bytes": 0, "lora_rank": 2, "lora_chunk_tokens": 4, "lora_batch_docs": 2}
    | {"phase_docs": 4, "sgd_chunk_tokens": 64},
}
SIZES["run"] |= {"warmup_steps": 1, "val_loss_every": 6, "val_batch_tokens": 512}
SIZES["data"] |= {"tokenizer_kind": "sentencepiece"}
LARGEST = {"bigram_buckets": 64, "embed_dim": 8, "rope_dims": 4}  # of the model section
# What no recipe of the contest switches on, on top of the naive baseline.
VARIANTS = {
    "qat": {"quant": {"qat_start": 0.3}},
    "water_fill": {"quant": {"method": "water_fill", "codec": "rans"}},
    "swa": {"average": {"swa_every": 2, "swa_below": 1.0}},
    "shuffled": {"data": {"loader": "shuffled"}},
    "repair": {"quant": {"method": "gptq", "repair_rank": 2}},
}
MODES = {  # mode -> further settings
    "chunked": [],
    "sliding": [],
    "doc": [],
    "sgd-ttt": [],
    "lora-ttt": ["lora_warm_lanes=0"],
    "phased": ["lora_warm_lanes=0", "phase_docs=3", "tilt_online=0"],
}
# Runs in a process of its own in either checkout: arguments of the trainer, and of the scorer for each mode.
SCRIPT = """
import contextlib, io, json, sys
import torch, train_gpt
torch.set_num_threads(1)  # two processes share the cores
packs, train, scores = json.loads(sys.argv[1])
if not packs:
    train_gpt.weigh_code = lambda folder: (0, "")
with contextlib.redirect_stdout(sys.stderr):
    train_gpt.main(train)
from eval.__main__ import main
found = {}
for mode, arguments in scores.items():
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main(arguments)
        facts = json.loads(said.getvalue())
        found[mode] = {key: facts[key] for key in ("val_loss", "val_bpb", "num_tokens", "num_bytes", "mode")}
    except Exception as error:
        found[mode] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def shrink(recipe: dict) -> dict:
    """Return a recipe at the size of a test."""
    small = {section: dict(values) for section, values in recipe.items() if isinstance(values, dict)}
    for section, values in SIZES.items():
        small[section] = small.get(section, {}) | values
    model = small["model"]
    model |= {key: min(model[key], most) for key, most in LARGEST.items() if model.get(key)}
    if model.get("fp8", "off") != "off":
        model |= {"fp8": "emulate", "mlp_mult": 4}  # on a CPU, and multiples of 16
    return small


def full_recipes() -> list[Path]:
    """List the recipes in records/."""
    return sorted(REPOSITORY.glob("records/*/*/recipe.toml"))


def small_recipes() -> dict[str, dict]:
    """Name every recipe in records/ at the size of a test, and the variants."""
    recipes = {}
    for path in full_recipes():
        track = path.parent.parent.name
        recipes[f"{track}_{path.parent.name}"] = shrink(tomllib.loads(path.read_text(encoding="utf-8")))
    for name, changes in VARIANTS.items():
        small = shrink({"model": {"num_layers": 3}})
        recipes[name] = {key: small.get(key, {}) | changes.get(key, {}) for key in {**small, **changes}}
    return recipes


class Side:
    """One of the two checkouts: runs its commands and keeps what they say, name -> value."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder = checkout, folder
        self.found: dict[str, object] = {}
        folder.mkdir()

    def run(self, what: str, *arguments: str) -> str:
        """Run `python ARGUMENTS` in the checkout; returns its output. `what` names it if it fails."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.checkout, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [""])[-1]
            self.found[f"failure: {what}"] = said.replace(str(self.folder), "")
        return done.stdout

    def make_data(self, corpus: Path) -> None:
        """Train a tokenizer and write shards."""
        self.model, self.data = self.folder / "tokenizer.model", self.folder / "data"
        train = ("--input", str(corpus), "--vocab-size", "300", "--out", str(self.model))
        self.run("tokenizer", "-m", "data.tokenizer", "train", *train)
        prepare = ("--input", str(corpus), "--val-docs", "8", "--out", str(self.data), "--num-threads", "1")
        self.run("prepare", "-m", "data.prepare", *prepare, "--tokenizer", str(self.model))
        for path in sorted(self.folder.glob("**/*.*")):
            if path.suffix in (".model", ".bin"):
                self.found[f"{path.name}: sha256"] = sha256_file(path)

    def describe(self, recipe: Path) -> None:
        """Keep what a recipe means at full size."""
        said = self.run(
            f"describe {recipe}", "train_gpt.py", "--recipe", str(recipe), "--describe", "--steps", "0,9,999"
        )
        for key, value in json.loads(said or "{}").items():
            self.found[f"{recipe.parent.name}: {key}"] = value

    def train(self, name: str, recipe: Path, packs: bool) -> None:
        """Train a small recipe and score its artifact in every mode; keep losses, artifact, scores."""
        places = {"data.data_path": self.data, "data.tokenizer_path": self.model, "run.out_dir": self.folder}
        train = ["--recipe", str(recipe), f"run.run_id={name}", *(f"{k}={v}" for k, v in places.items())]
        run = self.folder / name
        scores = {mode: [str(run), "--mode", mode, "--json", "--set", *MODES[mode]] for mode in MODES}
        said = self.run(f"train {name}", "-c", SCRIPT, json.dumps([packs, train, scores]))
        for mode, score in json.loads(said or "{}").items():
            self.found[f"{name}: {mode}"] = score
        if not (run / "result.json").is_file():
            return
        result = read_json(run / "result.json")
        score = {key: value for key, value in result["score"].items() if key != "seconds"}
        self.found[f"{name}: result"] = [score, result["config_hash"], result["steps"]]
        self.found[f"{name}: artifact"] = sha256_file(run / "artifact.bin")
        if packs:
            self.found[f"{name}: packed bytes"] = (run / "train_gpt.py").stat().st_size
        rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        keys = ("kind", "step", "train_loss", "val_loss", "val_bpb")
        self.found[f"{name}: losses"] = [[row.get(key) for key in keys] for row in rows]


def write_corpus(path: Path) -> None:
    """Write 120 documents of made-up words, always the same."""
    drawn = random.Random(1)
    words = ["".join(drawn.choices("abcdefgh", k=drawn.randint(2, 6))) for _ in range(200)]
    texts = [" ".join(drawn.choices(words, k=drawn.randint(20, 60))) + f". {i}\n" for i in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def work_through(side: Side, folder: Path, packs: bool, done: Callable[[], None]) -> dict[str, object]:
    """Do everything on one side; `done` hears of each job."""
    side.make_data(folder / "corpus.jsonl")
    for path in full_recipes():
        side.describe(path.relative_to(REPOSITORY))
        done()
    for name in small_recipes():
        side.train(name, folder / f"{name}.toml", packs)
        done()
    return side.found


def compare(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """List what differs, a line each; packed programs may shrink."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old != new and not (name.endswith("packed bytes") and old and new and new < old):
            lines.append(f"{name}: {shorten(old)} -> {shorten(new)}")
    return lines


def shorten(value) -> str:
    """Write a value in one short line."""
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def build_parser() -> CommandParser:
    """Describe the command line."""
    parser = CommandParser(
        prog="python -m tests.run_unchanged",
        description=__doc__,
        epilog="Exits with 1 when anything differs. Takes six minutes on two cores, 20 with --pack.",
    )
    parser.add_argument(
        "commit", nargs="?", default="HEAD", help="what to compare the working tree with (%(default)s)"
    )
    parser.add_argument("--pack", action="store_true", help="compare packed sizes too; they may only fall")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write all that was found as JSON")
    return parser


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[None]:
    """Check a commit out into a folder, which is removed again."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    add = [*git, "add", "--detach", str(folder), commit]
    made = subprocess.run(add, capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(f"{commit}: no such commit here ({made.stderr.strip()}). See git log.")
    try:
        yield
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=False)


def main(argv: list[str] | None = None) -> int:
    """Compare a commit and the working tree."""
    options = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name, checkout(options.commit, Path(name) / "old"):
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl")
        recipes = small_recipes()
        for recipe, values in recipes.items():
            (folder / f"{recipe}.toml").write_text(format_toml(values), encoding="utf-8")
        sides = [Side(folder / "old", folder / "before"), Side(REPOSITORY, folder / "after")]
        with tqdm(total=2 * (len(full_recipes()) + len(recipes)), unit="job") as bar, ThreadPool(2) as pool:
            before, after = pool.map(lambda side: work_through(side, folder, options.pack, bar.update), sides)
    if options.keep:
        options.keep.write_text(json.dumps({"before": before, "after": after}, indent=1), encoding="utf-8")
    lines = compare(before, after)
    print("\n".join([*lines, f"{len(after)} values, {len(lines)} differ from {options.commit}"]))
    failures = [value for name, value in after.items() if name.startswith("failure")]
    failures += [value for value in after.values() if isinstance(value, str) and "Error: " in value[:40]]
    if failures:
        print(f"{len(failures)} commands failed on the working tree, the first: {failures[0]}")
    return int(bool(lines or failures))


if __name__ == "__main__":
    run_command(main)
