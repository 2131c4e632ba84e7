"""What every request passes before its endpoint: limits, the API key, and headers for browsers."""

import asyncio
import hmac
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PUBLIC = ("/", "/health", "/page.css", "/page.js")  # without a key: the page asks for it
BODY_SECONDS = 30  # for a client to send its body
TOO_LARGE = "the body has more than {:,} bytes: send fewer texts at a time"

POLICY = (  # nothing from elsewhere, no inline code
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BROWSER_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def error_body(path: str, status: int, message: str, kind: str) -> dict:
    """Return an error as clients of the path expect it.

    /predict: that of text-embeddings-inference; others: that of vLLM and OpenAI.
    """
    if path == "/predict":
        return {"error": message, "error_type": kind}
    return {"error": {"message": message, "type": kind, "code": status}}


class TooSlow(Exception):
    """The body did not arrive in time."""


class Guards:
    """ASGI middleware: the key, the time for a body, and headers for browsers."""

    def __init__(self, app: ASGIApp, max_body: int, api_key: str | None) -> None:
        self.app, self.max_body = app, max_body
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline, arrived, started = time.monotonic() + BODY_SECONDS, False, False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = message | {"headers": [*message["headers"], *BROWSER_HEADERS]}
            await send(message)

        async def receive_in_time() -> Message:
            nonlocal arrived
            if arrived:  # then this waits until the client leaves, however long
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise TooSlow from None
            arrived = not message.get("more_body")
            return message

        async def refuse(status: int, message: str, kind: str) -> None:
            headers = {"www-authenticate": "Bearer"} if status == 401 else {"connection": "close"}
            content = error_body(scope["path"], status, message, kind)
            await JSONResponse(content, status, headers)(scope, receive, send_guarded)

        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        open_to_all = not self.expected or scope["path"] in PUBLIC
        if not (open_to_all or hmac.compare_digest(given, self.expected)):
            message = "pass the API key: Authorization: Bearer KEY"
            await refuse(401, message, "unauthorized")
            return
        if int(headers.get(b"content-length", 0)) > self.max_body:
            await refuse(413, TOO_LARGE.format(self.max_body), "too_large")
            return
        try:
            await self.app(scope, receive_in_time, send_guarded)
        except TooSlow:
            if not started:
                await refuse(408, f"the body took more than {BODY_SECONDS} s", "timeout")
