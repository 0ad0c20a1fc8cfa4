"""Can nodes meet, and how fast do they talk: verdicts over dials and timed all-reduces. Pure."""

from collections.abc import Iterator, Sequence

from meshwright.clusters.evidence import Dial, Endpoint, Evidence, Reduced, Wishes, endpoint_of
from meshwright.clusters.gpus import Gpu
from meshwright.clusters.hardware import Expected, catalog
from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING, Verdict

__all__ = ["allreduce_verdicts", "expected_bandwidth", "port_verdicts", "slow_nodes"]


def port_verdicts(evidence: Evidence, wishes: Wishes) -> Iterator[Verdict]:
    """Which interface and port of every node the others get through to, or who does not get through to whom."""
    cut_off = _cut_off(evidence)
    for node in evidence.facts:
        failed = [dial for dial in evidence.dials if dial.target == node and dial.seconds is None]
        if node in cut_off:
            out = [dial for dial in evidence.dials if dial.source == node]
            yield Verdict("ports", node, BAD, f"it reaches no other node: {_failures(out)}", _open(wishes))
        elif not evidence.listening.get(node):
            said = "; ".join(evidence.deaf.get(node, ())) or f"no interface {wishes.interface!r} that is up"
            remedy = "name another rendezvous.interface or port, or write auto"
            yield Verdict("ports", node, BAD, f"nothing can listen: {said}", remedy)
        elif endpoint_of(node, evidence) is not None:
            yield _met(node, evidence)
        elif {dial.source for dial in failed} <= cut_off:
            yield Verdict("ports", node, OK, f"reached by all but {', '.join(sorted(cut_off))}")
        else:
            yield Verdict("ports", node, BAD, f"not reached: {_failures(failed)}", _open(wishes))


def _open(wishes: Wishes) -> str:
    ports = "TCP" if wishes.ports is None else f"TCP {wishes.ports[0]}-{wishes.ports[1]}"
    return f"let nodes reach each other by {ports} (firewall, security group), or name rendezvous.interface"


def _met(node: str, evidence: Evidence) -> Verdict:
    endpoint = endpoint_of(node, evidence)
    assert endpoint is not None, node
    tries = [dial for dial in evidence.dials if dial.target == node and dial.endpoint == endpoint]
    slowest_ms = max(dial.seconds or 0.0 for dial in tries) * 1e3
    found = f"{_place(endpoint)}, reached from {_nodes(tries)} in {slowest_ms:.1f} ms"
    if any(each.address == endpoint.address and each.public for each in evidence.facts[node].interfaces):
        remedy = "use a private interface, or close the ports to the internet: the ranks' store asks for no password"
        return Verdict("ports", node, WARNING, f"{found}; a public address", remedy)
    return Verdict("ports", node, OK, found)


def _nodes(tries: Sequence[Dial]) -> str:
    others = [dial for dial in tries if dial.source != dial.target]
    return "itself" if not others else "1 node" if len(others) == 1 else f"{len(others)} nodes"


def _failures(failed: Sequence[Dial]) -> str:
    told = [f"{dial.source} to {dial.target} at {_place(dial.endpoint)}: {dial.error}" for dial in failed]
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    return "; ".join(told[:3]) + more


def _place(endpoint: Endpoint) -> str:
    return f"{endpoint.interface} {endpoint.address}:{endpoint.port}"


def _cut_off(evidence: Evidence) -> set[str]:
    """Nodes that reach nobody else: what they could not dial speaks against them, not against the others."""
    meant: dict[str, set[str]] = {}
    reached: dict[str, set[str]] = {}
    for dial in evidence.dials:
        if dial.source != dial.target:
            meant.setdefault(dial.source, set()).add(dial.target)
            if dial.seconds is not None:
                reached.setdefault(dial.source, set()).add(dial.target)
    lone = {source for source in meant if source not in reached}
    return lone if len(lone) < len(meant) else set()


