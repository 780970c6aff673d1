"""Partners: API keys that an admin makes, and what a partner may see with one, or with a token of its service."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Request, status
from sqlalchemy import select, update

from fastapi_hardening import RateLimit, RequirePermissions, RequireScopes, SecurityHeaders
from fastapi_hardening.security.auth import ApiKeyRecord, ApiKeys
from sample_app.database import CurrentSession, Database
from sample_app.models import PartnerKey, Product
from sample_app.schemas import KeyOut, NewKeyIn, NewKeyOut, StockOut

SCOPE = "stock:read"
DAY_SECONDS = 24 * 3600
# Keeps partners and users apart, whatever a partner is called.
PREFIX = "partner:"

admin_router = APIRouter(
    prefix="/admin/api-keys",
    tags=["partners"],
    dependencies=[RequirePermissions("partners:write"), SecurityHeaders(cache_control="no-store")],
)
router = APIRouter(
    prefix="/partner",
    tags=["partners"],
    dependencies=[RequireScopes(SCOPE), RateLimit("60/minute", name="partner")],
)


class PartnerKeyTable:
    """The keys in the database: the three methods that `ApiKeys` asks for."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, key_id: str) -> ApiKeyRecord | None:
        """Read the record of a key."""
        async with self._database.session() as session:
            row = await session.get(PartnerKey, key_id)
        return None if row is None else _record(row)

    async def put(self, record: ApiKeyRecord) -> None:
        """Keep a record, in place of one with the same id."""
        fields = asdict(record)
        for unused in ("name", "roles", "tenant"):
            del fields[unused]
        async with self._database.session() as session:
            await session.merge(PartnerKey(**fields | {"scopes": " ".join(sorted(record.scopes))}))
            await session.commit()

    async def used(self, key_id: str, at: float) -> None:
        """Note when a key was last used."""
        async with self._database.session() as session:
            await session.execute(update(PartnerKey).where(PartnerKey.id == key_id).values(last_used_at=at))
            await session.commit()


@admin_router.post("", status_code=status.HTTP_201_CREATED)
async def make_key(new: NewKeyIn, request: Request) -> NewKeyOut:
    """Make a key for a partner. It is shown now and never again."""
    keys: ApiKeys = request.app.state.api_keys
    issued = await keys.create(PREFIX + new.partner, scopes=[SCOPE], ttl_seconds=new.days * DAY_SECONDS)
    return NewKeyOut(key=issued.key, **_shown(issued.record).model_dump())


@admin_router.get("")
async def list_keys(session: CurrentSession) -> list[KeyOut]:
    """List all keys, the newest first."""
    rows = await session.scalars(select(PartnerKey).order_by(PartnerKey.created_at.desc()))
    return [_shown(_record(row)) for row in rows]


@admin_router.delete("/{key_id}", status_code=status.HTTP_204_NO_CONTENT)
async def revoke_key(key_id: Annotated[str, Path(max_length=40)], request: Request) -> None:
    """Take a key back, at once."""
    keys: ApiKeys = request.app.state.api_keys
    try:
        await keys.revoke(key_id)
    except KeyError:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such key.") from None


@router.get("/stock", response_model=list[StockOut])
async def read_stock(session: CurrentSession) -> Sequence[Product]:
    """Read how much of everything there is."""
    return (await session.scalars(select(Product).order_by(Product.id))).all()


def _record(row: PartnerKey) -> ApiKeyRecord:
    return ApiKeyRecord(
        id=row.id,
        digest=row.digest,
        subject=row.subject,
        scopes=frozenset(row.scopes.split()),
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked=row.revoked,
    )


def _shown(record: ApiKeyRecord) -> KeyOut:
    return KeyOut(
        id=record.id,
        partner=record.subject.removeprefix(PREFIX),
        scopes=sorted(record.scopes),
        expires_at=record.expires_at,
        last_used_at=record.last_used_at,
        revoked=record.revoked,
    )
