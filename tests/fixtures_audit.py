"""Record folders for the audit: a program, a line of a log, a folder on disk, and what is found in it."""

import json
import math
from pathlib import Path

from audit.__main__ import audit_folder

BYTES_PER_TOKEN = 151_080_000 / 62_021_632
SOURCE = """import os
import numpy as np
import torch


class Hyperparameters:
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    ngram_order = int(os.environ.get("NGRAM_ORDER", 0))


def main():
    args = Hyperparameters()
    weights = torch.zeros(args.num_layers)
    torch.save(weights, "final_model.pt")


if __name__ == "__main__":
    main()
"""


def score_line(label, bpb, per_token=BYTES_PER_TOKEN, extra=""):
    """Write a score as the contest's logs do."""
    return f"{label} val_loss:{bpb * math.log(2) * per_token:.8f} val_bpb:{bpb:.8f}{extra}\n"


def write_folder(root: Path, files: dict, track="track_10min_16mb", name="2026-05-01_Clean") -> Path:
    """Write a record: path -> text, bytes or the dictionary of a JSON file; returns its folder."""
    folder = root / track / name
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content) if isinstance(content, dict) else content
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def verdicts(folder: Path, against: list[Path] | None = None) -> dict[str, str]:
    """Audit a folder: check -> verdict."""
    return {check.id: finding.verdict for check, finding in audit_folder(folder, against)}


def evidence(folder: Path, check_id: str) -> str:
    """Audit a folder: the evidence of one check."""
    return next(
        "; ".join(finding.evidence) for check, finding in audit_folder(folder) if check.id == check_id
    )
