"""Options of `parallelize` as one checked value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor

from meshwright.parallel.errors import ScheduleError, WrapError, nearest
from meshwright.parallel.legal import check_layout
from meshwright.parallel.loss import LossContract, LossKind
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.choose import chosen, complaints
from meshwright.parallel.pipeline.placements import Placement
from meshwright.parallel.sequence_options import SequenceKeywords, SequenceOptions
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["DataEngineKind", "OptionKeywords", "Options"]

DataEngineKind = Literal["torch", "deepspeed"]


class OptionKeywords(SequenceKeywords, total=False):
    """Keyword arguments of `parallelize`, `verify` and the `parallel:` block of a job; see `Options`."""

    loss: LossKind
    loss_items: str | Callable[[Any], Tensor | float] | None
    loss_fn: Callable[[Any, Any], Tensor] | None
    num_microbatches: int
    zero_stage: int
    data_engine: DataEngineKind
    offload: Literal["none", "cpu"]
    seed: int
    bucket_bytes: int
    tensor_plan: Mapping[str, str] | TensorPlan | None
    example: Any
    predict_memory: bool


@dataclass(frozen=True, kw_only=True)
class Options(SequenceOptions):
    """How a model is split and stepped; `SequenceOptions` besides.

    Args:
        loss: what the model's loss is: "token_mean", "sample_mean" or "sum".
        loss_items: where its number of items comes from, if not from the loss call itself (see `LossContract`).
        loss_fn: `(output, batch) -> loss` for models that return none.
        num_microbatches: parts that a rank's share of a batch is cut into.
        zero_stage: what `fsdp` shards: 1 optimizer states, 2 and gradients, 3 and parameters (DeepSpeed also takes 0).
        data_engine: "torch" or "deepspeed".
        offload: "cpu" keeps sharded states in host memory between uses.
        seed: first part of every random key (dropout).
        bucket_bytes: size of one gradient all-reduce along `dp`.
        tensor_plan: module pattern -> "column", "row", "vocabulary" or "replicate", before what the model and rules
            say; or a plan made earlier.
        example: one micro-batch, looked at once to make the tensor plan (models of `transformers` bring their own) and
            to count FLOPs.
        predict_memory: run a step on `example` without values first, to have its peak memory in the report.

    Raises:
        WrapError: for values that do not exist.
    """

    loss: LossKind = "token_mean"
    loss_items: str | Callable[[Any], Tensor | float] | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    num_microbatches: int = 1
    zero_stage: int = 3
    data_engine: DataEngineKind = "torch"
    offload: Literal["none", "cpu"] = "none"
    seed: int = 0
    bucket_bytes: int = 25 << 20
    tensor_plan: Mapping[str, str] | TensorPlan | None = None
    example: Any = None
    predict_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("data_engine", get_args(DataEngineKind)),
            ("offload", ("none", "cpu")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise WrapError(f"{name}={value!r} does not exist; {nearest(str(value), choices)}")
        for name in ("num_microbatches", "bucket_bytes"):
            if getattr(self, name) < 1:
                raise WrapError(f"{name}={getattr(self, name)} must be at least 1")
        stages = (0, 1, 2, 3) if self.data_engine == "deepspeed" else (1, 2, 3)
        if self.zero_stage not in stages:
            raise WrapError(
                f"zero_stage={self.zero_stage} does not exist for data_engine={self.data_engine!r}; "
                f"choose from: {', '.join(map(str, stages))} (stage 0 of torch is the axis dp)"
            )

    @classmethod
    def of(cls, **keywords: Any) -> "Options":
        """Builds options from keywords, naming the nearest one for an unknown name.

        >>> Options.of(zero_stage=2).zero_stage
        2
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise WrapError(f"parallelize has no option {name!r}; {nearest(name, known)}")
        return cls(**keywords)

    @property
    def contract(self) -> LossContract:
        """The loss contract these options state."""
        return LossContract(self.loss, self.loss_items, self.loss_fn)

    def chosen(self, mesh: Mesh, num_blocks: int) -> tuple[Placement, Schedule]:
        """Which rank holds which blocks of a model, and what ranks do in one step; costs are numbers by now."""
        return chosen(
            self.order,
            num_blocks,
            mesh.pp,
            self.num_microbatches,
            asked=self.asked,
            zero_stage=self.zero_stage if mesh.fsdp > 1 else 0,
            num_buffers=self.num_buffers,
            recompute=bool(self.recompute),
            offload=self.offload_inputs,
        )

    def check(self, mesh: Mesh) -> None:
        """Refuses meshes that cannot be had, before any rank starts.

        Raises:
            WrapError: naming the axis and the nearest legal layout.
            ScheduleError: naming the options that do not fit together.
        """
        check_layout(mesh, self)
        if mesh.ep > 1 and self.moe is None:
            raise WrapError(
                f"mesh axis ep={mesh.ep} deals experts; say how by moe=meshwright.Experts(), or leave it out: "
                f"{Mesh.of(mesh.degrees())}"
            )
        for _, text in complaints(self.order, mesh.pp, num_microbatches=self.num_microbatches, asked=self.asked):
            raise ScheduleError(text)
