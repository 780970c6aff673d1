"""The deadline of a call: seen by what is further in, kept by whoever is earlier."""

import asyncio
import time

import pytest

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.call_deadline import remaining, within


def test_there_is_none_unless_somebody_has_set_one() -> None:
    """Also with a block that leaves it to others."""

    async def nothing() -> None:
        async with within(None):
            assert remaining() is None

    asyncio.run(nothing())


def test_the_earlier_deadline_holds() -> None:
    """Whether it is the inner or the outer one; after the block the outer one is back."""

    async def nested() -> None:
        async with within(60):
            async with within(600):
                assert (remaining() or 999) < 60
            async with within(6):
                assert (remaining() or 999) < 6
            assert (remaining() or 0) > 6

    asyncio.run(nested())
    assert remaining() is None


def test_the_innermost_ends_first() -> None:
    """A moment before the outer one, so that who waited too long is the one who says so."""

    async def nested() -> float:
        async with within(60) as outer, within(60) as inner:
            ends = [each._timeout.when() or 0 for each in (outer, inner) if each._timeout is not None]
        return ends[0] - ends[1]

    assert 0.04 < asyncio.run(nested()) < 0.06
    with pytest.raises(TimeoutError):
        asyncio.run(over())


async def over() -> None:
    async with within(0):
        await asyncio.Event().wait()


def test_deadline_of_the_request_counts_until_its_answer_begins() -> None:
    """A call that is made for a request sees what the request has left, and no deadline once a stream has begun."""
    context = request_context.ensure({"type": "http", "headers": []})
    token = request_context.enter(context)
    try:
        context.deadline = time.monotonic() + 5
        assert 0 < (remaining() or 0) <= 5
        context.deadline = None
        assert remaining() is None
    finally:
        request_context.leave(token)
