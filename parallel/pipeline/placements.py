"""Which blocks make a stage, and which rank runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshwright.parallel.errors import ScheduleError

__all__ = ["Placement", "balanced_cuts", "contiguous", "looped", "modular", "v_shaped"]


@dataclass(frozen=True)
class Placement:
    """Blocks cut into stages and stages dealt to ranks.

    Args:
        cuts: where stages begin and end: stage s holds blocks cuts[s] .. cuts[s + 1] - 1.
        homes: stage -> rank.

    Raises:
        ScheduleError: for an empty stage, or a rank without one.

    >>> Placement((0, 2, 4), (0, 1)).stage_of(3)
    1
    """

    cuts: tuple[int, ...]
    homes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.cuts) != len(self.homes) + 1 or self.cuts[0] != 0:
            raise ScheduleError(
                f"{len(self.homes)} stages need {len(self.homes) + 1} cuts that begin with 0, not {list(self.cuts)}"
            )
        for stage, (start, stop) in enumerate(pairwise(self.cuts)):
            if stop <= start:
                raise ScheduleError(f"stage {stage} has no blocks (cuts {list(self.cuts)}); use fewer stages")
        idle = sorted(set(range(self.num_ranks)) - set(self.homes))
        if idle or min(self.homes) < 0:
            raise ScheduleError(f"ranks {idle} have no stage (homes {list(self.homes)}); use a smaller pp")

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        return self.cuts[-1]

    @property
    def num_ranks(self) -> int:
        """Degree of the pipeline."""
        return max(self.homes) + 1

    def blocks(self, stage: int) -> range:
        """Blocks of one stage."""
        return range(self.cuts[stage], self.cuts[stage + 1])

    def stage_of(self, block: int) -> int:
        """The stage that holds a block."""
        return next(stage for stage in range(len(self.homes)) if block in self.blocks(stage))


def contiguous(num_blocks: int, num_ranks: int, *, costs: Sequence[float] | None = None) -> Placement:
    """One stage for each rank, of neighbouring blocks; as even as can be, by number or by `costs`.

    >>> contiguous(7, 3).cuts
    (0, 3, 5, 7)
    """
    return looped(num_blocks, num_ranks, num_loops=1, costs=costs)


def looped(num_blocks: int, num_ranks: int, *, num_loops: int, costs: Sequence[float] | None = None) -> Placement:
    """Stage s on rank s mod `num_ranks`, `num_loops` times around.

    >>> looped(8, 2, num_loops=2).homes
    (0, 1, 0, 1)
    """
    number = _stages(num_blocks, num_ranks, num_loops)
    return Placement(_cuts(num_blocks, number, costs), tuple(stage % num_ranks for stage in range(number)))


def modular(num_blocks: int, num_ranks: int) -> Placement:
    """Block l on rank l mod `num_ranks`: each block is a stage (arXiv 2106.02679).

    The number of blocks need not be a multiple of the number of ranks.

    >>> modular(5, 2).homes
    (0, 1, 0, 1, 0)
    """
    _stages(num_blocks, num_ranks, 1)
    return Placement(tuple(range(num_blocks + 1)), tuple(block % num_ranks for block in range(num_blocks)))


def v_shaped(num_blocks: int, num_ranks: int, *, costs: Sequence[float] | None = None) -> Placement:
    """Two stages for each rank, down and up again, so that the first rank also has the last stage (arXiv 2405.15362).

    >>> v_shaped(4, 2).homes
    (0, 1, 1, 0)
    """
    number = _stages(num_blocks, num_ranks, 2)
    down = tuple(range(num_ranks))
    return Placement(_cuts(num_blocks, number, costs), (*down, *reversed(down)))


def balanced_cuts(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cuts that make the dearest stage as cheap as can be.

    Among such cuts, the earlier stages are no longer than needed. Exact, by dynamic programming over prefixes.

    >>> balanced_cuts([1, 1, 1, 5], 2)
    (0, 3, 4)
    """
    number = len(costs)
    if not 1 <= num_stages <= number:
        raise ScheduleError(f"{number} blocks cannot make {num_stages} stages; use 1 to {number}")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = [sums[stop] for stop in range(number + 1)]  # of the first `stop` blocks in the stages made so far
    choices: list[list[int]] = []
    for stages in range(2, num_stages + 1):
        before, best, chosen = best, [float("inf")] * (number + 1), [0] * (number + 1)
        for stop in range(stages, number + 1):
            start = min(
                range(stages - 1, stop), key=lambda start: (max(before[start], sums[stop] - sums[start]), start)
            )
            best[stop], chosen[stop] = max(before[start], sums[stop] - sums[start]), start
        choices.append(chosen)
    cuts = [number]
    for chosen in reversed(choices):
        cuts.append(chosen[cuts[-1]])
    return (*([] if cuts[-1] == 0 else [0]), *reversed(cuts))


def _stages(num_blocks: int, num_ranks: int, num_loops: int) -> int:
    number = num_ranks * num_loops
    if num_ranks < 1 or num_loops < 1:
        raise ScheduleError(f"{num_ranks} ranks and {num_loops} loops: both must be at least 1")
    if num_blocks < number:
        raise ScheduleError(
            f"{num_blocks} blocks cannot make {number} stages ({num_ranks} ranks x {num_loops}); "
            f"nearest legal: pp={min(num_ranks, num_blocks)} with {max(1, num_blocks // num_ranks)} per rank"
        )
    return number


def _cuts(num_blocks: int, num_stages: int, costs: Sequence[float] | None) -> tuple[int, ...]:
    if costs is not None:
        if len(costs) != num_blocks:
            raise ScheduleError(f"{len(costs)} costs were given for {num_blocks} blocks")
        return balanced_cuts(costs, num_stages)
    each, more = divmod(num_blocks, num_stages)
    return tuple(stage * each + min(stage, more) for stage in range(num_stages + 1))
