"""Who calls, and what that caller may do: the engine of authentication, without ASGI.

A gate asks its authenticators in their order; the first that finds credentials of its kind decides, for better or
worse. It never guesses: what an authenticator raises ends in a refusal, and a crash in a 500.

Example:
    >>> import asyncio
    >>> from starlette.requests import HTTPConnection
    >>> gate = Gate()
    >>> asyncio.run(gate.identify(HTTPConnection({"type": "http", "headers": []}))) is None
    True
    >>> gate.not_authenticated().headers
    {'WWW-Authenticate': 'Bearer'}
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from starlette.requests import HTTPConnection

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import Authenticator, CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.core.store import MemoryStore, StateStore, StoreUnavailable
from fastapi_hardening.security.auth.basic import BasicAuthenticator
from fastapi_hardening.security.auth.bearer import BearerAuthenticator
from fastapi_hardening.security.auth.cross_site import CrossSite
from fastapi_hardening.security.auth.jwt import JwtVerifier
from fastapi_hardening.security.auth.problems import (
    BEARER,
    AuthenticationUnavailable,
    CredentialsRefused,
    NotAllowed,
    NotAuthenticated,
    is_bearer,
    joined,
    with_parameters,
)
from fastapi_hardening.security.auth.rbac import Permissions, PermissionsOf, Rbac, roles_of
from fastapi_hardening.security.auth.revocation import Revocations
from fastapi_hardening.security.auth.session import Sessions
from fastapi_hardening.security.auth.settings import AuthSettings, keys_of

logger = logging.getLogger("fastapi_hardening.auth")

A = TypeVar("A")


class Found(NamedTuple):
    """A caller who is known, and who says so."""

    principal: Principal
    authenticator: Authenticator


class Gate:
    """Identifies callers and answers what they may do; one for an application.

    Args:
        settings: The settings of authentication.
        authenticators: Who finds out who calls, asked in this order, before those that the settings name.
        permissions_of: Gives the permissions of roles, beside the settings.
        store: Where authenticators keep state, if they have no store of their own.
        events: Where authenticators that the settings have made tell their facts.
        clock: Where the time comes from.

    Attributes:
        settings: The settings.
        authenticators: All of them, in their order.
        rbac: Roles and permissions.
        required: Whether a route that says nothing demands a caller who is known.
        idle: Nobody can be identified and nothing is demanded, so that the layer has nothing to do.
        cross_site: Tells requests of other sites.
        revocations: What was revoked of the tokens whose issuer the settings name.
        keys: The keys of that issuer; ``None`` where none is named.
        clock: Where the time comes from.

    Raises:
        ConfigurationError: Everything is closed and nobody could be let in.
    """

    def __init__(
        self,
        settings: AuthSettings | None = None,
        authenticators: Sequence[Authenticator] = (),
        *,
        permissions_of: PermissionsOf | None = None,
        store: StateStore | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings = settings or AuthSettings()
        self.clock = clock or SystemClock()
        store = store or MemoryStore(clock=self.clock)
        self.revocations = Revocations(store, clock=self.clock, events=events)
        jwt = settings.jwt if settings.enabled and settings.jwt is not None and settings.jwt.enabled else None
        self.keys = None if jwt is None else keys_of(jwt, clock=self.clock, events=events)
        self.authenticators: tuple[Authenticator, ...] = (*authenticators, *self._of_settings())
        if not settings.enabled:
            if authenticators:
                raise ConfigurationError("auth.enabled is false, so the authenticators would not be asked; drop one")
            self.authenticators = ()
        for authenticator in self.authenticators:
            for name in ("scheme", "challenge", "authenticate"):
                if isinstance(authenticator, type) or not hasattr(authenticator, name):
                    raise ConfigurationError(
                        f"{authenticator!r} is no authenticator; give harden() objects with scheme, challenge and "
                        "authenticate(connection)"
                    )
            attach = getattr(authenticator, "attach", None)
            if attach is not None:
                attach(store=store, clock=self.clock)
        self.required = settings.default == "required"
        if self.required and not self.authenticators:
            raise ConfigurationError(
                "auth.default is 'required', but nothing could let anybody in: give harden() authenticators, as in "
                "harden(app, authenticators=[...]), or set auth.jwt, auth.basic or auth.session"
            )
        rbac = settings.rbac
        self.idle = not self.authenticators and not self.required
        self.rbac = Rbac(
            rbac.roles,
            rbac.inherits,
            permissions_of=permissions_of,
            cache_seconds=rbac.cache_seconds,
            max_cached=rbac.max_cached,
            clock=self.clock,
        )
        self.cross_site = CrossSite(settings.trusted_origins)
        self.query_parameters = frozenset(
            parameter for each in self.authenticators if (parameter := getattr(each, "query_parameter", None))
        )
        self._bearer = next((each.challenge for each in self.authenticators if is_bearer(each.challenge)), BEARER)

    def find(self, kind: type[A]) -> A | None:
        """The first authenticator of a class, such as ``Sessions`` that the settings have made."""
        return next((each for each in self.authenticators if isinstance(each, kind)), None)

    async def identify(self, connection: HTTPConnection, *, open_to_all: bool = False) -> Found | None:
        """Who calls; ``None`` where no credentials were sent.

        Args:
            connection: The request.
            open_to_all: Somebody unknown may call, too. Then credentials that a browser sends by itself and that cannot
                be checked now count as none: a page for everybody does not go down with the store of sessions.

        Raises:
            CredentialsRefused: There are some, and they prove nothing.
            AuthenticationUnavailable: Whoever would know does not answer.
        """
        for authenticator in self.authenticators:
            try:
                principal = await authenticator.authenticate(connection)
                if principal is None:
                    continue
                self._check_end(principal)
            except CredentialsUnchecked as unchecked:
                logger.warning("%s credentials cannot be checked: %s", authenticator.scheme, unchecked.reason)
                if open_to_all and is_ambient(authenticator):
                    continue
                raise AuthenticationUnavailable(math.ceil(unchecked.retry_after_seconds)) from unchecked
            except InvalidCredentials as invalid:
                logger.info("%s credentials are refused: %s", authenticator.scheme, invalid.reason)
                raise self.credentials_refused(authenticator) from None
            except (StoreUnavailable, TimeoutError, ConnectionError) as down:
                logger.exception("what %s credentials are looked up in does not answer", authenticator.scheme)
                if open_to_all and is_ambient(authenticator):
                    continue
                raise AuthenticationUnavailable from down
            return Found(principal, authenticator)
        return None

    def _of_settings(self) -> Iterable[Authenticator]:
        """The authenticators that the settings name."""
        basic, session, jwt = self.settings.basic, self.settings.session, self.settings.jwt
        if jwt is not None and self.keys is not None:
            yield BearerAuthenticator(
                JwtVerifier(jwt, self.keys, clock=self.clock), revocations=self.revocations, clock=self.clock
            )
        if session is not None and session.enabled:
            yield Sessions(session)
        if basic is not None and basic.enabled and basic.users:
            yield BasicAuthenticator(basic.users, realm=basic.realm, roles=basic.roles, permissions=basic.permissions)

    def _check_end(self, principal: Principal) -> None:
        if principal.expires_at is not None and principal.expires_at <= self.clock.time():
            raise InvalidCredentials("expired")

    def not_authenticated(self) -> NotAuthenticated:
        """The refusal of a caller who sent nothing: every scheme that would do."""
        return NotAuthenticated("Say who you are.", headers=joined(self._challenges()))

    def credentials_refused(self, authenticator: Authenticator | None = None) -> CredentialsRefused:
        """The refusal of credentials that prove nothing; why is not told."""
        challenges = self._challenges(failed=authenticator)
        return CredentialsRefused("The credentials are not valid.", headers=joined(challenges))

    def not_allowed(self, principal: Principal, scopes: Iterable[str] = ()) -> NotAllowed:
        """The refusal of a caller who is known; which scopes would do is told where it is a token that lacks them."""
        wanted = " ".join(scopes)
        if not wanted:
            return NotAllowed("You may not do this.")
        headers = None
        if principal.scheme == BEARER.lower():
            said = with_parameters(
                self._bearer,
                error="insufficient_scope",
                scope=wanted,
                resource_metadata=self.settings.resource_metadata,
            )
            headers = {"WWW-Authenticate": said}
        return NotAllowed(f"The credentials do not cover this; it needs {wanted}.", headers=headers)

    async def permissions(self, principal: Principal, tenant: str | None) -> Permissions:
        """What a caller may do in a tenant.

        Raises:
            AuthenticationUnavailable: The function that knows the permissions cannot be asked.
        """
        try:
            return await self.rbac.permissions(roles_of(principal, tenant), principal.permissions)
        except (StoreUnavailable, TimeoutError, ConnectionError) as down:
            logger.exception("what the permissions of roles are looked up in does not answer")
            raise AuthenticationUnavailable from down

    def _challenges(self, failed: Authenticator | None = None) -> Iterable[str]:
        for authenticator in self.authenticators or (_AnyBearer,):
            challenge = authenticator.challenge
            if challenge and is_bearer(challenge):
                error = "invalid_token" if authenticator is failed else None
                yield with_parameters(challenge, error=error, resource_metadata=self.settings.resource_metadata)
            elif challenge:
                yield challenge


class _AnyBearer:
    """What is asked for where no authenticator is there to say: a 401 has to name some scheme."""

    challenge = BEARER


def gate_of(context: RequestContext | None) -> Gate:
    """The gate that this request passed, or one that lets nobody in where there was none."""
    gate: Gate | None = None if context is None else context.state.get(Gate)
    return gate or _NOBODYS


def tenant_of(context: RequestContext, principal: Principal) -> str | None:
    """The tenant that a request is about, as far as it is known by now."""
    return context.tenant if context.tenant is not None else principal.tenant


def is_ambient(authenticator: Authenticator | None) -> bool:
    """Whether a browser sends these credentials along by itself, so that another site can make use of them."""
    return bool(getattr(authenticator, "ambient", False))


_NOBODYS = Gate()
