"""`parallelize`: an existing model, a mesh, and passes in reading order.

The model is not rewritten: its own forward runs, and what stands around it decides where states live and how gradients
are summed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.parallel.agreement import check_agreement
from meshwright.parallel.as_given import AsGiven
from meshwright.parallel.as_wrapped import HOOKED
from meshwright.parallel.blockwise.install import BlockwiseAttention
from meshwright.parallel.build import deal, engine_of
from meshwright.parallel.collectives import Groups
from meshwright.parallel.connecting import check_transport
from meshwright.parallel.costs import settled
from meshwright.parallel.data import LocalStates
from meshwright.parallel.deferred import device_of
from meshwright.parallel.engine import Engine
from meshwright.parallel.errors import WrapError
from meshwright.parallel.ledger import Ledger, LedgerSummary
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.optimizer import BuildOptimizer, GroupOf, StepOptimizer
from meshwright.parallel.options import OptionKeywords, Options
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.recorder import recording
from meshwright.parallel.pipeline.timeline import Timeline
from meshwright.parallel.plan import make_plans
from meshwright.parallel.report import WrapReport, describe
from meshwright.parallel.totals import StepStats
from meshwright.parallel.weights import NamedStates, WeightFiles, alias_groups, boxes_of, write_weights

__all__ = ["ParallelModel", "parallelize"]


def parallelize(model: nn.Module, mesh: Mesh, **options: Unpack[OptionKeywords]) -> "ParallelModel":
    """Splits a model over a mesh; call it on every rank, after the process group has started.

    Args:
        model: any `nn.Module`, with equal weights on all ranks, or `deferred`; it is changed in place.
        mesh: degrees of the axes; their product is the number of running ranks.
        options: see `Options`.

    Raises:
        WrapError: for options or axes that cannot be had.
        MeshError: when the number of ranks is not the mesh's, or its axes need another transport.
    """
    chosen = settled(Options.of(**options), model)
    chosen.check(mesh)
    groups = Groups(mesh, device_of(model).type)
    check_transport(mesh, groups.device_type)
    check_agreement(model, groups)
    hooked = _hooked(model)
    names, plans = NamedStates.of(model), make_plans(model, mesh, chosen)
    report = describe(model, mesh, chosen, plans)
    blockwise, said = deal(model, groups, chosen, plans=plans)
    report = replace(report, notes=(*report.notes, *said))
    engine = engine_of(model, groups, chosen, plans=plans, names=names)
    _check_hooks(engine.data.module, hooked)
    return ParallelModel(engine, groups, report, blockwise=blockwise)


class ParallelModel:
    """A model on a mesh: `step` leaves the plain run's gradients in its parameters."""

    def __init__(
        self, engine: Engine, groups: Groups, report: WrapReport, *, blockwise: BlockwiseAttention | None = None
    ) -> None:
        self.mesh = groups.mesh
        self.rank = groups.rank
        self.report = report if blockwise is None else blockwise.described(report)
        self._blockwise = blockwise
        self.schedule: Schedule | None = engine.schedule
        self.last_step: StepStats | None = None
        self._engine = engine
        self._groups = groups
        self._owned: StepOptimizer | None = None
        self._given = AsGiven(engine.data.local if isinstance(engine.data, LocalStates) else dict, groups.mesh)

    @property
    def module(self) -> nn.Module:
        """The wrapped module itself (`train()`, `eval()`, generation)."""
        return self._engine.data.module

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank reads."""
        return self.mesh.data_rank(self.rank)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters as the optimizer of a user takes them."""
        return self.module.parameters()

    def step(self, batch: Any) -> Tensor:
        """Runs forward and backward over the micro-batches of `batch` and returns the global loss (0-dim).

        Args:
            batch: this data rank's share: a mapping (keywords of forward), a tuple, or a tensor; dim 0 counts samples.
        """
        if self._blockwise is None or self._blockwise.is_known:
            self.last_step = self._engine.step(batch)
        else:
            with self._blockwise.watched():
                self.last_step = self._engine.step(batch)
            self.report = self._blockwise.described(self.report)
        self._given.note()
        return self.last_step.loss

    def ledger_step(self, batch: Any) -> tuple[Tensor, LedgerSummary]:
        """The same as `step`, and the exact collectives it ran."""
        with Ledger(self.mesh, self.rank) as ledger:
            loss = self.step(batch)
        return loss, ledger.summary()

    def record_step(self, batch: Any) -> tuple[Tensor, Timeline]:
        """The same as `step`, and when this rank and the others along `pp` did what; all ranks must ask.

        The timeline is in seconds from the start of the step, at which ranks begin together and compare their clocks
        (see `recording`).

        Raises:
            WrapError: for a model that has no schedule.
        """
        if self.schedule is None:
            raise WrapError(
                "schedule='accumulate' runs the model as a whole, so there is no order to record; use another"
            )
        with recording(self._engine, self._groups, self.schedule) as found:
            loss = self.step(batch)
        return loss, found[0]

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of items over all data ranks (0-dim, float64), without gradients."""
        return self._engine.evaluate(batch)

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clips gradients in place to a global L2 norm; returns the norm before. None only measures."""
        norm = self._engine.data.clip(max_norm)
        self._given.note()
        return norm

    def make_optimizer(self, build: BuildOptimizer, group_of: GroupOf | None = None) -> Optimizer:
        """Builds the user's optimizer on the tensors this rank owns.

        Args:
            build: `lambda params: torch.optim.AdamW(params, lr=...)`; params are tensors, or dicts of groups.
            group_of: sorts parameters into groups: (name, parameter) -> settings such as {"weight_decay": 0.0}.

        Raises:
            WrapError: when an optimizer was made before.
        """
        if self._owned is not None:
            raise WrapError("this model has an optimizer already; keep the one that make_optimizer returned")
        self._engine.wrapped.check()
        self._owned = self._engine.data.make_optimizer(build, group_of)
        self._owned.optimizer.register_step_pre_hook(self._given.check)
        return self._owned.optimizer

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole trained parameters by name; every rank must ask."""
        return self._engine.data.full_parameters()

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients by name, None where no rank computed one; every rank must ask."""
        return self._engine.data.full_gradients()

    def microbatch_losses(self) -> list[list[float]]:
        """Loss of every micro-batch of the last step, by data rank; every rank must ask."""
        assert self.last_step is not None, "no step was run"
        return self._engine.over_data_ranks(self.last_step.microbatch_losses)

    def load_weights(self, folder: str | Path) -> None:
        """Reads safetensors files in Hugging Face's layout straight into what this rank holds.

        Raises:
            WeightsError: when a tensor is missing or has another shape.
        """
        files = WeightFiles(Path(folder))
        states = _local_states(self._engine).model_state()
        for names in alias_groups(self.module):
            name = next((each for each in names if each in files), names[0])
            files.fill(name, *boxes_of(states[names[0]]))

    def save_weights(self, folder: str | Path, *, file_bytes: int = 5 << 30) -> None:
        """Writes whole weights as safetensors files that `from_pretrained` reads; every rank must call it."""
        states = _local_states(self._engine).whole_states()
        if self.rank == 0:
            write_weights(Path(folder), states, self.module, file_bytes)
        for _ in states:  # the other ranks take part in joining each tensor
            pass

    def state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        """Model, optimizer and step count under names that no layout changes, for `torch.distributed.checkpoint`.

        Args:
            loading: create optimizer states that do not exist yet, as places for a checkpoint to be read into.
        """
        if loading and self._owned is not None:
            self._owned.make_states()
        states = {} if self._owned is None else self._owned.states()
        return {
            "model": self._engine.data.model_state(),
            "optimizer": states,
            "engine": {"num_steps": torch.tensor(self._engine.num_steps)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, after a checkpoint was read into it."""
        self._engine.data.load_model_state(state["model"])
        if self._owned is not None:
            self._owned.make_states()
            self._owned.load(state["optimizer"])
        self._engine.num_steps = int(state["engine"]["num_steps"])


def _local_states(engine: Engine) -> LocalStates:
    data = engine.data
    if not isinstance(data, LocalStates):
        raise WrapError("weights are read and written with data_engine='torch'; wrap the model with it once")
    data.release()
    return data


def _hooked(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with hooks on their gradients."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return {name: each for name, each in model.named_parameters() if any(getattr(each, kind) for kind in hooks)}


def _check_hooks(model: nn.Module, hooked: dict[str, nn.Parameter]) -> None:
    held = dict(model.named_parameters())
    for name, each in hooked.items():
        if held.get(name, each) is not each:
            raise WrapError(HOOKED.format(name))
