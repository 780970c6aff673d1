"""Prints what it costs to know who calls, beside PyJWT, joserfc and python-jose behind the same plain dependency.

    scripts/bench auth                        microseconds an authenticated request, in about two minutes
    scripts/bench auth --quick                fewer rounds, with wider intervals
    scripts/bench auth --wycheproof DIR       also which vectors of Project Wycheproof each library accepts

Every application has one route and one dependency that gives the claims of a bearer token; «bare» only takes the token
out of its header. The libraries get a prebuilt key, the algorithm, the issuer and the audience, and are told to ask for
the same claims. The applications take turns in short rounds; see overhead.py, whose pieces are used here.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jwt as pyjwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fastapi import Depends, FastAPI, HTTPException
from jose import jws as jose_jws
from jose import jwt as jose_jwt
from jose.jwk import construct
from joserfc import jws as rfc_jws
from joserfc import jwt as rfc_jwt
from joserfc.jwk import ECKey, JWKRegistry, OctKey, RSAKey
from joserfc.jwk import KeySet as RfcKeySet
from overhead import (
    BLOCK,
    ROOT,
    Estimate,
    Report,
    Rounds,
    _version,
    added,
    answers,
    estimate,
    in_turn,
    progress,
    quotient,
    scope_of,
    serving,
)
from starlette.requests import HTTPConnection

from fastapi_hardening.core.identity import InvalidCredentials
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.auth.bearer import BearerAuthenticator
from fastapi_hardening.security.auth.jwk import ALGORITHMS, InvalidKey, KeySet, VerificationKey
from fastapi_hardening.security.auth.jwt import JwtSettings, JwtVerifier, parse_compact
from fastapi_hardening.security.auth.keys import StaticKeys
from fastapi_hardening.security.auth.revocation import Revocations

PAGE = ROOT / "docs" / "concerns" / "jwt.md"

if TYPE_CHECKING:
    from jose.backends.base import Key as JoseKey

ISSUER = "https://id.example"
AUDIENCE = "orders"
REQUIRED = ["exp", "iat", "iss", "aud", "sub"]
SECRET = b"0123456789abcdef0123456789abcdef"
Identify = Callable[[HTTPConnection], Any]


# --- the applications -------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """What signs, and what verifies."""

    private: Any
    public: Any
    pem: bytes


def keys_for(algorithm: str) -> Keys:
    """New keys for an algorithm."""
    if algorithm == "HS256":
        return Keys(SECRET, SECRET, SECRET)
    private: Any = (
        rsa.generate_private_key(65537, 2048) if algorithm == "RS256" else ec.generate_private_key(ec.SECP256R1())
    )
    public = private.public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return Keys(private, public, public.public_bytes(serialization.Encoding.PEM, spki))


def token_for(algorithm: str, keys: Keys) -> str:
    """A token as an identity provider makes it."""
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "248289761001",
        "iat": now,
        "exp": now + 3600,
        "jti": "0b0f1a3c-5f51-4b9e-9d0c-1d6c3a1f7f11",
        "client_id": "web",
        "scope": "openid orders:read orders:write",
        "roles": ["clerk"],
    }
    return pyjwt.encode(claims, keys.private, algorithm, headers={"kid": "k1", "typ": "at+jwt"})


def application(identify: Identify) -> FastAPI:
    """One route behind one dependency."""
    app = FastAPI()

    async def claims(connection: HTTPConnection) -> Any:
        return await identify(connection)

    @app.get("/me")
    async def me(found: Annotated[Any, Depends(claims)]) -> dict[str, str]:
        return {"sub": found["sub"]}

    return app


def _token(connection: HTTPConnection) -> str:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise HTTPException(401)
    return token


async def _bare(connection: HTTPConnection) -> Any:
    return {"sub": _token(connection)[:8]}


def ours(algorithm: str, keys: Keys, *, remembers: bool, revocations: Revocations | None = None) -> Identify:
    """Our authenticator; without memory every request verifies."""
    settings = JwtSettings(issuer=ISSUER, audience=(AUDIENCE,), algorithms=(algorithm,))
    source = StaticKeys(VerificationKey(algorithm, keys.public, "k1"))
    size = 4096 if remembers else 0
    authenticator = BearerAuthenticator(JwtVerifier(settings, source), cache_size=size, revocations=revocations)

    async def identify(connection: HTTPConnection) -> Any:
        try:
            principal = await authenticator.authenticate(connection)
        except InvalidCredentials:
            principal = None
        if principal is None:
            raise HTTPException(401)
        return principal.claims

    return identify


def with_pyjwt(algorithm: str, keys: Keys) -> Identify:
    """PyJWT with a key object that is built once."""

    async def identify(connection: HTTPConnection) -> Any:
        try:
            return pyjwt.decode(
                _token(connection),
                keys.public,
                algorithms=[algorithm],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={"require": REQUIRED},
            )
        except pyjwt.PyJWTError:
            raise HTTPException(401) from None

    return identify


def with_joserfc(algorithm: str, keys: Keys) -> Identify:
    """Joserfc with a key object and a claims registry that are built once."""
    kind = {"HS256": OctKey, "RS256": RSAKey, "ES256": ECKey}[algorithm]
    key = kind.import_key(keys.pem)
    registry = rfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": AUDIENCE},
        exp={"essential": True},
        iat={"essential": True},
        sub={"essential": True},
    )

    async def identify(connection: HTTPConnection) -> Any:
        try:
            token = rfc_jwt.decode(_token(connection), key, algorithms=[algorithm])
            registry.validate(token.claims)
        except Exception:  # noqa: BLE001 - it raises several
            raise HTTPException(401) from None
        return token.claims

    return identify


def with_jose(algorithm: str, keys: Keys) -> Identify:
    """python-jose's own ``jwt.decode`` with a key object that is built once; it checks less."""
    key: JoseKey = construct(keys.public, algorithm)

    async def identify(connection: HTTPConnection) -> Any:
        try:
            return jose_jwt.decode(_token(connection), key, algorithms=[algorithm], audience=AUDIENCE, issuer=ISSUER)
        except jose_jwt.JWTError:
            raise HTTPException(401) from None

    return identify


