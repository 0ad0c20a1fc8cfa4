"""The catalog: what a healthy all-reduce has at the least, and where the number comes from."""

import pytest

from meshwright.clusters.hardware import catalog, gpu


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_a_driver_s_name_finds_its_own_entry(name: str | None, kind: str | None) -> None:
    found = catalog().accelerator(name)
    assert (None if found is None else found.name) == kind


def test_every_entry_has_a_source_and_every_expectation_says_its_reason() -> None:
    assert all(each.source for each in catalog().accelerators)
    by_link = catalog().between_gpus("NVIDIA H100 80GB HBM3", linked=True, generation=5)
    assert by_link is not None
    assert (by_link.bytes_per_s, by_link.why.startswith("60% of NVLink's 450 GB/s")) == (270e9, True)
    by_bus = catalog().between_gpus("NVIDIA L40S", linked=False, generation=4)
    assert by_bus is not None
    assert by_bus.bytes_per_s == pytest.approx(6.3e9)


def test_what_is_not_known_is_not_guessed() -> None:
    assert catalog().between_gpus("NVIDIA X1", linked=True, generation=5) is None
    assert catalog().between_gpus("NVIDIA L40S", linked=True, generation=4) is None
    assert catalog().between_gpus("NVIDIA L40S", linked=False, generation=None) is None
    assert catalog().between_nodes(None, "gloo", interface="eth0") is None


def test_the_share_of_a_network_depends_on_who_uses_it() -> None:
    def share(backend: str, interface: str) -> float:
        found = catalog().between_nodes(1.0, backend, interface=interface)
        assert found is not None
        return found.bytes_per_s

    assert share("gloo", "eth0") < share("nccl", "eth0") < share("nccl", "ib0")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("A100-SXM4-80GB", "A100"),
        ("A100-SXM4-40GB (p4d)", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H100-SXM-96GB(HBM2e 2.4TB/s, 500W)", "H100 96GB"),
        ("GB200-NVL72", "GB200"),
        ("GH200 (Alps, 4 per node)", "GH200"),
        ("mi300x", "MI300X"),
    ],
)
def test_a_gpu_s_numbers_are_found_by_the_names_of_drivers_and_of_tables(name: str, kind: str) -> None:
    assert gpu(name).name == kind


def test_an_unknown_gpu_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no GPU called 'H10O' in the catalog; nearest: 'H100'; known: .*A100"):
        gpu("H10O")


def test_numbers_of_training_agree_with_those_of_links_and_have_sources() -> None:
    for name in ("B200", "H200", "H100", "H800", "A100", "V100"):
        linked = catalog().accelerator(name)
        assert linked is not None
        assert gpu(name).nvlink_bytes_per_s == linked.nvlink_bytes_per_s
        assert gpu(name).source
        assert all(0.4 < share < 1 for share in gpu(name).sustained.values())
        assert gpu(name).matmul_flops_per_s("fp8") >= gpu(name).matmul_flops_per_s("bf16")
