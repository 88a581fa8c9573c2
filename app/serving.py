"""What the browser fetches beside the app: the viewer's modules, and the voxels of the volumes a session shows.

A volume is reached by an unguessable token of its session, never by a name or a path. The arrays may be memory maps of
any size: slices are sent piece by piece, so that no copy of a volume is ever made.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from threading import Lock

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MODULES = Path(__file__).parent / "viewer"
TYPES = {".js": "text/javascript", ".css": "text/css"}
"""What is served of the viewer's folder, and as what."""

PIECE = 1 << 19
"""Bytes that are in memory at a time for one request."""

_PRIVATE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_PLAIN = {"Content-Encoding": "identity"}  # keeps the app's own compression away from CT, which it cannot shrink much


@dataclass(frozen=True, eq=False)
class Shown:
    """The arrays of one case on the screen, all of one shape (z, y, x), indices growing to Superior, Posterior, Left.

    Attributes:
        image: HU, int16; a memory map is best.
        layers: label maps by name, uint8, the same voxels.
    """

    image: np.ndarray
    layers: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        assert self.image.ndim == 3 and self.image.dtype == np.int16, "an image is int16 (z, y, x)"
        for labels in self.layers.values():
            assert labels.shape == self.image.shape and labels.dtype == np.uint8, "a layer is uint8 on the image's grid"

    def same_as(self, other: Shown) -> bool:
        """Whether both hold the very same array objects."""
        return (
            self.image is other.image
            and dict(self.layers).keys() == dict(other.layers).keys()
            and all(array is other.layers[name] for name, array in self.layers.items())
        )


_lock = Lock()
_shown: dict[str, tuple[str, Shown]] = {}  # by token: the owner, and what is shown


def publish(owner: str, shown: Shown) -> str:
    """The token by which this owner's browser fetches these arrays; the same arrays keep their token."""
    with _lock:
        for token, (other, known) in _shown.items():
            if other == owner and known.same_as(shown):
                return token
        token = secrets.token_urlsafe(32)
        _shown[token] = owner, shown
        return token


def replace(token: str, name: str, labels: np.ndarray) -> None:
    """Put other labels, uint8 (z, y, x), in the place of one layer; the browser fetches them under a new version."""
    with _lock:
        owner, shown = _shown[token]
        _shown[token] = owner, changed(shown, layers={**shown.layers, name: labels})


def withdraw(owner: str) -> None:
    """Forget what an owner showed; its tokens are unknown from now on."""
    with _lock:
        for token in [token for token, (other, _) in _shown.items() if other == owner]:
            del _shown[token]


def routes() -> list[Route]:
    """The routes for `st.App`, all of them read only.

    `/surm/viewer/<file>` is the component's code. `/surm/data/<token>/image?from=a&to=b` is the raw little-endian int16
    of the axial slices [a, b), `/surm/data/<token>/layers/<name>?from=a&to=b` the uint8 of a label map.
    """
    return [
        Route("/surm/viewer/{file}", _module, methods=["GET"]),
        Route("/surm/data/{token}/image", _image, methods=["GET"]),
        Route("/surm/data/{token}/layers/{name}", _layer, methods=["GET"]),
    ]


async def _module(request: Request) -> Response:
    name = request.path_params["file"]
    if name not in {path.name for path in MODULES.iterdir() if path.suffix in TYPES}:
        return _absent()
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return FileResponse(MODULES / name, media_type=TYPES[Path(name).suffix], headers=headers)


async def _image(request: Request) -> Response:
    shown = _of(request)
    return _absent() if shown is None else _slices(request, shown.image, small=False)


async def _layer(request: Request) -> Response:
    shown = _of(request)
    labels = shown.layers.get(request.path_params["name"]) if shown else None
    return _absent() if labels is None else _slices(request, labels, small=True)


def _of(request: Request) -> Shown | None:
    with _lock:
        return _shown.get(request.path_params["token"], ("", None))[1]


def _slices(request: Request, array: np.ndarray, *, small: bool) -> Response:
    """The slices a request asks for; `small` says that they shrink to almost nothing, as labels do."""
    try:
        first, end = int(request.query_params["from"]), int(request.query_params["to"])
    except (KeyError, ValueError):
        first, end = 0, -1
    if not 0 <= first < end <= len(array):
        return PlainTextResponse("Slices are asked for as from=first&to=end.", 400, headers=_PRIVATE)
    pieces, headers = _pieces(array, first, end), _PRIVATE | _PLAIN
    if small and "gzip" in request.headers.get("accept-encoding", ""):
        pieces, headers = _compressed(pieces), _PRIVATE | {"Content-Encoding": "gzip"}
    else:
        headers = headers | {"Content-Length": str((end - first) * array[0].size * array.itemsize)}
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


def _pieces(array: np.ndarray, first: int, end: int) -> Iterator[bytes]:
    """Copies of `PIECE` bytes at most; Starlette draws them in a thread, where a slow disk holds nobody up."""
    rows = max(1, PIECE // (array.shape[2] * array.itemsize))
    for z in range(first, end):
        for row in range(0, array.shape[1], rows):
            yield array[z, row : row + rows].astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _compressed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    gzip = zlib.compressobj(level=1, wbits=31)
    for piece in pieces:
        if packed := gzip.compress(piece):
            yield packed
    yield gzip.flush()


def _absent() -> Response:
    return PlainTextResponse("There is nothing here.", 404, headers=_PRIVATE)
