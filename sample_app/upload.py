"""Product pictures: taken only if the bytes are what they claim to be, served so that they cannot be anything else."""

import hashlib
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Response, UploadFile, status
from sqlalchemy import select

from fastapi_hardening import Bulkhead, InputPolicy, Public, RequirePermissions, SecurityHeaders
from sample_app.catalogue import changes_catalogue
from sample_app.database import CurrentSession
from sample_app.models import Picture, Product
from sample_app.schemas import ProductId, ProductOut

MAX_PICTURE_BYTES = 1_000_000
# Room for the picture and the multipart envelope around it.
MAX_BODY_BYTES = MAX_PICTURE_BYTES + 10_000

# Four pictures at a time are in memory and hashed, four more wait, and the shop goes on whoever uploads a thousand.
uploads = Bulkhead(4, max_wait_seconds=5, name="uploads")
router = APIRouter(tags=["pictures"])


def sniff(data: bytes) -> str | None:
    """Tell the media type from the first and last bytes; None if it is not a picture that the shop serves.

    Looking at the end too refuses a picture with something else appended. SVG is not served: it can carry scripts.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 == len(data):
        return "image/webp"
    return None


@router.put(
    "/admin/products/{product_id}/picture",
    response_model=ProductOut,
    max_body_size=MAX_BODY_BYTES,
    # The name of the file is not used, so it may be whatever it is.
    dependencies=[
        RequirePermissions("products:write"),
        SecurityHeaders(cache_control="no-store"),
        uploads,
        changes_catalogue,
        InputPolicy(allow={"body.file.filename": ["traversal"]}),
    ],
)
async def upload_picture(product_id: ProductId, file: UploadFile, session: CurrentSession) -> Product:
    """Give a product its picture: PNG, JPEG or WebP; 413 if it is too large, 415 if it is not what it claims to be."""
    data = await file.read(MAX_PICTURE_BYTES + 1)
    if len(data) > MAX_PICTURE_BYTES:
        raise HTTPException(status.HTTP_413_CONTENT_TOO_LARGE, f"A picture has at most {MAX_PICTURE_BYTES} bytes.")
    media_type = sniff(data)
    if media_type is None or media_type != file.content_type:
        raise HTTPException(status.HTTP_415_UNSUPPORTED_MEDIA_TYPE, "The file is not the picture it claims to be.")
    product = await session.get(Product, product_id)
    if product is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"There is no product {product_id}.")
    # The client's file name is not used anywhere.
    product.picture_digest = hashlib.sha256(data).hexdigest()
    digest = product.picture_digest
    await session.merge(Picture(product_id=product_id, digest=digest, media_type=media_type, data=data))
    await session.commit()
    return product


@router.get("/products/{product_id}/pictures/{digest}", response_class=Response, dependencies=[Public()])
async def read_picture(
    product_id: ProductId, digest: Annotated[str, Path(pattern="^[0-9a-f]{64}$")], session: CurrentSession
) -> Response:
    """Read a picture. `nosniff` and the strict Content-Security-Policy on it come from `harden()`."""
    query = select(Picture).where(Picture.product_id == product_id, Picture.digest == digest)
    picture = await session.scalar(query)
    if picture is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such picture.")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Content-Disposition": "inline"}
    return Response(picture.data, media_type=picture.media_type, headers=headers)
