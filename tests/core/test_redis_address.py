"""URLs of shared stores: what they say, and that a mistake in one shows no secret."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.redis_address import Address, read_address

NOTHING = Address("server", "redis", (("host", 6379),), "", 0, None, None, {})


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", NOTHING),
        ("valkey://host:7000/3", NOTHING._replace(hosts=(("host", 7000),), database=3)),
        ("redis://host?db=2", NOTHING._replace(database=2)),
        ("redis://:p%40ss%2F@host", NOTHING._replace(password="p@ss/")),
        ("rediss://user:p:w@[::1]:7000", NOTHING._replace(
            scheme="rediss", hosts=(("::1", 7000),), username="user", password="p:w")),
        ("rediss://host?ssl_ca_certs=/ca.pem&ssl_check_hostname=no", NOTHING._replace(
            scheme="rediss", options={"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False})),
        ("unix:///run/redis.sock?db=1", NOTHING._replace(scheme="unix", hosts=(), path="/run/redis.sock", database=1)),
        ("redis+sentinel://:pw@a,b:26380/orders/2?sentinel_password=x", Address(
            "sentinel", "redis", (("a", 26379), ("b", 26380)), "orders", 2, None, "pw", {"sentinel_password": "x"})),
        ("REDISS+Cluster://a:1,b:2", Address("cluster", "rediss", (("a", 1), ("b", 2)), "", 0, None, None, {})),
    ],
)  # fmt: skip
def test_a_url_says_where_the_store_is(url: str, address: Address) -> None:
    """The notation of redis-py and, for several servers, that of ``limits``."""
    assert read_address(url) == address


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "begins with redis://"),
        ("localhost:6379", "a text without '://'"),
        ("http://host", "not with 'http'"),
        ("redis://", "no host:port"),
        ("redis://host:many", "no host:port"),
        ("redis://host:70000", "no host:port"),
        ("redis://user:12?secret=34@host", "no host:port"),
        ("redis://a,b", "begin it with redis+sentinel"),
        ("redis://host/orders", "number of a database"),
        ("redis+cluster://host/1", "a cluster has no other"),
        ("redis+sentinel://host", "names the service"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("redis://host?socket_timeout=9", "unknown option 'socket_timeout'"),
        ("redis://host?sentinel_username=x", "unknown option"),
        ("rediss://host?ssl_ca_cert=x", "did you mean 'ssl_ca_certs'"),
    ],
)
def test_a_url_that_leads_nowhere_is_told_what_is_wrong(url: str, sentence: str) -> None:
    """The sentence is one that mends it."""
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_address(url)


@given(
    scheme=st.sampled_from(["redis", "rediss+sentinel", "redis+cluster", "http"]),
    password=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1),
)
def test_no_message_and_no_address_shows_a_password(scheme: str, password: str) -> None:
    """Whatever is wrong with it: a slash or a question mark cuts it in pieces, none of which is shown."""
    secret = f"s3cr3t{password}s3cr3t"
    try:
        shown = read_address(f"{scheme}://user:{secret}@host/0").where
    except ValueError as error:
        shown = str(error)
    assert "s3cr3t" not in shown
