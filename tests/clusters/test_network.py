"""A node knows its addresses, listens on one of them, and says why it cannot reach another."""

import socket

import pytest

from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.network import bind_free, dial, interface_of, interfaces, own_address, way_to


def test_loopback_is_an_interface_and_the_way_to_itself() -> None:
    name = interface_of("127.0.0.1")
    assert name is not None
    assert interfaces()[name] == way_to("127.0.0.1") == "127.0.0.1"
    assert own_address(name, []) == "127.0.0.1"


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(RendezvousError, match=r"no interface 'ib9' with an IPv4 address; it has .*127\.0\.0\.1"):
        own_address("ib9", [])


def test_names_that_lead_to_loopback_or_elsewhere_are_passed_over() -> None:
    with pytest.raises(RendezvousError, match=r"localhost, 203\.0\.113\.1: none is an address .* name the interface"):
        own_address("auto", ["localhost", "203.0.113.1"])
    others = [each for each in interfaces().values() if not each.startswith("127.")]
    if others:
        assert own_address("auto", ["localhost", others[0]]) == others[0]


def test_a_socket_listens_on_its_address_only_and_takes_the_next_free_port() -> None:
    first = bind_free("127.0.0.1", None, (29400, 29999))
    port = first.getsockname()[1]
    with first, bind_free("127.0.0.1", None, (port, port + 50)) as second:
        assert second.getsockname()[0] == "127.0.0.1"
        assert second.getsockname()[1] > port
        dial("127.0.0.1", port, 5.0)
        with pytest.raises(RendezvousError, match=f"port {port} of 127.0.0.1 on .* in use; choose others"):
            bind_free("127.0.0.1", port, (1, 1))
        with pytest.raises(RendezvousError, match="no port of"):
            bind_free("127.0.0.1", None, (port, port))


def test_a_port_that_nobody_listens_at_is_said_with_both_ends() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(RendezvousError, match=f"{socket.gethostname()} cannot reach 127.0.0.1 port {port}, .*refused"):
        dial("127.0.0.1", port, 5.0)
