"""Attention by blocks: query blocks outside, key blocks inside, one online softmax; exact, also its second derivative.

Only query, key, value, output and log-sum-exp are kept for backward, which makes the scores anew block by block
(arXiv 2112.05682, 2205.14135, 2305.19370).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from torch.autograd.function import Function

from meshwright.parallel.blockwise.block import BlockGradients, Upstream
from meshwright.parallel.blockwise.chunk import Chunk, Work
from meshwright.parallel.blockwise.kernels import block_backward, block_forward
from meshwright.parallel.blockwise.merge import Partial, empty_partial, merge_into
from meshwright.parallel.blockwise.partial import Gradients, partial_backward, partial_forward
from meshwright.parallel.blockwise.positions import Pieces, Positions, pieces_of
from meshwright.parallel.blockwise.scoring import BiasFunction, Scoring, ScoringKeywords
from meshwright.parallel.errors import WrapError, nearest
from meshwright.parallel.meta import is_shape

__all__ = ["AttendKeywords", "attend", "cast_tensors", "check_sinks", "check_tensors", "draw_seed", "without_autocast"]


class AttendKeywords(ScoringKeywords, total=False):
    """Keyword arguments of `attend`."""

    bias: Tensor | BiasFunction | None
    sinks: Tensor | None
    dropout_seed: int | None
    query_positions: Positions | None
    key_positions: Positions | None
    known: tuple[Tensor, Tensor] | None


@overload
def attend(
    query: Tensor, key: Tensor, value: Tensor, *, with_lse: Literal[False] = ..., **options: Unpack[AttendKeywords]
) -> Tensor: ...
@overload
def attend(
    query: Tensor, key: Tensor, value: Tensor, *, with_lse: Literal[True], **options: Unpack[AttendKeywords]
) -> tuple[Tensor, Tensor]: ...
def attend(
    query: Tensor, key: Tensor, value: Tensor, *, with_lse: bool = False, **options: Unpack[AttendKeywords]
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(score(query, key)) value, with memory that grows with the sequence and not with its square.

    Args:
        query: [batch, heads, s_q, d].
        key: [batch, kv_heads, s_k, d]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, s_k, d_v].
        with_lse: also return the log of the softmax's denominator, [batch, heads, s_q]; it has a gradient.
        options: `bias` (a tensor broadcastable to [batch, heads, s_q, s_k], or a function of positions), `sinks`
            ([heads], one more score in each denominator), `query_positions`, `key_positions` (ranges; from 0 on where
            None), `known` (output and log-sum-exp of the same call, made before: they get a history and are not
            computed again), and those of `Scoring`.

    Returns:
        [batch, heads, s_q, d_v]; 0 for queries that may attend to nothing.

    >>> from meshwright.parallel.blockwise.masks import causal, window
    >>> query = key = value = torch.eye(3)[None, None]
    >>> attend(query, key, value, mask=causal() & window(1))[0, 0, 2].count_nonzero()
    tensor(2)

    Raises:
        WrapError: for shapes, dtypes or options that do not fit.
    """
    query, key, value = cast_tensors(query, key, value)
    check_tensors(query, key, value)
    check_sinks(options.get("sinks"), query.shape[1])
    bias, call = options.get("bias"), _Call.of(query, key, options)
    own = _four_dims(bias, query, key) if isinstance(bias, Tensor) else None
    with without_autocast(query.device.type):
        out, lse = _Attention.apply(query, key, value, own, options.get("sinks"), call)  # type: ignore[no-untyped-call]
    return (out, lse) if with_lse else out


def draw_seed() -> int:
    """A seed for one call's dropout, from torch's generator; any where numbers have no values."""
    drawn = torch.rand((), dtype=torch.float64)  # rand: what re-keys random bits knows it
    return 0 if is_shape(drawn) else int(drawn * (1 << 53))


