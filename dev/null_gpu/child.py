"""One case in a process on the null GPU: `python -m dev.null_gpu.child CASE LIBRARY FOLDER`."""

import sys
from pathlib import Path

import torch

from dev.null_gpu.cases import CASES, FOUND_NAME, Bed, write_found
from dev.null_gpu.counters import Counters
from dev.null_gpu.stand_ins import TritonBytes, keep_masks, replace_triton


def main() -> None:
    """Count one case."""
    case, library, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is the real one, and finds no driver
    torch._inductor.config.fx_graph_cache = False  # code is to be generated, whatever was before
    torch._functorch.config.enable_autograd_cache = False
    counters = Counters(library)
    moved = TritonBytes(counters.launch)
    replace_triton(moved)
    masks = keep_masks()
    write_found(CASES[case].count(Bed(counters, moved, folder)), folder / FOUND_NAME)
    del masks


if __name__ == "__main__":
    main()
