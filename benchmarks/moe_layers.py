"""Layers of a mixture of experts that are compared: ours by any router and transport, and DeepSpeed's, same sizes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.experts import FeedForward, gated, mix
from meshwright.moe.folding import own_experts
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from meshwright.moe.transports import TransportKind, transport

__all__ = ["Network", "OurLayer", "Sizes", "deepspeed_layer", "step_of", "tokens_of", "weights_of"]


@dataclass(frozen=True)
class Sizes:
    """Of a layer.

    Args:
        tokens: of each rank.
        width: of a token, the d of formulas.
        inner: of an expert.
        experts: of all ranks.
        k: experts of a token.
    """

    tokens: int
    width: int
    inner: int
    experts: int
    k: int


def weights_of(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Gate [experts, d], up [experts, 2 inner, d] and down [experts, d, inner]; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (sizes.experts, sizes.width),
        (sizes.experts, 2 * sizes.inner, sizes.width),
        (sizes.experts, sizes.width, sizes.inner),
    )
    gate, up, down = (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    return gate, up, down


class OurLayer(nn.Module):
    """Experts of this rank behind a gate of all.

    Args:
        sizes: of the layer.
        axes: the ranks.
        router: of one level or two; gates of two levels are the first rows of the flat one.
        kind: of the transport.
        shared: a network that every token visits besides, or None.
        halves: whether tokens travel in two halves, which goes without `shared`.
    """

    def __init__(
        self,
        sizes: Sizes,
        axes: ExpertAxes,
        *,
        router: TopK | BiLevel,
        kind: TransportKind,
        shared: nn.Module | None = None,
        halves: bool = False,
    ) -> None:
        super().__init__()
        gate, up, down = weights_of(sizes)
        own = own_experts(sizes.experts, ranks=axes.ep.size, rank=axes.ep.rank)
        self.up = nn.Parameter(up[own.start : own.stop])
        self.down = nn.Parameter(down[own.start : own.stop])
        rows = sizes.experts if isinstance(router, TopK) else router.num_nodes + router.num_local
        self.gate = nn.Parameter(gate[:rows].clone())
        self.router = router
        self.shared = shared
        self.halves = halves
        self.transport = transport(kind, axes)

    def route(self, tokens: Tensor) -> Routing:
        """Where tokens [tokens, d] go."""
        logits = functional.linear(tokens, self.gate)
        if isinstance(self.router, TopK):
            return self.router.route(logits)
        return self.router.route(*logits.split([self.router.num_nodes, self.router.num_local], 1))

    def carry(self, tokens: Tensor, routing: Routing) -> Tensor:
        """[tokens, d] -> [tokens, d], by a routing of theirs."""
        experts = FeedForward(up=self.up.mT, down=self.down.mT, act=gated(functional.silu))
        if self.halves:
            return self.transport.carry_halves(tokens, routing, experts)
        return mix(tokens, routing, transport=self.transport, experts=experts, shared=self.shared)

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens, d] -> [tokens, d]."""
        return self.carry(tokens, self.route(tokens))


class Network(nn.Module):
    """A gated feed-forward network of linear layers: DeepSpeed's expert, and the dense one.

    Args:
        up: [2 inner, d]
        down: [d, inner]
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        gate, up = functional.linear(inputs, self.up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down)


class _Deepspeed(nn.Module):
    """The layer of `deepspeed.moe` without what it returns besides."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens, d] -> [tokens, d]."""
        made: Tensor = self.layer(tokens)[0]
        return made


def deepspeed_layer(sizes: Sizes, *, ranks: int, rank: int, drop_tokens: bool) -> nn.Module:
    """DeepSpeed's layer with the weights of ours; a process group must be there.

    Args:
        sizes: of the layer.
        ranks: that share the experts.
        rank: this one.
        drop_tokens: its default, which computes less: experts have tokens x k / experts slots. Where False, it sends as
            many slots of every expert as the most wanted one of all ranks needs.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel, compiled at first use
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    gate, up, down = weights_of(sizes)
    layer = MoE(
        sizes.width,
        Network(up[0], down[0]),
        num_experts=sizes.experts,
        ep_size=ranks,
        k=sizes.k,
        drop_tokens=drop_tokens,
        top2_2nd_expert_sampling=False,  # which would choose other experts from call to call
    )
    layer.set_deepspeed_parallelism()
    inner: Any = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(gate)
        first = rank * sizes.experts // ranks
        for number, expert in enumerate(inner.experts.deepspeed_experts, first):
            expert.up.copy_(up[number])
            expert.down.copy_(down[number])
    return _Deepspeed(layer)


def tokens_of(sizes: Sizes, rank: int) -> Tensor:
    """[tokens, d] of a rank."""
    return torch.randn(sizes.tokens, sizes.width, generator=torch.Generator().manual_seed(1 + rank))


def step_of(layer: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of a layer, to gradients of tokens and of all parameters; gives the output."""
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(99))
    parameters = list(layer.parameters())

    def step() -> Tensor:
        leaf = tokens.detach().requires_grad_()
        for each in parameters:
            each.grad = None
        made: Tensor = layer(leaf)
        made.backward(upstream)
        return made.detach()

    return step