@dataclass(frozen=True)
class _Call:
    """What is not a tensor."""

    scoring: Scoring
    queries: Pieces
    keys: Pieces
    known: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, options: AttendKeywords) -> "_Call":
        unknown = [name for name in options if name not in AttendKeywords.__annotations__]
        if unknown:
            raise WrapError(
                f"attend() has no option {unknown[0]!r}; {nearest(unknown[0], AttendKeywords.__annotations__)}"
            )
        given: Any = {name: each for name, each in options.items() if name in ScoringKeywords.__annotations__}
        bias, seed = options.get("bias"), options.get("dropout_seed")
        if seed is None and options.get("dropout_p", 0.0) > 0.0:
            seed = draw_seed()
        queries = pieces_of(options.get("query_positions"), query.shape[2], "queries")
        keys = pieces_of(options.get("key_positions"), key.shape[2], "keys")
        function = None if isinstance(bias, Tensor) else bias
        if function is not None and function(range(1), range(1)).requires_grad:
            raise WrapError(
                "the bias function gives scores that want a gradient, which cannot reach what they are made of; give "
                "the bias as a tensor"
            )
        return cls(Scoring(**given, bias=function, dropout_seed=seed or 0), queries, keys, options.get("known"))


class _Attention(Function):
    """Output and log-sum-exp; sinks are keys whose value is 0."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        query, key, value, bias, sinks, call = inputs
        if call.known is not None:
            return call.known[0].detach(), call.known[1].detach()
        chunk = Chunk(query, key, value, call.queries, call.keys, bias)
        whole = Work(chunk, call.scoring, fused=True).whole if sinks is None else None
        out, lse = partial_forward(chunk, call.scoring) if whole is None else block_forward(whole)
        if sinks is not None:
            nothing = empty_partial(query, value.shape[-1])
            merge_into(Partial(out, lse), nothing._replace(lse=nothing.lse.copy_(sinks.unsqueeze(-1))))
        return out.to(query.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output)
        ctx.call = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, bias, sinks, out, lse = ctx.saved_tensors
        grad_out, grad_lse = gradients
        upstream = Upstream(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, out, lse)
        chunk = Chunk(query, key, value, ctx.call.queries, ctx.call.keys, bias)
        with_bias = bias is not None and ctx.needs_input_grad[3]
        with without_autocast(query.device.type):
            found = _gradients(chunk, ctx.call.scoring, upstream, with_bias=with_bias)
            own = None if sinks is None else _of_sinks(sinks, upstream)
        given = (query, key, value, bias, sinks)
        made = (found.query, found.key, found.value, found.bias if with_bias else None, own)
        return *(None if new is None else new.to(old.dtype) for old, new in zip(given, made, strict=True)), None


def _of_sinks(sinks: Tensor, upstream: Upstream) -> Tensor:
    lse = upstream.lse.masked_fill(upstream.lse == -torch.inf, 0.0)
    return -((sinks.unsqueeze(-1) - lse).exp() * upstream.delta()).sum((0, 2))


def _gradients(chunk: Chunk, scoring: Scoring, upstream: Upstream, *, with_bias: bool) -> Gradients | BlockGradients:
    if not with_bias and not torch.is_grad_enabled():
        whole = Work(chunk, scoring, fused=True).whole
        if whole is not None:
            return block_backward(whole, upstream, with_bias=False)
    return partial_backward(chunk, scoring, upstream, with_bias=with_bias)


def cast_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to torch's own attention."""
    kind = query.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (each if each.dtype is torch.float64 else each.to(dtype) for each in (query, key, value))
    return query, key, value


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context for a kind of device in which dtypes stay."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses shapes and dtypes that do not fit.

    Raises:
        WrapError: then.
    """
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if {query.dim(), key.dim(), value.dim()} != {4}:
        raise WrapError(f"attend() takes [batch, heads, tokens, d], not {shapes}")
    if 0 in (query.shape[3], value.shape[3], key.shape[1]):
        raise WrapError(f"{shapes}: without heads or width there is nothing to attend by")
    fits = key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    if not fits or query.shape[1] % key.shape[1]:
        raise WrapError(f"{shapes} do not fit: heads must be a multiple of kv_heads, and the other sizes equal")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or not query.dtype.is_floating_point:
        raise WrapError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; give them one floating dtype"
        )


def check_sinks(sinks: Tensor | None, heads: int) -> None:
    """Refuses sinks that are not [heads].

    Raises:
        WrapError: then.
    """
    if sinks is not None and sinks.shape != (heads,):
        raise WrapError(f"sinks {list(sinks.shape)} must be one score per head, [{heads}]")


def _four_dims(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    wanted = (*query.shape[:3], key.shape[2])
    if bias.dim() > 4 or any(size not in (1, full) for size, full in zip(bias.shape[::-1], wanted[::-1], strict=False)):
        raise WrapError(f"a bias {list(bias.shape)} does not broadcast to the scores {list(wanted)}")
    return bias.reshape(*(1,) * (4 - bias.dim()), *bias.shape)
