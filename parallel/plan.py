"""The tensor pass of `parallelize`: finds an example, has the plan made, deals the model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.context.plan import ContextPlan
from meshwright.parallel.context.planner import plan_context
from meshwright.parallel.dealt import check_duplicates
from meshwright.parallel.deferred import on_shapes
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis
from meshwright.parallel.experts import ExpertPlan
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.microbatch import call, to_device
from meshwright.parallel.options import Options
from meshwright.parallel.recompute import uncounted
from meshwright.parallel.spans.install import Spanned, plan_spans
from meshwright.parallel.tensor import install, keep_shares
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.tensor_planner import plan_tensor
from meshwright.parallel.vocabulary import deal_head, deal_lookup

Plan = TypeVar("Plan")

__all__ = [
    "Plans",
    "deal_model",
    "example_of",
    "make_context_plan",
    "make_expert_plan",
    "make_plan",
    "make_plans",
    "make_span_plan",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plans:
    """How a model is dealt.

    Args:
        tensor: over `tp`.
        context: over `cp`.
        experts: over `ep`.
        spans: which blocks run by spans; None where `layer_block` was not asked for.
    """

    tensor: TensorPlan = field(default_factory=lambda: TensorPlan(degree=1))
    context: ContextPlan | None = None
    experts: ExpertPlan = field(default_factory=ExpertPlan)
    spans: Spanned | None = None


@uncounted()
def make_plans(model: nn.Module, mesh: Mesh, options: Options) -> Plans:
    """What will be dealt over which axis; changes nothing.

    Raises:
        MeshwrightError: see `make_expert_plan`, `make_plan`, `make_context_plan` and `make_span_plan`.
    """
    experts = make_expert_plan(model, mesh, options)
    plan = make_plan(model, mesh, options, experts=experts)
    return Plans(
        tensor=plan,
        context=make_context_plan(model, mesh, options, plan=plan, experts=experts),
        experts=experts,
        spans=make_span_plan(model, options),
    )


def make_expert_plan(model: nn.Module, mesh: Mesh, options: Options) -> ExpertPlan:
    """Which experts of a model each rank keeps; a plan of degree 1 where none are dealt.

    Raises:
        MeshwrightError: when they cannot be found or dealt.
    """
    if options.moe is None:
        return ExpertPlan()
    plan = options.moe.plan(model, mesh)
    blocks = find_blocks(model, options.blocks)
    outside = [path for path in plan.paths if not any(path.startswith(f"{block}.") for block in blocks)]
    if plan.degree > 1 and mesh.cp > 1 and outside:
        raise WrapError(
            f"experts {outside[0]} are in no block, and what stands around blocks sees all positions on each rank of "
            f"cp={mesh.cp}; name blocks that hold them with blocks=[...], or use ep=1"
        )
    return plan


def make_plan(
    model: nn.Module, mesh: Mesh, options: Options, *, experts: ExpertPlan | None = None, shapes: bool = False
) -> TensorPlan:
    """The tensor plan of a model on a mesh; one of degree 1 where there is no `tp`.

    Args:
        model: unwrapped.
        mesh: with `tp`.
        options: may hold an example, and patterns.
        experts: that are dealt over `ep`, and not over `tp`.
        shapes: see `plan_tensor`.

    Raises:
        WrapError: when nothing can be dealt, no example is at hand, or `tp` does not fit the heads.
    """
    if mesh.tp == 1:
        return TensorPlan(degree=1)
    if isinstance(options.tensor_plan, TensorPlan):
        return options.tensor_plan
    dealt = () if experts is None or experts.degree == 1 else experts.paths
    patterns = {**{f"{path}*": "replicate" for path in dealt}, **(options.tensor_plan or {})}

    def planned(run: Callable[[], Any]) -> TensorPlan:
        return plan_tensor(model, run, mesh.tp, sequence=options.sequence_parallel, patterns=patterns, shapes=shapes)

    plan = _on_example(model, options, f"the axis tp={mesh.tp}", planned=planned)
    _check(plan, mesh)
    return plan


def make_context_plan(
    model: nn.Module, mesh: Mesh, options: Options, *, plan: TensorPlan, experts: ExpertPlan | None = None
) -> ContextPlan:
    """The plan of a model along `cp`; one of degree 1 where there is none.

    Args:
        model: unwrapped.
        mesh: with `cp`.
        options: may hold an example.
        plan: along `tp`.
        experts: that are dealt over `ep`.

    Raises:
        WrapError: when its blocks do not work on a dealt sequence, or no example is at hand.
    """
    if mesh.cp == 1:
        return ContextPlan(degree=1)
    found = _on_example(model, options, f"the axis cp={mesh.cp}", planned=lambda run: plan_context(model, run, mesh.cp))
    dealt = () if experts is None or experts.degree == 1 else experts.paths
    around = [(path, whole) for path in dealt for whole in found.joined if f"{path}.".startswith(f"{whole}.")]
    if around:
        raise WrapError(
            f"experts {around[0][0]} lie in {around[0][1]}, which looks at other positions, so that all ranks of "
            f"cp={mesh.cp} would run it on all tokens and send each {mesh.cp} times; let a module of its own choose "
            "experts from [samples, positions, features], or deal the batch over dp"
        )
    twice = [path for path in found.drops if path in plan.drops]
    if twice:
        raise WrapError(
            f"block {twice[0]} draws dropout masks that both tp={mesh.tp} and cp={mesh.cp} deal, which is not built; "
            f"set its dropout to 0, or use one of the axes"
        )
    return found


def make_span_plan(model: nn.Module, options: Options, *, shapes: bool = False) -> Spanned | None:
    """Which blocks of a model run by spans where `layer_block` is asked for.

    Args:
        model: unwrapped; it is not changed.
        options: may hold an example.
        shapes: see `plan_spans`.

    Raises:
        WrapError: when none may, or no example is at hand.
    """
    if options.sizes is None or options.sizes.layer_block is None:
        return None
    return _on_example(model, options, "layer_block", planned=lambda run: plan_spans(model, run, shapes=shapes))


def _on_example(model: nn.Module, options: Options, who: str, *, planned: Callable[[Callable[[], Any]], Plan]) -> Plan:
    """Plans from one forward pass on an example, on shapes alone where that can be."""
    example = example_of(model) if options.example is None else options.example

    def plan_on(device: torch.device) -> Plan:
        moved = to_device(example, device)
        with _dtypes_kept(model):
            return planned(lambda: call(model, moved))

    try:
        return on_shapes(model, plan_on)
    except (RuntimeError, TypeError, KeyError) as error:
        raise WrapError(
            f"the model cannot be run on its example, which {who} needs: {type(error).__name__}: "
            f"{error}; pass example= one micro-batch as step() takes it"
        ) from error


@contextmanager
def _dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Puts back parameters that a model's own forward casts, for good: routers of Switch Transformers do."""
    before = [(each, each.data) for each in model.parameters()]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.dtype is not data.dtype:
                parameter.data = data


