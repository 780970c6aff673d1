"""Pictures are what they claim to be, and come from the admin."""

import httpx2
import pytest

from sample_app.upload import MAX_PICTURE_BYTES, sniff

pytestmark = pytest.mark.anyio

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


async def upload(
    admin: httpx2.AsyncClient, data: bytes, media_type: str = "image/png", product: int = 1
) -> httpx2.Response:
    """Uploads a picture."""
    files = {"file": ("../../etc/passwd", data, media_type)}
    return await admin.put(f"/api/admin/products/{product}/picture", files=files)


async def test_picture_is_served_as_what_it_is(client: httpx2.AsyncClient, admin: httpx2.AsyncClient) -> None:
    """An uploaded picture comes back unchanged, with its type, cacheable for ever, and never sniffed."""
    product = (await upload(admin, PNG)).json()
    picture = await client.get(product["picture"])
    assert picture.content == PNG
    assert picture.headers["content-type"] == "image/png"
    assert "immutable" in picture.headers["cache-control"]
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert (await upload(admin, PNG, product=999)).status_code == 404
    assert (await client.get(product["picture"].replace("/1/", "/2/"))).status_code == 404


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"<html><script>alert(1)</script></html>", "image/png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml"),
        (PNG, "image/jpeg"),
        (PNG, "text/html"),
        (PNG + b"<script>alert(1)</script>", "image/png"),
        (b"", "image/png"),
    ],
)
async def test_upload_refuses_a_disguised_type(
    client: httpx2.AsyncClient, admin: httpx2.AsyncClient, data: bytes, media_type: str
) -> None:
    """A file whose bytes are not the picture that it claims to be is a 415, and the product stays without one."""
    assert (await upload(admin, data, media_type)).status_code == 415
    assert (await client.get("/api/products/1")).json()["picture"] is None


@pytest.mark.parametrize("size", [MAX_PICTURE_BYTES + 1, MAX_PICTURE_BYTES * 3])
async def test_upload_refuses_a_large_picture(client: httpx2.AsyncClient, admin: httpx2.AsyncClient, size: int) -> None:
    """A picture over the limit is a 413, whether the file or already the body is too large."""
    assert (await upload(admin, PNG.ljust(size, b"\0"))).status_code == 413


def test_sniff_knows_the_three_types_of_pictures() -> None:
    """PNG, JPEG and WebP are told by their bytes."""
    assert sniff(PNG) == "image/png"
    assert sniff(b"\xff\xd8\xff\xe0 \xff\xd9") == "image/jpeg"
    assert sniff(b"RIFF\x08\0\0\0WEBPVP8 ") == "image/webp"
    assert sniff(b"RIFF\x09\0\0\0WEBPVP8 ") is None
