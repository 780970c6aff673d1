"""The layer: takes a request apart, has its texts inspected, and refuses or reports.

Where findings are only reported nothing waits: the body passes as it comes, a copy is looked at after the answer. Where
they are refused the body is read first, as far as it is inspected, and handed on message by message as it came.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.security.input_validation import InputValidationMiddleware, InputValidationSettings
    >>> app = FastAPI()
    >>> app.add_middleware(InputValidationMiddleware, settings=InputValidationSettings(mode="enforce"))
"""

import asyncio
import logging
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from anyio import CapacityLimiter, to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.events import AttackFound
from fastapi_hardening.core.headers import get
from fastapi_hardening.core.policy import mark_handled
from fastapi_hardening.core.problem import Problem, refuse
from fastapi_hardening.core.request_head import media_type_of
from fastapi_hardening.core.routes import RouteEntry, route_of, route_path
from fastapi_hardening.security.input_validation.decoding import as_text
from fastapi_hardening.security.input_validation.documents import (
    Body,
    Path,
    Text,
    UnreadableError,
    body_texts,
    is_upload,
    pairs_of,
    pointer_of,
)
from fastapi_hardening.security.input_validation.inspector import Hit, Inspector
from fastapi_hardening.security.input_validation.nosql import find_in_key
from fastapi_hardening.security.input_validation.policy import (
    CodingNotTaken,
    ContentRefused,
    ContentTooLarge,
    RoutePolicy,
)
from fastapi_hardening.security.input_validation.reading import is_plain_json, is_plain_path, is_plain_query
from fastapi_hardening.security.input_validation.report import ValidationReport
from fastapi_hardening.security.input_validation.settings import InputValidationSettings
from fastapi_hardening.security.input_validation.shape import FREE

logger = logging.getLogger("fastapi_hardening.input_validation")

LAYER = "input validation"

# A body of more bytes than this is looked at by a thread, so that the others are served meanwhile. One thread does it:
# more would only take turns with each other, and with whoever is served. Where nobody waits for the result, so many may
# be behind; of the next ones it is counted that they were not inspected.
_LONG = 32_768
_MOST_BEHIND = 16
# A refusal names so many places; who sends more needs no list.
_MOST_TOLD = 20
_LONGEST_REMEMBERED = 512
_WITHOUT_BODY = frozenset(("GET", "HEAD", "OPTIONS"))
_POLICY_VIOLATION = 1008


class Finding(NamedTuple):
    """Something that was found in a request.

    Attributes:
        id: The stable name.
        pointer: Where, as a JSON pointer.
    """

    id: str
    pointer: str


