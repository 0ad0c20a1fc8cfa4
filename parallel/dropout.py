"""Dropout masks of the plain run, drawn by ranks that hold a share of the tensor.

Inside a unit that tensor or sequence parallelism splits, a rank draws the mask of the whole tensor from the same
generator state as the plain run and keeps its share, so that masks and the state after them depend on no mesh.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from meshwright.parallel.blockwise.calls import calling_module
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import rows
from meshwright.parallel.tensor_plan import Drop

__all__ = ["PlainDropout", "first_dropped_head", "with_plain_dropout", "without_dropout"]

_ATTENTION = functional.scaled_dot_product_attention  # as torch has it: the name may be replaced later
# functions that draw inside themselves, where a mode does not look
_DRAWING = (
    functional.multi_head_attention_forward,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.rrelu,
    functional.gumbel_softmax,
)
_DEFAULT_GENERATOR = Lock()
_ALONE = Dealing("contiguous", 1)

_OTHERWISE = (
    "dropouts of a block drop otherwise than when the model was wrapped (some were switched on or off, or p changed "
    "from or to 0), and ranks of tp and cp would draw other masks than the plain run; set them before parallelize()"
)

_RANDOM = (
    *(torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.normal, torch.bernoulli, torch.poisson, torch.binomial, torch.multinomial, torch.randperm),
    *(Tensor.uniform_, Tensor.normal_, Tensor.log_normal_, Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_),
    *(Tensor.random_, Tensor.bernoulli_, Tensor.bernoulli, Tensor.multinomial),
)


class PlainDropout(TorchFunctionMode):
    """A context in which dropout keeps this rank's share of the plain mask.

    Args:
        drops: one entry per call with p > 0; None draws as it is called. Empty while calls are only recorded.
        rank: position along the axis that deals.
        dealing: of positions over its ranks.
        length: full sequence length, asked when a dealt sequence is met.
        generator: where random bits come from; None is torch's default.
        heads: whether attention that drops by the numbers of heads counts as a call.
    """

    def __init__(
        self,
        drops: Sequence[Drop | None] = (),
        *,
        rank: int = 0,
        dealing: Dealing = _ALONE,
        length: Callable[[], int] | None = None,
        generator: torch.Generator | None = None,
        heads: bool = True,
    ) -> None:
        super().__init__()
        self._heads = heads
        self._drops = drops
        self._rank = rank
        self._dealing = dealing
        self._length = length
        self._generator = generator
        self.shapes: list[tuple[int, ...]] = []
        self.drawn: list[tuple[str, tuple[int, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces dropouts and passes every other call on."""
        keywords = dict(kwargs or {})
        if func is functional.dropout:
            return self._dropout(*args, **keywords)
        if func is _ATTENTION and _dropout_of(args, keywords) > 0:
            return self._attention(*args, **keywords)
        if func is first_dropped_head and self._heads:
            return self._first_head(*args)
        return func(*args, **keywords) if self._generator is None else self._drawn(func, args, keywords)

    def _drawn(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """A call that may draw, from this generator."""
        if func in _DRAWING and not _is_plugged(func):
            return self._seeded(func, lambda: func(*args, **keywords))
        if func not in _RANDOM:
            return func(*args, **keywords)
        made = func(*args, **{"generator": self._generator, **keywords})
        self._note(func, made)
        return made

    def _seeded(self, func: Any, draw: Callable[[], Any]) -> Any:
        """Draws from torch's default generator as if it were this one: threads share the default one."""
        seed = int(torch.randint(1 << 62, (), generator=self._generator))
        with _DEFAULT_GENERATOR, torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            before = torch.random.get_rng_state()
            made = draw()
            if not torch.equal(torch.random.get_rng_state(), before):
                self._note(func, made)
            return made

    def _note(self, func: Any, made: Any) -> None:
        self.drawn += [(func.__name__, tuple(each.shape)) for each in tree_leaves(made) if isinstance(each, Tensor)]

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return functional.dropout(input, p, training, inplace)
        self.shapes.append(tuple(input.shape))
        kept = input * self._mask(input, p)
        return input.copy_(kept) if inplace else kept

    def _mask(self, input: Tensor, p: float) -> Tensor:
        drop = self._dealt()
        shape = list(input.shape)
        if drop is not None:
            sizes = drop.sizes or self._lengths()
            if shape[drop.dim] != sizes[self._rank]:
                raise WrapError(_OTHERWISE)
            shape[drop.dim] = sum(sizes)
        strides = input.stride()
        order = sorted(range(input.dim()), key=lambda dim: -strides[dim])  # torch draws in order of memory
        whole = torch.empty([shape[dim] for dim in order], dtype=input.dtype, device=input.device)
        whole.bernoulli_(1 - p, generator=self._generator)
        if p < 1:
            whole.div_(1 - p)
        mask = whole.permute([order.index(dim) for dim in range(input.dim())])
        if drop is None:
            return mask
        if drop.sizes is None:
            return rows(mask, self._dealing.pieces(sum(sizes), self._rank), drop.dim)
        return mask.narrow(drop.dim, sum(sizes[: self._rank]), sizes[self._rank])

    def _first_head(self, query: Tensor, scores: tuple[int, ...]) -> int:
        """Attention that drops by the numbers of heads counts as one dropout of its scores."""
        self.shapes.append(scores)
        drop = self._dealt()
        if drop is None:
            return 0
        if drop.dim != 1 or drop.sizes is None:
            raise WrapError(f"attention scores {list(scores)} that drop are dealt along dim {drop.dim}, not by heads")
        return sum(drop.sizes[: self._rank])

    def _dealt(self) -> Drop | None:
        """How the call that came last is dealt."""
        number = len(self.shapes) - 1
        if number >= len(self._drops):
            if self._drops and self._generator is None:
                raise WrapError(_OTHERWISE)
            return None
        if self._drops[number] is not None and self._generator is None:
            _refuse_checkpoint()
        return self._drops[number]

    def check(self) -> None:
        """At the end of a unit: all of its dropouts dropped, or none did.

        Raises:
            WrapError: when some did not, since those behind them drew the masks of others.
        """
        if 0 < len(self.shapes) < len(self._drops):
            raise WrapError(_OTHERWISE)

    def _lengths(self) -> tuple[int, ...]:
        assert self._length is not None, "a dealt sequence outside a stream"
        return tuple(self._dealing.sizes(self._length()))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        """Attention as torch computes it on CPU when it drops, with the mask of the plain run."""
        if query.is_cuda:
            raise WrapError(
                "attention dropout inside scaled_dot_product_attention cannot be dealt on a GPU, where its mask has "
                "no order; set attn_implementation='eager' or the model's attention dropout to 0"
            )
        given = {**_ATTENTION_DEFAULTS, **dict(zip(_ATTENTION_DEFAULTS, rest, strict=False)), **keywords}
        mask, scale = given["attn_mask"], given["scale"]
        if given["enable_gqa"]:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if given["is_causal"]:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None and mask.dtype is torch.bool:
            scores = scores.masked_fill(mask.logical_not(), float("-inf"))
        elif mask is not None:
            scores = scores + mask
        return self._dropout(scores.softmax(-1), given["dropout_p"]) @ value


_ATTENTION_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def first_dropped_head(query: Tensor, scores: tuple[int, ...]) -> int:
    """Number in the whole model of the first head of a call whose dropout depends on these numbers.

    Args:
        query: any tensor of the call.
        scores: shape [b, heads, s_q, s_k] of what drops.
    """
    if has_torch_function((query,)):
        found: int = handle_torch_function(first_dropped_head, (query,), query, scores)
        return found
    return 0


def with_plain_dropout(unit: nn.Module, make: Callable[[], PlainDropout]) -> None:
    """Runs every forward of `unit` (also one repeated for recompute) inside a fresh `PlainDropout`."""
    unit.forward = partial(_inside, make, unit.forward)


def _inside(make: Callable[[], PlainDropout], forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with make() as dropout:
        made = forward(*args, **kwargs)
        dropout.check()
        return made


def _refuse_checkpoint() -> None:
    """What a checkpoint within a unit runs again does not come by `_inside`, and would draw another mask unnoticed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_name, frame.f_code.co_filename) != (_inside.__name__, __file__):
        if frame.f_code.co_filename == checkpoint.__file__:
            raise WrapError(
                "dropout of which this rank has a part (axes tp and cp) lies in a checkpoint that the model makes "
                "within a block, and would draw another mask when backward runs it again; switch the model's own "
                "gradient checkpointing off and use recompute='blocks' with schedule='layered', or set dropout to 0"
            )
        frame = frame.f_back


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Runs a model in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _is_plugged(func: Any) -> bool:
    """Whether the attention in a function arrives elsewhere, where it may wait for other threads and draws nothing."""
    return func is functional.multi_head_attention_forward and calling_module() is not None


def _dropout_of(args: tuple[Any, ...], keywords: dict[str, Any]) -> float:
    return float(args[4] if len(args) > 4 else keywords.get("dropout_p", 0.0))
