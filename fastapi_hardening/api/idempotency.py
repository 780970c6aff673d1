"""A request that is sent twice is carried out once: ``dependencies=[Idempotent()]`` and an ``Idempotency-Key``.

It protects what must not happen twice, such as a payment, from the client that has no answer and tries again. The first
request with a key is carried out, and its answer kept for a day; whoever sends the same request with the same key again
has the same answer, marked ``Idempotent-Replayed: true``. As in the IETF's draft-ietf-httpapi-idempotency-key-header:
400 without a key or with one that cannot be read, 409 while the first request is under way, 422 when the key comes with
another request.

It is *not* a transaction: an endpoint that dies half-way has done half. After a failure (5xx, an exception, or what
says that nothing was begun: 401, 403, 408, 425, 429) the key is free again, so the client may try; every other answer
is kept.

It sits below authentication and the rate limit, so nobody has an answer who would not be let in, and keys are apart by
caller and tenant. Where only the route itself can decide who is let in (``Authorize``, a security scheme of FastAPI),
no answer is handed out again: the second request is told that it was carried out (409).

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.api.idempotency import Idempotent, IdempotencyMiddleware
    >>> app = FastAPI()
    >>> app.add_middleware(IdempotencyMiddleware)
    >>> @app.post("/payments", dependencies=[Idempotent()])
    ... async def pay() -> str:
    ...     return "paid"
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import openapi
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.credentials import has_unknown_scheme, sounds_like_credentials
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.eviction import OVERHEAD_BYTES, S3Fifo
from fastapi_hardening.core.headers import RawHeaders, get_all
from fastapi_hardening.core.policy import Override, all_handled, mark_handled, refusing
from fastapi_hardening.core.problem import IANA, OWN, Problem, refuse, retry_after
from fastapi_hardening.core.routes import RouteEntry, route_of, table_of
from fastapi_hardening.core.store import BoundedMap, StateStore, StoreUnavailable

logger = logging.getLogger("fastapi_hardening.idempotency")

OnStoreFailure = Literal["rescue", "refuse"]

LAYER = "idempotency"
_METHODS = frozenset({"POST", "PATCH"})
# After these nothing was begun, or the client is told to try again.
_FREES = frozenset({401, 403, 408, 425, 429})
# A structured field string (RFC 9941, section 3.3.3), or bare, as many clients send it.
_QUOTED = re.compile(rb'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE = re.compile(rb"[\x21\x23-\x2b\x2d-\x7e]+")
_LONGEST_KEY = 255
_SENT_BY_THE_SERVER = frozenset({"http.response.pathsend", "http.response.zerocopysend"})
# Not kept: a cookie is given out once, and these belong to the connection.
_NOT_REPLAYED = frozenset({b"set-cookie", b"connection", b"transfer-encoding", b"date"})


class IdempotencySettings(ConcernSettings):
    """The settings of idempotency; which routes have it, they say themselves."""

    ttl_seconds: float = Field(86_400.0, gt=0)
    """How long an answer is kept for whoever sends the request again."""

    lock_seconds: float = Field(60.0, gt=0)
    """So long a key stays taken when the process that works on it dies; longer than the slowest handler."""

    max_body_bytes: int = Field(256 * 1024, ge=0)
    """A larger answer is sent and not kept; who asks again is told that it was carried out."""

    max_keys: int = Field(100_000, ge=1)
    """For how many keys there is a place in memory; without a shared store, or while it is gone."""

    max_memory_bytes: int = Field(64 * 1024 * 1024, ge=0)
    """How much the bodies in memory may take; those that are dropped are as those that are too large."""

    on_store_failure: OnStoreFailure = "rescue"
    """While the shared store is gone: ``rescue`` (each worker keeps keys for itself) or ``refuse`` (503)."""


class IdempotencyKeyMissing(Problem):
    """The route demands a key."""

    status = 400
    type = OWN + "idempotency-key-missing"
    title = "Idempotency-Key missing"


class IdempotencyKeyMalformed(Problem):
    """The key cannot be read."""

    status = 400
    type = OWN + "idempotency-key-malformed"
    title = "Idempotency-Key malformed"


class IdempotencyKeyReused(Problem):
    """The key was used for another request."""

    status = 422
    type = OWN + "idempotency-key-reused"
    title = "Idempotency-Key reused"


class RequestInProgress(Problem):
    """The first request with this key is under way."""

    status = 409
    type = OWN + "request-in-progress"
    title = "Request in progress"


class AlreadyDone(Problem):
    """The request was carried out before, and its answer cannot be handed out again."""

    status = 409
    type = OWN + "already-done"
    title = "Already done"


@dataclass(frozen=True, slots=True)
class RequestReplayed:
    """A request was answered with what it was answered before.

    Attributes:
        template: The path template of the route.
        request_id: The id of the second request.
        first_request_id: The id of the first one.
    """

    template: str | None
    request_id: str
    first_request_id: str


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """What is known of a key.

    Attributes:
        request: A digest of what the request is about: method, path, query, content type.
        request_id: Its id.
        cookies: A digest of its cookies, where nobody has identified the caller.
        body: A digest of its body; ``None`` where nobody has read it to its end.
        status: The status of the answer; 0 while there is none.
        headers: The fields of the answer.
        answer: Its body; ``None`` where it was not kept.
    """

    request: str
    request_id: str
    cookies: str = ""
    body: str | None = None
    status: int = 0
    headers: RawHeaders | None = None
    answer: bytes | None = None

    def pack(self) -> tuple[bytes, bytes]:
        """The head, which has no line break, and the body."""
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers or ()]
        kept = self.answer is not None
        head = json.dumps([self.request, self.request_id, self.cookies, self.body, self.status, fields, kept]).encode()
        return head, self.answer or b""

    @classmethod
    def unpack(cls, data: bytes) -> "Record | None":
        """What :meth:`pack` gave, with a line break between the two; ``None`` for anything else."""
        head, _, body = data.partition(b"\n")
        try:
            request, request_id, cookies, digest, status, fields, kept = json.loads(head)
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
            return cls(request, request_id, cookies, digest, int(status), headers, body if kept else None)
        except (ValueError, TypeError, AttributeError):
            return None


class Full(Exception):  # noqa: N818 - named as problems are, by what happened
    """Every place is taken by a key that is alive."""


class LocalRecords:
    """The records of one process. What a key is about is never dropped before its time; the bodies of answers may be.

    Args:
        max_keys: How many keys there may be.
        max_bytes: How much the bodies may take.
        clock: Where the time comes from.
    """

    def __init__(self, max_keys: int, max_bytes: int, clock: Clock | None = None) -> None:
        self._heads: BoundedMap[bytes] = BoundedMap(max_keys, clock=clock)
        self._bodies: S3Fifo[tuple[bytes, bytes]] = S3Fifo(max_keys, max_bytes)

    def get(self, name: str) -> Record | None:
        """The record of a key."""
        head = self._heads.get(name)
        if head is None:
            self._bodies.pop(name)
            return None
        record, kept = Record.unpack(head + b"\n"), self._bodies.get(name)
        if record is not None and record.answer is not None:
            # A body of an earlier use of the name is none of this one.
            record.answer = kept[1] if kept is not None and kept[0] == head else None
        return record

    def put(self, name: str, record: Record, seconds: float) -> bool:
        """Stores a record; ``False`` where there is no room."""
        head, body = record.pack()
        self._bodies.pop(name)
        if record.answer is not None:
            self._bodies.put(name, (head, body), len(body) + OVERHEAD_BYTES)
        return self._heads.put(name, head, seconds)

    def delete(self, name: str) -> None:
        """Forgets a key."""
        self._heads.delete(name)
        self._bodies.pop(name)


class Ledger:
    """Which requests were carried out: in memory, or in a store that all workers share.

    Args:
        settings: Times and sizes.
        store: The shared store, if there is one.
        clock: Where the time comes from.
    """

    def __init__(
        self, settings: IdempotencySettings, *, store: StateStore | None = None, clock: Clock | None = None
    ) -> None:
        self._settings = settings
        self._store = store
        self._local = LocalRecords(settings.max_keys, settings.max_memory_bytes, clock)

    async def claim(self, name: str, record: Record, on_store_failure: OnStoreFailure) -> Record | None:
        """Takes a key for a request; gives the record of the one that has it already.

        Raises:
            Full: There is no place for another key.
            StoreUnavailable: The shared store is gone, and nobody may go on without it.
        """
        # What was done while the store was gone is known here alone.
        known = self._local.get(name)
        if known is not None:
            return known
        if self._store is not None:
            try:
                return await self._claim_shared(name, record, self._store)
            except StoreUnavailable:
                if on_store_failure == "refuse":
                    raise
                logger.warning("the shared store is gone: keys are known to this worker alone")
                known = self._local.get(name)  # somebody else may have come here meanwhile
                if known is not None:
                    return known
        if not self._local.put(name, record, self._settings.lock_seconds):
            raise Full
        return None

    async def _claim_shared(self, name: str, record: Record, store: StateStore) -> Record | None:
        for _ in range(2):
            if await store.add(_key(name), b"\n".join(record.pack()), self._settings.lock_seconds):
                return None
            data = await store.get(_key(name))
            if data is not None:
                # What cannot be read was written by another version; it may have been carried out.
                return Record.unpack(data) or Record("", "", status=1)
        return Record(record.request, "")  # it comes and goes too fast to be seen: somebody works on it

    async def finish(self, name: str, record: Record, seconds: float) -> None:
        """Keeps the answer of a request that was carried out."""
        if self._store is not None:
            try:
                if await self._store.put(_key(name), b"\n".join(record.pack()), seconds):
                    self._local.delete(name)
                    return
            except StoreUnavailable:
                logger.warning("the shared store is gone: what was carried out is known to this worker alone")
        self._local.put(name, record, seconds)

    async def release(self, name: str) -> None:
        """Frees a key: nothing was carried out."""
        self._local.delete(name)
        if self._store is not None:
            try:
                await self._store.delete(_key(name))
            except StoreUnavailable:
                logger.warning("the shared store is gone: a key stays taken until its time is over")


def _key(name: str) -> str:
    return f"idempotency:{name}"


def key_in(headers: RawHeaders) -> bytes | None:
    """The key of a request; ``None`` where it has none.

    Raises:
        IdempotencyKeyMalformed: It is empty, too long, stands twice, or is neither a string nor a token.
    """
    values = get_all(headers, b"idempotency-key")
    if not values:
        return None
    value = values[0].strip()
    quoted = _QUOTED.fullmatch(value)
    key = quoted[1] if quoted else value if _BARE.fullmatch(value) else b""
    if len(values) > 1 or not 1 <= len(key) <= _LONGEST_KEY:
        raise IdempotencyKeyMalformed(
            f'Idempotency-Key is one string of at most {_LONGEST_KEY} visible characters, such as "8e03978e-40d5".'
        )
    return key


# --- layer ------------------------------------------------------------------------------------------------------------


class IdempotencyMiddleware:
    """Carries out a request with a key once, and answers it again.

    Args:
        app: The application inside.
        settings: Times and sizes.
        store: The store that all workers share, if there is one.
        events: Where :class:`RequestReplayed` goes.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: IdempotencySettings | None = None,
        *,
        store: StateStore | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self.settings = settings = settings or IdempotencySettings()
        self.ledger = Ledger(settings, store=store, clock=clock)
        self._events = events or Events()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or scope["method"] not in _METHODS or not self.settings.enabled:
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        entry = context.route or route_of(scope)
        overrides = entry.of(Idempotent)
        if not overrides:
            await self.app(scope, receive, send)
            return
        mark_handled(scope, overrides)
        override: Any = overrides[-1]  # the innermost counts
        try:
            work = await self._begin(override, entry, scope, receive, context)
        except Problem as problem:
            await refuse(problem, scope, receive, send, layer=LAYER)
            return
        if work is None:
            await self.app(scope, receive, send)
        elif isinstance(work, Record):
            await self._replay(work, send, context)
        else:
            await work.run(self.app, scope, receive, send)

    async def _begin(
        self, override: "Idempotent", entry: RouteEntry, scope: Scope, receive: Receive, context: RequestContext
    ) -> "_Work | Record | None":
        """What is to be done with a request: carry it out, answer it again, or nothing of both.

        Raises:
            Problem: It is refused.
        """
        key = key_in(scope["headers"])
        if key is None:
            if override.required:
                raise IdempotencyKeyMissing(
                    "This request needs an Idempotency-Key, so that it can be sent again safely."
                )
            return None
        name = _name(key, scope, context)
        record = Record(_about(scope, context), context.request_id, _cookies(scope, context))
        seconds = self.settings.ttl_seconds if override.ttl_seconds is None else override.ttl_seconds
        try:
            known = await self.ledger.claim(name, record, override.on_store_failure or self.settings.on_store_failure)
        except (Full, StoreUnavailable):
            raise Problem(
                "Whether this request was carried out cannot be kept in mind just now; come back later.",
                status=503,
                type=IANA + "temporary-reduced-capacity",
                title="Temporarily reduced capacity",
                headers=retry_after(2),
            ) from None
        if known is None:
            return _Work(self.ledger, name, record, self.settings.max_body_bytes, seconds)
        if known.status == 0:
            raise RequestInProgress(
                "The first request with this Idempotency-Key is under way.", headers={"Retry-After": "1"}
            )
        if known.request and (known.request != record.request or not await _same_body(known, receive)):
            raise IdempotencyKeyReused("This Idempotency-Key was used for another request.")
        if (
            known.answer is None
            or known.cookies != record.cookies
            or has_unknown_scheme(entry.dependant)
            or not all_handled(refusing(entry.overrides), scope)
        ):
            raise AlreadyDone("This request was carried out before; its answer is not kept.")
        return known

    async def _replay(self, record: Record, send: Send, context: RequestContext) -> None:
        template = None if context.route is None else context.route.template
        self._events.emit(RequestReplayed(template, context.request_id, record.request_id))
        headers = [*(record.headers or ()), (b"idempotent-replayed", b"true")]
        await send({"type": "http.response.start", "status": record.status, "headers": headers})
        await send({"type": "http.response.body", "body": record.answer or b""})


