"""How micro-batches go through a pipeline, found by sending one through it: rank after rank, without overlap.

Done once for every shape of micro-batch. All ranks call the same blocks in the same order, and tell each other what
their blocks give and which inputs they lack.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from meshwright.parallel.absent import Absent
from meshwright.parallel.errors import MeshwrightError, WrapError
from meshwright.parallel.guide import Arguments
from meshwright.parallel.pipeline.leftovers import Leftovers, watched
from meshwright.parallel.pipeline.passes import Pass
from meshwright.parallel.pipeline.route import Border, Call, Route, Shape, inputs_of, instead, shapes_in
from meshwright.parallel.pipeline.runtime import States
from meshwright.parallel.pipeline.wire import Wire
from meshwright.parallel.thread_state import ThreadState

__all__ = ["keys_of", "probe"]


def keys_of(module: nn.Module, batches: Iterable[Any]) -> list[Hashable]:
    """What micro-batches that take the same route have in common, of each."""
    casts = tuple(torch.get_autocast_dtype(each) for each in ("cpu", "cuda") if torch.is_autocast_enabled(each))
    state = module.training, torch.is_grad_enabled(), casts
    return [(_likeness(batch), state) for batch in batches]


def _likeness(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (dict, Mapping)):
        return tuple((key, _likeness(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *map(_likeness, value)
    leaves, structure = tree_flatten(value)
    return str(structure), *((each.shape, each.dtype) if isinstance(each, Tensor) else repr(each) for each in leaves)


def probe(run: Callable[[], Any], stages: Mapping[str, int], homes: Sequence[int], states: States, wire: Wire) -> Route:
    """Finds the route of micro-batches like the one that `run` takes.

    Args:
        run: the model's forward; returns its loss and number of items.
        stages: block -> stage.
        homes: stage -> rank of the pipeline.
        states: of the stages; buffers are left as they were.
        wire: to the other ranks of the pipeline.

    Raises:
        WrapError: for a model whose blocks are not called stage after stage.
    """
    route = Route()
    mine = [stage for stage, home in enumerate(homes) if home == wire.rank]
    each = _Prober(run, stages, mine=mine, route=route, device=wire.device)
    own = {block: states.module.get_submodule(block) for block, stage in stages.items() if stage in mine}
    with _buffers_kept(states.module), watched(own) as leftovers:
        probing = _Probe(each, route, stages, homes, states, wire, leftovers)
        try:
            each.flow.resume()
            while probing.through_call():
                pass
        finally:
            each.flow.close()
    each.forget()
    missing = sorted(set(range(len(homes))) - {call.stage for call in route.calls})
    if missing:
        raise WrapError(
            f"no block of stages {missing} was called (is there layer drop?); a pipeline needs each stage in every "
            "micro-batch"
        )
    return route


class _Prober(Pass):
    """A pass whose own blocks may give what they like."""

    given: Any = None
    lacked = False
    _before: ThreadState

    def forget(self) -> None:
        """Lets go of values and their graph now, since a pass and its flow hold each other until Python looks."""
        self.flow.detach()
        self.flow.forget()
        self.given = None

    def skips(self, block: str) -> Callable[[], Any] | None:
        """Own calls are noted when they are through, those of other ranks were told."""
        assert self._route is not None, block
        self.lacks = mine = self.stages[block] in self._mine
        self._before = ThreadState(random=False)
        return None if mine else instead(self._route.calls[-1].output, self._device)

    def completed(self, block: str, arguments: Arguments) -> Arguments:
        """Notes whether anything was missing."""
        self.lacked = any(isinstance(each, Absent) for each in inputs_of(arguments))
        return super().completed(block, arguments)

    def gave(self, block: str, output: Any) -> None:
        """Keeps what an own block gave.

        Raises:
            WrapError: when it leaves the thread otherwise than it was, which ranks that skip it would not notice.
        """
        changed = self._before.differs(ThreadState(random=False))
        if changed:
            raise WrapError(
                f"block {block} leaves another {changed} for what follows it, of which ranks that skip it "
                "know nothing; use contexts (with torch.no_grad():) that end inside the block, or wrap this model "
                "without pp"
            )
        self.given = output


@dataclass(frozen=True, eq=False)
class _Probe:
    each: _Prober
    route: Route
    stages: Mapping[str, int]
    homes: Sequence[int]
    states: States
    wire: Wire
    leftovers: Leftovers

    def through_call(self) -> bool:
        """Through one call on all ranks; returns whether there is another."""
        block = self.each.flow.waits
        if block is None:
            raise WrapError("the model calls none of its blocks; a pipeline has nothing to deal")
        stage, home = self.stages[block], self.homes[self.stages[block]]
        before = self.route.calls[-1].stage if self.route.calls else 0
        if not before <= stage <= before + 1:
            raise WrapError(
                f"block {block} of stage {stage} is called after stage {before}; a pipeline takes models that call "
                "their blocks in order, each stage once"
            )
        if stage > before and home != self.homes[before]:
            self._cross(stage, self.homes[before], home)
        told = self._run(stage) if home == self.wire.rank else None
        output, goes_on = self.wire.tell(told, home)
        self.route.calls.append(Call(block, stage, output, self.each.lacked and home == self.wire.rank))
        if home != self.wire.rank and goes_on:
            self._skip(block)
        return bool(goes_on)

    def _skip(self, block: str) -> None:
        try:
            self.each.flow.resume()
        except MeshwrightError:
            raise
        except Exception as error:
            raise WrapError(
                f"the model's code behind block {block} fails where the block is another rank's: "
                f"{type(error).__name__}: {error}; does it use more of the block than what the block gives?"
            ) from error

    def _run(self, stage: int) -> tuple[Any, bool]:
        """Runs the block that waits; returns what it gave, and whether another block waits now."""
        self.states.gather(stage)
        self.states.need(stage)
        block = self.each.flow.waits
        self.each.flow.resume()
        self.states.free(stage)
        given = shapes_in(self.each.given, str(block))
        self.each.given = None
        for left in self.leftovers.found():
            raise WrapError(
                f"block {block} leaves values outside of what it gives (shape {tuple(left.shape)}), which other ranks "
                "of a pipeline would miss; let it return them, switch off what collects them (use_cache=False for a "
                "cache, output_router_logits=False), or wrap this model without pp"
            )
        return given, self.each.flow.waits is not None

    def _cross(self, stage: int, sender: int, receiver: int) -> None:
        """The first block of a stage says what it lacks and gets it from the rank of the stage before."""
        each, wire = self.each, self.wire
        places = wire.tell(_lacking(each) if wire.rank == receiver else None, receiver)
        inputs = inputs_of(each.flow.arguments)
        values = [each.present(inputs[place]) for place in places] if wire.rank == sender else []
        border = Border(tuple(places), wire.tell(tuple(Shape.of(value) for value in values), sender))
        self.route.borders[stage] = border
        if wire.rank == sender:
            wire.send(values, receiver, tag=stage)
        if wire.rank == receiver:
            each.take(border, stage, wire.receive(border.shapes, sender, tag=stage)())
        wire.flush()


def _lacking(each: Pass) -> list[int]:
    """Places among the inputs of the block that waits whose values this rank has not, each value once."""
    lacked: list[Tensor] = []
    places = []
    for place, value in enumerate(inputs_of(each.flow.arguments)):
        if isinstance(value, Absent) and value.value is None and all(value is not other for other in lacked):
            lacked.append(value)
            places.append(place)
    return places


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
