"""Types that make a value safe for one use, where a model says so: HTML to show, text, a file name, an address to call.

Sanitising is a decision of whoever knows what the value is for, so it stands in the model, for everybody to read, and
nothing is changed behind anybody's back. It is *not* inspection, which refuses; nor is it output encoding: a
``PlainText`` that is put into a page is still encoded by the template.

It sits in the models of the application, not in the pipeline. ``CleanHtml`` and ``PlainText`` need the extra ``html``.

Example:
    >>> from pydantic import BaseModel
    >>> class Article(BaseModel):
    ...     title: PlainText
    ...     html: CleanHtml
    ...     picture: SafeFilename
    ...     source: HttpUrl
    >>> article = Article(
    ...     title="On <b>apples</b>",
    ...     html="<p onclick=x()>Good.</p><script>alert(1)</script>",
    ...     picture="../../etc/nginx.conf",
    ...     source="https://example.com/apples",
    ... )
    >>> article.title, article.html, article.picture
    ('On apples', '<p>Good.</p>', 'nginx.conf')
"""

import asyncio
import html
import re
import unicodedata
from pathlib import PurePosixPath
from types import ModuleType
from typing import Annotated

import pydantic
from pydantic import AfterValidator

from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.private_address import is_private_address, is_private_host

_MOST_ROUNDS = 5
_LONGEST_NAME_BYTES = 255
_LONGEST_EXTENSION = 16

# What file systems and shells read as something else than a part of a name.
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f<>:"|?*;&$`\'!%#{}()\[\]~^=,+@]+')
# Windows opens a device where a file has this name, whatever its extension.
_DEVICES = frozenset(
    ("con", "prn", "aux", "nul", "conin$", "conout$", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789"))
)


def _nh3() -> ModuleType:
    try:
        import nh3  # noqa: PLC0415 - of the extra "html"
    except ImportError:
        raise ConfigurationError("CleanHtml and PlainText need nh3: pip install 'fastapi-hardening[html]'") from None
    module: ModuleType = nh3
    return module


def clean_html(text: str) -> str:
    """HTML without anything that runs: unknown elements, handlers, scripts and their addresses are taken out.

    Args:
        text: HTML as somebody wrote it.

    Raises:
        ConfigurationError: The extra ``html`` is not installed.
    """
    cleaned: str = _nh3().clean(text)
    return cleaned


def plain_text(text: str) -> str:
    """The text of HTML, without its elements; entities are what they stand for.

    Args:
        text: HTML or text.

    Raises:
        ConfigurationError: The extra ``html`` is not installed.
        ValueError: There are elements within elements without end, as only an attack has.

    Example:
        >>> plain_text("Fish &amp; <i>chips</i>, 1 < 2")
        'Fish & chips, 1 < 2'
    """
    nh3 = _nh3()
    for _ in range(_MOST_ROUNDS):
        stripped = html.unescape(nh3.clean(text, tags=set()))
        if stripped == text:
            return text
        # What was an entity may be an element now.
        text = stripped
    raise ValueError("is HTML that is encoded again and again")


def safe_filename(name: str) -> str:
    r"""The last part of a path as a name that every file system takes, and that stays in its folder.

    Args:
        name: What a client calls a file.

    Raises:
        ValueError: Nothing is left of it.

    Example:
        >>> safe_filename("C:\\fakepath\\..\\con.txt"), safe_filename("résumé (final).pdf")
        ('_con.txt', 'résumé _final_.pdf')
    """
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    last = "".join(character for character in last if unicodedata.category(character) not in ("Cf", "Co", "Cs", "Cn"))
    last = _NOT_IN_NAMES.sub("_", last).strip(" .\t")
    if not last.strip("_ ."):
        raise ValueError("is not the name of a file")
    if last.partition(".")[0].strip().lower() in _DEVICES:
        last = f"_{last}"
    if last.startswith("-"):
        last = f"_{last[1:]}"
    extension = PurePosixPath(last).suffix
    if len(extension) > _LONGEST_EXTENSION:
        extension = ""
    encoded = last.removesuffix(extension).encode()[: _LONGEST_NAME_BYTES - len(extension.encode())]
    return (encoded.decode(errors="ignore").rstrip(" .") + extension) if len(last.encode()) > len(encoded) else last


def _public(url: pydantic.HttpUrl) -> pydantic.HttpUrl:
    if url.username or url.password:
        raise ValueError("has a user name in it")
    if is_private_host(url.host or ""):
        raise ValueError("is an address of a private network")
    return url


async def public_addresses(host: str, port: int = 443) -> list[str]:
    """The addresses of a host, if all of them are public; call one of these, and not the name again.

    A name can be resolved to another address a moment later (DNS rebinding), so what was checked and what is called
    has to be the same address; the name goes into ``Host`` and into the check of the certificate.

    Args:
        host: The host of a URL that a client named.
        port: The port.

    Raises:
        ValueError: One of its addresses is private, or there is none.
    """
    if is_private_host(host):
        raise ValueError("is an address of a private network")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port)
    except OSError:
        raise ValueError("has no address") from None
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if any(is_private_address(address) for address in addresses):
        raise ValueError("is an address of a private network")
    return addresses


CleanHtml = Annotated[str, AfterValidator(clean_html)]
"""HTML that is safe to show: what runs is taken out (nh3, the extra ``html``)."""

PlainText = Annotated[str, AfterValidator(plain_text)]
"""The text of what may be HTML (nh3, the extra ``html``)."""

SafeFilename = Annotated[str, AfterValidator(safe_filename)]
"""A name of a file, without its folders, that no system reads as something else."""

HttpUrl = Annotated[pydantic.HttpUrl, AfterValidator(_public)]
"""A URL of the public web: no private address in any notation, no user name. It does not resolve the name; before a
call, :func:`public_addresses` does."""
