"""The files of the page, which come with the package: read once, and looked up by name."""

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from plotly.offline import get_plotlyjs

_PLACES = {"esper.dashboard": "static", "esper.report": "static"}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
PLOTLY = "plotly.js"
PAGE = "index.html"


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file.

    Attributes:
        media_type: Of its content.
        tag: Differs when the content does.
    """

    content: bytes
    media_type: str
    tag: str


@cache
def assets() -> dict[str, Asset]:
    """Return all files by name; no other can be asked for."""
    found = {
        file.name: _asset(file.name, file.read_bytes())
        for package, folder in _PLACES.items()
        for file in (files(package) / folder).iterdir()
        if file.is_file()
    }
    found[PLOTLY] = _asset(PLOTLY, get_plotlyjs().encode())
    return found


def _asset(name: str, content: bytes) -> Asset:
    suffix = name[name.rindex(".") :]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    return Asset(content=content, media_type=kind, tag=tag)
