"""Size and speed of the entropy coder against the histogram's entropy and general compressors."""

import hashlib
import lzma
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import zstandard

from common import UserError
from dev.trained import Trained, open_trained
from formats.codes import decode_codes, decode_halves
from formats.codes_encode import encode_codes, encode_halves
from formats.recipe import read_recipe, with_values
from quantizers.rate import entropy_bits
from train_gpt import (
    Config,
    Log,
    Ranks,
    Training,
    collect_statistics,
    load_validation,
    quantize_model,
    train,
)

# The contest's quantizer: GPTQ, SDClip at 12.85 and 20 deviations.
CONTEST_QUANT = {
    "quant.method": "gptq", "quant.codec": "rans", "quant.clip_rule": "sigmas", "quant.scale_floor": False,
    "quant.matrix_bits": 6, "quant.matrix_clip": 12.85, "quant.embed_bits": 8, "quant.embed_clip": 20.0,
    "quant.target_bytes": 0, "quant.calib_batches": 8,
}  # fmt: skip
QUICK_RECIPE = "records/track_cpu/2026-11-21_SmallBatchMuon/recipe.toml"
QUICK_SECONDS = 45
QUICK = {
    "run.max_wallclock_seconds": QUICK_SECONDS, "run.val_loss_every": -1, "run.compile": "off",
    "run.train_log_every": 0, "run.warmup_steps": 0, "data.vocab_size": 2048,
    "data.data_path": "data/datasets/builtin_sp2048",  # what `make data` makes
    "data.tokenizer_path": "data/datasets/builtin_sp2048/tokenizer.model",
}  # fmt: skip


def train_quickly(ranks: Ranks, folder: Path) -> Trained:
    """Train the CPU track's model for less than a minute on the built-in corpus."""
    cfg = with_values(Config(), read_recipe(QUICK_RECIPE) | QUICK, "bench")
    text = load_validation(cfg.data)
    training = Training(cfg, ranks, text.bos_id)
    train(training, Log(folder, False), lambda: None)
    return Trained(training, text, folder)


def lrzip(raw: bytes) -> bytes:
    """Compress with ZPAQ as the contest's best record did; needs the program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes"
        path.write_bytes(raw)
        subprocess.run(["lrzip", "-z", "-L", "9", "-q", str(path)], check=True, capture_output=True)
        return path.with_suffix(".lrz").read_bytes()


OTHERS: dict[str, Callable[[bytes], bytes]] = {
    "brotli_bytes": lambda raw: brotli.compress(raw, quality=11, lgwin=24),
    "zstd_bytes": lambda raw: zstandard.ZstdCompressor(level=22, write_content_size=False).compress(raw),
    "lzma_bytes": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
}


def weigh_others(codes: list[np.ndarray]) -> dict[str, int | None]:
    """Weigh int8 codes by general compressors, each with the better of rows and columns first."""
    orders = [b"".join(matrix.astype(np.int8).tobytes(order) for matrix in codes) for order in "CF"]
    sizes = {name: min(len(pack(raw)) for raw in orders) for name, pack in OTHERS.items()}
    return sizes | {"lrzip_bytes": min(map(len, map(lrzip, orders))) if shutil.which("lrzip") else None}


def measure_codec(target: Path | None, ranks: Ranks) -> dict:
    """Quantize a trained model as the contest does, code it, and weigh the same codes by other means.

    ours_bytes are all that a reader needs of the codes; scales_bytes, the rows' float16 scales, come on top
    whatever codes the codes.
    """
    with tempfile.TemporaryDirectory() as folder:
        trained = open_trained(target, ranks) if target else train_quickly(ranks, Path(folder))
    training = trained.training
    training.cfg = with_values(training.cfg, CONTEST_QUANT, "bench")
    quantized = quantize_model(training.model, training.cfg, collect_statistics(training)[0], len)
    codes = [stored.codes.cpu().numpy() for stored in quantized.values()]
    scales = [stored.scales.cpu().numpy().ravel() for stored in quantized.values()]
    weights = b"".join(param.detach().cpu().numpy().tobytes() for param in training.model.parameters())
    times = [time.process_time()]
    coded, coded_scales = encode_codes(codes), encode_halves(scales)
    times.append(time.process_time())
    decoded = decode_codes(coded, [matrix.shape for matrix in codes])
    decode_halves(coded_scales, [len(vector) for vector in scales])
    times.append(time.process_time())
    if not all(map(np.array_equal, codes, decoded)):
        raise UserError("expected the codes that were coded, found others: report this model.")
    h0_bytes = sum(entropy_bits(stored.codes) for stored in quantized.values()) / 8  # histograms are free
    sizes = {"h0_bytes": round(h0_bytes), "ours_bytes": len(coded)}
    seconds = {"encode_s": times[1] - times[0], "decode_s": times[2] - times[1]}
    facts = {"model_sha256": hashlib.sha256(weights).hexdigest(), "weights": sum(map(np.size, codes))}
    return facts | sizes | weigh_others(codes) | seconds | {"scales_bytes": len(coded_scales)}