# --- time -------------------------------------------------------------------------------------------------------------

COLD, WARM, REVOKING = "ours, cold", "ours, warm", "ours, warm, asking for revocations"
PEERS = ("PyJWT", "joserfc", "python-jose, `jwt.decode`")


async def cost(report: Report) -> None:
    """Microseconds an authenticated request, by algorithm."""
    report.section(
        "Authenticated requests",
        "CPU time of a request behind a plain FastAPI dependency, one verified token each, in process. «Added» is what "
        "identifying the caller adds to the same request without it; «cold» verifies the signature every time, «warm» "
        "remembers. The ratio is ours to PyJWT, of what is added. "
        + ", ".join(f"{name} {_version(name)}" for name in ("python-jose", "cryptography", "pyjwt", "joserfc"))
        + ".",
    )
    rows: list[list[str]] = []
    for algorithm in ("HS256", "RS256", "ES256"):
        progress(f"authenticated requests, {algorithm}")
        keys = keys_for(algorithm)
        identifying: dict[str, Identify] = {
            "bare": _bare,
            COLD: ours(algorithm, keys, remembers=False),
            WARM: ours(algorithm, keys, remembers=True),
            REVOKING: ours(algorithm, keys, remembers=True, revocations=Revocations(MemoryStore())),
            PEERS[0]: with_pyjwt(algorithm, keys),
            PEERS[1]: with_joserfc(algorithm, keys),
            PEERS[2]: with_jose(algorithm, keys),
        }
        scope = scope_of("/me", authorization=f"Bearer {token_for(algorithm, keys)}")
        applications = {name: application(identify) for name, identify in identifying.items()}
        for app in applications.values():
            await answers(app, scope)
        rounds = await in_turn({name: serving(app, scope) for name, app in applications.items()}, report.seconds(30, 3))
        rows += _rows(algorithm, rounds)
        _goals(report, algorithm, rounds)
    report.table("identified by", "µs a request", "added µs", "times PyJWT", rows=rows)


def _rows(algorithm: str, rounds: Rounds) -> list[list[str]]:
    rows = [[f"**{algorithm}**", "", "", ""]]
    for name in rounds:
        row = [name, f"{estimate(statistics.median, rounds[name]):.1f}", "", ""]
        if name != "bare":
            row[2:] = f"{added(rounds, name):.1f}", f"{times(rounds, name):.2f}"
        rows.append(row)
    return rows


def times(rounds: Rounds, name: str, of: str = PEERS[0]) -> Estimate:
    """How many times what one adds is of what another adds."""
    above, below = ([a - b for a, b in zip(rounds[each], rounds["bare"], strict=True)] for each in (name, of))
    return quotient(above, below)


def _goals(report: Report, algorithm: str, rounds: Rounds) -> None:
    cold, warm = times(rounds, COLD), times(rounds, WARM)
    report.goal(f"{algorithm}: cold, at most what PyJWT adds", f"{cold:.2f} times", reached=cold.value <= 1)
    report.goal(f"{algorithm}: warm, at most half of what PyJWT adds", f"{warm:.2f} times", reached=warm.value <= 1 / 2)


# --- vectors ----------------------------------------------------------------------------------------------------------

Accepts = Callable[[Mapping[str, Any], str], bool]


def _algorithms(key: Mapping[str, Any]) -> list[str]:
    return [member["alg"] for member in key.get("keys", [key]) if isinstance(member.get("alg"), str)]


