"""How much a body may be, how slow and how deep, counted chunk by chunk as it comes.

Nothing is kept of a body but its counts, so a meter costs the same for a kilobyte and for a film. It is *not* a reader:
it neither waits nor asks for the time, which whoever awaits the chunks tells it; and it raises nothing, but says which
problem the body has become.

Example:
    >>> meter = BodyMeter(BodyLimits(max_body_bytes=10, max_json_depth=2), is_json=True)
    >>> meter.take(b"[[1, 2],")
    >>> meter.take(b" [3]]").explanation
    'The request body is larger than this route takes.'
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

from fastapi_hardening.core.problem import Problem


class BodyTooLarge(Problem):
    """The body has, or says that it has, more bytes than the route takes."""

    status = 413


class BodyTooSlow(Problem):
    """The body came slower than its client has to send."""

    status = 408


class JsonTooDeep(Problem):
    """Arrays and objects of the body nest deeper than the limit, or the body is not UTF-8."""

    status = 400


class BodyLimits(NamedTuple):
    """What a body is measured by; ``None`` is no limit.

    Attributes:
        max_body_bytes: How large it may be.
        min_body_bytes_per_second: How fast it has to come on average.
        body_grace_seconds: For how long it may be slower.
        max_json_depth: How deep its arrays and objects may nest.
    """

    max_body_bytes: int | None = None
    min_body_bytes_per_second: float | None = None
    body_grace_seconds: float = 0.0
    max_json_depth: int | None = None


_KEPT = b'[]{}"'
_DROPPED = bytes(byte for byte in range(256) if byte not in _KEPT)
_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_STEP = {ord("{"): 1, ord("}"): -1}.__getitem__
_FOLDS = 8

# What JSON may begin with, blanks and byte order marks included; and a null byte, which UTF-16 and UTF-32 begin with.
_JSON_STARTS = b' \t\r\n[{"-0123456789tfn\xef\xfe\xff\0'


class JsonNesting:
    """How deep a JSON text nests, chunk by chunk, at about a tenth of what parsing it costs.

    Everything but brackets and quotes is dropped by C code, then what stands in strings. Only where more brackets open
    than the limit leaves room for are they counted one after the other.

    Args:
        max_depth: The limit.

    Example:
        >>> nesting = JsonNesting(2)
        >>> nesting.exceeds(b'[["[[[') or nesting.exceeds(b'"]]')
        False
        >>> nesting.exceeds(b"[[[")
        True
    """

    __slots__ = ("_depth", "_escaping", "_in_string", "max_depth")

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self._depth = 0
        self._in_string = False
        self._escaping = False

    def exceeds(self, chunk: bytes) -> bool:
        """Reads on; whether some bracket opened deeper than the limit."""
        if self._escaping:
            chunk = b"\\" + chunk
            self._escaping = False
        if b"\\" in chunk:
            chunk = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
            self._escaping = chunk.endswith(b"\\")
        # Two quotes side by side change nothing for what stands after them, wherever they are.
        kept = chunk.translate(_TO_BRACES, _DROPPED).replace(b'""', b"")
        parts = kept.split(b'"')
        brackets = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        opened = brackets.count(b"{")
        if self._depth + opened > self.max_depth and self._peak(brackets) > self.max_depth:
            return True
        self._depth = max(0, self._depth + 2 * opened - len(brackets))
        return False

    def _peak(self, brackets: bytes) -> int:
        """The depth of the deepest bracket, or a bound that is within the limit."""
        folded, folds = brackets, 0
        # Taking away every innermost pair takes one off the depth, and most of the text.
        while folds < _FOLDS and len(shorter := folded.replace(b"{}", b"")) < len(folded):
            folded, folds = shorter, folds + 1
        bound = max(accumulate(map(_STEP, folded), initial=self._depth)) + folds
        return bound if bound <= self.max_depth else max(accumulate(map(_STEP, brackets), initial=self._depth))


class BodyMeter:
    """What a body has used of what it may: bytes, seconds, nesting.

    Args:
        limits: What it may.
        is_json: Whether its nesting matters.
    """

    __slots__ = ("_grace", "_is_json", "_max_bytes", "_nesting", "_rate", "received", "waited_seconds")

    def __init__(self, limits: BodyLimits, *, is_json: bool) -> None:
        self.received = 0
        self.waited_seconds = 0.0
        self._is_json = is_json
        self._nesting: JsonNesting | None = None
        self.limit(limits)

    def limit(self, limits: BodyLimits) -> None:
        """Goes on with these limits."""
        self._max_bytes, self._rate, self._grace, depth = limits
        if depth is None or (self.received and self._nesting is None):
            # Nesting cannot be counted from the middle.
            self._nesting = None
        elif self._nesting is not None:
            self._nesting.max_depth = depth
        elif self._is_json:
            self._nesting = JsonNesting(depth)

    @property
    def patience_seconds(self) -> float | None:
        """How much longer the client may be waited for; ``None`` for ever."""
        if self._rate is None:
            return None
        return max(self._grace, self.received / self._rate) - self.waited_seconds

    def take(self, chunk: bytes) -> Problem | None:
        """Counts a chunk; what it goes beyond, once each."""
        first = not self.received
        self.received += len(chunk)
        if self._max_bytes is not None and self.received > self._max_bytes:
            problem, self._max_bytes = too_large(self._max_bytes), None
            return problem
        if self._nesting is None or not chunk:
            return None
        if first and chunk[0] not in _JSON_STARTS:
            # Compressed perhaps; no parser of JSON reads beyond this byte.
            self._nesting = None
            return None
        return self._nested(chunk, self._nesting)

    def _nested(self, chunk: bytes, nesting: JsonNesting) -> Problem | None:
        # UTF-8 has no null byte in JSON. UTF-16 has, and Python's parser would read it, but the count would be wrong.
        if b"\0" in chunk:
            problem = JsonTooDeep("JSON has to be UTF-8 (RFC 8259, section 8.1).")
        elif nesting.exceeds(chunk):
            limit = {"max_json_depth": nesting.max_depth}
            problem = JsonTooDeep("The JSON body nests too deep.", extensions=limit)
        else:
            return None
        self._nesting = None
        return problem

    def give_up(self) -> Problem:
        """What is said of a body that was waited for too long; from now on it has all the time there is."""
        self._rate = None
        return BodyTooSlow("The request body came too slowly.")


def too_large(max_body_bytes: int, headers: Mapping[str, str] | None = None) -> Problem:
    """What is said of a body that is larger than this."""
    sentence = "The request body is larger than this route takes."
    return BodyTooLarge(sentence, headers=headers, extensions={"max_body_bytes": max_body_bytes})
