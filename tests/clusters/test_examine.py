"""Real probes on this machine, some of which lie or stay silent: who is sick is found and named."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from meshwright.clusters.evidence import Evidence, Reach, Wishes, endpoint_of
from meshwright.clusters.examine import examine as examine_all
from meshwright.clusters.health import diagnose
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached
from meshwright.clusters.sweep import carriers
from meshwright.clusters.verdicts import BAD, OK
from tests.lab.nvml import with_gpus
from tests.launch.waiting import least_s

WISHES = Wishes(checks=("clock", "ports", "disk"), write_bytes=0, timeout_s=20.0)


def _node(name: str, environment: dict[str, str] | None = None) -> Reach:
    """A probe whose environment differs from ours."""
    changed = [f"{key}={value}" for key, value in (environment or {}).items() if os.environ.get(key) != value]
    return Reach(name, ("env", *changed, *PROBE_ARGV))


def _lying(name: str, lie: str) -> Reach:
    """A probe in whose process something is changed before it starts."""
    code = f"import sys, time, socket\n{lie}\nfrom meshwright.clusters import probe\nprobe.main()"
    return Reach(name, (sys.executable, "-u", "-c", code))


def examine(reaches: Sequence[Reach], wishes: Wishes) -> Evidence:
    return examine_all(Reached(tuple(reaches)), wishes)


def _states(found: Evidence, wishes: Wishes) -> dict[tuple[str, str | None], str]:
    return {(each.check, each.node): each.state for each in diagnose(found, wishes).verdicts}


def test_nodes_of_this_machine_answer_meet_and_are_on_time() -> None:
    found = examine([_node("a"), _node("b"), _node("c")], WISHES)
    assert found.silent == {}
    assert set(_states(found, WISHES).values()) == {OK}
    assert len({(dial.source, dial.target) for dial in found.dials if dial.seconds is not None}) == 6
    place = endpoint_of("a", found)
    assert place is not None
    assert place.address == "127.0.0.1"


def test_a_clock_that_is_ahead_is_measured() -> None:
    lie = "real = time.time\ntime.time = lambda: real() + 30"
    found = examine([_node("a"), _lying("b", lie)], WISHES)
    assert found.clocks["b"].ahead_s == pytest.approx(30, abs=1)
    assert {node for (check, node), state in _states(found, WISHES).items() if state == BAD} == {"b"}


def test_a_silent_node_costs_one_timeout_and_the_others_are_examined() -> None:
    mute = Reach("mute", (sys.executable, "-c", "import time; time.sleep(60)"))
    gone = Reach("gone", (sys.executable, "-c", "import sys; sys.exit('no meshwright here')"))
    nowhere = Reach("nowhere", ("/no/such/program",))
    wishes = Wishes(checks=WISHES.checks, write_bytes=0, timeout_s=3.0)
    answers: list[Evidence] = []

    def taken_s(number: int) -> float:
        start_s = time.monotonic()
        answers.append(examine([mute, _node("a"), gone, nowhere], wishes))
        return time.monotonic() - start_s

    assert least_s(taken_s, 15.0) < 15.0
    found = answers[-1]
    assert found.silent["mute"] == "no answer to 'clock' within 3 s"
    assert found.silent["gone"] == "no meshwright here"
    assert found.silent["nowhere"] == "/no/such/program: No such file or directory"
    diagnosis = diagnose(found, wishes)
    assert set(diagnosis.sick) == {"mute", "gone", "nowhere"}
    assert {each.state for each in diagnosis.verdicts if each.node == "a"} == {OK}


def test_a_driver_that_never_answers_makes_its_node_silent_and_no_other() -> None:
    wishes = Wishes(checks=("gpu",), write_bytes=0, timeout_s=4.0)
    found = examine([_node("a"), _node("b", with_gpus("gpus=2 1.stuck=1"))], wishes)
    assert found.silent == {"b": "no answer to 'facts' within 4 s"}
    assert diagnose(found, wishes).sick == ("b",)


def test_the_node_with_the_sick_gpu_is_named() -> None:
    wishes = Wishes(checks=("gpu", "nvlink"), write_bytes=0)
    well, sick = with_gpus("gpus=4 *.links=18"), with_gpus("gpus=4 *.links=18 3.uncorrected=2")
    diagnosis = diagnose(examine([_node("a", well), _node("b", sick), _node("c", well)], wishes), wishes)
    assert diagnosis.sick == ("b",)
    assert "GPU 3 (0000:3d:00): 2 uncorrected memory errors" in str(diagnosis)


def test_a_node_that_nobody_reaches_is_found_by_dialling() -> None:
    lie = (
        "from meshwright.clusters import probe as p\nreal = p._bind\n"
        "def bind(address, ports):\n    listener = real(address, ports)\n"
        "    port = listener.getsockname()[1]\n"
        "    listener.close()\n"
        "    class Closed:\n        getsockname = lambda self: (address, port)\n"
        "        def accept(self): raise OSError\n        def shutdown(self, how): pass\n"
        "        def close(self): pass\n"
        "    return Closed()\np._bind = bind"
    )
    found = examine([_node("a"), _lying("b", lie), _node("c")], WISHES)
    assert {node for (check, node), state in _states(found, WISHES).items() if (check, state) == ("ports", BAD)} == {
        "b"
    }
    assert any(dial.error == "Connection refused" for dial in found.dials if dial.target == "b")


def test_who_answers_with_another_token_is_another_machine() -> None:
    lie = "from meshwright.clusters import probe as p\nreal = p._greet\np._greet = lambda line, _: real(line, b'?\\n')"
    found = examine([_node("a"), _lying("b", lie)], WISHES)
    assert {dial.error for dial in found.dials if dial.target == "b"} == {"another machine answers there"}


def test_a_port_that_is_taken_is_the_first_node_s_fault_only() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        found = examine([_node("a"), _node("b")], Wishes(checks=("ports",), ports=(port, port), write_bytes=0))
    assert f"port {port}: Address already in use" in found.deaf["a"][0]
    assert diagnose(found, Wishes(checks=("ports",))).sick == ("a",)


def test_an_interface_is_chosen_by_name() -> None:
    found = examine([_node("a")], Wishes(checks=("ports",), interface="lo", write_bytes=0))
    assert [each.interface for each in found.listening["a"]] == ["lo"]
    nowhere = examine([_node("a")], Wishes(checks=("ports",), interface="eth99", write_bytes=0))
    assert "no interface 'eth99'" in str(diagnose(nowhere, Wishes(checks=("ports",), interface="eth99")))


def test_a_disk_that_cannot_be_written_is_that_of_its_node(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wishes = Wishes(checks=("disk",), directories=(str(tmp_path / "file"),))
    assert diagnose(examine([_node("a")], wishes), wishes).sick == ("a",)


@pytest.mark.slow
def test_an_all_reduce_of_real_ranks_is_timed_and_leaves_nothing_behind() -> None:
    wishes = Wishes(checks=("ports", "allreduce"), allreduce_bytes=4 << 20, write_bytes=0)
    marked = {"MESHWRIGHT_RUN_ID": "doctor-test"}
    found = examine([_node("a", marked), _node("b", marked)], wishes)
    assert found.reduced is not None
    assert (found.reduced.error, found.reduced.ranks, found.reduced.backend) == (None, 2, "gloo")
    assert found.reduced.bus_bytes_per_s is not None
    assert 1e6 < found.reduced.bus_bytes_per_s < 1e12
    assert list(carriers("doctor-test")) == []


@pytest.mark.slow
def test_the_node_whose_ranks_fail_is_found_by_trying_each_two() -> None:
    wishes = Wishes(checks=("ports", "allreduce"), allreduce_bytes=1 << 20, write_bytes=0, min_bus_bytes_per_s=1e6)
    broken = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONHOME": "/nowhere"}
    lie = f"import os\nfrom meshwright.clusters import probe as p\nos.environ.update({broken!r})"
    found = examine([_node("a"), _lying("b", lie), _node("c")], wishes)
    diagnosis = diagnose(found, wishes)
    assert len(found.pairs) == 3
    assert diagnosis.sick == ("b",)


def test_a_probe_goes_when_its_asker_does() -> None:
    probe = subprocess.Popen(PROBE_ARGV, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert probe.stdin is not None
    probe.stdin.close()
    assert probe.wait(20) == 0
    assert probe.stdout is not None
    probe.stdout.close()