def _accepted_by_ours(key: Mapping[str, Any], token: str) -> bool:
    try:
        if "keys" in key:
            keys = KeySet.from_jwks(key, algorithms=ALGORITHMS)
        else:
            keys = KeySet([VerificationKey.from_jwk(key, algorithms=ALGORITHMS)])
        settings = JwtSettings(issuer="any", audience=("any",), algorithms=ALGORITHMS)
        verifier = JwtVerifier(settings, StaticKeys(keys))
        asyncio.run(verifier.verify_signature(parse_compact(token, max_bytes=65_536)))
    except (InvalidCredentials, InvalidKey):
        return False
    return True


def _accepted_by_pyjwt(key: Mapping[str, Any], token: str) -> bool:
    if "keys" in key:
        kid = pyjwt.get_unverified_header(token).get("kid")
        chosen = next(each for each in pyjwt.PyJWKSet.from_dict(dict(key)).keys if each.key_id == kid)
    else:
        chosen = pyjwt.PyJWK(dict(key))
    pyjwt.PyJWS().decode(token, chosen, algorithms=_algorithms(key))
    return True


def _accepted_by_joserfc(key: Mapping[str, Any], token: str) -> bool:
    imported = RfcKeySet.import_key_set(key) if "keys" in key else JWKRegistry.import_key(dict(key))  # type: ignore[arg-type]
    rfc_jws.deserialize_compact(token, imported, algorithms=_algorithms(key))
    return True


def _accepted_by_jose(key: Mapping[str, Any], token: str) -> bool:
    jose_jws.verify(token, dict(key), algorithms=_algorithms(key))
    return True


LIBRARIES: Mapping[str, Accepts] = {
    "ours": _accepted_by_ours,
    "PyJWT": _accepted_by_pyjwt,
    "joserfc": _accepted_by_joserfc,
    "python-jose": _accepted_by_jose,
}


class Vector(NamedTuple):
    """A key, or a set of keys, a token, and whether it is valid."""

    key: Mapping[str, Any]
    token: str
    valid: bool


def vectors_of(path: Path) -> list[Vector]:
    """The vectors in a file that have a token as text."""
    found = []
    for group in json.loads(path.read_text(encoding="utf-8"))["testGroups"]:
        key = group.get("public") or group.get("private") or {}
        for test in group["tests"]:
            token = test.get("jws", test.get("jwe"))
            found.append(Vector(key, token if isinstance(token, str) else json.dumps(token), test["result"] == "valid"))
    return found


def vectors(report: Report, folder: Path) -> None:
    """What each library makes of the vectors."""
    files = [path for path in sorted(folder.glob("json_web_*_test.json")) if "encryption" not in path.name]
    report.section(
        "Project Wycheproof",
        "Tokens that the vectors call invalid and a library accepts, and valid ones that it refuses; the key is given "
        "as JWK, and the algorithms are those that the JWK names. Invalid ones that are the same token with the same "
        "key as a valid one are not counted. Of the valid ones RFC 8725 wants six refused: four whose algorithm is not "
        "the one of their key, two with characters that base64url has not.",
    )
    rows = []
    for path in files:
        found = vectors_of(path)
        good = {(json.dumps(each.key), each.token) for each in found if each.valid}
        bad = [each for each in found if not each.valid and (json.dumps(each.key), each.token) not in good]
        valid = [each for each in found if each.valid]
        rows.append([f"**{path.stem}**", "", ""])
        for name, accepts in LIBRARIES.items():
            wrong = sum(_accepted(accepts, each) for each in bad)
            missed = sum(not _accepted(accepts, each) for each in valid)
            rows.append([name, f"{wrong} of {len(bad)}", f"{missed} of {len(valid)}"])
            if name == "ours":
                report.goal(f"{path.stem}: no invalid token is accepted", f"{wrong} of {len(bad)}", reached=wrong == 0)
    report.table("library", "invalid accepted", "valid refused", rows=rows)


def _accepted(accepts: Accepts, vector: Vector) -> bool:
    try:
        return accepts(vector.key, vector.token)
    except Exception:  # noqa: BLE001 - the libraries raise what they like, and that is a refusal
        return False


# --- the program ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the report."""
    parser = argparse.ArgumentParser(prog="scripts/bench auth", description="What it costs to know who calls.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, with wider intervals")
    parser.add_argument("--wycheproof", type=Path, metavar="DIR", help="the folder with the vectors of Wycheproof")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--docs", action="store_true", help="also put the report into docs/concerns/jwt.md")
    chosen = parser.parse_args(arguments)
    report = Report(quick=chosen.quick)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        asyncio.run(cost(report))
    if chosen.wycheproof:
        progress("vectors")
        vectors(report, chosen.wycheproof)
    print(report, end="")
    if chosen.out:
        chosen.out.write_text(f"# What it costs to know who calls\n\n{report}", encoding="utf-8")
    if chosen.docs:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda block: f"{block[1]}\n{report}\n{block[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
