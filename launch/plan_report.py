"""A plan as text and as JSON: the best layouts, why the next are slower, what would change the verdict."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.clusters.simulated.explain import Option, Way, differences, options, ways_out, words
from meshwright.clusters.simulated.networks import Turn, sufficient, turn
from meshwright.clusters.simulated.search import Found, Priced
from meshwright.launch.planning import job_keys

__all__ = ["Plan", "as_dict", "as_text", "axes_of", "plan_of", "snippet"]

_NUM_OPTIONS = 6
_TIGHT = 0.95  # of the memory; predictions are half a tenth off now and then
_DAY_S = 86400.0
_HEAD = ("mesh", "schedule", "micro", "recompute", "zero", "step", "tokens/s", "MFU", "memory", "against the first")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found for a job.

    Args:
        name: of the job.
        found: by the search.
        options: of the first, one thing changed.
        ways: out, where nothing fits.
        turn: of the network; None where it was not looked for, or there is none.
        sufficient_bytes_per_s: of the network, per GPU and direction; the same.
        notes: what was assumed.
        search_s: seconds that the search took.
        tokens: to train on; None where nobody said.
        per_node: ranks of a node, where the job is to say so.
    """

    name: str
    found: Found
    options: tuple[Option, ...]
    ways: tuple[Way, ...]
    turn: Turn | None
    sufficient_bytes_per_s: float | None
    notes: tuple[str, ...]
    search_s: float
    tokens: float | None
    per_node: int | None


def plan_of(found: Found, *, networks: bool = False, **about: Any) -> Plan:
    """Explains what a search found.

    Args:
        found: by the search.
        networks: search again at other rates of the network.
        about: the rest of the plan.
    """
    asked, first = found.question, found.best[0] if found.best else None
    return Plan(
        found=found,
        options=tuple(options(asked, first)[:_NUM_OPTIONS]) if first else (),
        ways=() if first else tuple(ways_out(asked)),
        turn=turn(asked, first) if first and networks else None,
        sufficient_bytes_per_s=sufficient(asked, first) if first and networks else None,
        **about,
    )


def axes_of(priced: Priced) -> str:
    """Degrees above one.

    >>> from meshwright.clusters.hardware import gpu
    >>> from meshwright.clusters.simulated import Cluster, Layout, Transformer
    >>> from meshwright.clusters.simulated.candidates import Question
    >>> from meshwright.clusters.simulated.search import price
    >>> small = Transformer(layers=8, hidden=1024, heads=8, kv_heads=8, ffn=4096, vocab=0, sequence=1024)
    >>> asked = Question(model=small, cluster=Cluster(gpu=gpu("A100"), num_gpus=8), global_batch=8)
    >>> axes_of(price(asked, Layout(tp=2, pp=4, global_batch=8)))
    'tp=2 pp=4'
    """
    layout = priced.layout
    found = [(name, getattr(layout, name)) for name in ("tp", "cp", "ep", "pp", "dp")]
    return " ".join(f"{name}={degree}" for name, degree in found if degree > 1) or "one GPU"


