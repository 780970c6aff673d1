"""The checks. The docstring of each says why, for the documentation; it gives what it found, and what to do.

An id is never used again for something else: pipelines ignore findings by it.
"""

import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fastapi.security.base import SecurityBase
from pydantic import BaseModel, SecretStr

from fastapi_hardening.audit.finding import CHECKS, Problems, Subject, check
from fastapi_hardening.core.client_ip import UNIX, parse_network
from fastapi_hardening.core.redis_address import read_address
from fastapi_hardening.security.auth.overrides import Public, is_open
from fastapi_hardening.settings import NotBuiltYet

__all__ = ["CHECKS"]


@check(0, "error", "the application cannot serve", everywhere=True)
def _broken(_subject: Subject) -> Problems:
    """The configuration contradicts itself: what `harden()`, or the first request, would say."""
    yield from ()


@check(1, "error", "not hardened", everywhere=True)
def _not_hardened(_subject: Subject) -> Problems:
    """Without `harden(app)` nothing of this package is there. A name that leads to another application is the cause."""
    yield from ()


# --- what is shown ----------------------------------------------------------------------------------------------------


@check(2, "warning", "environment is development", everywhere=True)
def _develops(subject: Subject) -> Problems:
    """Errors tell their traceback, and health its details. Most checks are left out then."""
    if subject.settings.environment == "development":
        yield "environment is 'development'", "set HARDENING_ENVIRONMENT=production where it is deployed"


@check(3, "error", "debug is on")
def _debug(subject: Subject) -> Problems:
    """`FastAPI(debug=True)` shows exceptions, and the code around them, to whoever causes them.

    The layer of errors switches it off, unless `errors.details` is on.
    """
    for application in subject.handle.table.built().applications:
        if getattr(application, "debug", False):
            yield f"{getattr(application, 'title', 'an application')}: debug is on", "leave out debug=True"


@check(4, "error", "error details are shown")
def _error_details(subject: Subject) -> Problems:
    """A 500 answer with its traceback tells paths, versions and values."""
    if subject.settings.errors.details:
        yield "errors.details is on", "set errors.details=false; the request id leads to the log"


@check(5, "warning", "documentation is open")
def _open_docs(subject: Subject) -> Problems:
    """`/docs` and `/openapi.json` list every route to everybody. That is right for a public API only."""
    app = subject.app
    known = {path for path in (app.docs_url, app.redoc_url, app.openapi_url) if path}
    found = sorted({str(route.template) for route in subject.routes() if route.template in known and route.open})
    if found:
        fix = "FastAPI(openapi_url=None), or auth.default='required'; if it is a public API, ignore FH005"
        yield f"everybody may read {', '.join(found)}", fix


@check(6, "info", "metrics are open to private peers")
def _open_metrics(subject: Subject) -> Problems:
    """Without a token or a port of their own, whoever calls from a private address may read all routes and loads."""
    metrics = subject.settings.metrics
    if metrics.enabled and metrics.path and metrics.token is None and metrics.port is None:
        yield f"{metrics.path} is open to private addresses", "set metrics.token, or metrics.port"


@check(7, "warning", "health details are open")
def _open_health(subject: Subject) -> Problems:
    """The report names every service behind this one, and which of them fails."""
    if subject.settings.health.enabled and subject.settings.health.details == "always":
        yield "health.details is 'always'", "set health.details='authorized'"


# --- who is believed --------------------------------------------------------------------------------------------------


@check(10, "warning", "any host is served")
def _any_host(subject: Subject) -> Problems:
    """A forged `Host` becomes the link in a mail that resets a password, or the key of a cache."""
    hosts = subject.settings.allowed_hosts
    if not hosts or "*" in hosts:
        yield "every Host is served", "set allowed_hosts to the names of this service"


@check(11, "warning", "allowed hosts are too wide")
def _wide_hosts(subject: Subject) -> Problems:
    """`*.com` takes in everybody's names, and so does `*.` before the domain of a hosting provider."""
    for host in subject.settings.allowed_hosts:
        if host.startswith("*.") and host.count(".") == 1:
            yield f"allowed_hosts has {host}: whole top-level domains", f"name your own domain, as in *.shop{host[1:]}"


@check(12, "info", "no trusted proxies")
def _no_proxies(subject: Subject) -> Problems:
    """Right where clients connect directly. Behind a load balancer all of them share one address and its limit."""
    if not subject.settings.trusted_proxies:
        yield "trusted_proxies is empty", "behind a load balancer, set it to the balancer's addresses"


@check(13, "error", "trusted proxies are too wide")
def _wide_proxies(subject: Subject) -> Problems:
    """Whoever is in such a network chooses the address that limits, bans and logs know them by."""
    for entry in subject.settings.trusted_proxies:
        if entry == UNIX:
            continue
        network = parse_network(entry)
        # As wide as the widest that are private, and as those of the networks that deliver content.
        private, public = (8, 12) if network.version == 4 else (7, 28)  # noqa: PLR2004
        if network.prefixlen < (private if network.is_private else public):
            yield f"trusted_proxies has {entry}", "name the addresses of your own proxies"


