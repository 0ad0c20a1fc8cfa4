"""Xid errors in a kernel's log."""

from pathlib import Path

from meshwright.clusters.xid import logged_xids, parse_xids

LOG = """6,1,2,-;NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.54.15
4,2,3,-;NVRM: Xid (PCI:0000:c1:00): 31, pid=77, name=python, Ch 00000008, MMU Fault
3,3,4,-;NVRM: Xid (PCI:0000:C1:00.0): 48, DBE (double bit error) ECC Error
3,4,5,-;NVRM: Xid (0000:3b:00): 79, GPU has fallen off the bus.
6,5,6,-;eth0: Xid of something else: 12
"""


def test_every_form_the_driver_writes_is_read() -> None:
    found = parse_xids(LOG.splitlines())
    assert [(xid.number, xid.bus_id) for xid in found] == [(31, "0000:c1:00"), (48, "0000:c1:00"), (79, "0000:3b:00")]
    assert found[2].text == "GPU has fallen off the bus."


def test_a_log_that_cannot_be_read_is_none_and_not_clean(tmp_path: Path) -> None:
    assert logged_xids(tmp_path / "kmsg") is None
    (tmp_path / "kmsg").write_text(LOG)
    assert len(logged_xids(tmp_path / "kmsg") or ()) == 3