class InputValidationMiddleware:
    """Inspects what comes in.

    Args:
        app: The application inside.
        settings: The settings.
        report: Where it is counted what was seen on each route.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: InputValidationSettings | None = None,
        *,
        report: ValidationReport | None = None,
    ) -> None:
        self.app = app
        self.report = report or ValidationReport()
        settings = settings or InputValidationSettings()
        self._behind = 0
        # As many as the application has routes; bounded for those that add routes all the time.
        self.policy_of = lru_cache(maxsize=10_000)(lambda entry: RoutePolicy(settings, entry))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        entry: RouteEntry = route_of(scope)
        policy = self.policy_of(entry)
        mark_handled(scope, policy.overrides)
        if policy.off:
            await self.app(scope, receive, send)
            return
        self.report.of(policy.template).inspected += 1
        head = _head(scope, policy)
        if kind == "websocket":
            if head and await self._refused_handshake(head, policy, scope, receive, send):
                return
            messages = _Messages(self, policy, scope, receive, send)
            await self.app(scope, messages.receive, messages.send if policy.enforces else send)
        elif policy.enforces:
            problem, receive = await self._look_first(head, policy, scope, receive)
            if problem is None:
                await self.app(scope, receive, send)
            else:
                await refuse(problem, scope, receive, send, layer=LAYER)
        else:
            reading = self._copy_of(policy, scope)
            if reading is not None:
                receive = reading.copying(receive)
            try:
                await self.app(scope, receive, send)
            finally:
                if head or reading is not None:
                    await self._look_after(head, reading, policy, scope)

    # --- enforce ------------------------------------------------------------------------------------------------------

    async def _look_first(
        self, head: list[Text], policy: RoutePolicy, scope: Scope, receive: Receive
    ) -> tuple[Problem | None, Receive]:
        findings = inspected(head, policy) if head else []
        problem: Problem | None = None
        if not findings and _may_have_body(scope):
            reading = _Reading(scope, policy)
            if reading.too_large(_declared_length(scope)):
                problem = self._uninspected(policy, reading)
            else:
                problem, findings = await self._read(reading, policy, receive)
                receive = reading.replay(receive)
        if findings:
            self._tell(findings, policy, scope, refused=True)
            problem = _refusal(findings)
        return problem, receive

    async def _read(
        self, reading: "_Reading", policy: RoutePolicy, receive: Receive
    ) -> tuple[Problem | None, list[Finding]]:
        while reading.more:
            reading.take(await receive())
            if reading.too_large(reading.size):
                return self._uninspected(policy, reading), []
        if reading.cut_off or not reading.size:
            return None, []
        try:
            return None, await self._inspected_body(reading.body(), policy)
        except UnreadableError:
            self.report.of(policy.template).not_inspected += 1
            return CodingNotTaken(
                "The coding of the body is not taken.", headers={"Accept-Encoding": "gzip, deflate"}
            ), []

    def _uninspected(self, policy: RoutePolicy, reading: "_Reading") -> Problem | None:
        self.report.of(policy.template).not_inspected += 1
        verdict = policy.settings.uploads if reading.is_upload else policy.settings.oversize
        if verdict == "pass":
            return None
        most = policy.settings.max_inspected_bytes
        return ContentTooLarge(
            "The body is larger than what this route inspects.", extensions={"max_inspected_bytes": most}
        )

    # --- report -------------------------------------------------------------------------------------------------------

    def _copy_of(self, policy: RoutePolicy, scope: Scope) -> "_Reading | None":
        if not _may_have_body(scope):
            return None
        reading = _Reading(scope, policy)
        if reading.too_large(_declared_length(scope)):
            self.report.of(policy.template).not_inspected += 1
            return None
        return reading

    async def _look_after(
        self, head: list[Text], reading: "_Reading | None", policy: RoutePolicy, scope: Scope
    ) -> None:
        findings = inspected(head, policy) if head else []
        if reading is not None:
            findings += await self._look_at_copy(reading, policy)
        if findings:
            self._tell(findings, policy, scope, refused=False)

    async def _look_at_copy(self, reading: "_Reading", policy: RoutePolicy) -> list[Finding]:
        if reading.too_large(reading.size):
            self.report.of(policy.template).not_inspected += 1
        elif reading.size and not reading.more and not reading.cut_off:
            try:
                body = reading.body()
                if not self._is_long(body) or self._behind < _MOST_BEHIND:
                    return await self._inspected_body(body, policy)
                self.report.of(policy.template).not_inspected += 1
            except UnreadableError:
                self.report.of(policy.template).not_inspected += 1
        return []

    # --- the body -----------------------------------------------------------------------------------------------------

    @cached_property
    def _aside(self) -> CapacityLimiter:
        return CapacityLimiter(1)

    @staticmethod
    def _is_long(body: Body) -> bool:
        return len(body.data) > _LONG or bool(body.coding)

    async def _inspected_body(self, body: Body, policy: RoutePolicy) -> list[Finding]:
        settings = policy.settings

        def look() -> list[Finding]:
            if body.media_type.endswith("json") and not body.coding and is_plain_json(body.data):
                return []
            texts = body_texts(body, policy.body, most_bytes=settings.max_inspected_bytes, files=settings.inspect_files)
            return inspected(texts, policy)

        if not self._is_long(body):
            return look()
        self._behind += 1
        try:
            return await to_thread.run_sync(look, limiter=self._aside)
        finally:
            self._behind -= 1

    # --- websocket ----------------------------------------------------------------------------------------------------

    async def _refused_handshake(
        self, head: list[Text], policy: RoutePolicy, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        findings = inspected(head, policy)
        if findings:
            self._tell(findings, policy, scope, refused=policy.enforces)
            if policy.enforces:
                await refuse(_refusal(findings), scope, receive, send, layer=LAYER)
        return bool(findings) and policy.enforces

    def look_at_message(self, text: str, policy: RoutePolicy, scope: Scope) -> bool:
        """Whether something was found in a message of a websocket; told and counted."""
        self.report.of(policy.template).inspected += 1
        findings = inspected(_message_texts(text), policy)
        if findings:
            self._tell(findings, policy, scope, refused=policy.enforces)
        return bool(findings)

    # --- findings -----------------------------------------------------------------------------------------------------

    def _tell(self, findings: list[Finding], policy: RoutePolicy, scope: Scope, *, refused: bool) -> None:
        context = request_context.ensure(scope)
        template = policy.template
        self.report.count(template, [(found.id, found.pointer) for found in findings], refused=refused)
        logger.warning(
            "%s a request to %s from %s: %s (request id %s)",
            "refused" if refused else "reported",
            template or "an unknown path",
            context.client.address,
            ", ".join(f"{found.id} at {found.pointer}" for found in findings[:_MOST_TOLD]),
            context.request_id,
        )
        if context.events is None:
            return
        told: set[tuple[str, str]] = set()
        for found in findings[:_MOST_TOLD]:
            kind = found.id.partition(".")[0]
            if (kind, found.pointer) not in told:
                told.add((kind, found.pointer))
                context.events.emit(
                    AttackFound(
                        found.id, kind, found.pointer, refused, template, context.request_id, context.client.address
                    )
                )


class _Messages:
    """The messages of one websocket on their way to the application."""

    __slots__ = ("_closed", "_layer", "_policy", "_receive", "_scope", "_send")

    def __init__(
        self, layer: InputValidationMiddleware, policy: RoutePolicy, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._layer = layer
        self._policy = policy
        self._scope = scope
        self._receive = receive
        self._send = send
        self._closed = False

    async def receive(self) -> Message:
        """The next message; where one is refused, the socket is closed, and the application told so."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            return message
        text = message.get("text")
        if text is None:
            text = as_text(message.get("bytes") or b"")
        look = self._layer.look_at_message
        if not self._policy.enforces:
            # After the application has got it.
            asyncio.get_running_loop().call_soon(look, text, self._policy, self._scope)
        elif look(text, self._policy, self._scope):
            self._closed = True
            closing = {"code": _POLICY_VIOLATION, "reason": "Content refused"}
            await self._send({"type": "websocket.close"} | closing)
            return {"type": "websocket.disconnect"} | closing
        return message

    async def send(self, message: Message) -> None:
        """Sends, unless the socket is closed."""
        if not self._closed:
            await self._send(message)


