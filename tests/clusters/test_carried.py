"""Any bytes that a kernel takes as words and variables reach the ranks of every cluster as they were given.

Each cluster's line is followed for real as far as one machine goes: pipes, the run's folder, a login shell, the script
of sbatch, a manifest as Kubernetes reads it; at its end the rank's own bootstrap becomes a program that tells what the
kernel gave it. MESHWRIGHT_CARRIED=1000 tries that many examples of each.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.clusters import bootstrap
from meshwright.clusters.base import Program, Secret, StartPlan, StartRequest
from meshwright.clusters.environment import rank_environment
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.files import FileLine, StepHandle, step_folder
from meshwright.clusters.kubernetes import plan_kubernetes
from meshwright.clusters.kubernetes_manifest import KubernetesOptions
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.mpi import MpiOptions, plan_mpi
from meshwright.clusters.mpi_handle import MpiHandle
from meshwright.clusters.mpi_rank import own_environment
from meshwright.clusters.pipes import Far, PipeHandle
from meshwright.clusters.prefork import escape
from meshwright.clusters.ray import RayOptions, plan_ray
from meshwright.clusters.ray_line import agent_class
from meshwright.clusters.saved import plan_from
from meshwright.clusters.setup import run_setup
from meshwright.clusters.slurm import SlurmOptions, plan_slurm
from meshwright.clusters.slurm_array import array_of
from meshwright.clusters.ssh import SshHost, SshOptions, plan_ssh

EXAMPLES = int(os.environ.get("MESHWRIGHT_CARRIED", "25"))
RUN_ID = f"carried-{os.getpid()}"  # processes of a run id are swept from the machine, also by other tests
Given = tuple[tuple[str, ...], dict[str, str], dict[str, str]]
TRICKY = [
    *(
        "",
        " ",
        "\n",
        "\r\n",
        "\t",
        "a b",
        "'",
        '"',
        "\\",
        "\\n",
        "`id`",
        "$(id)",
        "$HOME",
        "${local_rank}",
        "$$",
        "$$$",
    ),
    *(
        "$(MESHWRIGHT_KEY)",
        "$$(x)",
        "-",
        "--",
        "-c",
        "--help",
        "%",
        "%%",
        "%j",
        "%n",
        "{name}",
        "{}",
        "*",
        "~",
        "!",
        "#",
    ),
    *(
        "a=b",
        "a;b",
        "a|b",
        "a&b",
        "a>b",
        "null",
        "- x",
        "a: b",
        "&a",
        "*a",
        "!!python/name:x",
        "---",
        "\x1b[31m",
        "\x85",
    ),
    *("é", "\u2028", "\ufeff", "𝄞", "日本", "\udcff", "\udcc3\udca8", "a\udc80\n'\udcfe"),
]
ANY = st.one_of(
    st.sampled_from(TRICKY),
    st.lists(st.sampled_from(TRICKY), max_size=4).map("".join),
    st.binary(max_size=24).map(lambda found: os.fsdecode(found.replace(b"\0", b""))),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)
NAMES = st.one_of(
    st.from_regex(r"[A-Z][A-Z_]{1,6}[0-9]", fullmatch=True), st.sampled_from(["LC_CTYPE", "LANG", "PYTHONPATH", "IFS_"])
)
GIVEN = st.tuples(
    st.lists(ANY, max_size=4).map(tuple),
    st.dictionaries(NAMES, ANY, max_size=3),
    st.dictionaries(NAMES.map("S_{}".format), ANY, max_size=2),
)
TELLS = """\
import sys
with open("/proc/self/cmdline", "rb") as w, open("/proc/self/environ", "rb") as e, open(sys.argv[1], "wb") as out:
    out.write(w.read() + b"\\0\\1\\0" + e.read())
