"""The program of one node: reads its part of a start plan from standard input and runs torch's elastic agent on it.

    launcher --(plan, then "stop" or "kill")--> agent --(fork)--> ranks
             <--(started, exit, result)--------

The end of its input means that the launcher is gone, and then nothing of the run may stay: the thread that reads kills
all ranks itself, whatever the main thread is doing. The main thread forks the ranks (see `bootstrap`).
"""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from meshwright.clusters import bootstrap
from meshwright.clusters.channel import Channel
from meshwright.clusters.environment import rank_environment
from meshwright.clusters.setup import SetupError, run_setup
from meshwright.clusters.sweep import sweep

__all__ = ["main"]


class _Agent:
    """One node's run: the plan, the line to the launcher, and torch's agent once it is made."""

    def __init__(self, channel: Channel, message: Mapping[str, Any]) -> None:
        self.channel = channel
        self.plan: Mapping[str, Any] = message["plan"]
        self.node: Mapping[str, Any] = self.plan["nodes"][message["node"]]
        self.secrets: Mapping[str, str] = message["secrets"]
        self.stopped = False
        self.torch_agent: Any = None

    def listen(self, messages: Any) -> None:
        """Obeys the launcher until it is gone."""
        for message in messages:
            if message["command"] == "stop":
                self.stopped = True
                Thread(target=self._stop, daemon=True).start()
            else:
                self._end("stopped")
        self._end("abandoned")

    def _stop(self) -> None:
        """Asks the main thread; ends the process itself where that thread is busy with something else than ranks."""
        agent = self.torch_agent
        if agent is not None:
            agent.stop.set()
            if agent.deaths is not None and not agent.deaths.all_dead:
                return
        time.sleep(0.3)
        if agent is None or agent.deaths is None or agent.deaths.all_dead:
            self._end("stopped")

    def _end(self, state: str) -> None:
        if self.torch_agent is not None:
            self.torch_agent.kill_ranks()
        sweep(self.plan["run_id"], self.node["index"])
        self.channel.tell("result", state=state)
        os._exit(0)

    def run(self) -> str:
        """Sets the node up and runs its ranks; tells how that ended."""
        _adopt(rank_environment(self.plan, self.node, secrets=self.secrets, environment=os.environ))
        if self.plan["setup"] is not None:
            log = Path(self.plan["run_dir"], "logs", f"setup-{self.node['name']}.log")
            _adopt(run_setup(self.plan["setup"], cwd=self.node["cwd"], env=os.environ, log=log))
        return self._run_ranks()

    def _run_ranks(self) -> str:
        from meshwright.clusters.elastic import NodeAgent, StoppedError

        spec = self._spec()
        self.torch_agent = NodeAgent(
            spec,
            run_id=self.plan["run_id"],
            node=self.node["index"],
            limits=self.plan["limits"],
            tell=self.channel.tell,
        )
        if self.stopped:
            return "stopped"
        try:
            result = self.torch_agent.run()
        except StoppedError:
            return "stopped"
        with suppress(Exception):  # all is said and done; other nodes may have left already
            spec.rdzv_handler.shutdown()
        return "failed" if result.is_failed() else "succeeded"

    def _spec(self) -> Any:
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # that store would listen on every interface
        num_nodes, limits = len(self.plan["nodes"]), self.plan["limits"]
        if num_nodes == 1:  # torch waits up to 0.3 s so that nodes do not all come at once
            setattr(dynamic_rendezvous, "_delay", lambda seconds: None)  # noqa: B010 (torch keeps it to itself)
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=str(Path(self.plan["run_dir"], "private", "rendezvous")),
            run_id=self.plan["run_id"],
            min_nodes=num_nodes,
            max_nodes=num_nodes,
            local_addr=f"node{self.node['index']:04d}",  # only a name: torch ranks nodes in the order of these
            store_type="file",
            join_timeout=max(1, int(limits["join_timeout_s"])),
        )
        backend, store = create_backend(parameters)
        words = (str(os.getpid()), self.plan["run_dir"], self.node["cwd"], *self.node["argv"])
        return WorkerSpec(
            role="rank",
            local_world_size=len(self.node["ranks"]),
            rdzv_handler=dynamic_rendezvous.create_handler(store, backend, parameters),
            entrypoint=sys.executable,
            args=("-I", "-S", str(bootstrap.__file__), *map(escape, words)),
            max_restarts=limits["max_restarts"],
            monitor_interval=0.1,
            master_addr="127.0.0.1",
            master_port=self.plan["port"],
        )


def _adopt(environment: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def escape(word: str) -> str:
    """A word that torch's macros turn back into itself.

    >>> escape("${local_rank} costs $5")
    '$${local_rank} costs $$5'
    """
    return word.replace("$", "$$")


def _open_log(plan: Mapping[str, Any], name: str) -> None:
    path = Path(plan["run_dir"], "logs", f"agent-{name}.log")
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _told(agent: _Agent) -> None:
    try:
        state, message = agent.run(), ""
    except SetupError as error:
        state, message = "setup_failed", str(error)
    except Exception as error:
        import traceback

        traceback.print_exc()
        late = type(error).__module__.startswith("torch.distributed.elastic.rendezvous")
        state, message = ("rendezvous_failed" if late else "error"), f"{type(error).__name__}: {error}"
    agent.channel.tell("result", state=state, message=message)


def main() -> None:
    """Runs one node; imports torch while the launcher is still reading the job."""
    channel = Channel()
    import meshwright.clusters.elastic  # noqa: F401

    messages = channel.messages()
    first = next(messages, None)
    if first is None:
        return
    agent = _Agent(channel, first)
    _open_log(agent.plan, agent.node["name"])
    Thread(target=agent.listen, args=(messages,), name="launcher", daemon=True).start()
    _told(agent)
    sys.stderr.flush()
    os._exit(0)  # torch's own threads and atexit hooks have nothing left to do


if __name__ == "__main__":
    main()
