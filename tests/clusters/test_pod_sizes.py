"""A plan for more pods on some of them."""

from pathlib import Path

from meshwright.clusters.base import StartRequest
from meshwright.clusters.kubernetes import plan_kubernetes
from meshwright.clusters.kubernetes_manifest import KubernetesOptions
from meshwright.clusters.pod_sizes import plan_of_pods, sized_files
from meshwright.clusters.request import Program


def test_pods_that_came_are_the_first_nodes_by_their_own_names() -> None:
    request = StartRequest("j", "r", Path("/r"), Program(("x",), Path("/")), num_nodes=3, ranks_per_node=2)
    plan = plan_kubernetes(request, KubernetesOptions("x"))
    found = plan_of_pods(plan, (0, 2))
    assert [(node.name, node.index, node.ranks) for node in found.nodes] == [
        ("j-r-node-0-0", 0, (0, 1)),
        ("j-r-node-0-2", 1, (2, 3)),
    ]
    env = dict(found.nodes[1].env)
    assert (env["MESHWRIGHT_HOST"], env["MESHWRIGHT_NODE"], found.meeting) == ("j-r-node-0-2", "1", plan.meeting)


def test_other_files_stay_and_that_of_sizes_goes() -> None:
    files = {"job.json": '{"nodes": 2}', "sizes.json": '{"1": {"nodes": 1}, "2": {}}', "more": "x"}
    assert sized_files(files, 1) == {"job.json": '{"nodes": 1}', "more": "x"}
    assert sized_files(files, 2) == {"job.json": '{"nodes": 2}', "more": "x"}