"""
examples = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def _bytes(found: Mapping[str, str]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(value) for name, value in found.items()}


class Place:
    """A run directory, and the program at the far end."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.out = folder / "run \udcff $(x) 'y'", folder / "out"
        for name in ("logs", "private", "ranks"):
            (self.run_dir / name).mkdir(parents=True, exist_ok=True)
        (folder / "tells.py").write_text(TELLS)
        self.program = (sys.executable, "-I", "-S", str(folder / "tells.py"), str(self.out))

    def request(self, words: tuple[str, ...], env: Mapping[str, str], secrets: Mapping[str, str]) -> StartRequest:
        """Of one rank."""
        hidden = tuple(Secret(name, "from_env X", value) for name, value in secrets.items())
        program = Program((*self.program, *words), self.run_dir, env=tuple(env.items()), inherit=(), secrets=hidden)
        return StartRequest("j", RUN_ID, self.run_dir, program)

    def told(self, run: Callable[[], object]) -> tuple[list[bytes], dict[bytes, bytes]]:
        """What the program at the far end tells of its further words and its variables."""
        self.out.unlink(missing_ok=True)
        run()
        words, _, pairs = self.out.read_bytes().partition(b"\0\1\0")
        found = dict(each.split(b"=", 1) for each in pairs.split(b"\0") if each)
        return words.removesuffix(b"\0").split(b"\0")[len(self.program) :] if words.count(b"\0") else [], found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A fresh one."""
    return Place(tmp_path)


def _rank(message: Mapping[str, Any], *, by_torch: bool = True, inherited: Mapping[str, str] | None = None) -> None:
    """The end of every line: a node's first rank, as its agent starts it."""
    from torch.distributed.elastic.utils import macros

    plan, passed = message["plan"], message.get("passed", {})
    node = plan["nodes"][message["node"]]
    around = {"PATH": os.environ["PATH"], **(inherited or {})}
    find = rank_environment if by_torch else own_environment
    env = {**passed, **find(plan, node, secrets=message["secrets"], environment=around)}
    words = [str(os.getpid()), plan["run_dir"], node["cwd"], *node["argv"]]
    if by_torch:
        words = macros.substitute([escape(word) for word in words], "0")
    argv = [sys.executable, "-I", "-S", str(bootstrap.__file__), *words]
    subprocess.run(argv, env={"RANK": "0", **env}, check=True, stdin=subprocess.DEVNULL)


def _cat() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def _first_line(agent: "subprocess.Popen[bytes]") -> Any:
    """What a process was told first."""
    assert agent.stdin is not None
    assert agent.stdout is not None
    agent.stdin.close()
    with agent.stdout as told:
        line = told.read().split(b"\n")[0]
    agent.wait()
    return json.loads(line)


def _by_pipe(plan: StartPlan, secrets: Mapping[str, str], passed: Mapping[str, str] | None = None) -> Any:
    far = Far({} if passed is None else {"passed": dict(passed)}, None, lambda name, code: {}, lambda event: None)
    agents = {node.name: _cat() for node in plan.nodes}
    PipeHandle(plan, agents, secrets, far=far)
    return _first_line(agents[plan.nodes[0].name])


def _local(place: Place, found: Given) -> None:
    request = place.request(*found)
    _rank(_by_pipe(plan_local(request, Machine("here", 4)), found[2]))


def _ssh(place: Place, found: Given) -> None:
    host = SshHost("gpu01", "gpu01", env=found[1])
    plan = plan_ssh(place.request(found[0], {}, found[2]), [host], SshOptions())
    _rank(_by_pipe(plan, found[2]))


def _ssh_passed(place: Place, found: Given) -> None:
    plan = plan_ssh(place.request(found[0], {}, found[2]), [SshHost("gpu01", "gpu01")], SshOptions())
    _rank(_by_pipe(plan, found[2], passed=found[1]))


def _slurm(place: Place, found: Given) -> None:
    plan = plan_slurm(place.request(*found), SlurmOptions())
    saved = plan_from(json.loads(json.dumps(plan.as_dict())))
    handle = StepHandle(saved, found[2], words=["true"], warning=lambda asked: None)
    _rank(next(FileLine(step_folder(place.run_dir), 0).messages()))
    while not handle.done:
        handle.poll(0.05)


def _mpi(place: Place, found: Given) -> None:
    plan = plan_mpi(place.request(*found), MpiOptions("openmpi"))
    handle = MpiHandle(replace(plan, nodes=(replace(plan.nodes[0], agent=("cat",)),)), found[2])
    job = handle._job
    _rank({**_first_line(job), "node": 0}, by_torch=False, inherited={"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"})


