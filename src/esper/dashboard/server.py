"""The dashboard as a web application: its page, its data as JSON, and its stream of news."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.dashboard.access import COMMAND_HEADER, Access
from esper.dashboard.assets import PAGE, Asset, assets
from esper.dashboard.commands import Command, CommandChannel, CommandRefusedError
from esper.dashboard.comparison import MAX_COMPARED, compare
from esper.dashboard.follower import Follower
from esper.dashboard.run_tail import RunTail
from esper.dashboard.stream import Streams
from esper.dashboard.watched_run import CANNOT_READ
from esper.dashboard.watcher import UnknownRunError, Watcher
from esper.lifecycle.stages import GROWTH_PATH
from esper.report.chart import STAGE_COLOURS

_LOG = logging.getLogger(__name__)
_MAX_BODY_BYTES = 4096
_COMMANDS_AT_ONCE = 8
"""More wait for one of these to be answered."""
_OPEN_PATHS = ("/", "/api/session")
_OPEN_PREFIX = "/static/"
_SECURITY_HEADERS = {
    # plotly writes its own styles into the page, and pictures as data
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_WRONG_HOST = (
    "This dashboard answers to localhost only. To reach it by another name, start it with a token, "
    "for example with --token-file."
)
_NO_TOKEN = "The token is missing or wrong."  # noqa: S105 – what is said without one


class Dashboard:
    """Answers requests.

    Args:
        root: The folder that runs are in.
        access: Decides who may look.
        channel: Takes commands to runs; None: there are none, and nothing in the page shows any.
    """

    def __init__(self, root: Path, access: Access, channel: CommandChannel | None = None) -> None:
        self._watcher = Watcher(root)
        self._access = access
        self._channel = channel
        self._commanding = ThreadPoolExecutor(_COMMANDS_AT_ONCE, "esper-dashboard-commands")
        """Of its own: a run that does not answer must not hold up who only looks."""
        self._follower = Follower(self._watcher)
        self._streams = Streams(self._watcher, self._follower, channel)

    def app(self) -> Starlette:
        """Return the application."""
        app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/static/{name}", self._static),
                Route("/api/session", self._session, methods=["GET", "POST"]),
                Route("/api/runs", self._runs),
                Route("/api/stream", self._stream),
                Route("/api/compare", self._compare),
                Route("/api/runs/{run:path}/charts", self._charts),
                Route("/api/runs/{run:path}/actions", self._act, methods=["POST"]),
            ],
            middleware=[Middleware(_Guard, access=self._access)],
            exception_handlers={HTTPException: _problem, Exception: _failure},
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        return app

    def end_streams(self) -> None:
        """End all streams, so that the server can end. Called in the server's event loop."""
        self._follower.dismiss_listeners()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._follower.run())
        try:
            yield
        finally:
            self._follower.dismiss_listeners()
            task.cancel()
            self._commanding.shutdown(wait=False)

    async def _page(self, request: Request) -> Response:
        return _asset(request, assets()[PAGE])

    async def _static(self, request: Request) -> Response:
        asset = assets().get(request.path_params["name"])
        if asset is None:
            raise HTTPException(404, "There is no such file.")
        return _asset(request, asset)

    async def _session(self, request: Request) -> Response:
        """Say whether the token is needed; exchange it for a cookie."""
        access, headers = self._access, request.headers
        if request.method == "POST":
            given = (await _body(request)).get("token")
            if not isinstance(given, str) or not access.is_token(given):
                raise HTTPException(403, "This is not the token.")
            response = Response(status_code=204)
            response.set_cookie(
                access.cookie_name, access.cookie_value, httponly=True, samesite="strict"
            )
            return response
        admitted = access.admits(headers)
        return _json(
            {
                "needs_token": access.needs_token,
                "admitted": admitted,
                "command_token": access.command_token if admitted and self._channel else None,
                "growth_path": [
                    {"stage": stage, "colour": STAGE_COLOURS[stage]} for stage in GROWTH_PATH[1:]
                ],
            }
        )

    async def _runs(self, _: Request) -> Response:
        await asyncio.to_thread(self._watcher.look)
        return _json(await asyncio.to_thread(self._watcher.changes))

    async def _stream(self, request: Request) -> Response:
        query = request.query_params
        last = request.headers.get("last-event-id", query.get("since", ""))
        return StreamingResponse(
            self._streams.messages(run=query.get("run"), last_id=last),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def _charts(self, request: Request) -> Response:
        def read() -> object:
            version, charts = self._read(request).charts()
            return {"version": version, "charts": charts}

        return await _answer(read)

    def _read(self, request: Request) -> RunTail:
        tail = self._watcher.tail(request.path_params["run"])
        while tail.advance():
            pass
        return tail

    async def _compare(self, request: Request) -> Response:
        wanted = list(dict.fromkeys(request.query_params.getlist("run")))
        if not wanted:
            raise HTTPException(422, "Name the runs to compare: /api/compare?run=A&run=B.")
        if len(wanted) > MAX_COMPARED:
            raise HTTPException(422, f"At most {MAX_COMPARED} runs can be compared.")

        def read() -> object:
            self._watcher.look()
            rows = {row.id: row for row in self._watcher.changes().rows}
            folders = [self._watcher.folder(run) for run in wanted]
            if not rows.keys() >= set(wanted):
                raise UnknownRunError(", ".join(wanted))
            return compare([(rows[run], at) for run, at in zip(wanted, folders, strict=True)])

        return await _answer(read)

    async def _act(self, request: Request) -> Response:
        """Pass a command on, if it was offered and the request is the page's own."""
        channel, access = self._channel, self._access
        if channel is None:
            raise HTTPException(404, "This dashboard passes no commands on.")
        if not access.may_command(request.headers):
            raise HTTPException(403, f"Commands need this page's origin and {COMMAND_HEADER}.")
        body = await _body(request)
        run, slot = request.path_params["run"], body.get("slot")
        named = None if slot is None else str(slot)
        command = Command(run=run, action=str(body.get("action")), slot=named)

        def send() -> object:
            self._watcher.folder(run)
            return {"told": _passed_on(command, channel)}

        try:
            return await _answer(send, self._commanding)
        except CommandRefusedError as error:
            raise HTTPException(409, str(error)) from error


class _Guard:
    """Turns away who may not look, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_SECURITY_HEADERS)
            await send(message)

        refusal = self._refusal(scope["path"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        if not self._access.knows_host(headers):
            return _json({"problem": _WRONG_HOST}, status=421)
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX) or self._access.admits(headers):
            return None
        return _json({"problem": _NO_TOKEN}, status=401)


def _asset(request: Request, asset: Asset) -> Response:
    headers = {"etag": asset.tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


def _json(document: object, *, status: int = 200) -> Response:
    return Response(
        to_json(document, inf_nan_mode="null"),
        status_code=status,
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


async def _answer(read: Callable[[], object], executor: Executor | None = None) -> Response:
    """Return what is read in a thread of an executor, None is the loop's own, as JSON."""
    try:
        return _json(await asyncio.get_running_loop().run_in_executor(executor, read))
    except UnknownRunError as error:
        raise HTTPException(404, "There is no such run.") from error
    except CANNOT_READ as error:
        raise HTTPException(422, f"The run cannot be read: {error}") from error


def _passed_on(command: Command, channel: CommandChannel) -> str:
    """Send a command that is offered now, and return what is said to it.

    Raises:
        CommandRefusedError: It is not offered, or had no effect.
        HTTPException: The channel failed.
    """
    target = "run" if command.slot is None else "slot"
    try:
        offers = channel.offers(command.run)
        if any((offer.name, offer.target) == (command.action, target) for offer in offers):
            return channel.send(command)
    except CommandRefusedError:
        raise
    except Exception as error:
        _LOG.exception("%s could not be passed on to %s", command.action, command.run)
        problem = f"{command.action} could not be passed on: {error}"
        raise HTTPException(502, problem) from error
    raise CommandRefusedError(f"{command.action} is not offered for {command.run}")


async def _problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"problem": error.detail}, status=error.status_code)


async def _failure(_: Request, __: Exception) -> Response:
    """Answer what went wrong in here, which is logged, beyond what guards the other answers."""
    answer = _json({"problem": "The dashboard failed; its console says why."}, status=500)
    answer.headers.update(_SECURITY_HEADERS)
    return answer


async def _body(request: Request) -> dict[str, object]:
    """Return a small JSON object that was posted."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Only application/json is taken.")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _MAX_BODY_BYTES:
            raise HTTPException(413, f"At most {_MAX_BODY_BYTES} bytes are taken.")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "This is not JSON.") from error
    if not isinstance(document, dict):
        raise HTTPException(400, "This is no JSON object.")
    return document
