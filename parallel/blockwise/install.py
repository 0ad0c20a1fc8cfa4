"""A model whose attention runs by blocks: which of its modules do, which do not, and what the report says of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.by_hand import HandWatch
from meshwright.parallel.blockwise.calls import AttentionCall, Handler, name_of_calling
from meshwright.parallel.blockwise.plugs import Plugged, plug_in, plugged
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.deferred import on_shapes
from meshwright.parallel.dropout import without_dropout
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import call, to_device
from meshwright.parallel.plan import example_of
from meshwright.parallel.report import WrapReport
from meshwright.parallel.tensor_plan import starred

__all__ = ["BlockwiseAttention", "Seen", "look"]

_UNKNOWN = "attention by blocks: which modules is known after the first step, or with example="


@dataclass(frozen=True)
class Seen:
    """Attention in one forward pass.

    Attributes:
        arrived: module -> through what its calls arrive where they can be computed by blocks.
        by_hand: modules that multiply, take a softmax and multiply themselves.
    """

    arrived: Mapping[str, str]
    by_hand: Sequence[str]

    def lines(self, sizes: Blockwise) -> tuple[str, ...]:
        """What a report says."""
        ways: dict[str, list[str]] = {}
        for path, way in self.arrived.items():
            ways.setdefault(way, []).append(path)
        blocks = f"{sizes.query_block:,} queries x {sizes.kv_block:,} keys"
        found = [f"attention in blocks of {blocks}: {_named(paths)}, by {way}" for way, paths in ways.items()]
        if self.by_hand:
            found.append(f"attention not in blocks, since it is computed by hand: {_named(self.by_hand)}")
        return tuple(found)


def look(model: nn.Module, run: Callable[[], Any]) -> Seen:
    """Says where `run`, one forward pass of `model`, attends; attention itself is not computed, the model not changed.

    >>> model = nn.TransformerEncoderLayer(8, 2)
    >>> look(model, lambda: model(torch.ones(3, 1, 8))).arrived
    {'self_attn': 'scaled_dot_product_attention'}
    """
    watch = HandWatch(name_of_calling)
    with ExitStack() as inside:
        plug = inside.enter_context(plugged(model, _nothing))
        for context in (without_dropout(model), torch.no_grad(), torch.random.fork_rng(devices=[]), watch):
            inside.enter_context(context)
        run()
    return Seen(plug.arrived, watch.found)


class BlockwiseAttention:
    """Attention by blocks in one wrapped model.

    Args:
        model: whole.
        sizes: of blocks.
        example: one micro-batch; the model's own is taken where it has one. Without any, what there is to say is known
            after the first step.

    Raises:
        WrapError: for a model none of whose attention can be computed by blocks.
    """

    def __init__(self, model: nn.Module, sizes: Blockwise, example: Any = None) -> None:
        self._model = model
        self._sizes = sizes
        self._seen = _look_at_example(model, example)
        self._plugged: Plugged | None = None
        if self._seen is not None:
            _check(self._seen)

    def install(self, handler: Handler | None = None) -> None:
        """Begins; the model may have been dealt in the meantime, and others may compute its calls."""
        self._plugged = plug_in(self._model, handler or partial(attend_to, sizes=self._sizes))

    @property
    def is_known(self) -> bool:
        """Whether it was seen which modules attend."""
        return self._seen is not None

    def described(self, report: WrapReport) -> WrapReport:
        """A report that also says which modules attend by blocks."""
        notes = tuple(note for note in report.notes if note != _UNKNOWN)
        said = (_UNKNOWN,) if self._seen is None else self._seen.lines(self._sizes)
        return replace(report, notes=(*notes, *said))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sees in a step which modules attend.

        Raises:
            WrapError: as when it is made.
        """
        assert self._plugged is not None, "not installed"
        with HandWatch(name_of_calling) as watch:
            yield
        self._seen = Seen(self._plugged.plug.arrived, watch.found)
        _check(self._seen)


def _look_at_example(model: nn.Module, example: Any) -> Seen | None:
    """Looks at a forward pass, if there is something to run it on and it can be run."""
    try:
        given = example_of(model) if example is None else example
        return on_shapes(model, lambda device: look(model, lambda: call(model, to_device(given, device))))
    except (WrapError, RuntimeError, TypeError, KeyError, ValueError):
        return None


def _check(seen: Seen) -> None:
    if seen.arrived:
        return
    if seen.by_hand:
        raise WrapError(
            f"blockwise: {_named(seen.by_hand)} of the model attend by hand (product, softmax, product), where nothing "
            "can step in; have them call torch.nn.functional.scaled_dot_product_attention or the attention interface "
            "of transformers, or leave out blockwise="
        )
    raise WrapError("blockwise: no module of the model attends; leave out blockwise=")


def _nothing(asked: AttentionCall) -> Tensor:
    return asked.query.new_zeros(*asked.query.shape[:-1], asked.value.shape[-1])


def _named(paths: Sequence[str]) -> str:
    """Modules by their paths, several of one pattern by the pattern and their number."""
    patterns: dict[str, list[str]] = {}
    for path in paths:
        patterns.setdefault(starred(path), []).append(path or "the model itself")
    return ", ".join(own[0] if len(own) == 1 else f"{len(own)} x {pattern}" for pattern, own in patterns.items())