def _ray(place: Place, found: Given) -> None:
    plan = plan_ray(place.request(*found), RayOptions())
    actor = agent_class()()
    with pytest.MonkeyPatch.context() as patch:
        util = types.SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")
        context = types.SimpleNamespace(get_node_id=lambda: "6f1c")
        pretended = types.SimpleNamespace(util=util, get_runtime_context=lambda: context)
        patch.setitem(sys.modules, "ray", pretended)
        actor.start(["cat"])
    message = {"plan": asdict(plan), "node": 0, "secrets": found[2]}
    line = json.dumps(message).encode() + b"\n"
    for at in range(0, len(line), 1000):
        actor.write(line[at : at + 1000])
    actor.write(b"")
    said = b"".join(iter(actor.read, b""))
    actor._agent.stdout.close()
    assert actor.wait() == 0
    _rank(json.loads(said))


def _expanded(word: str) -> str:
    """What Kubernetes makes of a word of a command where no variable is known: `$$` is `$`, other references stay."""
    return re.sub(r"\$\$", "$", word)


def _kubernetes(place: Place, found: Given) -> None:
    request = place.request(found[0], found[1], {})
    submission = plan_kubernetes(request, KubernetesOptions("image", python=sys.executable)).submission
    assert submission is not None
    config, _ = yaml.safe_load_all(submission.script.encode())
    told = subprocess.run(
        [sys.executable, "-IS", "-c", "import os, sys; sys.stdout.write(os.environ['MESHWRIGHT_PLAN'])"],
        env={"MESHWRIGHT_PLAN": config["data"]["plan"]},
        capture_output=True,
        check=True,
    )
    plan = json.loads(told.stdout)
    plan["run_dir"] = str(place.run_dir)  # which a pod has made
    _rank({"plan": plan, "node": 0, "secrets": found[2]})


LINES = {
    "local": _local,
    "ssh": _ssh,
    "ssh, passed on": _ssh_passed,
    "slurm": _slurm,
    "mpi": _mpi,
    "ray": _ray,
    "kubernetes": _kubernetes,
}


@pytest.mark.parametrize("cluster", LINES)
@examples
@given(found=GIVEN)
def test_words_and_variables_reach_a_rank_as_given(cluster: str, found: Given, place: Place) -> None:
    words, pairs = place.told(lambda: LINES[cluster](place, found))
    assert words == [os.fsencode(word) for word in found[0]]
    wanted = _bytes({**found[1], **found[2]})
    assert {name: pairs.get(name) for name in wanted} == wanted


def test_a_program_may_have_any_name(place: Place, tmp_path: Path) -> None:
    for number, name in enumerate(["-a b", "$(x)", "'\"\n", "\udcff"]):
        program = tmp_path / str(number) / name
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nprintf %s "$1" >{shlex.quote(str(place.out))}\n')
        program.chmod(0o700)
        request = place.request((), {}, {})
        found = replace(request, program=replace(request.program, argv=(str(program), name)))
        _rank(_by_pipe(plan_local(found, Machine("here", 4)), {}))
        assert place.out.read_bytes() == os.fsencode(name)


@pytest.mark.parametrize("shell", ["sh", "bash"])
@examples
@given(env=st.dictionaries(NAMES, ANY, max_size=3))
def test_the_login_shell_of_a_host_hands_the_agent_what_was_planned(
    shell: str, env: dict[str, str], place: Place
) -> None:
    host = SshHost("gpu01", "gpu01", env=env, python="/opt/my py/'$(x)'/python3")
    plan = plan_ssh(place.request((), {}, {}), [host], SshOptions())
    _, pairs = place.told(lambda: _logged_in(shell, plan.nodes[0].agent[-1], place, host))
    assert {name: pairs.get(name) for name in _bytes(env)} == _bytes(env)


