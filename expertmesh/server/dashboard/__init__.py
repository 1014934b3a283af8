"""The page at /dashboard: what the engine does, seen while it does it. Files without a build step, and one stream."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import RedirectResponse

from expertmesh.server.dashboard.feed import Feed
from expertmesh.server.events import EventStream
from expertmesh.server.states import States

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Nothing but what comes from here is run, shown or called.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_dashboard(app: FastAPI, states: States, name: str) -> None:
    """Routes of the page. name: of the model, as clients call it. The page's files are for everybody; who may see
    /dashboard/events is the application's matter: the page asks for an API key where it is answered 401."""
    pages = _files()
    feed = Feed(states, name)

    def page(file: str) -> Response:
        if file not in pages:
            raise HTTPException(404, "Not Found")
        kind = TYPES[file.rpartition(".")[2]]
        return Response(pages[file], media_type=kind, headers=HEADERS)

    async def index() -> Response:
        return page("index.html")

    async def slash() -> Response:
        return RedirectResponse("../dashboard")

    async def events() -> Response:
        return EventStream(feed.events())

    async def file(file: str) -> Response:
        return page(file)

    routes: dict[str, Any] = {"": index, "/": slash, "/events": events, "/{file}": file}
    for path, endpoint in routes.items():
        app.add_api_route(f"/dashboard{path}", endpoint, methods=["GET"], include_in_schema=False)


def _files() -> dict[str, bytes]:
    folder = files("expertmesh.server.dashboard") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
