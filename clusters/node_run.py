"""The run of one node: its agent reads a part of a start plan from standard input and runs torch's elastic agent on it.

    launcher --(plan; then meet, alive, leave, stop, kill)--> agent --(fork)--> ranks
             <--(joined, meeting, started, exit, data, result)--

The end of its input means that the launcher is gone, and then nothing of the run may stay: the thread that reads kills
all ranks itself, whatever the main thread is doing. The main thread forks the ranks (see `prefork`, `bootstrap`).
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

from meshwright.clusters.asking import Asking
from meshwright.clusters.channel import Channel, Line
from meshwright.clusters.environment import rank_environment
from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.files import FileLine, step_folder
from meshwright.clusters.imports import IMPORTS, Imports
from meshwright.clusters.joining import Joining
from meshwright.clusters.lost import LOST_CODE
from meshwright.clusters.masking import Concealer, conceal_while, logs_of
from meshwright.clusters.prefork import Forks, escape, executed
from meshwright.clusters.sending import Sender, make_run_dir
from meshwright.clusters.setup import SetupError, run_setup
from meshwright.clusters.sweep import sweep
from meshwright.parallel.keyed import BOARD_KEY, derived

__all__ = ["main"]

_HEED_S = 3.0
_AT_ONCE_S = 0.05  # who is started with a plan finds it there


class _Agent:
    """One node's run: the plan, the line to the launcher, and torch's agent once it is made."""

    def __init__(self, channel: Line, message: Mapping[str, Any], imports: Imports) -> None:
        self.channel, self.imports = channel, imports
        self.message = message
        self.plan: Mapping[str, Any] = message["plan"]
        self.node: Mapping[str, Any] = self.plan["nodes"][message["node"]]
        self.stopped = False
        self.torch_agent: Any = None
        self.sender: Sender | None = None
        self.concealer = Concealer(Path(self.plan["run_dir"]), message["secrets"].values(), logs=logs_of(self.node))
        self._heard_s = time.monotonic()
        self.asking = Asking(channel.tell, self.stop, silent_s=lambda: time.monotonic() - self._heard_s)
        self.joining = Joining(message, channel.tell, self._cut_off)

    def listen(self, messages: Any) -> None:
        """Obeys the launcher until it is gone."""
        for message in messages:
            self._heard_s = time.monotonic()
            command = message["command"]
            self.asking.hear(command)
            if command == "stop":
                self.stop()
            elif command == "meet":
                self.joining.told.put(message)
            elif command == "leave":
                self._leave(signal.Signals[message["signal"]])
            elif command == "kill":
                self._end("stopped")
        self._end("abandoned")

    def watch(self, lost_after_s: float) -> None:
        """Ends everything when nothing has been heard for so long: a connection that is cut gives no end of input."""
        while time.monotonic() - self._heard_s < lost_after_s:
            time.sleep(lost_after_s / 20)
        self._end("abandoned")

    def stop(self) -> None:
        """Ends the ranks with grace."""
        self.stopped = True
        Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        """Asks the main thread; ends everything itself where that waits for something else, such as a lost node."""
        agent = self.torch_agent
        if agent is None:
            time.sleep(_HEED_S / 10)
        else:
            agent.stop.set()
            idle = agent.deaths is None or agent.deaths.all_dead
            if agent.heeded.wait(_HEED_S / 10 if idle else _HEED_S):
                return
            agent.end_ranks()
        self._end("stopped")

    def _leave(self, number: signal.Signals) -> None:
        """Tells ranks that this node is about to be taken away, those that can be told; it is said until they left."""
        able = [] if self.torch_agent is None else self.torch_agent.leave(number)
        self.channel.tell("leaving", ranks=able)

    def _end(self, state: str) -> None:
        if self.torch_agent is not None:
            self.torch_agent.kill_ranks()
        sweep(self.plan["run_id"], self.node["index"])
        self.say_result(state)
        os._exit(0)

    def _cut_off(self) -> None:
        """Ends without a last word: the first node is out of reach, and the run goes on without this one."""
        if self.torch_agent is not None:
            self.torch_agent.kill_ranks()
        sweep(self.plan["run_id"], self.node["index"])
        self.channel.tell("unheard", of=self.node["index"])
        os._exit(LOST_CODE)

    def _lose(self, number: int) -> NoReturn:
        """Ends without a last word, since somebody else ends this node, such as a shutdown: it counts as lost."""
        if self.sender is not None:
            self.sender.finish()
            self.concealer.finish()
        self.torch_agent.kill_ranks()
        os._exit(128 + number)

    def say_result(self, state: str, message: str = "") -> None:
        """The last word, after everything that ranks wrote."""
        if self.sender is not None:
            self.sender.finish()
        if self.sender is not None or state == "abandoned":  # otherwise the launcher does, when it has read them
            self.concealer.finish()
        self.channel.tell("result", state=state, message=message)

    def prepare(self) -> None:
        """Finds the run directory, or makes one on this machine and sends what is written there."""
        run_dir, probe = Path(self.plan["run_dir"]), self.message.get("probe")
        shared = probe is None or (run_dir / probe).exists()
        if not shared:
            make_run_dir(run_dir, self.message["files"])
            self.sender = Sender(run_dir, self.channel.tell, ranks=self.node["ranks"])
            conceal_while(self.concealer, Event())
        _open_log(run_dir, self.node["name"])
        self.channel.tell("joined", host=socket.gethostname(), shared=shared)
        self.joining.hold()

    def adopt(self) -> None:
        """Takes on the variables of this node's ranks."""
        own = rank_environment(self.plan, self.node, secrets=self.message["secrets"], environment=os.environ)
        _adopt({**self.message.get("passed", {}), **own})

    def run(self) -> str:
        """Sets the node up and runs its ranks; tells how that ended."""
        if self.plan["setup"] is not None:
            log = Path(self.plan["run_dir"], "logs", f"setup-{self.node['name']}.log")
            _adopt(run_setup(self.plan["setup"], cwd=self.node["cwd"], env=os.environ, log=log))
        return self._run_ranks()

    def _run_ranks(self) -> str:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        from meshwright.clusters.elastic import NodeAgent, StoppedError

        forks = _forks(self)
        spec = self._spec(forks)
        where, mask = self.node["index"], self.concealer.mask
        self.torch_agent = NodeAgent(spec, plan=self.plan, node=where, tell=self.channel.tell, forks=forks, mask=mask)
        if self.stopped:
            return "stopped"
        try:
            result = self.torch_agent.run()
        except StoppedError:
            return "stopped"
        except SignalException as error:
            self._lose(int(error.sigval))
        with suppress(Exception):  # all is said and done; other nodes may have left already
            spec.rdzv_handler.shutdown()
        return "failed" if result.is_failed() else "succeeded"

    def _spec(self, forks: Forks | None) -> Any:
        from torch.distributed.elastic.agent.server.api import WorkerSpec

        words = (str(os.getpid()), self.plan["run_dir"], self.node["cwd"], *self.node["argv"])
        if isinstance(self.channel, FileLine):
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # TERM is ours, see `main`
        if not self.joining.near:
            _share_cores(len(self.node["ranks"]))
        os.environ[BOARD_KEY] = derived(self.joining.key, "board").hex()
        arguments = tuple(map(escape, words))
        program: Any = forks.begin if forks else None
        if forks is None:
            program, arguments = executed(arguments)
        return WorkerSpec(
            role="rank",
            local_world_size=len(self.node["ranks"]),
            rdzv_handler=self.joining.meet(),
            entrypoint=program,
            args=arguments,
            max_restarts=self.plan["limits"]["max_restarts"],
            monitor_interval=0.1,
        )


