"""Is a node fit: whether it answers, its clock, versions and disks. Verdicts over evidence; pure."""

from collections import Counter
from collections.abc import Callable, Iterator
from shlex import join

from meshwright.clusters.evidence import Clock, Evidence, Wishes
from meshwright.clusters.health_gpus import gpu_verdicts, nvlink_verdicts
from meshwright.clusters.health_network import allreduce_verdicts, port_verdicts
from meshwright.clusters.inventory import Directory
from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING, Diagnosis, Verdict

__all__ = ["diagnose"]

_CLOCK_BAD_S, _CLOCK_WARNING_S = 1.0, 0.1
"""Causes of failures are told apart by times to 0.1 s; certificates and tokens suffer from seconds."""

_FREE_BAD_BYTES, _FREE_WARNING_BYTES = 1e9, 10e9
_SLOW_WRITE_BYTES_PER_S = 20e6

_REMEDIES = (
    ("Host key verification failed", "compare the host's key with its owner's, then add it to known_hosts"),
    ("Permission denied", "give the node your public key (ssh-copy-id), or name the right user"),
    ("Could not resolve", "write the name as the resolver knows it, or an address"),
    ("Connection refused", "start sshd there, or name the right port"),
    ("timed out", "see whether the node is up and reachable from here"),
    ("No module named", "install the same meshwright for that node's Python, or name the right MESHWRIGHT_PYTHON"),
    ("not found", "install the same Python there, or name the right MESHWRIGHT_PYTHON"),
)


def diagnose(evidence: Evidence, wishes: Wishes, excluded: tuple[str, ...] = ()) -> Diagnosis:
    """All verdicts over what was found."""
    makers: dict[str, Callable[[], Iterator[Verdict]]] = {
        "ssh": lambda: _reach(evidence),
        "clock": lambda: _clocks(evidence),
        "versions": lambda: _versions(evidence),
        "ports": lambda: port_verdicts(evidence, wishes),
        "disk": lambda: _disks(evidence),
        "gpu": lambda: gpu_verdicts(evidence, wishes),
        "nvlink": lambda: nvlink_verdicts(evidence),
        "allreduce": lambda: allreduce_verdicts(evidence, wishes),
    }
    silent = [] if "ssh" in wishes.checks else [each for each in _reach(evidence) if each.state == BAD]
    verdicts = [verdict for check, make in makers.items() if check in wishes.checks for verdict in make()]
    return Diagnosis(evidence.nodes, (*silent, *verdicts), excluded)


def _reach(evidence: Evidence) -> Iterator[Verdict]:
    for reach in evidence.reaches:
        why = evidence.silent.get(reach.name)
        if why is None:
            yield Verdict("ssh", reach.name, SKIPPED if reach.by == "here" else OK, f"answers ({reach.by})")
            continue
        otherwise = f"run it by hand: {join(reach.argv)}"
        remedy = next((remedy for sign, remedy in _REMEDIES if sign in why), otherwise)
        yield Verdict("ssh", reach.name, BAD, f"no answer: {why}", remedy)


def _clocks(evidence: Evidence) -> Iterator[Verdict]:
    for node, clock in evidence.clocks.items():
        off_s = max(0.0, abs(clock.ahead_s) - clock.unsure_s)
        state = BAD if off_s > _CLOCK_BAD_S else WARNING if off_s > _CLOCK_WARNING_S else OK
        remedy = "" if state == OK else "set its clock by NTP: chronyc tracking, or timedatectl set-ntp true"
        yield Verdict("clock", node, state, _said(clock), remedy)


def _said(clock: Clock) -> str:
    word = "ahead of" if clock.ahead_s >= 0 else "behind"
    return f"{_time(abs(clock.ahead_s))} {word} this machine, give or take {_time(clock.unsure_s)}"


def _time(seconds: float) -> str:
    """Seconds in a unit that people read.

    >>> _time(0.0004), _time(2.5)
    ('0.4 ms', '2.5 s')
    """
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.3g} s"


def _versions(evidence: Evidence) -> Iterator[Verdict]:
    """Each node against what most nodes have; the first node's counts where there is no majority."""
    names = list(dict.fromkeys(name for facts in evidence.facts.values() for name in facts.versions))
    usual = {
        name: _usual([_release(name, facts.versions.get(name)) for facts in evidence.facts.values()]) for name in names
    }
    for node, facts in evidence.facts.items():
        if facts.versions.get("torch") is None:
            found, remedy = f"{facts.python} has no torch", f"{facts.python} -m pip install torch"
            yield Verdict("versions", node, BAD, found, remedy)
            continue
        own = {name: _release(name, facts.versions.get(name)) for name in names}
        odd = [name for name in names if own[name] != usual[name]]
        if odd:
            found = ", ".join(f"{name} {own[name] or 'none'} (others: {usual[name] or 'none'})" for name in odd)
            yield Verdict("versions", node, BAD, found, f"install there what the others have, for {facts.python}")
        else:
            told = ", ".join(f"{name} {own[name]}" for name in sorted(names) if own[name])
            yield Verdict("versions", node, OK, told)


def _release(name: str, version: str | None) -> str | None:
    """What must be equal: of Python the first two numbers, of everything else all.

    >>> _release("python", "3.11.7"), _release("torch", "2.13.0+cpu")
    ('3.11', '2.13.0+cpu')
    """
    return ".".join(version.split(".")[:2]) if version and name == "python" else version


def _usual(found: list[str | None]) -> str | None:
    return Counter(found).most_common(1)[0][0]


def _disks(evidence: Evidence) -> Iterator[Verdict]:
    for node, facts in evidence.facts.items():
        for directory in facts.directories:
            yield _disk(node, directory)


def _disk(node: str, directory: Directory) -> Verdict:
    if directory.error is not None or directory.free_bytes is None:
        remedy = "make it writable for this user, or choose another directory (logs.dir, checkpoint.dir)"
        return Verdict("disk", node, BAD, f"{directory.path} cannot be written: {directory.error}", remedy)
    speed = directory.write_bytes_per_s
    found = f"{directory.path}: {directory.free_bytes / 1e9:.1f} GB free"
    found += "" if speed is None else f", writes {speed / 1e6:.0f} MB/s"
    if directory.free_bytes < _FREE_WARNING_BYTES:
        state = BAD if directory.free_bytes < _FREE_BAD_BYTES else WARNING
        return Verdict("disk", node, state, found, "free some space, or choose another directory")
    if speed is not None and speed < _SLOW_WRITE_BYTES_PER_S:
        return Verdict("disk", node, WARNING, found, "checkpoints will take long: choose a faster disk")
    return Verdict("disk", node, OK, found)