@check(14, "error", "the server believes everybody")
def _server_believes_all(subject: Subject) -> Problems:
    """With `FORWARDED_ALLOW_IPS=*` uvicorn takes the first entry of `X-Forwarded-For`, which any client can write."""
    if "*" in _believed(subject):
        yield "FORWARDED_ALLOW_IPS is *", "unset it, run uvicorn with --no-proxy-headers, and set trusted_proxies"


@check(15, "warning", "forwarding headers are read twice")
def _read_twice(subject: Subject) -> Problems:
    """Uvicorn puts the client in the place of the peer; the client is then taken for a proxy, or for an unknown one."""
    believed = _believed(subject)
    if believed and "*" not in believed and subject.settings.trusted_proxies:
        yield (
            "FORWARDED_ALLOW_IPS and trusted_proxies are both set",
            "unset the first, and run uvicorn with --no-proxy-headers",
        )


def _believed(subject: Subject) -> str:
    return subject.environ.get("FORWARDED_ALLOW_IPS") or subject.environ.get("UVICORN_FORWARDED_ALLOW_IPS") or ""


# --- state ------------------------------------------------------------------------------------------------------------


@check(20, "warning", "each worker counts for itself")
def _counts_apart(subject: Subject) -> Problems:
    """In memory a limit holds for one process: with four, four times as much passes, and a ban is known to one."""
    workers = max(subject.workers, subject.settings.workers)
    if workers > 1 and subject.settings.state_url is None:
        yield f"{workers} workers keep limits, bans and sessions apart", "set state_url to a Redis that all share"


@check(21, "warning", "number of workers differs")
def _workers_differ(subject: Subject) -> Problems:
    """When the store is gone each worker counts its share, which is by the setting."""
    said = subject.workers
    if said > 1 and subject.settings.workers not in (1, said):
        yield f"the server runs {said} workers, the setting says {subject.settings.workers}", f"set workers={said}"


@check(22, "warning", "the store is open on the network")
def _open_store(subject: Subject) -> Problems:
    """Who reaches the store can lift every limit and read sessions."""
    url = subject.settings.state_url
    if url is None:
        return
    address = url.get_secret_value()
    host = re.sub(r"^.*?://(?:[^@/]*@)?(\[[^]]*\]|[^:/,?]*).*$", r"\1", address)
    read_address(address)
    if host in ("localhost", "127.0.0.1", "[::1]", "") or address.startswith("unix"):
        return
    if "@" not in address:
        yield "state_url has no password", "give the store a password: redis://:PASSWORD@host:6379/0"
    if not address.startswith("rediss"):
        yield "state_url is not encrypted", "use rediss:// where the network is not yours alone; else ignore FH022"


# --- protection -------------------------------------------------------------------------------------------------------

_LAYERS = (
    "errors security_headers request_limits address_limit rate_limit input_validation access_log health metrics auth"
)
_HALF_A_YEAR = 15_552_000
_FEW_CHARACTERS = 8
_GUESSED = re.compile(r"change.?me|secret|password|example|12345678", re.IGNORECASE)


@check(30, "warning", "a layer is off")
def _layer_off(subject: Subject) -> Problems:
    """What is switched off protects from nothing. If another part of your system does it, say so by ignoring FH030."""
    off = [name for name in _LAYERS.split() if not getattr(subject.settings, name).enabled]
    if off:
        yield f"switched off: {', '.join(off)}", "leave enabled=false out"


@check(31, "warning", "HSTS is off or short")
def _hsts(subject: Subject) -> Problems:
    """Without it the first request of a visit may go out unencrypted, to whoever listens. Half a year is the least."""
    headers = subject.settings.security_headers
    value = headers.strict_transport_security if headers.enabled else None
    age = re.search(r"max-age=\"?(\d+)", value or "")
    if age is None or int(age[1]) < _HALF_A_YEAR:
        yield "HSTS is off, or below half a year", "set strict_transport_security='max-age=63072000; includeSubDomains'"


@check(32, "warning", "validation is off")
def _validation_off(subject: Subject) -> Problems:
    """Nothing looks at content, and nothing tells that somebody tries."""
    if subject.settings.input_validation.mode == "off":
        yield "input_validation.mode is 'off'", "set it to 'report', and to 'enforce' when the report is clean"


@check(33, "info", "validation only reports")
def _validation_reports(subject: Subject) -> Problems:
    """The default, so that nobody is refused by mistake. When the report has been clean for a while, enforce."""
    validation = subject.settings.input_validation
    if validation.enabled and validation.mode == "report":
        yield "input_validation.mode is 'report'", "look at handle.validation, then set it to 'enforce'"


@check(34, "warning", "limits only report")
def _limits_report(subject: Subject) -> Problems:
    """Requests over the limit are counted, and pass."""
    if subject.settings.rate_limit.enabled and subject.settings.rate_limit.report_only:
        yield "rate_limit.report_only is on", "take it out when the limits fit"