def deal_model(model: nn.Module, plan: TensorPlan, axis: Axis) -> None:
    """Deals a model in place: shares of parameters, then the collectives around them."""
    vocabulary = {path: plan.splits[f"{path}.weight"] for path in (*plan.lookups, *plan.heads)}
    keep_shares(model, plan.splits, axis.rank)
    install(model, plan, axis)
    for path in plan.lookups:
        deal_lookup(model.get_submodule(path), vocabulary[path], axis)
    for path in plan.heads:
        deal_head(model.get_submodule(path), vocabulary[path], axis)


def _check(plan: TensorPlan, mesh: Mesh) -> None:
    nearest = Mesh.of({**mesh.degrees(), "tp": 1, "dp": mesh.dp * mesh.tp})
    if not plan.splits:
        reasons = {each.reason for each in plan.decisions if each.reason != "no rule fits"}
        raise WrapError(
            f"mesh axis tp={mesh.tp}: nothing can be dealt ({'; '.join(sorted(reasons)) or 'no rule fits'})"
            f"; nearest legal layout: {nearest}"
        )
    for name, split in plan.splits.items():
        empty = [rank for rank in range(split.degree) if split.local_size(rank) == 0]
        if empty:
            raise WrapError(f"mesh axis tp={mesh.tp} leaves ranks {empty} without a part of {name} ({split.size})")
    clash = check_duplicates(plan) if mesh.fsdp > 1 else None
    if clash is not None:
        raise WrapError(
            f"mesh axes tp={mesh.tp} and fsdp={mesh.fsdp} do not fit together: {clash}; nearest legal layout: "
            f"{Mesh.of({**mesh.degrees(), 'fsdp': 1, 'dp': mesh.dp * mesh.fsdp})}"
        )


def example_of(model: nn.Module) -> Any:
    """A micro-batch for a model of `transformers`, from what its class and config say; labels are not needed."""
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    given = getattr(model, "dummy_inputs", None) if name == "input_ids" else None
    if isinstance(given, Mapping) and isinstance(given.get("input_ids"), Tensor):
        limit = getattr(config, "vocab_size", None) or 2
        return {
            key: each.clamp(max=limit - 1) if isinstance(each, Tensor) and not each.is_floating_point() else each
            for key, each in given.items()
        }
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.randn(2, getattr(config, "num_channels", 3), height, width)}
    raise WrapError(
        "the axes tp and cp, and layer_block, need one look at a forward pass: pass example= one micro-batch as step() "
        "takes it (a dict of keywords, a tuple, or a tensor)"
    )
