"""One rank of a job of any size, run for real in one process: the code that trains, on tensors without values.

Nothing of the runtime is rewritten: the model is dealt, its states are sharded and a step goes through its schedule as
on every rank of a run; only the process group is torch's "fake" one (`paper`), so that collectives are counted and
nothing is sent, and a pipeline's routes are found by playing all its ranks (`paper_routes`). So what is predicted of
collectives can be compared with what the code calls, on a mesh that nobody has.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from meshwright.parallel.build import deal, engine_of
from meshwright.parallel.costs import settled
from meshwright.parallel.deferred import device_of
from meshwright.parallel.engine import Engine
from meshwright.parallel.errors import WrapError
from meshwright.parallel.footprint import Footprint, Live
from meshwright.parallel.ledger import Call, Ledger, LedgerSummary
from meshwright.parallel.legal import check_on_paper
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.meta import MetaAnswers, unnoticed, without_values
from meshwright.parallel.microbatch import call, split
from meshwright.parallel.options import OptionKeywords, Options
from meshwright.parallel.paper import PaperGroups, on_paper
from meshwright.parallel.pipeline.paper_routes import routes_on_paper
from meshwright.parallel.plan import Plans, make_plans
from meshwright.parallel.stages import stages_of
from meshwright.parallel.weights import NamedStates

__all__ = ["FakeRank", "fake_rank", "first_footprint"]


@dataclass(frozen=True)
class FakeRank:
    """What one rank does in a step.

    Attributes:
        rank: which.
        calls: its collectives, sends and receives, in order.
        memory: at most in the step, and between steps.
        seconds: that it took here to deal the model and to run the step.
    """

    rank: int
    calls: tuple[Call, ...]
    memory: Footprint
    seconds: float

    @property
    def ledger(self) -> LedgerSummary:
        """The calls counted."""
        return LedgerSummary.of(self.calls)


def fake_rank(
    model: nn.Module,
    mesh: Mesh,
    rank: int,
    *,
    batch: Any,
    plans: Plans | None = None,
    **options: Unpack[OptionKeywords],
) -> FakeRank:
    """Runs one step of one rank without the others, and without values.

    It is a step after the first, in which ranks of a pipeline also tell each other the routes of micro-batches. Buckets
    of gradients are sent as where every parameter is used by some rank. What kernels use inside of one call is not
    seen, nor what an allocator wastes. The model is not changed.

    Args:
        model: as `parallelize` takes it, `deferred` or not.
        mesh: of any size.
        rank: of it.
        batch: this rank's share, as `step` takes it; or a list of micro-batches.
        plans: made of this model, mesh and options before, where several ranks are asked for.
        options: as `parallelize` takes them.

    Raises:
        WrapError: for what cannot be run without values, with the reason.
    """
    start = time.perf_counter()
    if not 0 <= rank < mesh.world_size:
        raise WrapError(f"rank {rank} lies outside of the mesh {mesh}; choose 0 to {mesh.world_size - 1}")
    chosen = settled(Options.of(**options), model)
    chosen.check(mesh)
    plans = make_plans(model, mesh, chosen) if plans is None else plans
    calls, memory = _step(model, mesh, chosen, plans=plans, rank=rank, batch=batch)
    return FakeRank(rank, calls, memory, time.perf_counter() - start)


def first_footprint(model: nn.Module, mesh: Mesh, options: Options, *, plans: Plans) -> Footprint:
    """The memory of the first rank in a step on micro-batches like `options.example`; the model is not changed.

    Raises:
        WrapError: where it cannot be told, with the reason.
    """
    if options.example is None:
        raise WrapError("no example was given")
    batch = [options.example] * options.num_microbatches
    return _step(model, mesh, options, plans=plans, rank=0, batch=batch)[1]


def _step(
    model: nn.Module, mesh: Mesh, options: Options, *, plans: Plans, rank: int, batch: Any
) -> tuple[tuple[Call, ...], Footprint]:
    check_on_paper(options)
    counted = replace(options, loss="sum", loss_items=None)  # counting items would ask for values
    device = device_of(model).type
    try:
        with on_paper(mesh, rank, device) as groups, _without_values(Ledger(mesh, rank)) as (fakes, live, ledger):
            mine = without_values(model, device)
            parts = tree_map(lambda leaf: _faked(leaf, fakes, device), batch)
            engine = _engine(mine, groups, counted, plans=plans, names=NamedStates.of(model), batch=parts)
            gc.collect()  # shares were taken from whole parameters, which hooks may hold in cycles
            live.peak_bytes = states_bytes = live.now_bytes
            engine.num_steps = 1  # the first one also looks at the model
            before = len(ledger.calls)
            engine.accumulate(parts)
            return ledger.calls[before:], Footprint(states_bytes, live.peak_bytes)
    except RuntimeError as error:
        raise WrapError(f"a step asks for values: {str(error).splitlines()[0]}") from error


def _engine(
    mine: nn.Module, groups: PaperGroups, options: Options, *, plans: Plans, names: NamedStates, batch: Any
) -> Engine:
    """Deals a model without values, as `parallelize` does one with them."""
    deal(mine, groups, options, plans=plans)
    if groups.mesh.pp == 1:
        return engine_of(mine, groups, options, plans=plans, names=names)
    stages, contract = stages_of(mine, groups.mesh, groups.rank, options), options.contract

    def forward(part: Any) -> tuple[Tensor, Tensor]:
        return contract.run(lambda: call(mine, part), part)

    routes = routes_on_paper(mine, stages, split(batch, options.num_microbatches), forward=forward)
    return engine_of(mine, groups, options, plans=plans, names=names, routes=routes)


@contextmanager
def _without_values(ledger: Ledger) -> Iterator[tuple[FakeTensorMode, Live, Ledger]]:
    with ExitStack() as inside:
        inside.enter_context(unnoticed())
        fakes = inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        inside.enter_context(MetaAnswers())
        inside.enter_context(ledger)
        yield fakes, inside.enter_context(Live()), ledger


def _faked(leaf: Any, fakes: FakeTensorMode, device_type: str) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    fake: Tensor = fakes.from_tensor(leaf)
    return fake.to(torch.device(device_type))
