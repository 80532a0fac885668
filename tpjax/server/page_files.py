"""Serves the files of the web page, which are in ``page/``."""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import Response

from tpjax.server.error_responses import ApiError

_FOLDER = files("tpjax.server").joinpath("page")
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
# Nothing from another host, nothing inline, no frames: what got past the sanitiser could still run nothing.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'; style-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_file(name: str) -> Response:
    """Returns a file of the page.

    Raises:
        ApiError: 404, there is none of that name.
    """
    kind = _TYPES.get(name.rpartition(".")[2])
    file = next((file for file in _FOLDER.iterdir() if file.name == name), None)
    if kind is None or file is None:
        raise ApiError(404, f"the page has no file {name[:80]!r}", code="not_found")
    return Response(file.read_bytes(), media_type=kind, headers=_HEADERS)
