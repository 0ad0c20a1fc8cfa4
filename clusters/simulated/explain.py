"""Why one layout is faster than others: cause by cause, option by option, and what it would take where none fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.clusters.simulated.candidates import Question, groups
from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.search import Priced, least_memory, price

__all__ = ["Option", "Way", "differences", "options", "ways_out", "words"]

_CAUSES = {
    "compute_s": "computing",
    "recompute_s": "recomputing",
    "head_s": "head and loss",
    "tp_s": "tp",
    "cp_s": "cp",
    "ep_s": "ep",
    "pp_bubble_s": "bubble",
    "pp_transfer_s": "transfers between stages",
    "dp_s": "gradients and gathers",
    "optimizer_s": "optimizer",
    "straggling_s": "stragglers",
    "offload_s": "copies to the host",
}
_MOST_TIMES = 64  # as many GPUs, or as short sequences, as are tried
_SHORTEST = 128


@dataclass(frozen=True, kw_only=True)
class Option:
    """A layout that differs from another in one option.

    Args:
        changed: which, and how: "recompute full -> none".
        priced: what it costs.
        over_bytes: by which it does not fit; 0 where it does.
    """

    changed: str
    priced: Priced
    over_bytes: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """A change after which something fits.

    Args:
        text: what to change: "128 GPUs instead of 64".
        priced: a layout that fits then.
    """

    text: str
    priced: Priced


def differences(best: Priced, other: Priced) -> dict[str, float]:
    """Seconds by cause that the other takes longer for as many sequences as a step of the best; largest first.

    >>> from meshwright.clusters.hardware import gpu
    >>> from meshwright.clusters.simulated import Cluster, Transformer
    >>> small = Transformer(layers=8, hidden=1024, heads=8, kv_heads=8, ffn=4096, vocab=0, sequence=1024)
    >>> asked = Question(model=small, cluster=Cluster(gpu=gpu("A100"), num_gpus=8), global_batch=8)
    >>> piped = price(asked, Layout(pp=8, global_batch=8))
    >>> next(iter(differences(price(asked, Layout(dp=8, global_batch=8)), piped)))
    'bubble'
    """
    scale = best.layout.global_batch / other.layout.global_batch
    found = {
        name: scale * getattr(other.step, key) - getattr(best.step, key)
        for key, name in _CAUSES.items()
        if getattr(other.step, key) or getattr(best.step, key)
    }
    return dict(sorted(found.items(), key=lambda each: -abs(each[1])))


def words(best: Priced, other: Priced, *, num_causes: int = 3) -> str:
    """How much slower the other is, and for what; causes below a hundredth of the step are left out."""
    slower = other.sequence_s / best.sequence_s - 1
    told = [
        f"{name} {seconds:+.2g} s"
        for name, seconds in differences(best, other).items()
        if abs(seconds) >= 0.01 * best.step.total_s
    ]
    return f"{100 * slower:+.1f}%" + (f": {', '.join(told[:num_causes])}" if told else "")


def options(asked: Question, best: Priced) -> list[Option]:
    """Each legal layout that differs in one option only, fastest first; those that do not fit last."""
    found = []
    for layout in _same_degrees(asked, best.layout):
        changed = _changed(best.layout, layout)
        if len(changed) == 1:
            priced = price(asked, layout)
            over = max(0.0, priced.memory_bytes - asked.cluster.gpu.memory_bytes)
            found.append(Option(changed=changed[0], priced=priced, over_bytes=over))
    return sorted(found, key=lambda each: (each.over_bytes > 0, each.priced.rank))


def _same_degrees(asked: Question, best: Layout) -> Iterator[Layout]:
    for group in groups(asked):
        base = group.base
        if (base.tp, base.cp, base.ep, base.pp) != (best.tp, best.cp, best.ep, best.pp):
            continue
        if best.dp in group.replicas:
            for microbatches in group.microbatches(best.dp):
                for schedule, vpp in group.orders(microbatches):
                    for stage in group.zero_stages(best.dp, schedule, microbatches):
                        yield group.layout(
                            dp=best.dp, microbatches=microbatches, schedule=schedule, vpp=vpp, zero_stage=stage
                        )


def _changed(best: Layout, other: Layout) -> list[str]:
    pairs = {
        "micro-batch": (best.micro_batch, other.micro_batch),
        "recompute": (best.recompute, other.recompute),
        "sequence_parallel": (best.sequence_parallel, other.sequence_parallel),
        "zero stage": (best.zero_stage, other.zero_stage),
        "schedule": (_order(best), _order(other)),
    }
    return [f"{name} {one} -> {two}" for name, (one, two) in pairs.items() if one != two]


def _order(layout: Layout) -> str:
    return layout.schedule if layout.vpp == 1 else f"{layout.schedule} x {layout.vpp}"


def ways_out(asked: Question) -> list[Way]:
    """The smallest change of each kind that makes something fit: GPUs, then sequence length, in powers of two."""
    found = []
    times = 2
    while times <= _MOST_TIMES:
        more = replace(asked, cluster=replace(asked.cluster, num_gpus=times * asked.cluster.num_gpus))
        if fitting := _fits(more):
            text = f"{more.cluster.num_gpus} GPUs instead of {asked.cluster.num_gpus}"
            found.append(Way(text=text, priced=fitting))
            break
        times *= 2
    length = asked.model.sequence // 2
    while length >= _SHORTEST:
        if fitting := _fits(replace(asked, model=replace(asked.model, sequence=length))):
            text = f"sequences of {length} tokens instead of {asked.model.sequence}"
            found.append(Way(text=text, priced=fitting))
            break
        length //= 2
    return found


def _fits(asked: Question) -> Priced | None:
    least = least_memory(asked)
    return least if least and least.memory_bytes <= asked.cluster.gpu.memory_bytes else None
