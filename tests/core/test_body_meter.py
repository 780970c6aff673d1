"""The meter of a body: bytes, seconds and nesting, however the body is cut."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.body_meter import (
    BodyLimits,
    BodyMeter,
    BodyTooLarge,
    BodyTooSlow,
    JsonNesting,
    JsonTooDeep,
)

# --- nesting ----------------------------------------------------------------------------------------------------------


def too_deep(chunks: Iterable[bytes], max_depth: int) -> bool:
    nesting = JsonNesting(max_depth)
    return any(nesting.exceeds(chunk) for chunk in chunks)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max((depth_of(each) for each in inner), default=0)


def cut(text: bytes, places: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for place in sorted({place % (len(text) + 1) for place in places}):
        yield text[start:place]
        start = place
    yield text[start:]


TEXTS = st.text(st.sampled_from('[]{}"\\a\u00e9\n,:'))
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=60
)


@given(VALUES, st.lists(st.integers(min_value=0)), st.integers(min_value=0, max_value=8), st.booleans())
def test_nesting_is_that_of_the_parsed_text_however_it_is_cut(
    value: Any, places: list[int], max_depth: int, escaped: bool
) -> None:
    """Brackets and quotes in strings, escapes at the cut, any limit."""
    text = json.dumps(value, ensure_ascii=escaped).encode()
    assert too_deep(cut(text, places), max_depth) is (depth_of(value) > max_depth)


def test_many_shallow_arrays_are_not_deep() -> None:
    """A list of many is counted bracket by bracket only as far as it has to be."""
    assert not too_deep([b"[" + b"[[]]," * 10_000 + b"[]]"], 64)
    assert not too_deep([(b"[" * 60 + b"]" * 60) * 50], 64)
    assert too_deep([(b"[" * 60 + b"]" * 60) * 50 + b"[" * 65], 64)


def test_a_depth_bomb_in_chunks_is_found() -> None:
    """No chunk is deep by itself; exactly the limit passes."""
    assert not too_deep([b'{"a":['] * 32, 64)
    assert too_deep([b'{"a":['] * 33, 64)
    assert too_deep([b"["] * 65, 64)
    assert not too_deep([b'"' + b"[" * 1000, b"[" * 1000 + b"\\", b'"[' * 100], 64)


# --- meter ------------------------------------------------------------------------------------------------------------


def test_a_body_of_exactly_the_limit_passes() -> None:
    """One byte more does not, however it is cut; it is told once."""
    meter = BodyMeter(BodyLimits(max_body_bytes=10), is_json=False)
    assert [meter.take(b"x" * 5), meter.take(b"x" * 5), meter.take(b"")] == [None, None, None]
    problem = meter.take(b"x")
    assert isinstance(problem, BodyTooLarge)
    assert problem.extensions == {"max_body_bytes": 10}
    assert meter.take(b"x") is None


def test_the_patience_with_a_client_grows_with_what_it_sent() -> None:
    """Ten seconds for nothing; afterwards 500 bytes for each."""
    meter = BodyMeter(BodyLimits(min_body_bytes_per_second=500, body_grace_seconds=10), is_json=False)
    assert meter.patience_seconds == 10
    meter.waited_seconds = 9
    assert meter.patience_seconds == 1
    meter.take(b"x" * 10_000)
    assert meter.patience_seconds == 11
    assert isinstance(meter.give_up(), BodyTooSlow)
    assert meter.patience_seconds is None


def test_json_that_is_not_utf_8_is_refused_and_what_is_no_json_is_not_looked_at() -> None:
    """Python's parser reads UTF-16 as well, in which every bracket looks different."""
    for text in ("[1]".encode("utf-16"), "[1]".encode("utf-16-le"), "[1]".encode("utf-32-be"), b"[\0"):
        meter = BodyMeter(BodyLimits(max_json_depth=64), is_json=True)
        assert isinstance(meter.take(text), JsonTooDeep)
        assert meter.take(b"\0") is None
    compressed = BodyMeter(BodyLimits(max_json_depth=64), is_json=True)
    assert compressed.take(b"\x1f\x8b\0" + b"[" * 99) is None
    assert BodyMeter(BodyLimits(max_json_depth=64), is_json=False).take(b"[" * 99) is None
    assert BodyMeter(BodyLimits(), is_json=True).take(b"[" * 99) is None


def test_limits_can_change_in_the_middle_of_a_body() -> None:
    """But nesting cannot be counted from there."""
    meter = BodyMeter(BodyLimits(max_json_depth=9), is_json=True)
    assert meter.take(b"[[") is None
    meter.limit(BodyLimits(max_json_depth=2))
    assert isinstance(meter.take(b"["), JsonTooDeep)
    meter = BodyMeter(BodyLimits(), is_json=True)
    meter.take(b"[[")
    meter.limit(BodyLimits(max_json_depth=1))
    assert meter.take(b"[[") is None