def _refusal(findings: list[Finding]) -> ContentRefused:
    errors = [{"pointer": f"#{found.pointer}", "reason": found.id} for found in findings[:_MOST_TOLD]]
    return ContentRefused("The request has content that this route does not take.", extensions={"errors": errors})


# --- the request as texts ---------------------------------------------------------------------------------------------


# The most that any policy looks for; a suspicion is enough.
_EVERYTHING = Inspector(threshold=1)


@lru_cache(maxsize=4096)
def _plain_header(value: bytes) -> bool:
    """Whether a value of the header needs no look; the same few values come again and again."""
    return not _EVERYTHING.inspect(as_text(value), in_line=True)


def _head(scope: Scope, policy: RoutePolicy) -> list[Text]:
    """The texts of the head that need a look."""
    found: list[Text] = []
    query: bytes = scope["query_string"]
    if query and not is_plain_query(query):
        found += pairs_of(query, "query", policy.query)
    wanted = policy.headers
    for name, value in scope["headers"]:
        if name in wanted:
            if len(value) > _LONGEST_REMEMBERED or not _plain_header(value):
                found.append(Text(("header", name.decode("latin-1")), as_text(value), in_line=True))
        elif name == b"cookie" and (len(value) > _LONGEST_REMEMBERED or not _plain_header(value)):
            found += _cookies(value, policy)
    if policy.segments is None or policy.segments:
        found += _path_texts(scope, policy)
    return found


def _cookies(value: bytes, policy: RoutePolicy) -> Iterator[Text]:
    for pair in as_text(value).split(";"):
        name, _, content = pair.strip().partition("=")
        if content and not policy.cookies.member(name).exempt:
            yield Text(("cookie", name), content.strip('"'), in_line=True)


