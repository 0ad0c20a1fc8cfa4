"""What a job trains: model, text, mesh and numerics of the built-in training program."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Tag, WithJsonSchema

from meshwright.launch.spec.block import BY_KIND, Block, Count, Duration, Line, Listed, Share, whole
from meshwright.launch.spec.data import Data
from meshwright.launch.values import check_line
from meshwright.parallel.errors import nearest
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, ON_ONE_RANK, Asked
from meshwright.parallel.pipeline.files import is_file, read_schedule
from meshwright.parallel.pipeline.placements import Placement

__all__ = [
    "Adamw",
    "Axes",
    "BlockSizes",
    "Decay",
    "Model",
    "Parallel",
    "Staged",
    "Stages",
    "Train",
    "Training",
]

SCHEDULES = (*ON_ONE_RANK, *ACROSS_RANKS)
_SCHEDULE_SCHEMA = {"anyOf": [{"enum": list(SCHEDULES), "type": "string"}, {"type": "string", "pattern": r"\.csv$"}]}
Precision = Literal["float32", "bfloat16", "float64"]
Positive = Annotated[float, Field(gt=0)]


def _function(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
        raise ValueError('expected a function written "package.module:function"')
    return value


def _schedule(value: str) -> str:
    if value not in SCHEDULES and not is_file(value):
        raise ValueError(f"there is no schedule {value!r}; {nearest(value, SCHEDULES)} (or a file that ends in .csv)")
    return check_line(value)


class BiLevelGates(Block):
    """Routers that choose nodes first, and experts inside of them (SMILE, arXiv 2212.05191)."""

    nodes: Count = Field(description="Nodes that the experts of a layer are spread over.")
    k_nodes: Count = Field(default=1, description="Nodes of each token.")
    k_local: Count = Field(default=1, description="Experts of each token in each of its nodes.")
    renormalise: bool = Field(default=False, description="Divide the weights of a token by their sum.")
    scale: Positive = Field(default=1.0, description="Of all weights, such as DeepSeek-V3's routed_scaling_factor.")


class Model(Block):
    """What is trained: exactly one of architecture, path and python."""

    architecture: Line | None = Field(default=None, description="A model_type of transformers, such as llama.")
    path: Line | None = Field(default=None, description="Directory or hub id with a config.json of transformers.")
    python: Annotated[str, AfterValidator(_function)] | None = Field(
        default=None, description='A function that returns the model, "package.module:function".'
    )
    class_: Literal["causal_lm"] = Field(
        default="causal_lm", alias="class", description="Head on an architecture or path: causal_lm."
    )
    bilevel: BiLevelGates | None = Field(
        default=None,
        description="Bi-level routing in the place of the model's own routers: a gate for nodes, then one.",
    )
    config: dict[Line, Any] = Field(
        default_factory=dict, description="Keys of the transformers config that differ from its defaults."
    )
    arguments: dict[Line, Any] = Field(default_factory=dict, description="Keyword arguments of the python function.")
    dtype: Precision = Field(default="float32", description="Type of the parameters.")


class Axes(Block):
    """Degrees of the mesh's axes; their product (without ep) is the number of ranks."""

    pp: Count = Field(default=1, description="Pipeline stages.")
    dp: Count = Field(default=1, description="Replicas that hold whole parameters.")
    fsdp: Count = Field(default=1, description="Ranks that share one sharded set of states (ZeRO).")
    cp: Count = Field(default=1, description="Ranks that share one sequence.")
    tp: Count = Field(default=1, description="Ranks that share one matrix.")
    ep: Count = Field(default=1, description="Ranks that share one set of experts, folded over the ranks of a stage.")


class Stages(Block):
    """Blocks cut into stages, and stages dealt to ranks of the pipeline."""

    cuts: Listed[Annotated[int, Field(ge=0)]] = Field(
        description="Where stages begin and end: stage s holds blocks cuts[s] to cuts[s + 1] - 1."
    )
    homes: Listed[Annotated[int, Field(ge=0)]] = Field(description="Stage by stage, the rank that runs it.")


