"""The pages at `/` and `/login`. Styles and scripts are files of their own, so that the strictest policy fits."""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from sqlalchemy import func, select

from fastapi_hardening import Public, SecurityHeaders
from sample_app.database import CurrentSession
from sample_app.models import Product

HERE = Path(__file__).parent
templates = Jinja2Templates(HERE / "templates")

# `harden()` enforces on HTML only what breaks no page, and reports the rest; this page needs no such mercy.
enforce_strictly = SecurityHeaders(
    content_security_policy="default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    content_security_policy_report_only=None,
)
# `Public()` has a meaning only where everything else is closed: HARDENING_AUTH__DEFAULT=required.
router = APIRouter(include_in_schema=False, dependencies=[Public()])
router.mount("/static", StaticFiles(directory=HERE / "static"), name="static")


@router.get("/", response_class=HTMLResponse, dependencies=[enforce_strictly])
async def storefront(request: Request, session: CurrentSession) -> HTMLResponse:
    """Show the shop; the script of the page gets the rest from the API."""
    products = await session.scalar(select(func.count()).select_from(Product))
    return templates.TemplateResponse(request, "storefront.html", {"shop": request.app.title, "products": products})


@router.get("/login", response_class=HTMLResponse, dependencies=[enforce_strictly])
async def login(request: Request) -> HTMLResponse:
    """Show the two forms; the script of the page sends them to the API."""
    return templates.TemplateResponse(request, "login.html", {"shop": request.app.title})