def snippet(plan: Plan) -> str:
    """The first layout as YAML for the job; empty where nothing fits."""
    if not plan.found.best:
        return ""
    import yaml

    keys = job_keys(plan.found.best[0].layout, per_node=plan.per_node)
    return "".join(
        yaml.safe_dump({key: value}, default_flow_style=None, sort_keys=False, width=100) for key, value in keys.items()
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-able values; times in seconds, memory in bytes."""
    found, first = plan.found, plan.found.best[0] if plan.found.best else None
    asked = found.question
    return {
        "name": plan.name,
        "model": asdict(asked.model) | {"parameters": asked.model.parameters},
        "gpu": asked.cluster.gpu.name,
        "gpus": asked.cluster.num_gpus,
        "gpus_per_node": asked.cluster.gpus_per_node,
        "network_bytes_per_s": asked.cluster.network,
        "global_batch": asked.global_batch,
        "at_most": asked.at_most,
        "layouts": {name: getattr(found, name) for name in ("seen", "pruned", "too_large", "priced")},
        "search_s": plan.search_s,
        "best": [_as_dict(each, first, plan) for each in found.best],
        "options": [
            {"changed": each.changed, "over_bytes": each.over_bytes} | _as_dict(each.priced, first, plan)
            for each in plan.options
        ],
        "nearest": None if found.nearest is None else _as_dict(found.nearest, None, plan),
        "ways_out": [{"change": each.text} | _as_dict(each.priced, None, plan) for each in plan.ways],
        "sufficient_network_bytes_per_s": plan.sufficient_bytes_per_s,
        "turn": None
        if plan.turn is None
        else {"network_bytes_per_s": plan.turn.bytes_per_s, "instead": asdict(plan.turn.instead.layout)},
        "notes": list(plan.notes),
    }


def _as_dict(priced: Priced, first: Priced | None, plan: Plan) -> dict[str, Any]:
    return {
        "layout": asdict(priced.layout),
        "job": job_keys(priced.layout, per_node=plan.per_node),
        "step_s": priced.step.total_s,
        "causes_s": vars(priced.step),
        "tokens_per_s": priced.tokens_per_s,
        "mfu": priced.mfu,
        "memory_bytes": priced.memory_bytes,
        "slower_by": None if first is None else priced.sequence_s / first.sequence_s - 1,
        "differences_s": None if first is None else differences(first, priced),
        "train_s": None if plan.tokens is None else plan.tokens / priced.tokens_per_s,
    }


def as_text(plan: Plan) -> str:
    """A plan as people read it."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    found, asked = plan.found, plan.found.question
    model, cluster = asked.model, asked.cluster
    limit = "at most " if asked.at_most else ""
    yield (
        f"{plan.name}: {model.parameters:,} parameters, {model.layers} layers of {model.hidden}, {model.sequence} "
        f"tokens; {limit}{cluster.num_gpus} x {cluster.gpu.name}, steps of {limit}{asked.global_batch} sequences"
    )
    yield (
        f"{found.seen:,} layouts: {found.pruned:,} cannot be among the best, {found.too_large:,} do not fit, "
        f"{found.priced:,} priced, in {plan.search_s:.1f} s"
    )
    for note in plan.notes:
        yield f"note: {note}"
    yield ""
    yield from _of_best(plan) if found.best else _of_none(plan)


def _of_best(plan: Plan) -> Iterator[str]:
    first = plan.found.best[0]
    yield from _table([_HEAD, *(_row(each, first) for each in plan.found.best)])
    yield ""
    yield f"of the first: {_shares(first)}"
    if plan.tokens is not None:
        yield f"{plan.tokens:.3g} tokens take {plan.tokens / first.tokens_per_s / _DAY_S:.1f} days"
    if first.memory_bytes > _TIGHT * first.training.cluster.gpu.memory_bytes:
        yield (
            f"warning: {_gb(first.memory_bytes)} of {_gb(first.training.cluster.gpu.memory_bytes)} is tight: predicted "
            "memory is a few percent off; --with memory=GB leaves room"
        )
    if plan.options:
        yield "the first with one thing changed:"
        for each in plan.options:
            over = f", does not fit by {_gb(each.over_bytes)}" if each.over_bytes else ""
            yield f"  {_changed(first, each)}: {words(first, each.priced)}{over}"
    yield from _of_networks(plan)
    yield ""
    yield "in the job:"
    yield from (f"  {line}" for line in snippet(plan).splitlines())


def _of_networks(plan: Plan) -> Iterator[str]:
    have = plan.found.question.cluster.network
    if plan.turn is not None:
        yield (
            f"below {_gbits(plan.turn.bytes_per_s)} per GPU (of {_gbits(have)}) {axes_of(plan.turn.instead)} is better"
        )
    if plan.sufficient_bytes_per_s is not None:
        enough = _gbits(plan.sufficient_bytes_per_s)
        yield f"with {enough} per GPU (of {_gbits(have)}) a step takes at most a tenth longer"


def _of_none(plan: Plan) -> Iterator[str]:
    nearest, asked = plan.found.nearest, plan.found.question
    if nearest is None:
        yield (
            f"no layout is legal: {asked.cluster.num_gpus} GPUs do not share {asked.global_batch} sequences and the "
            "model evenly in any way; change one of them, or use --with at_most=1"
        )
        return
    capacity = asked.cluster.gpu.memory_bytes
    yield (
        f"nothing fits: the nearest, {axes_of(nearest)} with {_order(nearest)}, needs {_gb(nearest.memory_bytes)} of "
        f"{_gb(capacity)}, {_gb(nearest.memory_bytes - capacity)} too much"
    )
    for each in plan.ways:
        yield f"  fits with {each.text}: {axes_of(each.priced)}, {_gb(each.priced.memory_bytes)}"
    yield f"  fits with GPUs of {_gb(nearest.memory_bytes)}"


def _row(priced: Priced, first: Priced) -> tuple[str, ...]:
    layout = priced.layout
    return (
        axes_of(priced),
        _order(priced),
        str(layout.micro_batch),
        {"full": "blocks"}.get(layout.recompute, layout.recompute),
        str(layout.zero_stage),
        f"{priced.step.total_s:.3g} s",
        f"{priced.tokens_per_s:,.0f}",
        f"{100 * priced.mfu:.1f}%",
        _gb(priced.memory_bytes),
        "-" if priced is first else words(first, priced),
    )


def _order(priced: Priced) -> str:
    told = job_keys(priced.layout)["parallel"]
    loops = f" x {told['num_loops']}" if "num_loops" in told else ""
    loops += " by 1" if "group_size" in told else ""
    return f"{told['schedule']}{loops}{', seq' if priced.layout.sequence_parallel else ''}"


def _changed(first: Priced, option: Option) -> str:
    """In the words of jobs."""
    if option.changed.startswith("schedule"):
        return f"schedule {_order(first)} -> {_order(option.priced)}"
    return option.changed.replace("full", "blocks")


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip()


def _shares(priced: Priced) -> str:
    total = priced.step.total_s
    found = sorted(vars(priced.step).items(), key=lambda each: -each[1])
    told = [(name.removesuffix("_s").replace("_", " "), value / total) for name, value in found]
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in told if share >= 0.005)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _gbits(bytes_per_s: float) -> str:
    return f"{8 * bytes_per_s / 1e9:.0f} Gb/s"