class Staged(Axes):
    """The mesh, and how a model is cut into stages on it."""

    schedule: Annotated[str, AfterValidator(_schedule), WithJsonSchema(_SCHEDULE_SCHEMA)] = Field(
        default="accumulate",
        description="Order of micro-batches: accumulate runs them one after the other, layered block by block; "
        "with pp one of gpipe, 1f1b, interleaved, modular, zb-h1, zbv. Or a file that ends in .csv, beside the job, "
        "with a line of actions for each rank.",
    )
    blocks: Annotated[Listed[Line], Field(min_length=1)] | None = Field(
        default=None,
        description="Patterns of the paths of the repeated blocks; by default they are found by structure.",
    )
    placement: Stages | None = Field(
        default=None,
        description="Which blocks make a stage, and which rank runs it; by default as the schedule has it.",
    )
    stage_costs: (
        Annotated[
            Annotated[Literal["parameters", "flops"], Tag("<text>")]
            | Annotated[Listed[Annotated[float, Field(ge=0)]], Field(min_length=1), Tag("<list>")],
            BY_KIND,
        ]
        | None
    ) = Field(
        default=None,
        description="What to cut stages evenly by: parameters, flops, or a number for each block; by default the "
        "number of blocks.",
    )
    group_size: Count | None = Field(
        default=None,
        description="Micro-batches that go through a stage before the next, for layered and modular (all of them) and "
        "interleaved (pp).",
    )
    num_loops: Count | None = Field(
        default=None, description="Stages of each rank, for interleaved (2) and modular (one for each block)."
    )
    num_buffers: Count = Field(
        default=2, description="Blocks whose parameters are whole at once, where a layered step shards them."
    )
    recompute: (
        Annotated[
            Annotated[Literal["blocks"], Tag("<text>")] | Annotated[Listed[Line], Field(min_length=1), Tag("<list>")],
            BY_KIND,
        ]
        | None
    ) = Field(
        default=None,
        description="Blocks of which only the inputs are kept for backward: blocks (all), or patterns of their paths.",
    )
    offload_inputs: bool = Field(default=False, description="Keep these inputs in host memory until they are needed.")

    @property
    def order(self) -> str | Schedule:
        """The schedule: its name, or what its file says.

        Raises:
            ScheduleError: for a file that holds none.
        """
        return read_schedule(self.schedule) if is_file(self.schedule) else self.schedule

    @property
    def asked(self) -> Asked:
        """What is asked for besides the schedule.

        Raises:
            ScheduleError: for a placement with an empty stage or rank.
        """
        placement = None if self.placement is None else Placement(self.placement.cuts, self.placement.homes)
        return Asked(
            num_loops=self.num_loops, group_size=self.group_size, placement=placement, stage_costs=self.stage_costs
        )


class BlockSizes(Block):
    """What is computed by blocks of the sequence, and when; sizes in positions."""

    query_block: Count = Field(default=1024, description="Queries whose attention scores are made at once.")
    kv_block: Count = Field(default=1024, description="Keys that they meet at once.")
    ffn_block: Count | None = Field(
        default=None, description="Positions that a feed-forward layer takes at once; by default all."
    )
    layer_block: Count | None = Field(
        default=None, description="Positions that all of a block but its attention takes at once; by default all."
    )
    loss_block: Count | None = Field(
        default=None, description="Positions whose scores over the vocabulary are made at once; by default all."
    )
    loss_in_advance: bool = Field(
        default=False, description="Gradients of a loss by blocks are computed with it, for schedule accumulate."
    )


class Moe(Block):
    """How tokens travel to experts that are dealt over ep."""

    transport: Literal["auto", "all_gather", "one_hop", "inter_first", "intra_first", "once"] = Field(
        default="auto",
        description="one_hop sends rows to the ranks of their experts, inter_first and intra_first over nodes and "
        "inside of them, once a token once to each node, all_gather all to all; auto is once over several nodes.",
    )
    slices: Count = Field(default=1, description="Ranks of ep that share the hidden features of each expert.")
    overlap: bool = Field(
        default=False, description="Tokens travel in two halves: experts compute one while the other is on its way."
    )