class _Work:
    """A request that is carried out, and whose answer is kept for those who send it again."""

    def __init__(self, ledger: Ledger, name: str, record: Record, max_body_bytes: int, seconds: float) -> None:
        self._ledger = ledger
        self._name = name
        self._record = record
        self._max_body_bytes = max_body_bytes
        self._seconds = seconds
        self._digest: Any = hashlib.blake2b(digest_size=20)
        self._frees = True
        self._finished = False
        self._parts: list[bytes] | None = []
        self._size = 0

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the application answer."""

        async def receive_and_digest() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._digest.update(message.get("body", b""))
                if not message.get("more_body", False):
                    self._record.body = self._digest.hexdigest()
            return message

        async def send_and_keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._start(message)
            elif message["type"] == "http.response.body":
                await self._take(message)
            elif message["type"] in _SENT_BY_THE_SERVER:
                self._parts = None
            await send(message)

        # Who sends it again may take other codings, so the answer is kept, and sent, as it is.
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        completed = False
        try:
            await app(scope, receive_and_digest, send_and_keep)
            completed = True
        finally:
            if not self._finished:
                if completed and not self._frees:
                    await self._finish()
                else:
                    await self._ledger.release(self._name)

    def _start(self, message: Message) -> None:
        status = message["status"]
        self._frees = status >= 500 or status in _FREES  # noqa: PLR2004 - the server's failures
        headers = [(name.lower(), value) for name, value in message.get("headers") or ()]
        self._record.status = status
        self._record.headers = [pair for pair in headers if pair[0] not in _NOT_REPLAYED]
        types = get_all(headers, b"content-type")
        if message.get("trailers") or any(value.startswith(b"text/event-stream") for value in types):
            self._parts = None

    async def _take(self, message: Message) -> None:
        """Takes a part of the answer. The last one is sent after it is kept: who has the answer can have it again."""
        if self._parts is not None:
            self._parts.append(message.get("body", b""))
            self._size += len(self._parts[-1])
            if self._size > self._max_body_bytes:
                self._parts = None
        if not message.get("more_body", False) and not self._frees:
            await self._finish()

    async def _finish(self) -> None:
        self._finished = True
        self._record.answer = None if self._parts is None else b"".join(self._parts)
        if self._record.answer is None:
            self._record.headers = []
        await self._ledger.finish(self._name, self._record, self._seconds)


def _name(key: bytes, scope: Scope, context: RequestContext) -> str:
    """Whose key it is, and which: a digest of caller, tenant and key."""
    principal: Any = context.principal
    whose: list[Any] = [context.tenant]
    if principal is not None:
        whose += [getattr(principal, part, None) for part in ("scheme", "issuer", "id", "tenant")]
    else:
        # What the endpoint may tell callers apart by; but for cookies, which may be others a moment later.
        whose += [pair for pair in scope["headers"] if pair[0] != b"cookie" and sounds_like_credentials(pair[0])]
    return _digest_of(whose, key)


def _cookies(scope: Scope, context: RequestContext) -> str:
    """A digest of the cookies of a caller whom nobody has identified: with others he has no earlier answer."""
    cookies = get_all(scope["headers"], b"cookie") if context.principal is None else ()
    return _digest_of(cookies) if cookies else ""


def _digest_of(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def _about(scope: Scope, context: RequestContext) -> str:
    """What a request is about, but for its body."""
    types = get_all(scope["headers"], b"content-type")
    path = (scope.get("root_path", ""), scope["path"], scope.get("query_string", b""))
    return _digest_of(scope["method"], *path, types, context.version)


async def _same_body(known: Record, receive: Receive) -> bool:
    """Whether a request has the body of the first one; it is read and not kept."""
    digest = hashlib.blake2b(digest_size=20)
    more = known.body is not None
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        digest.update(message.get("body", b""))
        more = message.get("more_body", False)
    return known.body is None or digest.hexdigest() == known.body


# --- OpenAPI ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Description:
    """The amendment of one application's document; equal to another one of the same application."""

    app: FastAPI

    def __call__(self, document: openapi.Document) -> None:
        paths: Any = document.get("paths") or {}
        for entry in table_of(self.app):
            overrides: Any = entry.of(Idempotent)
            for method in _METHODS & (entry.methods or frozenset()) if overrides else ():
                operation = paths.get(entry.template or "", {}).get(method.lower())
                if operation is not None:
                    _amend(operation, required=overrides[-1].required)


