"""The ASGI application: LibreTranslate's interface, health, metrics, and the page."""

import asyncio
import math
import time
from contextlib import asynccontextmanager
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fairseq_smoe.serving.metrics import CONTENT_TYPE
from fairseq_smoe.serving.requests import (
    CLIENT_GONE,
    RequestError,
    parse_body,
    read_body,
    read_translation_request,
)

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(server, started=lambda: None):
    """The application.

    Args:
        server: :class:`~fairseq_smoe.serving.server.Server`
        started: called when signals are handled.
    """
    page = resources.files("fairseq_smoe") / "serving" / "page"
    files = {path: ((page / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

    async def translate(request):
        started = time.perf_counter()
        limits = server.limits
        try:
            body = await asyncio.wait_for(read_body(request, limits.body), limits.timeout)
        except TimeoutError:
            raise RequestError(408, f"no body within {limits.timeout:g} seconds") from None
        except ClientDisconnect:
            raise RequestError(CLIENT_GONE, "the client has gone") from None
        fields = parse_body(body, request.headers.get("content-type", ""))
        key = fields.get("api_key") or request.headers.get("authorization", "").removeprefix(
            "Bearer "
        )
        if not server.keys.accept(key):
            raise RequestError(403, "api_key: give a valid one")
        wait = server.rate.wait(request.client.host if request.client else "")
        if wait:
            raise RequestError(429, "too many requests", {"Retry-After": str(math.ceil(wait))})
        asked = read_translation_request(fields, server.languages, limits)

        async def gone():
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answer = await server.service.translate(asked, gone)
        server.metrics.translated(sum(map(len, asked.texts)), time.perf_counter() - started)
        return JSONResponse(answer)

    async def languages(request):
        return JSONResponse(server.languages.listed())

    async def health(request):
        ready = server.workers.alive > 0
        state = {"status": "ok" if ready else "starting", "workers": server.workers.alive}
        return JSONResponse(state, 200 if ready else 503)

    async def metrics(request):
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)

    async def page_file(request):
        content, kind = files[request.url.path]
        return Response(content, media_type=kind, headers=HEADERS)

    def counted(path, endpoint):
        async def answer(request):
            try:
                response = await endpoint(request)
            except RequestError as error:
                response = JSONResponse({"error": str(error)}, error.status, error.headers)
            server.metrics.answered(path, response.status_code)
            return response

        return answer

    async def no_such(request, error):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @asynccontextmanager
    async def lifespan(app):
        started()
        yield
        # uvicorn has answered all requests by now
        await asyncio.to_thread(server.stop)

    routes = [
        Route("/translate", counted("/translate", translate), methods=["POST"]),
        *(
            Route(path, counted(path, endpoint), methods=["GET"])
            for path, endpoint in (
                ("/languages", languages),
                ("/health", health),
                ("/metrics", metrics),
                *((path, page_file) for path in files),
            )
        ),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: no_such})