class Parallel(Staged):
    """The mesh, and how a step runs on it."""

    num_microbatches: Count = Field(default=1, description="Parts that a rank's share of a batch is cut into.")
    loss: Literal["token_mean", "sample_mean", "sum"] = Field(
        default="token_mean", description="What the model's loss is: a mean over tokens, over samples, or a sum."
    )
    loss_items: Line | None = Field(
        default=None,
        description="Key of the batch that counts the loss's items; by default the loss call is watched.",
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole)] = Field(
        default=3,
        description="What fsdp shards: 1 optimizer states, 2 and gradients, 3 and parameters; 0 with deepspeed only.",
    )
    data_engine: Literal["torch", "deepspeed"] = Field(default="torch", description="Who replicates and shards.")
    offload: Literal["none", "cpu"] = Field(default="none", description="cpu keeps sharded states in host memory.")
    sequence_parallel: bool = Field(
        default=False, description="Deal the sequence over tp between the matrices of blocks."
    )
    tensor_plan: dict[Line, Literal["column", "row", "vocabulary", "replicate"]] | None = Field(
        default=None,
        description="Module pattern: how it is dealt over tp, before what the model and rules say.",
    )
    blockwise: BlockSizes | None = Field(
        default=None, description="Compute attention by blocks of the sequence; {} takes the default sizes."
    )
    cp_kind: Literal["auto", "ring", "ulysses", "hybrid", "gather"] = Field(
        default="auto",
        description="How the ranks of cp share attention: by a ring, by heads, both, or with all keys on each rank; "
        "auto sends least.",
    )
    moe: Moe = Field(default_factory=Moe, description="How tokens travel to experts that are dealt over ep.")


class Adamw(Block):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: Positive = Field(default=1e-3, description="Learning rate after the warm-up.")
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of the two moments, each 0 to 1."
    )
    eps: Positive = Field(default=1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="Decoupled decay of the weights.")


class Decay(Block):
    """The learning rate over the steps."""

    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps of linear rise from 0.")
    decay: Literal["cosine", "constant"] = Field(default="cosine", description="What follows the warm-up.")
    min_lr_ratio: Share = Field(default=0.1, description="Learning rate at the end of the cosine, as a part of `lr`.")


class Train(Block):
    """The training loop of the built-in program."""

    steps: Count = Field(description="Optimizer steps.")
    batch_size: Count = Field(description="Sequences of one global batch.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(default=0, description="First part of every random key.")
    optimizer: Adamw = Field(default_factory=Adamw, description="AdamW and its numbers.")
    schedule: Decay = Field(default_factory=Decay, description="The learning rate over the steps.")
    clip_norm: Positive | None = Field(
        default=1.0, description="Largest global gradient norm; null leaves gradients alone."
    )
    balance_rate: Positive | None = Field(
        default=None,
        description="Step of the biases that balance experts without a loss (arXiv 2408.15664), such as 0.001; for "
        "models whose routers have them, as DeepSeek-V3's.",
    )
    precision: Precision = Field(default="float32", description="Type the forward and backward pass compute in.")
    validate_every_steps: Count | None = Field(
        default=None, description="Steps between validations; by default only at the end."
    )
    validate_batches: Count = Field(default=16, description="Global batches of one validation.")
    log_every_steps: Count = Field(default=10, description="Steps between lines of metrics.jsonl.")
    stop_after: Duration | None = Field(default=None, description="Save and stop after this time, whatever the step.")


class Training(Block):
    """Keys of a job that say what it trains."""

    model: Model | None = Field(default=None, description="What the built-in program trains; or give `command`.")
    data: Data | None = Field(default=None, description="The text it trains on; needed with `model`.")
    parallel: Parallel = Field(default_factory=Parallel, description="The mesh, and how a step runs on it.")
    train: Train | None = Field(default=None, description="The training loop; needed with `model`.")