def _why_executed(agent: _Agent) -> str:
    """Why ranks are not forked, in words; empty if they are."""
    if agent.plan["setup"] is not None:
        return "the node was set up while it imported"
    return agent.imports.why_not(agent.node["argv"], Path(agent.node["cwd"]))


def _forks(agent: _Agent) -> Forks | None:
    """What ranks begin with where they are forked; None where they are executed, and the log says why."""
    why = _why_executed(agent)
    if not why:
        return Forks(agent.imports)
    if os.environ.get(IMPORTS):
        sys.stderr.write(f"ranks are executed, not forked: {why}\n")
    return None


def _share_cores(num_ranks: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))


def _adopt(environment: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _open_log(run_dir: Path, name: str) -> None:
    log = os.open(run_dir / "logs" / f"agent-{name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _told(agent: _Agent) -> None:
    imports = agent.imports
    try:
        early = imports.begun
        if not early:
            agent.adopt()
            imports.begin()
        agent.prepare()
        imports.await_torch()
        if early:  # who imports may be reading all variables
            agent.adopt()
        if not _why_executed(agent):
            imports.go_on(Path(agent.node["cwd"]))
        state, message = agent.run(), ""
    except SetupError as error:
        state, message = "setup_failed", str(error)
    except RendezvousError as error:
        state, message = "rendezvous_failed", str(error)
    except Exception as error:
        import traceback

        traceback.print_exc()
        late = type(error).__module__.startswith("torch.distributed.elastic.rendezvous")
        state, message = ("rendezvous_failed" if late else "error"), f"{type(error).__name__}: {error}"
    sweep(agent.plan["run_id"], agent.node["index"])  # a setup may have started something, whatever failed since
    agent.say_result(state, message)


def _line(words: Sequence[str]) -> Line:
    """Standard streams; or, given a run directory and the variable that holds a node's index, the run's folder."""
    if not words:
        return Channel()
    run_dir, variable = words
    return FileLine(step_folder(Path(run_dir)), int(os.environ[variable]))


def main() -> None:
    """Runs one node; imports meanwhile, so that it heeds the launcher and says what is wrong before."""
    imports, line = Imports(), _line(sys.argv[1:])
    if not line.has_words(_AT_ONCE_S):  # the launcher is still reading the job
        imports.begin()
    messages = line.messages()
    first = next(messages, None)
    if first is None:
        os._exit(0)
    agent = _Agent(line, first, imports)
    if isinstance(line, FileLine):  # by default what started us would end ranks without grace
        signal.signal(signal.SIGTERM, agent.asking)
    Thread(target=agent.listen, args=(messages,), name="launcher", daemon=True).start()
    if first["lost_after_s"] is not None:
        Thread(target=agent.watch, args=(first["lost_after_s"],), name="lease", daemon=True).start()
    _told(agent)
    sys.stderr.flush()
    os._exit(0)  # torch's own threads and atexit hooks have nothing left to do
