"""What may say who calls, though no authenticator of ours has looked at it.

Whatever answers in place of an endpoint (a cache, a replay) must know whom the answer is for. Where something else
decides that, further in, only the endpoint may answer.

Example:
    >>> [sounds_like_credentials(name) for name in (b"x-api-key", b"cookie", b"user-agent", b"accept")]
    [True, True, False, False]
"""

import inspect
import re
from typing import Any

from fastapi.security.base import SecurityBase

_CREDENTIAL = re.compile(
    rb"auth|cookie|token|api-?key|session|secret|credential|signature|password|jwt|user|tenant|account|identity|"
    rb"client-cert|ssl-client|remote-"
)
# What browsers send with every request, and what only says that a page of one's own has sent it.
_NO_CREDENTIAL = re.compile(rb"user-agent\Z|sec-|access-control-|upgrade-|(x-)?[cx]srf-?token\Z")


def sounds_like_credentials(name: bytes) -> bool:
    """Whether a field of a request may say who calls, by its name in lower case."""
    return _CREDENTIAL.search(name) is not None and _NO_CREDENTIAL.match(name) is None


def has_unknown_scheme(dependant: Any) -> bool:
    """Whether a security scheme of FastAPI is among the dependencies of a route; what it decides is not known."""
    if dependant is None:
        return False
    call = getattr(dependant, "call", None)
    scheme = inspect.unwrap(call) if callable(call) else call
    return isinstance(scheme, SecurityBase) or any(map(has_unknown_scheme, dependant.dependencies))
