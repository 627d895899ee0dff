"""What only a CUDA device can show; skipped where there is none."""

import math
from pathlib import Path

import pytest
import torch

from common import read_json
from formats.recipe import with_values
from kernels.fused_choice import TRIALS, FusedShape, why_plain
from train_gpt import Environment, Ranks, load_artifact, load_validation, run, score_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_main_job_runs_on_a_gpu_and_its_artifact_scores_alike_on_a_cpu(tiny_config):
    """bfloat16, compiled, then the same bytes on the other device: one artifact, one score."""
    values = {
        "run.device": "cuda",
        "run.compile": "on",
        "model.compute_dtype": "bfloat16",
        "run.iterations": 20,
    }
    cfg = with_values(tiny_config, values, "test")
    run(cfg, Environment({}))
    folder = Path(cfg.run.out_dir) / "tiny"
    on_gpu = read_json(folder / "result.json")["score"]["val_bpb"]
    cpu = Ranks(Environment({}), "cpu")
    model, packed_cfg, header = load_artifact(folder / "artifact.bin", cfg, cpu.device)
    text = load_validation(packed_cfg.data, "", header["tokenizer_sha256"])
    assert math.isfinite(on_gpu)
    assert score_model(model, packed_cfg, text, cpu).val_bpb == pytest.approx(on_gpu, rel=1e-2)


@pytest.mark.parametrize("name", TRIALS)
def test_fused_kernels_agree_with_their_plain_forms(name):
    """At the sizes of the 1.0611 recipe; whether they pay is the battery's question."""
    pytest.importorskip("triton")
    assert why_plain(name, torch.device("cuda"), torch.bfloat16, FusedShape()) == ""
