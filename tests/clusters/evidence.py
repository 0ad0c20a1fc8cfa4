"""Makes evidence of nodes that are well, for tests that spoil one thing of it."""

from dataclasses import replace
from typing import Any

from meshwright.clusters.evidence import Dial, Endpoint, Evidence, Reach
from meshwright.clusters.gpus import NO_LIBRARY, READ, Bus, Ecc, Gpu, GpuReport, Heat, Link, Memory, Repairs
from meshwright.clusters.interfaces import Interface
from meshwright.clusters.inventory import Directory, NodeFacts

__all__ = ["evidence", "facts", "gpu", "met", "node_with", "spoiled"]

VERSIONS = {"torch": "2.13.0+cu130", "nccl": "2.28.9", "python": "3.11.7", "meshwright": "0.1.0", "driver": "580.1"}


def gpu(index: int = 0, **more: Any) -> Gpu:
    """A healthy H100 on a board with switches."""
    well = Gpu(
        index,
        name="NVIDIA H100 80GB HBM3",
        uuid=f"GPU-{index}",
        bus=Bus(f"0000:{index:02x}:00", 5, 5, 16, 16),
        memory=Memory(80 << 30, 1 << 20, 0),
        heat=Heat(40, 90, 1980, 1980, ()),
        ecc=Ecc(True, 0, 0, 0),
        repairs=Repairs(0, False, 0, False, False),
        links=tuple(Link(each, True, "switch") for each in range(18)),
        recovery="none",
    )
    return replace(well, **more)


def facts(name: str, gpus: int = 0, **more: Any) -> NodeFacts:
    """A healthy node."""
    report = GpuReport(READ, driver="580.1", cuda="13.0", gpus=tuple(map(gpu, range(gpus))), xids=())
    well = NodeFacts(
        host=name,
        time_unix_s=0.0,
        python="/opt/python",
        versions=VERSIONS,
        cores=8,
        memory_bytes=64 << 30,
        interfaces=(Interface("eth0", address(name), True, bytes_per_s=12.5e9, wired=True),),
        directories=(Directory("/runs", 10**12, 1e9),),
        gpus=report if gpus else GpuReport(NO_LIBRARY, "no driver here"),
    )
    return replace(well, **more)


def address(name: str) -> str:
    """Of a node, from the last letter of its name."""
    return f"10.0.0.{ord(name[-1])}"


def met(nodes: str) -> dict[str, Any]:
    """Every node reaches every other one."""
    listening = {node: (Endpoint("eth0", address(node), 29500),) for node in nodes}
    dials = [
        Dial(one, other, listening[other][0], 0.001)
        for one in nodes
        for other in nodes
        if one != other or len(nodes) == 1
    ]
    return {"listening": listening, "dials": tuple(dials)}


def evidence(nodes: str = "abc", gpus: int = 0, **more: Any) -> Evidence:
    """Of nodes with names of one letter, all well and reached by ssh."""
    found = {node: facts(node, gpus) for node in nodes}
    parts = {"facts": found, **met(nodes), **more}
    return Evidence(tuple(Reach(node, ("ssh", node), by="ssh") for node in nodes), **parts)


def spoiled(node: str, nodes: str = "abc", **more: Any) -> Evidence:
    """As above, with something else about one node."""
    well = evidence(nodes)
    return replace(well, facts={**well.facts, node: replace(well.facts[node], **more)})


def node_with(*gpus: Gpu, **more: Any) -> Evidence:
    """One node with these GPUs."""
    return evidence(
        "a",
        facts={"a": replace(facts("a"), gpus=GpuReport(READ, driver="580.1", cuda="13.0", gpus=gpus, xids=(), **more))},
    )
