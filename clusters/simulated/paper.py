"""A job on paper: the schedule that its ranks run, walked with what their works take.

One rank of each stage stands for all: ranks of a stage do the same. The schedule is one that `chosen` made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log2

from meshwright.clusters.simulated.hosting import inputs_moved_s, moves_s, shards_moved_s, updated_s
from meshwright.clusters.simulated.machine import Machine, Priced
from meshwright.clusters.simulated.meetings import StageBytes, closing_s, copied_bytes, handled_s, meetings
from meshwright.clusters.simulated.step import Step
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.timeline import Costs, Timeline, timeline
from meshwright.parallel.work import Passes, Sent, Traced

__all__ = ["Paper", "StageBytes"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a prediction is made from.

    Args:
        machine: mesh and cluster.
        schedule: of one step, all ranks of the pipeline.
        traced: what one rank does for one micro-batch.
        stage_of: block -> stage; all on stage 0 where it is empty.
        recomputed: blocks whose forward runs again.
        border_bytes: of what travels between stages for one micro-batch, from one rank.
        stages: bytes of each stage, where the schedule gathers and reduces by itself.
        rest: of what stands around blocks, gathered before and reduced behind all of it.
        sent: collectives of `dp` and `fsdp` of a step that the schedule does not show.
        closing: sums along `tp` and `cp` that end a step on one rank.
        optimizer_bytes: read and written by the update.
        shards_on_host: whether shards rest in the host's memory, and are updated there.
    """

    machine: Machine
    schedule: Schedule
    traced: Traced
    stage_of: Mapping[str, int] = field(default_factory=dict)
    recomputed: frozenset[str] = frozenset()
    border_bytes: float = 0.0
    stages: Mapping[int, StageBytes] = field(default_factory=dict)
    rest: StageBytes = field(default_factory=StageBytes)
    sent: tuple[Sent, ...] = ()
    closing: tuple[Sent, ...] = ()
    optimizer_bytes: float = 0.0
    shards_on_host: bool = False

    def blocks(self, stage: int) -> dict[str, Passes]:
        """Of one stage."""
        return {name: each for name, each in self.traced.blocks.items() if self.stage_of.get(name, 0) == stage}

    def priced(self, stage: int) -> dict[Kind, Priced]:
        """Seconds of one micro-batch through a stage: forward, backward, and forward again."""
        return self._priced[stage]

    @cached_property
    def timeline(self) -> Timeline:
        """The step up to the optimizer, in seconds."""
        return timeline(self.schedule, self.costs, checked=True)

    @cached_property
    def costs(self) -> Costs:
        """Seconds of each action."""
        ranks, hidden = range(self.schedule.num_ranks), 1 - self.machine.efficiency.links.transfer
        hops = {
            (one, other): hidden * self.machine.hop_s(self.border_bytes, one, other)
            for one in ranks
            for other in (one - 1, one + 1, 0, len(ranks) - 1)
            if one != other and 0 <= other < len(ranks)
        }
        return Costs(exact=dict(self._exact), hops=hops, latency=max(hops.values(), default=0.0), unit_s=1.0)

    @cached_property
    def step(self) -> Step:
        """Where the time of a step goes, on the rank that computes longest."""
        quiet = timeline(self.schedule, replace(self.costs, exact=self._quiet), checked=True)
        rank = max(range(quiet.num_ranks), key=lambda each: quiet.busy[each])
        count, stages = self.schedule.num_microbatches, self.schedule.stages_of(rank)
        back = sum((self.priced(stage)[Kind.BACKWARD] for stage in stages), Priced())
        ahead = sum((self.priced(stage)[Kind.FORWARD] for stage in stages), Priced())
        again = sum((self.priced(stage)[Kind.RECOMPUTE] for stage in stages), Priced())
        both, head = ahead + back, self._around(stages)
        passed_s, inputs_s = self._passing_s(rank) * 2 * len(stages) * count, inputs_moved_s(self, rank)
        found = Step(
            compute_s=count * (both.compute_s - head.compute_s),
            recompute_s=count * again.total_s,
            head_s=count * head.compute_s,
            tp_s=count * both.tp_s + closing_s(self, "tp"),
            cp_s=count * both.cp_s + closing_s(self, "cp"),
            ep_s=count * both.ep_s,
            pp_bubble_s=max(0.0, quiet.makespan - quiet.busy[rank] - inputs_s),
            pp_transfer_s=passed_s,
            dp_s=self._data_s(quiet, rank),
            optimizer_s=updated_s(self),
            offload_s=inputs_s + shards_moved_s(self, quiet.busy[rank]),
        )
        share = self.machine.efficiency.links.straggling * log2(self.machine.cluster.nodes)
        waits_s = self.machine.efficiency.waits_s(quiet.busy[rank], meetings(self, rank))
        return replace(found, straggling_s=found.total_s * share + waits_s)

    def around(self, stage: int) -> Iterator[Passes]:
        """What stands around blocks and is done with a stage."""
        if stage == 0:
            yield self.traced.before
        if stage == self.schedule.num_stages - 1:
            yield self.traced.after

    def _around(self, stages: tuple[int, ...]) -> Priced:
        """The same of a rank with these stages, both directions."""
        return sum(
            (one for stage in stages for each in self.around(stage) for one in self.machine.both(each)), Priced()
        )

    @cached_property
    def _priced(self) -> dict[int, dict[Kind, Priced]]:
        known: dict[int, tuple[Priced, Priced]] = {}

        def both(passes: Passes) -> tuple[Priced, Priced]:
            if id(passes) not in known:
                known[id(passes)] = self.machine.both(passes)
            return known[id(passes)]

        found = {}
        for stage in range(self.schedule.num_stages):
            mine = self.blocks(stage)
            again = [both(each)[0] for name, each in mine.items() if name in self.recomputed]
            pairs = [*map(both, mine.values()), *map(both, self.around(stage))]
            found[stage] = {
                Kind.FORWARD: sum((each[0] for each in pairs), Priced()),
                Kind.BACKWARD: sum((each[1] for each in pairs), Priced()),
                Kind.RECOMPUTE: sum(again, Priced()),
            }
        return found

    @cached_property
    def _exact(self) -> dict[tuple[int, Kind], float]:
        found = dict(self._quiet)
        for stage in range(self.schedule.num_stages):
            of = self.stages.get(stage, StageBytes())
            found[stage, Kind.GATHER] = self._gathered_s(of)
            found[stage, Kind.REDUCE] = self._reduced_s(of)
        return found

    @cached_property
    def _quiet(self) -> dict[tuple[int, Kind], float]:
        """Seconds of each action, without what is gathered and reduced."""
        found: dict[tuple[int, Kind], float] = {}
        for stage in range(self.schedule.num_stages):
            priced, passing_s = self.priced(stage), self._passing_s(self.schedule.homes[stage])
            back_s = priced[Kind.BACKWARD].total_s
            if not self.schedule.has(Kind.RECOMPUTE):  # stepped as a whole, blocks are recomputed inside of backward
                back_s += priced[Kind.RECOMPUTE].total_s
            found |= {
                (stage, Kind.FORWARD): priced[Kind.FORWARD].total_s + passing_s,
                (stage, Kind.BACKWARD): back_s + passing_s,
                (stage, Kind.INPUT_GRADIENT): back_s / 2 + passing_s,
                (stage, Kind.WEIGHT_GRADIENT): back_s / 2,
                (stage, Kind.RECOMPUTE): priced[Kind.RECOMPUTE].total_s,
            }
            found |= {(stage, kind): each for kind, each in moves_s(self, stage).items()}
        return found

    def _passing_s(self, rank: int) -> float:
        """What sending costs a rank with each micro-batch and direction, whatever else it has to do."""
        if self.schedule.num_ranks == 1:
            return 0.0
        links = self.machine.efficiency.links
        neighbour = rank + 1 if rank + 1 < self.schedule.num_ranks else 0
        return links.transfer * self.machine.hop_s(self.border_bytes, rank, neighbour) + links.stage_s

    def _gathered_s(self, of: StageBytes) -> float:
        return self.machine.sent_s(Sent("fsdp", "all_gather", of.gathered))

    def _reduced_s(self, of: StageBytes) -> float:
        mesh = self.machine.mesh
        within_s = self.machine.sent_s(Sent("fsdp", "reduce_scatter", of.reduced))
        return within_s + self.machine.sent_s(Sent("dp", "all_reduce", of.reduced / mesh.fsdp))

    def _data_s(self, quiet: Timeline, rank: int) -> float:
        """What is seen of gathers and reductions: what the walk does not hide, and never less than a share of all."""
        rest_s = self._gathered_s(self.rest) + self._reduced_s(self.rest)
        rest_s += self.machine.efficiency.memory_s(copied_bytes(self, rank), self.machine.cluster.gpu)
        rest_s += handled_s(self)
        shown_s = sum(
            self.costs.of(action) for action in self.schedule.ranks[rank] if action.kind in (Kind.GATHER, Kind.REDUCE)
        )
        waited_s = self.timeline.makespan - quiet.makespan if shown_s else 0.0
        hidden_s = sum(map(self.machine.sent_s, self.sent))
        exposed = self.machine.efficiency.links.exposed
        by_s = quiet.busy[rank] / (1 if self._gathers_inside else self.schedule.num_microbatches)
        return rest_s + max(waited_s, exposed * shown_s) + max(hidden_s - by_s, exposed * hidden_s)

    @property
    def _gathers_inside(self) -> bool:
        """Whether collectives that the schedule does not show go with each micro-batch."""
        return sum(each.kind == "all_gather" for each in self.sent) > len(self.traced.blocks) + 1
