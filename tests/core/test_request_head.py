"""What the head of a request says: which hosts are on a list, whatever they are spelled like."""

import pytest

from fastapi_hardening.core.request_head import HostList


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("shop.example", True),
        ("SHOP.example", True),
        ("shop.example:8443", True),
        ("shop.example.", True),
        ("eu.shop.example", True),
        ("a.b.shop.example:80", True),
        ("[::1]", True),
        ("[::1]:8000", True),
        ("[0:0:0:0:0:0:0:1]:8000", True),
        ("evilshop.example", False),
        ("shop.example.evil.example", False),
        ("*.shop.example", False),
        (".shop.example.evil", False),
        ("::1", False),
        ("[::2]", False),
        ("[::1", True),
        ("127.0.0.1", False),
        ("", False),
    ],
)
def test_a_host_is_served_by_its_name_whatever_the_port(host: str, served: bool) -> None:
    """Case, a final dot and the spelling of an IPv6 address do not matter."""
    hosts = HostList(["shop.example", "*.Shop.example", "[::1]"])
    assert hosts.serves(host.encode()) is served


def test_without_a_list_any_host_is_served() -> None:
    """And with a star in it."""
    assert HostList().serves(b"anything")
    assert HostList(["shop.example", "*"]).serves(b"anything")
