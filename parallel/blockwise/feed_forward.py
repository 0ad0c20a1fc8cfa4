"""Feed-forward networks by blocks of positions: the wide hidden exists for one block only (arXiv 2305.19370).

What is kept of "y + MLP(norm(y))" is y: where a norm's output reaches the network as it is, backward starts from the
norm's input, which the model keeps anyway. Networks and norms are recognised by what they do, not by name: they hold
matrices, or vectors, and work position by position, which is tried (see `works_by_position`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.blockwise.block_dropout import BlockDropout
from meshwright.parallel.blockwise.by_position import works_by_position
from meshwright.parallel.blockwise.calls import has_hooks, is_hooked
from meshwright.parallel.blockwise.pointwise import Pointwise, run_by_blocks
from meshwright.parallel.blockwise.product import narrow_dtype
from meshwright.parallel.unit_run import settings_of
from meshwright.parallel.watch import matrix_form

__all__ = ["TiledFeedForward", "tile_feed_forward"]

_MARK = "_meshwright_normed"


def tile_feed_forward(model: nn.Module, block: int) -> list[str]:
    """Makes the feed-forward networks in a model's blocks run `block` positions at a time.

    Call it on the whole model: what is dealt over `tp` or sharded later stays as it is, with the collectives of a
    network once for every block of positions. It saves memory only; the numbers are those of the untouched model,
    dropout included.

    Args:
        model: changed in place.
        block: positions (of dim -2) at a time.

    Returns:
        Paths of the networks; empty where none is a module of its own.

    >>> layer = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> model = nn.ModuleList(nn.ModuleDict({"mlp": layer, "norm": nn.LayerNorm(4)}) for _ in range(2))
    >>> tile_feed_forward(model, 8)
    ['0.mlp']
    """
    by_position = _Proofs()
    tiled = []
    for path, part in (find_blocks(model) or {"": model}).items():
        found = dict(_networks(part, path, by_position))
        for name in found:
            module = model.get_submodule(name)
            if not isinstance(module.forward, TiledFeedForward):
                module.forward = TiledFeedForward(name, module, block, module.forward)
                tiled.append(name)
        _note_norms(part, set(found.values()), by_position)
    return tiled


class _Proofs:
    """Which modules work by position; equal ones are tried once."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def __call__(self, module: nn.Module, width: int) -> bool:
        key = (settings_of(module), width)
        if key not in self._known:
            self._known[key] = works_by_position(module, width)
        return self._known[key]


@dataclass(eq=False)
class TiledFeedForward:
    """The forward of a network that runs by blocks.

    Attributes:
        name: path, for messages.
        module: the network.
        block: positions at a time.
        forward: its own.
        uses: how it ran -> how often.
    """

    name: str
    module: nn.Module
    block: int
    forward: Callable[..., Any]
    uses: Counter[str] = field(default_factory=Counter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output; hooks on inner modules, which would see blocks, make it run as a whole."""
        given = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(given, Tensor) or given.dim() < 2 or not given.shape[-2] or has_hooks(self.module):
            self.uses["whole"] += 1
            return self.forward(*args, **kwargs)
        return self._with_gradients(given) if torch.is_grad_enabled() else self._without_gradients(given)

    def _with_gradients(self, given: Tensor) -> Tensor:
        normed: _Normed | None = vars(given).get(_MARK)
        source = None if normed is None else normed.given(given)
        if normed is None or source is None:
            self.uses["by blocks"] += 1
            return run_by_blocks(Pointwise(self.name, (self.module,), self.forward, None, self.block), given, given)
        self.uses["by blocks, with its norm"] += 1
        modules = (normed.norm.module, self.module)
        call = Pointwise(self.name, modules, self.forward, normed.norm.forward, self.block)
        return run_by_blocks(call, source, given)

    def _without_gradients(self, given: Tensor) -> Tensor:
        self.uses["without gradients"] += 1
        blocks = range(0, given.shape[-2], self.block)
        with BlockDropout(given.shape[-2]) as dropout:
            parts = []
            for block in (slice(start, start + self.block) for start in blocks):
                dropout.at(block)
                parts.append(self.forward(given[..., block, :].contiguous()))
        return torch.cat(parts, -2)


@dataclass(eq=False)
class _NotedNorm:
    """The forward of a norm whose outputs know what they were made from."""

    module: nn.Module
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the norm gives."""
        made = self.forward(*args, **kwargs)
        given = args[0] if len(args) == 1 and not kwargs else None
        if torch.is_grad_enabled() and isinstance(given, Tensor) and isinstance(made, Tensor) and made is not given:
            setattr(made, _MARK, _Normed.of(self, given, made))
        return made


@dataclass(frozen=True, eq=False)
class _Normed:
    """What a norm's output was made from, in which state."""

    norm: _NotedNorm
    source: TensorWeakRef
    state: tuple[Any, ...]

    @classmethod
    def of(cls, norm: _NotedNorm, given: Tensor, made: Tensor) -> "_Normed":
        """Notes it."""
        return cls(norm, TensorWeakRef(given), _state(given, made))

    def given(self, made: Tensor) -> Tensor | None:
        """The norm's input, if backward can start there: nothing changed, and nobody waits for what is between."""
        given = self.source()
        hooked = made._backward_hooks or made.retains_grad or is_hooked(self.norm.module)
        return None if given is None or hooked or _state(given, made) != self.state else given


def _state(given: Tensor, made: Tensor) -> tuple[Any, ...]:
    return given._version, made._version, narrow_dtype(given.device)


def _networks(module: nn.Module, path: str, by_position: _Proofs) -> Iterator[tuple[str, int]]:
    """The outermost modules that hold at least two matrices, no lists, and work by position; and their width."""
    for name, child in module.named_children():
        inner = f"{path}.{name}".strip(".")
        width = _width(child)
        if width is not None and by_position(child, width):
            yield inner, width
        else:
            yield from _networks(child, inner, by_position)


def _width(module: nn.Module) -> int | None:
    """The size of what goes into and out of a module that may be a feed-forward network."""
    lists = any(isinstance(each, (nn.ModuleList, nn.ModuleDict)) for each in module.modules())
    forms = [(each, form) for each in module.modules() if (form := matrix_form(each)) is not None]
    wide = sum(parameter.dim() > 1 for parameter in module.parameters())
    if lists or len(forms) < 2 or wide != len(forms):
        return None
    sizes = [dict(each.named_parameters())["weight"].shape[0 if form == "transposed" else 1] for each, form in forms]
    return min(sizes)


def _note_norms(block: nn.Module, widths: set[int], by_position: _Proofs) -> None:
    for module in block.modules():
        own = list(module.parameters())
        leaf = not any(True for _ in module.children()) and not isinstance(module.forward, _NotedNorm)
        if not leaf or not own or any(each.dim() != 1 or len(each) not in widths for each in own):
            continue
        if by_position(module, len(own[0])):
            module.forward = _NotedNorm(module, module.forward)