def _logged_in(shell: str, command: str, place: Place, host: SshHost) -> None:
    """What sshd does with a command; the program that tells stands for the host's interpreter."""
    here = place.out.parent / "py 'x' $(y)"
    here.write_text(f'#!/bin/sh\nexec {shlex.join(place.program)} "$@"\n')
    here.chmod(0o700)
    replaced = command.replace(shlex.quote(host.python), shlex.quote(str(here)))
    subprocess.run([shell, "-c", replaced], cwd=place.run_dir, env={"PATH": os.environ["PATH"]}, check=True)


def test_a_hosts_interpreter_that_env_would_take_for_a_variable_is_refused(place: Place) -> None:
    host = SshHost("gpu01", "gpu01", env={"A": "b"}, python="/opt/a=b/python3")
    with pytest.raises(UnavailableError, match=r"host gpu01: python '/opt/a=b/python3' has a '='"):
        plan_ssh(place.request((), {}, {}), [host], SshOptions())


RUN_DIRS = ANY.filter(lambda word: not re.search(r"[\x00-\x1f\x7f\\]", word)).map("/runs/a{}".format)


@examples
@given(run_dir=RUN_DIRS)
def test_the_script_of_sbatch_starts_the_launcher_of_that_directory(run_dir: str, place: Place) -> None:
    request = replace(place.request((), {}, {}), run_dir=Path(run_dir))
    plan = plan_slurm(request, SlurmOptions(python="/opt/py"))
    assert plan.submission is not None
    wanted = [b"-u", b"-m", b"meshwright.launch.batch", os.fsencode(str(Path(run_dir)))]
    assert _script(place, plan.submission.script, {}) == wanted
    array = array_of([plan, plan], "j", directory=Path("/sweeps"), max_parallel=1)
    script = array.script.replace(">>", ">>/dev/null #")
    assert _script(place, script, {"SLURM_ARRAY_TASK_ID": "1"}) == wanted
    output = next(word for word in plan.submission.argv if word.startswith("--output="))
    assert output.removeprefix("--output=").replace("%%", "%") == f"{Path(run_dir)}/launcher.log"
    assert "%" not in output.replace("%%", "")


def _script(place: Place, script: str, env: Mapping[str, str]) -> list[bytes]:
    """The words that a script on standard input hands the interpreter on a node."""
    text = script.replace("exec /opt/py", f"exec {shlex.join(place.program)}")
    around = {"PATH": os.environ["PATH"], **env}
    words, _ = place.told(lambda: subprocess.run(["sh"], input=os.fsencode(text), env=around, check=True))
    return words


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\tb"])
def test_a_run_directory_that_sbatch_would_read_otherwise_is_refused(name: str, place: Place) -> None:
    with pytest.raises(UnavailableError, match=r"Slurm would read .* otherwise; set logs.dir"):
        plan_slurm(replace(place.request((), {}, {}), run_dir=Path("/runs") / name), SlurmOptions())


SAVES = ("USR2", "180")
"""How a pod is told by what signal ranks save, and for how long."""


@examples
@given(tail=ANY.filter(lambda word: not re.search(r"[\ud800-\udfff]", word)))
def test_kubernetes_expands_nothing_in_the_command_of_a_pod(tail: str, place: Place) -> None:
    options = KubernetesOptions("image", python=f"/opt/{tail}")
    submission = plan_kubernetes(place.request((), {}, {}), options).submission
    assert submission is not None
    _, jobset = yaml.safe_load_all(submission.script.encode())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", command[0])
    assert [_expanded(word) for word in command] == [f"/opt/{tail}", "-u", "-m", "meshwright.clusters.pod", *SAVES]


def test_bytes_that_a_manifest_cannot_hold_are_refused(place: Place) -> None:
    with pytest.raises(UnavailableError, match=r"command: '/opt/\\udcff/python3' is not Unicode text"):
        plan_kubernetes(place.request((), {}, {}), KubernetesOptions("image", python="/opt/\udcff/python3"))


@examples
@given(env=st.dictionaries(NAMES, ANY, max_size=3))
def test_a_setup_script_hands_on_every_variable_that_it_does_not_touch(env: dict[str, str], place: Place) -> None:
    around = {"PATH": os.environ["PATH"], "SHLVL": "7", **env}
    left = run_setup("true", cwd="/", env=around, log=place.out)
    assert _bytes(left) == _bytes(around)
