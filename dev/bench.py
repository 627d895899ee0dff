"""Speed of the main parts, each against a yardstick measured in the same run (`make bench`).

    python -m dev.bench                 all parts, a table
    python -m dev.bench --only step     one of: step, scoring, packing, loader, data, state, codec
    python -m dev.bench --json          one JSON object
    python -m dev.bench --gpu           this GPU in under three minutes, against the contest's machine

`--only codec` codes the contest's quantization of a trained model: of the CPU track's, trained for 45 s on
the built-in corpus, or with `--artifact PATH` of an artifact file or of a run folder with a checkpoint.
`--only data` works on the built-in corpus, and for overlap on random tokens as many as 200 MB of text have;
it takes minutes, measures once what takes long, and compares it with the time that it may take.

Ratios travel between machines, seconds do not: compare the last column. Figures are medians.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor

from common import CommandParser, format_table, run_command, sha256_file
from data.builtin import collect_documents, find_modules
from data.codecs import load_codec
from data.doctor import Dataset, check_overlap
from data.documents import Document
from data.intact import ShardVerifier
from data.prepare import write_dataset
from data.shards import MANIFEST_NAME, TRAIN_GLOB, write_shard
from data.train_tokenizer import train_tokenizer
from dev.codec import measure_codec
from durable.seals import write_sealed
from formats.recipe import with_values
from formats.state import read_state, write_state
from kernels.machine import resolve_compile
from pack.program import pack
from scoring.sliding import ScoreOptions, plan_batches, plan_windows, score_windows
from train_gpt import (
    Batch,
    Config,
    Environment,
    Optimizers,
    Ranks,
    StepRates,
    build_model,
    get_stages,
    mean_loss,
    next_batch,
    open_loader,
)

NUM_BATCHES = 2000
NUM_THREADS = 2
TEXT_MEGABYTES = 20
LONG_MEGABYTES = 50
STATE_ARRAYS = 108  # of 2^20 float32: weights, momentum and average of 36 M parameters
VERIFIED_TOKENS, VERIFIED_TURNS = 100_000_000, 5  # a shard of the contest's size
SHAPE = {"model.num_layers": 6, "model.model_dim": 128, "model.num_heads": 4, "model.num_kv_heads": 2}


class Measurement(NamedTuple):
    """One row: what ran, how fast, and the yardstick beside it in the same unit."""

    part: str
    value: float
    unit: str
    yardstick: str
    yardstick_value: float

    @property
    def ratio(self) -> float:
        return self.value / self.yardstick_value


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `action` after one unmeasured call."""
    action()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def random_batch(cfg: Config, rows: int, device: torch.device) -> Batch:
    """Make a batch of random tokens, (rows, seq_len)."""
    tokens = torch.randint(2, cfg.data.vocab_size, (rows, cfg.data.seq_len + 1), device=device)
    return Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] == 1)


def matmul_seconds(cfg: Config, num_tokens: int, device: torch.device) -> float:
    """Time the bare matrix products of a training step: each weight three times over the tokens.

    The yardstick of a step: what is left when attention, norms, loss and optimizer cost nothing.
    """
    model = build_model(cfg, device)
    weights = [param.detach().to(model.compute_dtype) for param in model.parameters() if param.ndim == 2]
    inputs = {dim: torch.randn(num_tokens, dim, device=device, dtype=model.compute_dtype)
              for dim in {weight.shape[1] for weight in weights}}  # fmt: skip
    return median_seconds(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights for _ in range(3)], 5)


def bench_step(ranks: Ranks) -> list[Measurement]:
    """Training step at the contest's small shape: tokens/s against the bare matrix products."""
    cfg = with_values(Config(), SHAPE | {"data.seq_len": 512, "data.batch_tokens": 16_384}, "bench")
    micro_rows = cfg.data.batch_tokens // cfg.data.micro_batches // cfg.data.seq_len
    rows = []
    seconds = cfg.data.micro_batches * matmul_seconds(cfg, micro_rows * cfg.data.seq_len, ranks.device)
    bare = cfg.data.batch_tokens / seconds
    for compiled in (False, True) if resolve_compile("auto", ranks.device) else (False,):
        speed = cfg.data.batch_tokens / step_seconds(cfg, ranks, compiled)
        name = "step 6x128 T512, compiled" if compiled else "step 6x128 T512, eager"
        rows.append(Measurement(name, speed, "tokens/s", "bare matrix products", bare))
    return rows


