"""What every request passes before its endpoint: limits, the API key, and headers for browsers."""

import asyncio
import hmac
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import error_response

PUBLIC = ("/", "/health", "/page.css", "/page.js")  # without a key: the page asks for it
BODY_SECONDS = 30  # for a client to send its body
MOST_BODIES = 16  # of the largest size, in memory or the temporary folder at a time
CLOSE = {"connection": "close"}  # rather than read the rest of the body
NO_KEY = HTTPException(
    401, "pass the API key: Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
)

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


class Guards:
    """ASGI middleware: the key, the size of a body and its time, and headers for browsers."""

    def __init__(self, app: ASGIApp, max_body: int, api_key: str | None) -> None:
        self.app, self.max_body, self.held = app, max_body, 0  # bytes of all bodies
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # HEAD is GET, of which the server sends no body; a slash at the end changes nothing
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = scope | {"method": method, "path": scope["path"].rstrip("/") or "/"}
        deadline, received, is_whole = time.monotonic() + BODY_SECONDS, 0, False

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *BROWSER_HEADERS]}
            await send(message)

        async def receive_guarded() -> Message:
            nonlocal received, is_whole
            if is_whole:  # this waits until the client leaves, however long
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                text = f"the body took more than {BODY_SECONDS} s"
                raise HTTPException(408, text, CLOSE) from None
            size = len(message.get("body", b""))
            received, self.held = received + size, self.held + size
            if self.held > MOST_BODIES * self.max_body:
                text = "too many large requests at once: try again"
                raise HTTPException(503, text, CLOSE)
            if received > self.max_body:
                text = f"the body has more than {self.max_body:,} bytes: send less at a time"
                raise HTTPException(413, text, CLOSE)
            is_whole = not message.get("more_body")
            return message

        key = dict(scope["headers"]).get(b"authorization", b"")
        is_public = not self.expected or scope["path"] in PUBLIC
        if not (is_public or hmac.compare_digest(key, self.expected)):
            await error_response(scope["path"], NO_KEY)(scope, receive, send_guarded)
            return
        try:
            await self.app(scope, receive_guarded, send_guarded)
        finally:
            self.held -= received
