"""What each block of a model does forward and backward: the real model, run on tensors without values.

It runs as the first rank of `tp` holds it, on the positions that a rank of `cp` has. Every operation is counted for the
block that starts it; an operation of backward belongs to the block whose forward made the node of the graph that is at
work. Blocks that are equal and called alike are run once. What stands around blocks is counted before all of them or
behind.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.axis import ProcessAxis
from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.blockwise.plugs import plugged
from meshwright.parallel.blockwise.tiling import coarser, tile_heads, tile_networks
from meshwright.parallel.errors import WrapError
from meshwright.parallel.legal import check_on_paper
from meshwright.parallel.meta import without_values
from meshwright.parallel.microbatch import call
from meshwright.parallel.operations import Tally, tensors_of
from meshwright.parallel.options import Options
from meshwright.parallel.plan import deal_model, make_span_plan
from meshwright.parallel.spans.install import Spanned, span_blocks
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.traced_attention import OwnAttention, Shared
from meshwright.parallel.traced_blocks import Alike, alike_blocks, watch_blocks
from meshwright.parallel.traced_kernels import Kernels, shapes_only
from meshwright.parallel.traced_memory import Books
from meshwright.parallel.work import Passes, Sent, Traced, Work

__all__ = ["RecordingAxis", "Tracer", "trace"]

_BEFORE, _AFTER = "<before>", "<after>"

_MOST_STEPS = 64

Prepare = Callable[[nn.Module, "Tracer"], None]
"""Changes the copy of a model that is traced, where it asks for values."""


class TraceKeywords(TypedDict, total=False):
    """Keyword arguments of `trace`."""

    plan: TensorPlan | None
    precision: torch.dtype | None
    shared: Shared | None
    prepare: Prepare | None
    backward: bool
    on_cpu: bool
    spans: Spanned | None


def trace(model: nn.Module, options: Options, **how: Unpack[TraceKeywords]) -> Traced:
    """Runs a model once on its example, forward and backward; the model is not changed.

    Args:
        model: unwrapped; on any device, meta included.
        options: of the wrap, with an example.
        how: `plan` along `tp`, of which the first rank's share is run; `precision` that autocast computes in;
            `shared`, how ranks of `cp` share the sequence;
            `prepare` changes the copy that is run; `backward`, whether to run it too; `on_cpu`, whether kernels are
            those of a CPU; `spans`, which blocks run by spans, where `layer_block` is asked for (found if None).

    Raises:
        WrapError: where the model asks its tensors for values, with its words; see `check_on_paper`, too.
    """
    check_on_paper(options)
    if options.example is None:
        raise WrapError("no example was given")
    how = {**how, "spans": how.get("spans") or make_span_plan(model, options)}
    plan = how.get("plan")
    streams = () if plan is None else plan.streams
    ends = {name for stream in streams for name in (stream.blocks[0], stream.blocks[-1])}  # which deal and join it
    tracer = Tracer(alike_blocks(find_blocks(model, options.blocks), ends))
    try:
        with shapes_only(), Kernels(tracer, on_cpu=how.get("on_cpu", False)):
            mine, attends = _prepared(tracer, model, options, how=how)
            blocks = find_blocks(mine, options.blocks)
            with attends:
                _run(tracer, mine, options, backward=how.get("backward", True))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise WrapError(
            f"the model cannot be run on shapes: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return tracer.traced(blocks)


def _prepared(
    tracer: "Tracer", model: nn.Module, options: Options, *, how: TraceKeywords
) -> tuple[nn.Module, AbstractContextManager[object]]:
    """The copy that is run, and the context for it."""
    mine, plan = tracer.copied(model), how.get("plan")
    sizes, spans = coarser(options.sizes, options.example, most=_MOST_STEPS), how.get("spans")
    shared = how.get("shared")
    tile_networks(mine, sizes)
    attends: AbstractContextManager[object] = nullcontext()
    if sizes is not None and spans is not None:
        attends = plugged(mine, span_blocks(mine, spans, sizes))
    elif sizes is not None or shared is not None:
        attends = plugged(mine, OwnAttention(tracer, sizes, shared))
    if plan is not None and plan.degree > 1:
        held = {name: split for name, split in plan.splits.items() if tracer.runs(name)}
        axis = RecordingAxis(None, 0, plan.degree, tracer=tracer, name="tp")
        deal_model(mine, replace(plan, splits=held), axis)
    tile_heads(mine, sizes, None)
    prepare, precision = how.get("prepare"), how.get("precision")
    if prepare is not None:
        prepare(mine, tracer)
    if precision is not None:
        mine.forward = torch.autocast("cpu", dtype=precision)(mine.forward)
    return mine, attends


def _run(tracer: "Tracer", model: nn.Module, options: Options, *, backward: bool) -> None:
    """The pass itself."""
    contract = replace(options, loss="sum", loss_items=None).contract  # counting items would ask for values
    batch = tree_map(_faked, options.example)
    with tracer.running(model, batch, find_blocks(model, options.blocks)):
        loss, _ = contract.run(lambda: call(model, batch), batch)
        if backward:
            tracer.goes_back()
            loss.backward()


@dataclass(frozen=True, eq=False)
class RecordingAxis(ProcessAxis):
    """An axis whose other ranks are not there, and that tells a tracer what would be sent."""

    tracer: "Tracer" = field(kw_only=True)
    name: str = field(kw_only=True)

    def _all_reduce(self, tensor: Tensor, kind: Any) -> None:
        self.tracer.send(self.name, "all_reduce", tensor)

    def _all_gather(self, parts: Tensor, mine: Tensor) -> None:
        self.tracer.send(self.name, "all_gather", parts)

    def _reduce_scatter(self, mine: Tensor, whole: Tensor) -> None:
        self.tracer.send(self.name, "reduce_scatter", whole)


class Tracer(TorchDispatchMode):
    """Counts operations by block and direction."""

    def __init__(self, alike: Alike) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alike = alike
        self._books = Books()
        self._forward: dict[str, Tally] = {}
        self._backward: dict[str, Tally] = {}
        self._here: str | None = _BEFORE
        self._begun: list[tuple[int, str | None]] = []  # sequence numbers of autograd's nodes, and whose they are
        self._made_forward = inf  # nodes have smaller numbers, unless backward made them
        self._at: tuple[str | None, bool] = (None, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts it."""
        made = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions, such as where a tensor is
            return made
        tally = self.tally()
        if tally is not None:
            self._books.note(tensors_of(made))
            name, is_backward = self._at
            if name is not None and not is_backward:
                self._books.use(name, tensors_of((args, kwargs)), tensors_of(made))
            tally.note(func, args, kwargs or {}, made=made)
        return made

    def tally(self) -> Tally | None:
        """Of the block and direction at work; None for one that is not counted."""
        node = torch._C._current_autograd_node()
        name, is_backward = self._here, node is not None
        if is_backward:
            name = self._whose(node)
        if (name, is_backward) != self._at:
            self._turn(name, is_backward)
        if name is None:
            return None
        return (self._backward if is_backward else self._forward).setdefault(name, Tally())

    def send(self, axis: str, kind: str, tensor: Tensor) -> None:
        """Counts a collective."""
        tally = self.tally()
        if tally is not None:
            tally.sent.append(Sent(axis, kind, tensor.numel() * tensor.itemsize))

    @contextmanager
    def running(self, model: nn.Module, batch: Any, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, a pass over `model` is counted."""
        trained = [each for name, each in model.named_parameters() if each.requires_grad and self.runs(name)]
        constant = [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(batch) if isinstance(x, Tensor))]
        self._books.open(constant, trained)
        self._begin(_BEFORE)
        with ExitStack() as stack:
            for each in trained:
                stack.callback(each.register_post_accumulate_grad_hook(self._books.take).remove)
            stack.enter_context(watch_blocks(blocks, self._alike, self._around))
            stack.enter_context(saved_tensors_hooks(self._save, _same))
            stack.enter_context(self)
            yield
        self._turn(None, False)

    def goes_back(self) -> None:
        """Backward begins."""
        self._made_forward = torch._C._autograd._get_sequence_nr()

    def traced(self, blocks: Mapping[str, nn.Module]) -> Traced:
        """What was counted."""
        known: dict[str, Passes] = {}
        for name in self._alike.runs.values():
            known.setdefault(name, self._passes(name))
        idle = Passes(forward=Work(), backward=Work())
        found = {name: known.get(self._alike.runs.get(name, ""), idle) for name in blocks}
        return Traced(blocks=found, before=self._passes(_BEFORE), after=self._passes(_AFTER))

    def _passes(self, name: str) -> Passes:
        works = [tallies[name].work() if name in tallies else Work() for tallies in (self._forward, self._backward)]
        return self._books.of(name, forward=works[0], backward=works[1])

    def copied(self, model: nn.Module) -> nn.Module:
        """A copy without values of what will be run; parameters of blocks that are not stay as they are."""
        owned = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        used = {id(each) for name, each in owned if self.runs(name)}
        idle = [each for _, each in owned if id(each) not in used]
        return without_values(model, "cpu", besides=idle).train(model.training)

    def runs(self, name: str) -> bool:
        """Whether a parameter or module is used: all but those of blocks to which an earlier one is equal."""
        block = next((each for each in self._alike.first if name.startswith(f"{each}.")), None)
        return block is None or self._alike.is_first(block)

    def _around(self, name: str | None, inputs: list[Tensor], *, is_over: bool = False, is_last: bool = False) -> None:
        """Told of calls of blocks."""
        if is_over:
            name = _AFTER if is_last else _BEFORE
        elif name is not None:
            self._books.give(name, inputs)
        self._begin(name)

    def _begin(self, name: str | None) -> None:
        self._here = name
        self._begun.append((torch._C._autograd._get_sequence_nr(), name))

    def _whose(self, node: Any) -> str | None:
        """The block in whose forward a node was made; or that runs forward again and goes back within its backward."""
        if type(node).__name__ == "AccumulateGrad" or node._sequence_nr() >= self._made_forward:
            return self._at[0]
        place = bisect_right(self._begun, node._sequence_nr(), key=lambda each: each[0])
        return self._begun[max(0, place - 1)][1]

    def _turn(self, name: str | None, is_backward: bool) -> None:
        """Closes the books of one block in one direction, and opens those of the next."""
        before, was_backward = self._at
        tallies = self._backward if was_backward else self._forward
        self._books.turn(None if before is None else tallies.setdefault(before, Tally()), was_backward=was_backward)
        self._at = name, is_backward

    def _save(self, tensor: Tensor) -> Tensor:
        """Told of a tensor that autograd keeps."""
        tally, (name, _) = self.tally(), self._at
        if tally is not None and name is not None:
            self._books.keep(name, tensor, tally)
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _faked(leaf: Any) -> Any:
    """A tensor of a batch, inside a fake mode."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu") if isinstance(leaf, Tensor) else leaf
