"""Bits per byte: nats, tokens and bytes in, val_loss and val_bpb out, in float64."""

import math

import numpy as np

from common import UserError


class BpbMeter:
    """Add up the cost of scored targets.

    val_loss is nats per token; val_bpb = val_loss / ln 2 * tokens / bytes, where bytes are those of the
    original UTF-8 text that the scored targets stand for.
    """

    def __init__(self):
        self.nats = 0.0
        self.num_tokens = 0
        self.num_bytes = 0

    def add(self, nats: np.ndarray, target_bytes: np.ndarray) -> None:
        """Add (N,) nats and the (N,) byte counts of the same targets."""
        if nats.shape != target_bytes.shape:
            raise ValueError(
                f"expected as many nats as byte counts, found {nats.shape} and {target_bytes.shape}"
            )
        if not np.isfinite(nats).all():
            at = int(np.flatnonzero(~np.isfinite(nats))[0])
            raise UserError(
                f"expected finite costs, found {nats[at]} for target {at}: the model's logits are not finite "
                "there. It diverged; lower the learning rates and train again."
            )
        self.nats += float(nats.sum(dtype=np.float64))
        self.num_tokens += nats.size
        self.num_bytes += int(target_bytes.sum(dtype=np.int64))

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2.0) / self.num_bytes
