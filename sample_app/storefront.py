"""The page at `/`. Its style and script are files of their own, so that the strictest policy fits."""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates
from sqlalchemy import func, select

from fastapi_hardening import SecurityHeaders
from sample_app.database import CurrentSession
from sample_app.models import Product

templates = Jinja2Templates(Path(__file__).parent / "templates")
router = APIRouter(include_in_schema=False)

# `harden()` enforces on HTML only what breaks no page, and reports the rest; this page needs no such mercy.
enforce_strictly = SecurityHeaders(
    content_security_policy="default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    content_security_policy_report_only=None,
)


@router.get("/", response_class=HTMLResponse, dependencies=[enforce_strictly])
async def storefront(request: Request, session: CurrentSession) -> HTMLResponse:
    """Show the shop; the script of the page gets the rest from the API."""
    products = await session.scalar(select(func.count()).select_from(Product))
    return templates.TemplateResponse(request, "storefront.html", {"shop": request.app.title, "products": products})