def describe(app: FastAPI) -> None:
    """Has an application's document name the key where it is taken; a second call changes nothing."""
    openapi.amend(app, _Description(app))


def _amend(operation: dict[str, Any], *, required: bool) -> None:
    parameters = operation.setdefault("parameters", [])
    if any(each.get("in") == "header" and each.get("name", "").lower() == "idempotency-key" for each in parameters):
        return
    schema = {"type": "string", "minLength": 1, "maxLength": _LONGEST_KEY}
    said = "Tells this request from every other; send it again with the same key to have it carried out once."
    parameters.append(
        {"name": "Idempotency-Key", "in": "header", "required": required, "description": said, "schema": schema}
    )
    answers = operation.setdefault("responses", {})
    content = answers.get("4XX", {}).get("content")
    conflict = {"description": "The first request is under way, or its answer is not kept"}
    answers.setdefault("409", conflict | ({} if content is None else {"content": content}))


# --- override ---------------------------------------------------------------------------------------------------------


class Idempotent(Override):
    """Has ``POST`` and ``PATCH`` of a route carried out once for each ``Idempotency-Key``; the innermost counts.

    Args:
        required: Whether a request without a key is refused; else it is carried out each time.
        ttl_seconds: How long an answer is kept; by default as the settings say.
        on_store_failure: What holds while the shared store is gone; by default as the settings say.
    """

    may_refuse: ClassVar[bool] = False  # where its layer is missing, and then nothing is replayed either

    def __init__(
        self,
        *,
        required: bool = True,
        ttl_seconds: float | None = None,
        on_store_failure: OnStoreFailure | None = None,
    ) -> None:
        super().__init__()
        self.required = required
        self.ttl_seconds = ttl_seconds
        self.on_store_failure: OnStoreFailure | None = on_store_failure

    async def act_late(self, connection: HTTPConnection) -> None:
        """Refuses: nobody would keep in mind that the request was carried out."""
        if connection.scope["type"] == "http" and connection.scope["method"] in _METHODS:
            raise Problem("This request could not be carried out safely.", status=500)