def step_seconds(cfg: Config, ranks: Ranks, compiled: bool) -> float:
    """Time a training step on random tokens."""
    model = build_model(cfg, ranks.device)
    optimizers = Optimizers(model, cfg, ranks)
    loss = torch.compile(mean_loss, dynamic=False, fullgraph=True) if compiled else mean_loss
    micro_rows = cfg.data.batch_tokens // cfg.data.micro_batches // cfg.data.seq_len

    def step():
        for _ in range(cfg.data.micro_batches):
            loss(model, random_batch(cfg, micro_rows, ranks.device)).backward()
        optimizers.step(StepRates(1.0, 0.95))

    return median_seconds(step, 5)


def bench_scoring(ranks: Ranks) -> list[Measurement]:
    """Sliding-window scoring at stride 64: scored tokens/s against a loop over the same batches of windows.

    The loop computes and charges whole windows and keeps the targets that count.
    """
    options = ScoreOptions(1, 4096, ranks.device)
    rows = []
    for vocab_size, context_len in itertools.product((1024, 8192), (512, 1024)):
        cfg = with_values(Config(), SHAPE | {"data.vocab_size": vocab_size}, "bench")
        model = build_model(cfg, ranks.device).eval()
        tokens = np.random.default_rng(0).integers(2, vocab_size, context_len + 8 * 64 + 1)
        windows = plan_windows(len(tokens) - 1, context_len, 64)

        @torch.no_grad()
        def plain_loop(model=model, tokens=tokens, windows=windows):
            for batch in plan_batches(windows, options.batch_tokens):
                lows, _, firsts = windows[batch].T
                length = int(windows[batch[0], 1] - lows[0])
                chunk = torch.from_numpy(tokens[lows[:, None] + np.arange(length + 1)]).to(ranks.device)
                logits = model(chunk[:, :-1], chunk[:, :-1] == 1)
                nats = F.cross_entropy(logits.float().flatten(0, 1), chunk[:, 1:].flatten(), reduction="none")
                nats.view(len(batch), length)[:, firsts[0] :].cpu()

        def batched(model=model, tokens=tokens, windows=windows):
            score_windows(model, tokens, windows, options)

        pairs = [(median_seconds(batched, 1), median_seconds(plain_loop, 1)) for _ in range(3)]  # in turns
        fast, slow = ((len(tokens) - 1) / median(column) for column in zip(*pairs))
        name = f"stride 64 of {context_len:,}, V {vocab_size:,}"
        rows.append(Measurement(name, fast, "tokens/s", "loop over windows", slow))
    return rows


def bench_packing(ranks: Ranks) -> list[Measurement]:
    """Packing the source, against compiling it."""
    source = Path("train_gpt.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        packing = median_seconds(lambda: pack(None, Path(folder) / "train_gpt.py"), 1)
    compiling = median_seconds(lambda: compile(source, "train_gpt.py", "exec"), 5)
    return [Measurement("packing the source", 1 / packing, "1/s", "compiling it", 1 / compiling)]


def bench_loader(ranks: Ranks) -> list[Measurement]:
    """Reading micro-batches from a shard, against a plain copy of its tokens."""
    tokens = np.random.default_rng(0).integers(2, 1024, 4_000_000).astype(np.uint16)
    cfg = with_values(Config(), {"data.seq_len": 1024, "data.batch_tokens": 524_288}, "bench")
    stage = get_stages(cfg)[0]
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "fineweb_train_000000.bin", tokens)
        loader = open_loader(with_values(cfg, {"data.data_path": folder}, "bench"), bos_id=1)
        seconds = median_seconds(lambda: next_batch(loader, stage, ranks), 20)
        speed = stage.batch_tokens / stage.micro_batches / seconds
    copying = tokens.size / median_seconds(lambda: torch.from_numpy(tokens.astype(np.int64)), 5)
    return [Measurement("loader", speed, "tokens/s", "cast and copy", copying)]


def bench_data(ranks: Ranks) -> list[Measurement]:
    """Text to shards, BESE, the search for overlap and the loader's batches, each against its bar."""
    documents, _ = collect_documents(find_modules())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = bench_text(documents, folder)
        if sys.platform != "win32":
            text = "\n\n".join(document.text for document in documents)
            rows.append(bench_memory(text, folder / "sp.model", folder))
        write_random_shards(folder / "random")
        return rows + bench_overlap(folder / "random") + bench_batches(folder / "random", ranks)


