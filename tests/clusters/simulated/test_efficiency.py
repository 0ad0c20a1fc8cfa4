"""What hardware reaches: times grow with work and fall with rates."""

from dataclasses import MISSING, Field, fields, replace
from typing import Any

import pytest
import yaml

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, fitted
from meshwright.clusters.simulated.efficiency import FILE, Compute, Links, Reserves, Unhidden
from meshwright.parallel.work import Attention, Product, Work

A100, H100 = gpu("A100"), gpu("H100")
REACHED = fitted()
_KINDS = ("bf16", "fp32")
BIG = Product(8192, 8192, 8192)


def test_the_catalog_says_how_it_was_fitted() -> None:
    told = yaml.safe_load(FILE.read_text())
    assert {"rows", "step_time_mape_percent", "cross_validated_by_source_mape_percent"} <= set(told["fit"])
    for part, kind in (("compute", Compute), ("links", Links), ("reserves", Reserves)):
        assert set(told[part]) == {each.name for each in fields(kind) if _is_fitted(each)}


def _is_fitted(field: Field[Any]) -> bool:
    """What is not is measured on a machine, and a GPU of the catalog has its default."""
    return field.default is MISSING and field.default_factory is MISSING


def test_no_product_is_faster_than_the_peak() -> None:
    for kind in (A100, H100):
        for precision in ("bf16", "fp8"):
            peak = kind.flops_per_s.get(precision, kind.flops_per_s["bf16"])
            assert BIG.flops / REACHED.matmul_s(replace(BIG, precision=precision), kind) < peak


def test_small_and_thin_products_are_slow_by_themselves() -> None:
    def rate(product: Product) -> float:
        return product.flops / REACHED.matmul_s(product, A100)

    assert rate(Product(256, 256, 256)) < 0.2 * rate(BIG)
    assert rate(Product(8192, 8192, 64)) < 0.8 * rate(BIG)


def test_widths_that_tensor_cores_cannot_load_at_once_cost_more() -> None:
    heads = [Product(2048, 2048, width, batch=48) for width in (144, 150, 152)]
    aligned, odd, wider = (REACHED.matmul_s(each, A100) for each in heads)
    assert odd > 3 * aligned
    assert odd > 3 * wider


def test_narrow_products_are_not_slower_and_a_gpu_without_them_computes_in_16_bits() -> None:
    assert REACHED.matmul_s(replace(BIG, precision="fp8"), H100) < REACHED.matmul_s(BIG, H100)
    assert REACHED.flops_per_s(A100, "fp8") >= REACHED.flops_per_s(A100)


def test_products_of_four_bytes_move_twice_as_much_at_a_rate_of_their_own() -> None:
    cpu = replace(A100, flops_per_s={"fp32": 1e11, "bf16": 1e15}, sustained={})
    assert REACHED.flops_per_s(cpu, "fp32") == 1e11 * REACHED.compute.matmul
    fast = replace(cpu, flops_per_s={"bf16": 1e18, "fp32": 1e18})
    moved_s = [REACHED.matmul_s(Product(10**6, 8, 8, precision=each), fast) for each in _KINDS]
    start_s = REACHED.compute.kernel_s
    assert moved_s[1] - start_s == pytest.approx(2 * (moved_s[0] - start_s), rel=1e-3)


def test_the_host_is_a_floor_or_comes_on_top() -> None:
    host_s = 3 * REACHED.compute.host_s
    assert REACHED.floor_s(1e-9, 3) == pytest.approx(host_s)
    assert REACHED.floor_s(100 * host_s, 3) == pytest.approx(100 * host_s)
    assert REACHED.floor_s(1.0, 3, in_series=True) == pytest.approx(1.0 + 3 * REACHED.compute.waiting_s)


def test_a_ring_sends_all_but_one_part_of_n() -> None:
    exact = replace(REACHED, links=replace(REACHED.links, nvlink=1.0, nvlink_s=0.0))
    group = Cluster(gpu=A100, num_gpus=8).group(8)
    assert exact.gather_s(8e9, group) == pytest.approx(7e9 / 300e9)
    assert exact.gather_s(8e9, Cluster(gpu=A100, num_gpus=8).group(1)) == 0.0


def test_collectives_take_longer_across_nodes_and_with_more_bytes() -> None:
    cluster = Cluster(gpu=A100, num_gpus=64)
    within, across = cluster.group(8), cluster.group(8, 8)
    assert REACHED.gather_s(1e9, across) > 5 * REACHED.gather_s(1e9, within)
    assert REACHED.gather_s(2e9, across) > REACHED.gather_s(1e9, across)
    assert REACHED.send_s(1e9, cluster, 8) > REACHED.send_s(1e9, cluster, 1)


def test_small_collectives_take_a_latency_for_each_further_node() -> None:
    cluster = Cluster(gpu=A100, num_gpus=512)
    few, many = (REACHED.gather_s(1.0, cluster.group(nodes, 8)) for nodes in (2, 64))
    assert many - few == pytest.approx(62 * REACHED.links.network_s, rel=1e-3)


def test_eight_gpus_of_a_node_reach_what_nccl_was_measured_at() -> None:
    """8 A100 of one node: 194 GB/s of bus bandwidth at 256 MiB, 172 at 64 MiB (ml-engineering, nccl-tests)."""
    group = Cluster(gpu=A100, num_gpus=8).group(8)
    for mebibytes, measured in ((256, 194e9), (64, 172e9)):
        size = mebibytes * 2**20
        assert 2 * 7 / 8 * size / (2 * REACHED.gather_s(size, group)) == pytest.approx(measured, rel=0.2)


def test_random_numbers_cost_besides_their_bytes_where_drawing_is_not_hidden() -> None:
    work = Work(moved_bytes=4e6, drawn=1e6)
    slow = replace(REACHED, compute=replace(REACHED.compute, unhidden=Unhidden(drawn_s=1e-8)))
    assert REACHED.busy_s(work, H100) == REACHED.memory_s(4e6, H100)
    assert slow.busy_s(work, H100) == pytest.approx(REACHED.memory_s(4e6, H100) + 1e-2)


def test_functions_and_small_products_cost_a_cpu_more_than_bytes_and_flops() -> None:
    slow = replace(REACHED, compute=replace(REACHED.compute, unhidden=Unhidden(function_s={"tanh": 1e-9}, batched=0.5)))
    work = Work(moved_bytes=4e6, computed=(("tanh", 1e6), ("exp", 1e9)))
    assert slow.busy_s(work, H100) == pytest.approx(REACHED.memory_s(4e6, H100) + 1e-3)
    assert slow.matmul_s(BIG, H100) == REACHED.matmul_s(BIG, H100)
    many = replace(BIG, batch=4)
    assert slow.matmul_s(many, H100) == pytest.approx(2 * REACHED.matmul_s(many, H100), rel=0.01)


def test_a_cpu_computes_half_a_block_of_keys_beyond_the_border_of_a_mask() -> None:
    host = replace(H100, generation="cpu")
    plain, masked = Attention(1e9, 1e6), Attention(1e9, 1e6, besides=1.0)
    start_s = REACHED.compute.kernel_s
    assert REACHED.attention_s(masked, H100) == REACHED.attention_s(plain, H100)
    assert REACHED.attention_s(masked, host) - start_s == pytest.approx(
        2 * (REACHED.attention_s(plain, host) - start_s)
    )
