"""What a signal means to a run in Slurm's hands: a warning, after which ranks save and leave, or its end.

    SIGUSR2 to the launcher              a warning: before the time limit, or of a preemption where Slurm is set up so
    SIGTERM to the tasks, job goes on    a preemption with a grace, in which nobody tells the launcher
    SIGTERM to all, job starts again     a preemption without a grace, or a requeue: KillWait is left
    SIGTERM to the tasks, job goes on    without a preemption: the step ends, since one of its tasks did
    SIGTERM to all                       the end

Signals do not say which it is; Slurm does, when it is asked.
"""

import math
import signal
import time
from types import FrameType

from meshwright.clusters.slurm_commands import JobNow, kill_wait_s, look_at
from meshwright.launch.supervise import Interrupts

__all__ = ["Notice"]

_AGAIN_S = 5.0  # within which the agents of other nodes say the same

_UNKNOWN = JobNow(state="", restarts=0, preempted=False)


class Notice(Interrupts):
    """Collects signals to the launcher, and what agents hear; only what ends the run counts as an interrupt.

    Args:
        name: of the signal that warns, without SIG.
        job: Slurm's id; empty where there is nobody to ask.
        times: how often the job was queued again before this start.
    """

    def __init__(self, name: str, job: str = "", times: int = 0) -> None:
        super().__init__()
        self._number = signal.Signals[f"SIG{name}"]
        self._job, self._times = job, times
        self._came: list[int] = []
        self._weighed_s, self._end_s = -math.inf, math.inf
        self.given = self.preempted = False
        if self._number not in self._SIGNALS:
            signal.signal(self._number, self._warn)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.given = True

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def heard(self) -> bool:
        """Whether a signal came, whatever it means."""
        return bool(self._came or self.numbers or self.given)

    def __call__(self, asked: bool) -> str | None:
        """The name of the signal by which ranks are to be warned, once they are; "" where their agents are to end.

        Args:
            asked: whether an agent was asked to end since the last call.
        """
        came = [self._came.pop(0) for _ in self._came[:]]
        if self.numbers or any(number != signal.SIGTERM for number in came):
            self.numbers += came
        elif (came or (asked and time.monotonic() - self._weighed_s > _AGAIN_S)) and self._weigh(came):
            return ""
        if time.monotonic() >= self._end_s:
            self._end_s = math.inf
            self.numbers.append(int(signal.SIGTERM))
        return self._number.name if self.given else None

    def _weigh(self, came: list[int]) -> bool:
        """Finds out what a SIGTERM means, to us or, where there came none, to an agent; whether that of the step alone.

        Slurm ends a step one of whose tasks was killed: who failed is found from what agents say, as elsewhere.
        """
        self._weighed_s = time.monotonic()
        now = (look_at(self._job) if self._job else None) or _UNKNOWN
        if now.restarts > self._times:
            self._starts_again()
        elif self._is_warning(now, bool(came)):
            self.given, self.preempted = True, self.preempted or now.preempted
        elif now.state == "RUNNING" and not came:
            return True
        else:
            self.numbers += came or [int(signal.SIGTERM)]
        return False

    def _starts_again(self) -> None:
        """Half of the time until Slurm kills is for ranks to save, the other half for those that do not leave."""
        self.given = True
        if self._end_s == math.inf:
            self._end_s = time.monotonic() + kill_wait_s() / 2

    def _is_warning(self, now: JobNow, to_us: bool) -> bool:
        """Whether a job that was sent a SIGTERM goes on for a while."""
        return now.state == "RUNNING" and (now.preempted or (to_us and self._number == signal.SIGTERM))
