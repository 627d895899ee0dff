"""Muon over stacks of equal-shaped matrices that ranks share (arXiv 2409.20325; contest pull request 399).

Each rank averages, orthogonalizes and all-gathers its share of a stack. Shapes: n matrices of (r, c).
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients (a, b, c) by iteration; the last row repeats.
NS_TABLES = {
    "classic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (  # minimax for five iterations, arXiv 2505.16932
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

STACK_STATE = ("momentum", "row_squares")  # tensors of a Stack that survive a step


class MuonSettings(NamedTuple):
    """How a direction becomes an update."""

    num_ns_steps: int
    ns_table: str  # a key of NS_TABLES
    row_norm: bool  # MuonEq-R
    normuon_beta2: float  # 0: no NorMuon


class AsyncWork(NamedTuple):
    """A tensor on its way between ranks."""

    tensor: Tensor
    work: object | None = None  # torch.distributed's handle
    scale: float = 1.0
    source: Tensor | None = None  # kept alive while it is read

    def wait(self) -> Tensor:
        """Return the tensor when it is there."""
        if self.work is None:
            return self.tensor
        self.work.wait()
        return self.tensor if self.scale == 1.0 else self.tensor.mul_(self.scale)


class Communicator(Protocol):
    """What a stack needs of the ranks."""

    rank: int
    world_size: int

    def start_scatter_average(self, stack: Tensor) -> AsyncWork: ...

    def start_gather(self, share: Tensor) -> AsyncWork: ...


def newton_schulz(stack: Tensor, num_steps: int, table: str = "classic") -> Tensor:
    """Push the singular values of every (r, c) matrix in (n, r, c) towards 1 (arXiv 2409.20325; Muon).

    X <- aX + (bA + cA^2)X with A = XX^T, from X / ||X||_F, in the stack's dtype.
    """
    wide = stack.size(1) <= stack.size(2)
    x = stack if wide else stack.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    rows = NS_TABLES[table]
    for step in range(num_steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Stack:
    """Equal-shaped matrices that Muon updates together; each rank owns an equal, padded share."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, ranks: Communicator):
        self.params = params
        self.lr = lr
        self.weight_decay = weight_decay
        self.ranks = ranks
        rows, cols = params[0].shape
        self.size = math.ceil(len(params) / ranks.world_size)
        self.momentum = params[0].new_zeros(self.size, rows, cols)
        self.row_squares = params[0].new_zeros(self.size, rows, 1)  # NorMuon's running mean squares
        self.num_updates = 0
        self.grad: Tensor | None = None  # this rank's share of the averaged gradient
        self.pending: AsyncWork | None = None

    def padded(self, tensors: list[Tensor]) -> Tensor:
        """Stack tensors, with zeros after them so that the ranks' shares are equal."""
        zeros = [torch.zeros_like(tensors[0])] * (self.size * self.ranks.world_size - len(tensors))
        return torch.stack([*tensors, *zeros])

    def start_reduce(self) -> None:
        """Begin to average the gradients over ranks."""
        self.pending = self.ranks.start_scatter_average(self.padded([param.grad for param in self.params]))

    def finish_reduce(self) -> Tensor:
        """Return this rank's share of the averaged gradient, (n, r, c)."""
        self.grad, self.pending = self.pending.wait(), None
        return self.grad

    def start_update(self, momentum: float, cfg: MuonSettings, dtype: torch.dtype) -> None:
        """Orthogonalize this rank's share of the Nesterov direction and begin to hand it to all ranks."""
        self.momentum.mul_(momentum).add_(self.grad)
        direction = self.grad.add(self.momentum, alpha=momentum)
        if cfg.row_norm:  # MuonEq-R, arXiv 2603.28254
            direction /= direction.norm(dim=2, keepdim=True) + 1e-7
        update = newton_schulz(direction.to(dtype), cfg.num_ns_steps, cfg.ns_table)
        if cfg.normuon_beta2 > 0:
            update = self.even_rows(update, cfg.normuon_beta2)
        self.grad, self.pending = None, self.ranks.start_gather(update)

    def even_rows(self, update: Tensor, beta2: float) -> Tensor:
        """Divide rows by their running root mean squares, keeping the norm (NorMuon, arXiv 2510.05491)."""
        self.num_updates += 1
        self.row_squares.lerp_(update.square().mean(2, keepdim=True).to(self.row_squares.dtype), 1 - beta2)
        scale = (self.row_squares / (1 - beta2**self.num_updates)).add(1e-10).rsqrt()
        evened = update * scale.to(update.dtype)
        norms = [x.norm(dim=(1, 2), keepdim=True) for x in (update, evened)]
        return evened * (norms[0] / (norms[1] + 1e-7))

    def finish_update(self, lr_mul: float, decay_mul: float) -> None:
        """Take the step w <- w (1 - lr * decay) - lr * sqrt(max(1, r / c)) * update."""
        rows, cols = self.params[0].shape
        updates = self.pending.wait()[: len(self.params)] * max(1.0, rows / cols) ** 0.5
        self.pending = None
        lr = self.lr * lr_mul
        torch._foreach_mul_(self.params, 1.0 - lr * decay_mul * self.weight_decay)
        torch._foreach_add_(self.params, list(updates.to(self.params[0].dtype).unbind()), alpha=-lr)

    def state_dict(self) -> dict:
        """Collect the state of all ranks: it does not depend on how many there are."""
        gathered = {name: self.ranks.start_gather(getattr(self, name)).wait() for name in STACK_STATE}
        whole = {name: stack[: len(self.params)].clone() for name, stack in gathered.items()}
        return whole | {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        share = slice(self.ranks.rank * self.size, (self.ranks.rank + 1) * self.size)
        for name in STACK_STATE:
            whole = self.padded(list(state[name].unbind()))
            getattr(self, name).copy_(whole[share])
        self.num_updates = state["num_updates"]
