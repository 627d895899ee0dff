"""The [quant] section of a recipe: how weights are stored and how many bytes they may take."""

from dataclasses import dataclass

from formats.artifact import LIMIT_BYTES, STREAM_CODECS
from formats.recipe import option
from quantizers.grid import CLIP_RULES

# The quantizers and what they do; each has its row in quantizers/methods.py.
METHODS = {
    "round": "each weight to the nearest code of its row's grid; needs no calibration",
    "gptq": "column by column, spreading each column's error over the later ones (arXiv 2210.17323)",
    "water_fill": "gptq with a step for every column, as fine as the loss asks for; codes of any size",
}


@dataclass(frozen=True)
class QuantConfig:
    """How weights are stored and how many bytes they may take."""

    method: str = option("round", "", "how matrices become codes", choices=METHODS)
    matrix_bits: int = option(8, "", "bits of the block matrices' codes, one scale a row", low=1, high=8)
    embed_bits: int = option(8, "", "bits of the embedding's and head's codes", low=1, high=8)
    mlp_bits: int = option(0, "", "bits of the mlps' codes; 0: matrix_bits", low=0, high=8)
    clip_rule: str = option("quantile", "", "what a row's largest code stands for", choices=tuple(CLIP_RULES))
    matrix_clip: float = option(0.9999984, "", "clip_rule's number for block matrices", low=0)
    embed_clip: float = option(0.9999984, "", "clip_rule's number for embedding and head", low=0)
    mlp_clip: float = option(0.0, "", "clip_rule's number for the mlps; 0: matrix_clip", low=0)
    step: float = option(0.4, "", "water_fill: steps of the median matrix, in deviations", low=1e-3, high=8)
    target_bytes: int = option(0, "", "code + artifact: water_fill fits step, gptq bits; 0: free", low=0)
    awq_group_cols: int = option(0, "", "gptq: columns of a matrix with steps a quarter as large", low=0)
    repair_rank: int = option(0, "", "rank of products added to the worst matrices (LQER); 0: none", low=0)
    repair_top: int = option(3, "", "how many matrices are repaired", low=0)
    repair_bits: int = option(4, "", "bits of the repair products' codes", low=2, high=8)
    repair_outputs: bool = option(True, "", "gptq: repair the outputs' error, not the weights'")
    rate_weight: float = option(0.0, "", "water_fill: price of bits in rounding, 1: all of it", low=0)
    qat_start: float = option(1.0, "", "progress from which gradients see stored weights", low=0, high=1)
    qat_sharpness: float = option(0.0, "", "sharpness of QAT's soft stairs; 0: straight-through", low=0)
    damping: float = option(0.01, "", "added to Hessians, a fraction of the mean diagonal", low=0)
    calib_batches: int = option(16, "", "training micro-batches that Hessians are taken from", low=1)
    reserve_seconds: float = option(
        0.0, "", "least seconds of the clock kept for calibration; its need is measured", low=0
    )
    float16_numel: int = option(65_536, "", "matrices of at most so many elements stay float16", low=0)
    float16_names: str = option("", "", "patterns, with commas between, of others that stay float16")
    scale_floor: bool = option(True, "", "scales are at least 1 / largest code, 8 bits (contest's baseline)")
    codec: str = option(
        "zlib",
        "",
        "compression of the artifact's streams; rans: formats/codes.py",
        choices=(*STREAM_CODECS, "rans"),
    )
    limit_bytes: int = option(LIMIT_BYTES, "", "most bytes of code + artifact", low=0)
    code_wrap: str = option(
        "brotli", "", "compression of the packed code", choices=("brotli", "lzma", "mix", "none")
    )