def _path_texts(scope: Scope, policy: RoutePolicy) -> Iterator[Text]:
    if policy.segments is None:
        # No route, or an application that is not looked into.
        yield Text(("path",), route_path(scope["path"], scope.get("root_path", ""))[1:], in_line=True)
        return
    given = scope["path"].split("/")[1:]
    if len(given) <= len(policy.segments) and is_plain_path(scope["path"]):
        return
    # The template has the prefixes of mounts; a server may have put a root path before it.
    surplus = max(0, len(given) - len(policy.segments))
    root = scope.get("root_path", "").strip("/")
    start = len(root.split("/")) if root and surplus and scope["path"].startswith(scope["root_path"]) else 0
    for index, name in enumerate(policy.segments):
        if name is None or policy.path.member(name).exempt:
            continue
        rest = given[start + index :]
        # A parameter that takes the rest of the path is the last one.
        value = "/".join(rest) if index == len(policy.segments) - 1 else rest[0] if rest else ""
        if value:
            yield Text(("path", name), value, in_line=True)


def _message_texts(text: str) -> Iterator[Text]:
    body = Body(text.encode("utf-8", "surrogatepass"), "", b"", "")
    for each in body_texts(body, FREE, most_bytes=0, files=False):
        yield each._replace(path=("websocket", *each.path[1:]))


def inspected(texts: Any, policy: RoutePolicy) -> list[Finding]:
    """What is found in texts, but for what the policy allows."""
    found: list[Finding] = []
    inspect = policy.inspector.inspect
    classes = policy.inspector.classes
    for path, value, in_line, key_of in texts:
        hits: tuple[Hit, ...] = inspect(value, in_line=in_line)
        if key_of is not None:
            for kind, reason in find_in_key(value, key_of):
                if kind in classes and not policy.allows(path, kind):
                    found.append(Finding(f"{kind}.{reason}", pointer_of(path)))
        found += [
            Finding(hit.id, pointer_of(path))
            for hit in hits
            if not policy.allows(path, hit.kind) and not _is_own_address(path, hit.kind)
        ]
    return found


def _is_own_address(path: Path, kind: str) -> bool:
    # That a browser or a proxy is on a private network is no attack.
    return kind == "ssrf" and path[0] == "header"


# --- the body ---------------------------------------------------------------------------------------------------------


def _may_have_body(scope: Scope) -> bool:
    """Whether a body may come: on HTTP/1 it announces itself (RFC 9112, section 6.3)."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return bool(value != b"0")
        if name == b"transfer-encoding":
            return True
    version: str = scope.get("http_version", "1.1")
    return version[:1] != "1" and scope["method"] not in _WITHOUT_BODY


def _declared_length(scope: Scope) -> int:
    value = get(scope["headers"], b"content-length")
    return int(value) if value is not None and value.isdigit() and len(value) < 19 else 0  # noqa: PLR2004 - 64 bits


class _Reading:
    """The body of one request, read or copied as far as it is inspected.

    Attributes:
        size: How many bytes have come.
        more: There is more to come.
        cut_off: The client went away before the end.
    """

    __slots__ = ("_chunks", "_messages", "_most", "_scope", "cut_off", "is_upload", "more", "size")

    def __init__(self, scope: Scope, policy: RoutePolicy) -> None:
        self._scope = scope
        self._most = policy.settings.max_inspected_bytes
        self._messages: list[Message] = []
        self._chunks: list[bytes] = []
        self.is_upload = is_upload(media_type_of(get(scope["headers"], b"content-type")))
        self.size = 0
        self.more = True
        self.cut_off = False

    def too_large(self, size: int) -> bool:
        """Whether so many bytes are more than what is inspected."""
        return size > self._most

    def take(self, message: Message) -> None:
        """Keeps a message, to be replayed."""
        self._messages.append(message)
        self._copy(message)

    def _copy(self, message: Message) -> None:
        if message["type"] != "http.request":
            self.cut_off, self.more = True, False
            return
        chunk = message.get("body", b"")
        self.size += len(chunk)
        self.more = message.get("more_body", False)
        if self.too_large(self.size):
            self._chunks.clear()
        else:
            self._chunks.append(chunk)

    def replay(self, receive: Receive) -> Receive:
        """Gives the messages that were kept, then those that still come."""
        messages = self._messages
        messages.reverse()

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        return receive_again

    def copying(self, receive: Receive) -> Receive:
        """Gives every message as it comes, and keeps a copy of what is in it."""

        async def receive_and_copy() -> Message:
            message = await receive()
            if self.more:
                self._copy(message)
            return message

        return receive_and_copy

    def body(self) -> Body:
        """The whole body."""
        headers = self._scope["headers"]
        content_type = get(headers, b"content-type") or b""
        coding = (get(headers, b"content-encoding") or b"").strip().lower().decode("latin-1")
        return Body(b"".join(self._chunks), media_type_of(content_type), content_type, coding)