def bench_text(documents: list[Document], folder: Path) -> list[Measurement]:
    """Write shards, against the bare encoder; train BESE, scaled to TEXT_MEGABYTES, and encode with it."""
    texts = [document.text for document in documents]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    model, bese = folder / "sp.model", folder / "bese.json"
    train_tokenizer(texts, 1024, model)
    codec, bare = load_codec(model), SentencePieceProcessor(model_file=str(model))
    encoding = median_seconds(lambda: bare.encode(texts, num_threads=NUM_THREADS), 5)
    dataset = (folder / "sp", codec, documents[50:], documents[:50], {})
    writing = median_seconds(lambda: write_dataset(*dataset, num_threads=NUM_THREADS), 5)
    started = time.perf_counter()
    train_tokenizer(texts, 288, bese, "bese")
    training = (time.perf_counter() - started) * TEXT_MEGABYTES / megabytes
    codec = load_codec(bese)
    merging = median_seconds(lambda: codec.encode_batch(texts, NUM_THREADS), 1)
    return [
        Measurement("shard writing", megabytes / writing, "MB/s", "bare encoder", megabytes / encoding),
        Measurement("BESE training, 20 MB", training, "s", "bar", 60),
        Measurement("BESE encoding", megabytes / merging, "MB/s", "bar", 2),
    ]


