"""A decision transformer (arXiv 2106.01345) on 32 trajectories of 1,000 steps in one sequence, within a given memory.

`python -m tests.parallel.spans.trajectories vanilla|ours STEPS MEGABYTES` prints JSON: losses, or why it ended.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import meshwright as mw
from meshwright.parallel.blockwise.mask_tensor import MaskTensor
from meshwright.parallel.blockwise.masks import causal, window

TRAJECTORIES, STEPS, TOKENS = 32, 1000, 3
_STATE, _ACTION, _WIDTH, _HEADS = 17, 6, 32, 2


class _Layer(nn.Module):
    """What it is given, attention and a network, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.projected, self.joined = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.network = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        split = self.projected(self.before(rows)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*split.unbind(0), attn_mask=mask)
        rows = rows + self.joined(attended.transpose(1, 2).flatten(2))
        return rows + self.network(self.between(rows))


class Decider(nn.Module):
    """Returns, states and actions in turn; each sees the last 1,000 tokens; says the next action."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(nn.Linear(size, _WIDTH) for size in (1, _STATE, _ACTION))
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _ACTION), nn.Tanh())

    def forward(self, returns: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        given = [make(each) for make, each in zip(self.tokens, (returns, states, actions), strict=True)]
        rows = torch.stack(given, 2).flatten(1, 2)
        length = rows.shape[1]
        mask = MaskTensor(causal() & window(STEPS), (1, 1, length, length), device=rows.device)
        for layer in self.layers:
            rows = layer(rows, mask)
        return functional.mse_loss(self.head(rows[:, 1::TOKENS]), actions)


def batch(steps: int) -> dict[str, Tensor]:
    """What a fixed policy does in random states."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, steps, _STATE, generator=generator)
    policy = torch.randn(_STATE, _ACTION, generator=generator) / _STATE**0.5
    left = torch.arange(steps, 0, -1).reshape(1, steps, 1).float().remainder(STEPS) / STEPS
    return {"returns": left, "states": states, "actions": (states @ policy).tanh()}


def _wrapped(model: nn.Module) -> Callable[[dict[str, Tensor]], float]:
    parallel = mw.parallelize(model, mw.Mesh(), loss="sample_mean", blockwise={"layer_block": 4096}, example=batch(8))

    def step(given: dict[str, Tensor]) -> float:
        return float(parallel.step(given))

    return step


def _plain(model: nn.Module) -> Callable[[dict[str, Tensor]], float]:
    def step(given: dict[str, Tensor]) -> float:
        loss = model(**given)
        loss.backward()
        return loss.item()

    return step


def main() -> None:
    """Trains for some steps in so much more memory than the process has."""
    way, steps, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Decider()
    step = _wrapped(model) if way == "ours" else _plain(model)
    step(batch(40))  # what is made once
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = batch(steps)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    losses = []
    try:
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(step(given))
            optimizer.step()
    except RuntimeError as error:
        sys.stdout.write(json.dumps({"losses": losses, "error": str(error)}) + "\n")
    else:
        sys.stdout.write(json.dumps({"losses": losses, "error": None}) + "\n")


if __name__ == "__main__":
    main()
