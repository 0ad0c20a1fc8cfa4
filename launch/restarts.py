"""What restarts a run had: why, after what wait, what time they cost; and why there was no further one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from meshwright.clusters.retry import spent
from meshwright.launch.supervise import RunState

__all__ = ["RestartLines", "excluded_of", "line_of", "restarts_of", "why_given_up"]


def restarts_of(state: RunState) -> tuple[dict[str, Any], ...]:
    """The restarts of a run, oldest first: what its agents decided, when ranks ran again, and how long none did."""
    found = [told for _, told in sorted(state.decisions.items()) if told["again"] and told["attempt"] < state.attempt]
    return tuple(_restart(told, state) for told in found)


def excluded_of(state: RunState) -> tuple[dict[str, Any], ...]:
    """Nodes that a run went on without, with the time it took until ranks ran again."""
    return tuple({**each, "down_s": _again(state, each["attempt"])[1]} for each in state.losses.excluded)


def _again(state: RunState, failed: int) -> tuple[float | None, float]:
    """When ranks had started again after an attempt, where they had, and after how many seconds."""
    when_s, down_s = state.again.get(failed, (None, 0.0))
    return when_s, round(down_s, 3)


def _restart(told: Mapping[str, Any], state: RunState) -> dict[str, Any]:
    failed = told["attempt"]
    when_s, down_s = _again(state, failed)
    return {**told, "cause": _cause(told), "down_s": down_s, "next_attempt": failed + 1, "time_unix_s": when_s}


def _cause(told: Mapping[str, Any]) -> str:
    who = "" if told["rank"] is None else f"rank {told['rank']} on {told['host']}: "
    return f"{who}{told['evidence']}"


def why_given_up(state: RunState) -> str | None:
    """Why a run that may restart did not do so again; None where nothing failed, or nothing may restart."""
    limit, told = state.plan.limits.max_restarts, state.decisions.get(state.attempt)
    if told is not None:
        return None if told["again"] else str(told["reason"])
    failed = any(end.code and not end.ended_by_us for end in state.ends.values())
    return spent(limit) if failed and limit and state.attempt >= limit else None


def line_of(told: Mapping[str, Any]) -> str:
    """A restart in words.

    >>> told = {"attempt": 0, "kind": "signal", "rank": 1, "host": "b", "evidence": "killed", "wait_s": 2.0, "step": 40}
    >>> line_of({**told, "down_s": 3.26})
    'attempt 0: signal at step 40: rank 1 on b: killed; started again after a wait of 2 s, 3.3 s lost'
    """
    where = "" if told["step"] is None else f" at step {told['step']}"
    what = f"attempt {told['attempt']}: {told['kind'] or 'failure'}{where}: {_cause(told)}"
    if "down_s" in told:
        changed = told.get("nodes")
        where = f" on {changed[1]} nodes instead of {changed[0]}" if changed else ""
        return f"{what}; started again{where} after a wait of {told['wait_s']:.3g} s, {told['down_s']:.1f} s lost"
    return f"{what}; starting again in {told['wait_s']:.3g} s: {told['reason']}"


class RestartLines:
    """Says that ranks will start again while they wait for it.

    Args:
        mask: replaces secrets.
        write: takes one line for people.
        said: attempts of which it was said before.
    """

    def __init__(self, mask: Callable[[str], str], write: Callable[[str], object], said: Iterable[int] = ()) -> None:
        self._mask, self._write = mask, write
        self._said = set(said)

    def __call__(self, state: RunState) -> None:
        """Says what is new."""
        for attempt in sorted(set(state.decisions) - self._said):
            self._said.add(attempt)
            self._say(state.decisions[attempt])

    def moved(self, state: RunState) -> None:
        """Says what the launcher decided, though agents may have decided otherwise before they ended."""
        self._said.add(state.attempt)
        self._say(state.decisions[state.attempt])

    def _say(self, told: Mapping[str, Any]) -> None:
        if told["again"]:
            self._write(self._mask(f"meshwright: {line_of(told)}"))
