"""Types that make a value safe for one use."""

import asyncio
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.private_address import is_private_address, is_private_host, parse_host
from fastapi_hardening.security.sanitising import (
    CleanHtml,
    HttpUrl,
    PlainText,
    SafeFilename,
    clean_html,
    plain_text,
    public_addresses,
    safe_filename,
)


class Article(BaseModel):
    """A model with each of them."""

    html: CleanHtml = ""
    title: PlainText = ""
    file: SafeFilename = "a"


@pytest.mark.parametrize(
    "html",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<a href='javascript:alert(1)'>x</a>",
        "<svg/onload=x>",
    ],
)
def test_html_is_cleaned_of_what_runs(html: str) -> None:
    """Nothing that runs is left; what only looks is kept."""
    cleaned = Article(html=f"<p>fine</p>{html}").html
    assert cleaned.startswith("<p>fine</p>")
    assert not any(word in cleaned for word in ("script", "onerror", "onload"))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Fish &amp; <i>chips</i>", "Fish & chips"),
        ("a < b & c", "a < b & c"),
        ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
        ("it's", "it's"),
    ],
)
def test_text_of_html(text: str, plain: str) -> None:
    """Elements go, also those that were entities; the text stays as it is read."""
    assert Article(title=text).title == plain


def test_encoded_again_and_again_is_refused() -> None:
    """What is still HTML after five rounds is no text."""
    text = "<b>x</b>"
    for _ in range(9):
        text = text.replace("&", "&amp;").replace("<", "&lt;")
    with pytest.raises(ValidationError, match="encoded again and again"):
        Article(title=text)


@given(st.text(max_size=60))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    """What was cleaned is clean, and what is text is text."""
    assert clean_html(clean_html(text)) == clean_html(text)
    try:
        plain = plain_text(text)
    except ValueError:
        return
    assert plain_text(plain) == plain


def test_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nh3 the message says what to install."""
    monkeypatch.setitem(sys.modules, "nh3", None)
    with pytest.raises(ConfigurationError, match=r"fastapi-hardening\[html\]"):
        clean_html("x")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("CON", "_CON"),
        ("nul.tar.gz", "_nul.tar.gz"),
        ("a\x00b.txt", "a_b.txt"),
        ("-rf", "_rf"),
        ("x\u202egnp.exe", "xgnp.exe"),
        ("a;b|c.txt", "a_b_c.txt"),
        (" trailing. ", "trailing"),
        ("é" * 200 + ".pdf", "é" * 125 + ".pdf"),
        ("a" * 250 + "." + "b" * 40, ("a" * 250 + "." + "b" * 40)[:255]),
    ],
)
def test_name_of_a_file_is_made_safe(name: str, safe: str) -> None:
    """A name stays in its folder, is no device and no option, and has at most 255 bytes."""
    assert Article(file=name).file == safe
    assert len(safe.encode()) <= 255


@pytest.mark.parametrize("name", ["", "..", "/", "a/", "???", " . "])
def test_no_name_is_refused(name: str) -> None:
    """Of some names nothing is left."""
    with pytest.raises(ValueError, match="is not the name of a file"):
        safe_filename(name)


@given(st.text(max_size=300))
def test_any_name_is_refused_or_safe(name: str) -> None:
    """Whatever a client calls a file, what comes of it has no separator, is no dots, and does not change again."""
    try:
        safe = safe_filename(name)
    except ValueError:
        return
    assert not set(safe) & set('/\\\x00<>:"|?*')
    assert safe.strip(".")
    assert len(safe.encode()) <= 255


PRIVATE = [
    "127.0.0.1", "127.1", "0x7f.1", "0x7f000001", "2130706433", "0177.0.0.1", "10.0.0.7", "172.16.9.9", "192.168.0.1",
    "169.254.169.254", "100.64.0.1", "0.0.0.0", "0", "224.0.0.1", "::1", "[::1]", "[::]", "[fe80::1%25eth0]",
    "[fc00::1]", "[::ffff:10.0.0.1]", "[::10.0.0.1]", "[64:ff9b::a00:1]", "[2002:a00:1::]", "localhost", "LOCALHOST.",
    "a.localhost",
    "metadata.google.internal", "db.internal", "127.0.0.1.nip.io", "lvh.me", "\u2460\u2461\u2466.0.0.1", "",
]  # fmt: skip
PUBLIC = [
    "example.com",
    "8.8.8.8",
    "134744072",
    "[2001:4860:4860::8888]",
    "1.2.3.4.5",
    "0x",
    "256.1.1.1",
    "1e3",
    "09.1.1.1",
    "[x:]",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_host_is_known_in_every_notation(host: str) -> None:
    """However an address of the own network is written, it is one."""
    assert is_private_host(host)


@pytest.mark.parametrize("host", PUBLIC[:5])
def test_public_host_is_let_through(host: str) -> None:
    """An address or a name of the public internet is none of the own network."""
    assert not is_private_host(host)


@pytest.mark.parametrize("host", PUBLIC[6:])
def test_what_is_no_address_is_none(host: str) -> None:
    """A number out of range, a wrong octal digit or another word is a name."""
    assert parse_host(host.strip("[]")) is None


def test_address_is_needed() -> None:
    """Text that is no address is a mistake of the caller."""
    with pytest.raises(ValueError, match="does not appear to be"):
        is_private_address("example.com")
    assert is_private_address("fe80::1%eth0")


URL = TypeAdapter(HttpUrl)


@pytest.mark.parametrize(
    "url", ["http://127.1/", "http://0x7f000001", "https://[::ffff:10.0.0.1]/", "http://a@example.com/"]
)
def test_url_of_a_private_address_is_refused(url: str) -> None:
    """A URL must be of the public web, and have no user name to confuse its readers."""
    with pytest.raises(ValidationError):
        URL.validate_python(url)


def test_public_url_is_taken() -> None:
    """Another one is a URL of pydantic."""
    assert URL.validate_python("https://example.com/a?b=c").host == "example.com"


def test_addresses_of_a_host_are_checked_before_a_call() -> None:
    """Whoever calls gets the addresses that were checked; a private one, or none, is an error."""
    assert asyncio.run(public_addresses("8.8.8.8")) == ["8.8.8.8"]
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(ValueError, match="private network"):
            asyncio.run(public_addresses(host))


def test_name_that_is_resolved_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what a name is resolved to."""

    async def resolved(host: str) -> list[str]:
        loop = asyncio.get_running_loop()

        async def getaddrinfo(asked: str, _port: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
            if asked == "gone.example":
                raise OSError
            return [(0, 0, 0, "", ("8.8.8.8", 443)), (0, 0, 0, "", ("10.0.0.1", 443))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        return await public_addresses(host)

    with pytest.raises(ValueError, match="private network"):
        asyncio.run(resolved("rebinding.example"))
    with pytest.raises(ValueError, match="no address"):
        asyncio.run(resolved("gone.example"))
