"""What the standards say of stored answers, field by field."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastapi_hardening.core.http_caching import (
    Lifetime,
    directives,
    lifetime_of,
    not_modified,
    on_not_modified,
    seconds,
    strong_etag,
    variant,
    varies_by,
    weakened,
)

CONTROL = b"cache-control"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", {}),
        (b"max-age=60", {"max-age": "60"}),
        (b"No-Store , MAX-AGE=1", {"no-store": None, "max-age": "1"}),
        (b'max-age="60", private="a, b"', {"max-age": "60", "private": "a, b"}),
        (b"max-age=1, max-age=2", {"max-age": "1"}),
        (b"max-age=, no-cache", {"max-age": None, "no-cache": None}),
        (b",,no-store,", {"no-store": None}),
    ],
)
def test_directives_are_read(text: bytes, said: dict[str, str | None]) -> None:
    """In any case, quoted or not; the first of two counts."""
    assert directives([text]) == said


@given(st.lists(st.binary(max_size=30), max_size=3))
@hypothesis_settings(max_examples=60)
def test_no_field_raises_anything(values: list[bytes]) -> None:
    """Whatever an application sends, it is read or it says nothing."""
    said = lifetime_of(200, [(CONTROL, value) for value in values])
    assert isinstance(said, (str, Lifetime))
    assert isinstance(not_modified({b"if-none-match": b"".join(values)}, [(b"etag", b'"a"')]), bool)


@pytest.mark.parametrize(("text", "number"), [(None, None), ("60", 60), ("-1", 0), ("1.5", 0), ("9" * 30, 2**31)])
def test_seconds_are_whole_and_bounded(text: str | None, number: float | None) -> None:
    """What is no number is stale; what is too large is as large as the standard asks for."""
    assert seconds(text) == number


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (500, [], "status"),
        (206, [], "status"),
        (302, [], "status"),
        (200, [(b"set-cookie", b"a=b")], "set-cookie"),
        (200, [(b"content-range", b"bytes 0-1/2")], "partial"),
        (200, [(b"content-type", b"text/event-stream; charset=utf-8")], "stream"),
        (200, [(b"vary", b"accept, *")], "vary"),
        (200, [(CONTROL, b"max-age=60, no-store")], "no-store"),
        (200, [(CONTROL, b"max-age=60"), (CONTROL, b"no-cache")], "no-cache"),
        (200, [(CONTROL, b'no-cache="x"')], "no-cache"),
        (200, [(CONTROL, b"private, max-age=60")], "private"),
    ],
)
def test_what_may_not_be_kept(status: int, headers: list[tuple[bytes, bytes]], reason: str) -> None:
    """It says why."""
    assert lifetime_of(status, headers) == reason


@pytest.mark.parametrize(
    ("headers", "lifetime"),
    [
        ([], Lifetime(None, None, None)),
        ([(CONTROL, b"max-age=60")], Lifetime(60, None, None)),
        ([(CONTROL, b"max-age=60, s-maxage=10")], Lifetime(10, 0, 0)),
        ([(CONTROL, b"max-age")], Lifetime(0, None, None)),
        ([(CONTROL, b"max-age=soon")], Lifetime(0, None, None)),
        (
            [(CONTROL, b"max-age=60, stale-while-revalidate=5, stale-if-error=6")],
            Lifetime(60, 5, 6),
        ),
        ([(CONTROL, b"max-age=60, must-revalidate, stale-if-error=6")], Lifetime(60, 0, 0)),
        ([(CONTROL, b"max-age=60, proxy-revalidate")], Lifetime(60, 0, 0)),
        (
            [(b"date", b"Thu, 01 Jan 2026 00:00:00 GMT"), (b"expires", b"Thu, 01 Jan 2026 00:01:00 GMT")],
            Lifetime(60, None, None),
        ),
        ([(b"date", b"Thu, 01 Jan 2026 00:00:00 GMT"), (b"expires", b"0")], Lifetime(0, None, None)),
        ([(b"expires", b"Thu, 01 Jan 2026 00:01:00 GMT")], Lifetime(0, None, None)),
    ],
)
def test_how_long_an_answer_says_it_may_be_used(headers: list[tuple[bytes, bytes]], lifetime: Lifetime) -> None:
    """For a cache that all share."""
    assert lifetime_of(200, headers) == lifetime


def test_what_is_kept_for_one_caller_may_be_private() -> None:
    """And s-maxage is not for it."""
    assert lifetime_of(200, [(CONTROL, b"private, max-age=60, s-maxage=1")], private=True) == Lifetime(60, None, None)
    assert lifetime_of(200, [(CONTROL, b"private, max-age=60")]) == "private"


def test_variants_differ_by_the_named_fields_alone() -> None:
    """Blanks around a value do not count, and no two values can be taken for another two."""
    names = varies_by([(b"vary", b"Accept-Language , accept"), (b"vary", b"accept,")])
    assert names == (b"accept", b"accept-language")
    german = [(b"accept-language", b" de "), (b"user-agent", b"one")]
    assert variant(names, german) == variant(names, [(b"accept-language", b"de"), (b"user-agent", b"two")])
    assert variant(names, german) != variant(names, [(b"accept-language", b"en")])
    assert variant(names, german) != variant(names, [])
    assert variant(names, [(b"accept", b"a"), (b"accept", b"b")]) != variant(names, [(b"accept", b"ab")])


@pytest.mark.parametrize(
    ("asked", "etag", "has"),
    [
        (b'"a"', b'"a"', True),
        (b'W/"a"', b'"a"', True),
        (b'"a"', b'W/"a"', True),
        (b'"b", "a"', b'"a"', True),
        (b'"x, \\"a\\""', b'"a"', False),
        (b'"b"', b'"a"', False),
        (b"a", b'"a"', False),
        (b"*", b'"a"', True),
        (b'"a"', None, False),
    ],
)
def test_whether_the_client_has_it(asked: bytes, etag: bytes | None, has: bool) -> None:
    """Entity tags are compared weakly."""
    headers = [] if etag is None else [(b"etag", etag)]
    assert not_modified({b"if-none-match": asked, b"if-modified-since": b"nonsense"}, headers) is has


@pytest.mark.parametrize(
    ("since", "has"),
    [
        (b"Thu, 01 Jan 2026 00:00:00 GMT", True),
        (b"Thu, 01 Jan 2026 00:00:01 GMT", True),
        (b"Wed, 31 Dec 2025 23:59:59 GMT", False),
        (b"yesterday", False),
        (b"\xff", False),
    ],
)
def test_whether_it_has_changed_since(since: bytes, has: bool) -> None:
    """By date, where there is no entity tag."""
    headers = [(b"last-modified", b"Thu, 01 Jan 2026 00:00:00 GMT")]
    assert not_modified({b"if-modified-since": since}, headers) is has
    assert not_modified({b"if-modified-since": since}, []) is False


def test_what_a_304_repeats() -> None:
    """What the client needs to go on using its copy; nothing of the content."""
    headers = [(b"etag", b'"a"'), (b"content-type", b"text/html"), (b"content-length", b"1"), (b"vary", b"accept")]
    assert on_not_modified(headers) == [(b"etag", b'"a"'), (b"vary", b"accept")]


def test_entity_tags() -> None:
    """One for each body; a weakened one stays as it is."""
    assert strong_etag(b"a") == strong_etag(b"a") != strong_etag(b"b")
    assert strong_etag(b"a").startswith(b'"')
    assert weakened(b'"a"') == weakened(weakened(b'"a"')) == b'W/"a"'