# A process between: at its start a child counts as its own the memory that its parent has.
PEAK_SOURCE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(command: list[str]) -> int:
    """Run a command and return the most memory that it took, in bytes; not on Windows."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK_SOURCE, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(found.stdout) * (1 if sys.platform == "darwin" else 1024)


def bench_memory(text: str, model: Path, folder: Path) -> Measurement:
    """Prepare a document of LONG_MEGABYTES in a process of its own: memory beyond a short one's, a byte."""
    peaks = []
    for num_chars in (1000, LONG_MEGABYTES * 1_000_000):
        (folder / "one.txt").write_text((text * (num_chars // len(text) + 1))[:num_chars], encoding="utf-8")
        (folder / "val.txt").write_text("validation")
        command = [sys.executable, "-m", "data.prepare", "--tokenizer", model, "--out", folder / "one"]
        command += ["--input", folder / "one.txt", "--val-input", folder / "val.txt"]
        peaks.append(peak_memory([str(word) for word in command]))
    spent = (peaks[1] - peaks[0]) / (folder / "one.txt").stat().st_size
    return Measurement(f"memory, {LONG_MEGABYTES} MB document", spent, "bytes/byte", "bar", 8)


def write_random_shards(folder: Path) -> None:
    """Write as many tokens as 200 MB and 4.2 MB of text have in the contest's sp1024, a BOS every 500."""
    rng = np.random.default_rng(0)
    for split, size in (("train", 83_000_000), ("val", 1_730_000)):
        tokens = rng.integers(2, 1024, size, dtype=np.uint16)
        tokens[::500] = 1
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens)


def bench_overlap(folder: Path) -> list[Measurement]:
    """Search training shards for validation documents."""
    started = time.perf_counter()
    check_overlap(Dataset(folder, None))
    return [Measurement("overlap, 200 MB", time.perf_counter() - started, "s", "bar", 60)]


def bench_batches(folder: Path, ranks: Ranks) -> list[Measurement]:
    """Read micro-batches of the CPU track's size, against training on them."""
    shape = SHAPE | {"data.seq_len": 256, "data.batch_tokens": 4096, "data.micro_batches": 1}
    cfg = with_values(Config(), shape | {"data.data_path": str(folder)}, "bench")
    loader, stage, times = open_loader(cfg, bos_id=1), get_stages(cfg)[0], []
    for _ in range(NUM_BATCHES):
        started = time.perf_counter()
        next_batch(loader, stage, ranks)
        times.append(time.perf_counter() - started)
    step = step_seconds(cfg, ranks, compiled=False)
    return [
        Measurement("batches of 4,096", 4096 / median(times), "tokens/s", "step 6x128", 4096 / step),
        Measurement("slowest of 2,000", 1000 * max(times), "ms", "1 % of a step", 10 * step),
    ]


def bench_state(ranks: Ranks) -> list[Measurement]:
    """A checkpoint of 36 M parameters beside its hash alone; steps while a shard is verified beside steps."""
    rng = np.random.default_rng(0)
    state = {str(index): rng.standard_normal(1 << 20, np.float32) for index in range(STATE_ARRAYS)}
    size_gb, rows = 4 * STATE_ARRAYS * 2**20 / 1e9, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        write = median_seconds(lambda: write_state(path, state, {}), 3) / size_gb
        read = median_seconds(lambda: read_state(path), 3) / size_gb
        blob = path.read_bytes()
        seal = median_seconds(lambda: hashlib.sha256(blob).digest(), 3) / size_gb
        rows += [
            Measurement("checkpoint write", write, "s/GB", "its hash alone", seal),
            Measurement("checkpoint read", read, "s/GB", "its hash alone", seal),
        ]
        rows.append(bench_verified_steps(Path(folder), ranks))
    return rows


def bench_verified_steps(folder: Path, ranks: Ranks) -> Measurement:
    """Time a few steps while a shard of the contest's size is hashed, in turn with steps alone."""
    cfg = with_values(Config(), SHAPE | {"data.seq_len": 512, "data.batch_tokens": 16_384}, "bench")
    shard = folder / TRAIN_GLOB.replace("*", "000000")
    write_shard(shard, np.random.default_rng(0).integers(0, 1024, VERIFIED_TOKENS), 1024)
    entry = {"file": shard.name, "sha256": sha256_file(shard)}
    write_sealed(folder / MANIFEST_NAME, {"train": {"shards": [entry]}})
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * VERIFIED_TURNS):
        started = time.perf_counter()
        verifier = ShardVerifier([shard]) if turn % 2 else None
        step_seconds(cfg, ranks, False)
        seconds[turn % 2].append(time.perf_counter() - started)
        if verifier:
            verifier.wait()
    alone, beside = map(median, seconds)
    return Measurement("steps, a shard is hashed", beside, "s", "steps alone", alone)


PARTS: dict[str, Callable[[Ranks], list[Measurement]]] = {
    "step": bench_step,
    "scoring": bench_scoring,
    "packing": bench_packing,
    "loader": bench_loader,
    "data": bench_data,
    "state": bench_state,
}


def codec_rows(found: dict) -> list[Measurement]:
    """Lay out what measure_codec found as rows: bytes against the entropy, seconds against each other."""
    sizes = [(name, found[name]) for name in found if name.endswith("_bytes") and name != "h0_bytes"]
    rows = [
        Measurement(f"codec {name}", size, "bytes", "order-0 entropy", found["h0_bytes"])
        for name, size in sizes
        if size is not None
    ]
    return [*rows, Measurement("codec encode_s", found["encode_s"], "s", "decode_s", found["decode_s"])]


def print_table(rows: list[Measurement]) -> None:
    """Print the rows for people."""
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads; medians")
    columns = {"part": "<28", "value": ">14,.1f", " unit": "<10", "yardstick": ">14,.1f", "  (what)": "<26"}
    cells = [
        (row.part, row.value, f" {row.unit}", row.yardstick_value, f"  {row.yardstick}", row.ratio)
        for row in rows
    ]
    print(format_table(columns | {"ratio": ">8.3f"}, cells))


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m dev.bench", description=__doc__)
    parser.add_argument("--only", choices=[*PARTS, "codec"], help="measure one part")
    parser.add_argument("--artifact", type=Path, help="codec: an artifact, or a run folder with a checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--gpu", action="store_true", help="measure a GPU, and nothing of the above")
    args = parser.parse_args(argv)
    if args.gpu:
        from dev.gpu_battery.short import run_short  # the battery needs POSIX

        print("\n".join(run_short()))
        return
    ranks = Ranks(Environment({}), "auto")
    rows, found = [], {}
    for name in [args.only] if args.only else [*PARTS, "codec"]:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        if name == "codec":
            found = measure_codec(args.artifact, ranks)
        else:
            rows += PARTS[name](ranks)
    if args.json:
        print(json.dumps({row.part: row._asdict() | {"ratio": row.ratio} for row in rows} | found))
        return
    print_table(rows + (codec_rows(found) if found else []))


if __name__ == "__main__":
    run_command(main)