@check(35, "error", "a secret is weak")
def _weak_secret(subject: Subject) -> Problems:
    """Of few different characters, or with a word that everybody tries. The value is never shown."""
    for key, secret in _secrets(subject.settings):
        text = secret.get_secret_value()
        if len(set(text)) < _FEW_CHARACTERS or _GUESSED.search(text):
            yield f"{key} can be guessed", "make one by `openssl rand -hex 32`"


@check(36, "warning", "session cookie without TLS")
def _insecure_cookie(subject: Subject) -> Problems:
    """A cookie that goes out unencrypted is a login for whoever listens."""
    session = subject.settings.auth.session
    if session is not None and session.enabled and session.secure is False:
        yield "auth.session.secure is off", "leave it out: the cookie is for https where the request came by https"


@check(37, "warning", "CORS trusts what is not safe")
def _risky_cors(subject: Subject) -> Problems:
    """A page without TLS can be changed on its way; one on localhost is whatever runs on the visitor's machine."""
    cors = subject.handle.cors
    for origin in cors.allow_origins:
        if origin.startswith("http://"):
            yield f"CORS allows {origin}", "name the https:// origin, and developers' ones in development only"
    if cors.allow_origin_regex is not None:
        yield "CORS allows a pattern of origins", "name them in allow_origins, where nothing can be misread"
    if cors.allow_private_network:
        yield "public pages may call into the private network", "set cors.allow_private_network=false"


@check(38, "info", "CORS allows everybody")
def _open_cors(subject: Subject) -> Problems:
    """Right for a public API that knows nobody by cookies or by the network."""
    if "*" in subject.handle.cors.allow_origins:
        yield "pages of every origin may read answers", "name the origins, unless this is a public API"


@check(39, "warning", "anybody may change something")
def _open_changes(subject: Subject) -> Problems:
    """With `auth.default = "optional"` a route that forgets its requirement is open. `Public()` says it is meant."""
    unsafe = {"POST", "PUT", "PATCH", "DELETE"}
    found = [
        f"{'/'.join(sorted(unsafe & entry.methods))} {entry.template}"
        for entry in subject.handle.table
        if entry.methods is not None
        and unsafe & entry.methods
        and is_open(entry, required=subject.handle.auth.required)
        and not (entry.of(Public) or _has_a_scheme(entry.dependant))
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""  # noqa: PLR2004 - enough to see what it is about
        fix = "put RequireUser() on it, or Public() if it is meant; auth.default='required' closes all that say nothing"
        yield f"open to everybody: {', '.join(found[:5])}{more}", fix


@check(40, "info", "threads without a deadline")
def _no_deadline(subject: Subject) -> Problems:
    """A `def` endpoint holds one of forty threads until it is done. When all wait for a database, nobody is served."""
    entries = () if subject.settings.timeout.enabled else subject.handle.table
    found = [str(entry.template) for entry in entries if entry.kind == "http" and _runs_in_a_thread(entry.endpoint)]
    if found:
        fix = "give every call in them a timeout of its own"
        yield f"{len(found)} endpoints run in threads, such as {found[0]}", fix


def _runs_in_a_thread(endpoint: Any) -> bool:
    function = inspect.unwrap(endpoint) if callable(endpoint) else endpoint
    return inspect.isfunction(function) and not inspect.iscoroutinefunction(function)


def _has_a_scheme(dependant: Any) -> bool:
    """Whether the application guards a route by a security scheme of FastAPI's, of which we know nothing more."""
    inside = getattr(dependant, "dependencies", ())
    return any(isinstance(each.call, SecurityBase) or _has_a_scheme(each) for each in inside)


# --- the deployment ---------------------------------------------------------------------------------------------------


@check(50, "warning", "a key has no effect")
def _without_effect(subject: Subject) -> Problems:
    """A key of a concern that is planned is accepted, and does nothing yet."""
    for key in subject.settings.without_effect():
        yield f"{key} is set, but the concern is not built yet", "do not rely on it"


@check(51, "warning", "spans are lost")
def _lost_spans(subject: Subject) -> Problems:
    """An endpoint is set, and nothing is installed that could send spans to it."""
    environ, tracing = subject.environ, subject.handle.tracing
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    wanted = endpoint and tracing.settings.enabled and tracing.settings.export and tracing.provider is None
    if wanted and not _is_installed("opentelemetry.exporter.otlp"):
        yield f"spans for {endpoint} cannot be sent", "pip install 'fastapi-hardening[otlp]'"


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _secrets(model: BaseModel, above: str = "") -> Iterator[tuple[str, SecretStr]]:
    """Every secret of the settings with its key, apart from addresses that have one inside."""
    for name in type(model).model_fields:
        value, key = getattr(model, name), f"{above}{name}"
        if isinstance(value, NotBuiltYet) or key == "state_url":
            continue
        if isinstance(value, BaseModel):
            yield from _secrets(value, f"{key}.")
            continue
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(each, SecretStr):
                yield key, each