def expected_bandwidth(evidence: Evidence, wishes: Wishes, reduced: Reduced) -> Expected | None:
    """The least bus bandwidth that passes: the job's own, or what the catalog says of the narrowest link."""
    if wishes.min_bus_bytes_per_s is not None:
        return Expected(wishes.min_bus_bytes_per_s, "health.allreduce.min_busbw_gbps of the job")
    if reduced.backend == "nccl" and len(reduced.nodes) == 1:
        return _inside(evidence.facts[reduced.nodes[0]].gpus.gpus)
    if all(reach.by == "here" for reach in evidence.reaches):
        return catalog().on_loopback()
    found = [_across(node, evidence, reduced.backend) for node in reduced.nodes]
    known = [each for each in found if each is not None]
    return min(known, key=lambda each: each.bytes_per_s) if len(known) == len(found) else None


def _inside(gpus: Sequence[Gpu]) -> Expected | None:
    linked = all(any(link.active for link in gpu.links or ()) for gpu in gpus)
    return catalog().between_gpus(gpus[0].name, linked=linked, generation=gpus[0].bus.max_generation)


def _across(node: str, evidence: Evidence, backend: str) -> Expected | None:
    endpoint = endpoint_of(node, evidence)
    if endpoint is None:
        return None
    speeds = {each.name: each.bytes_per_s for each in evidence.facts[node].interfaces}
    return catalog().between_nodes(speeds.get(endpoint.interface), backend, interface=endpoint.interface)


def allreduce_verdicts(evidence: Evidence, wishes: Wishes) -> Iterator[Verdict]:
    """The all-reduce of all nodes, and where it is slow, whose fault that is."""
    reduced = evidence.reduced
    if reduced is None:
        why = "the nodes do not meet" if evidence.silent or _unmet(evidence) else "one GPU has nothing to reduce"
        yield Verdict("allreduce", None, SKIPPED, why)
        return
    expected = expected_bandwidth(evidence, wishes, reduced)
    verdict = _weighed(reduced, expected)
    yield verdict
    if verdict.state == BAD:
        floor = 0.0 if expected is None else expected.bytes_per_s
        for node in slow_nodes(evidence.pairs, floor):
            found = "slow, or fails, with every other node"
            yield Verdict("allreduce", node, BAD, found, "leave it out, and see to its network card")


def _unmet(evidence: Evidence) -> bool:
    return any(endpoint_of(node, evidence) is None for node in evidence.nodes)


def _weighed(reduced: Reduced, expected: Expected | None) -> Verdict:
    speed = reduced.bus_bytes_per_s
    if speed is None:
        remedy = "see what it says; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL tells more"
        return Verdict("allreduce", None, BAD, f"{_said(reduced)} failed: {reduced.error}", remedy)
    found = f"{_said(reduced)}: {speed / 1e9:.2f} GB/s"
    if expected is None:
        return Verdict("allreduce", None, OK, f"{found}; nothing is known of the link to compare it with")
    found += f", expected at least {expected.bytes_per_s / 1e9:.2f} ({expected.why})"
    if speed < expected.bytes_per_s:
        return Verdict("allreduce", None, BAD, found, _remedy(reduced))
    return Verdict("allreduce", None, OK, found)


def _remedy(reduced: Reduced) -> str:
    if reduced.backend == "nccl":
        return "see nvidia-smi topo -m and NCCL_DEBUG=INFO: is NVLink or InfiniBand used, and GPUDirect"
    return "see what else uses the link or the cores, and whether rendezvous.interface names the fast one"


def _said(reduced: Reduced) -> str:
    nodes = "1 node" if len(reduced.nodes) == 1 else f"{len(reduced.nodes)} nodes"
    return f"{reduced.backend}, {reduced.num_bytes / 2**20:g} MiB over {reduced.ranks} ranks of {nodes}"


def slow_nodes(pairs: Sequence[Reduced], floor_bytes_per_s: float) -> tuple[str, ...]:
    """Nodes whose every pair is slow or fails while some other pair is not.

    >>> def pair(one, other, speed):
    ...     return Reduced((one, other), "gloo", 2, 8, speed)
    >>> slow_nodes([pair("a", "b", 9.0), pair("a", "c", 1.0), pair("b", "c", None)], 5.0)
    ('c',)
    """
    good = [pair for pair in pairs if pair.bus_bytes_per_s and pair.bus_bytes_per_s >= floor_bytes_per_s]
    everybody = dict.fromkeys(node for pair in pairs for node in pair.nodes)
    well = {node for pair in good for node in pair.nodes}
    return tuple(node for node in everybody if node not in well) if good else ()
