"""The errors that clients are told, in the two forms that they know."""

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

STATUSES = {  # the type of the error, and what OpenAPI says of the status
    400: ("validation", "not JSON, or an unknown host"),
    401: ("unauthorized", "the API key is missing or wrong"),
    403: ("forbidden", "updates are not allowed"),
    404: ("not_found", "no such model"),
    408: ("timeout", "the body came too slowly"),
    413: ("too_large", "too many bytes or texts"),
    422: ("validation", "the request is not valid"),
    429: ("overloaded", "the queue is full: try again after Retry-After seconds"),
    499: ("gone", "the client has gone"),
    500: ("internal", "the server failed: see its log"),
    503: ("unavailable", "the model's folder has changed, or the server is stopping"),
}
REWORDED = {  # what FastAPI and pydantic say less well; by field, or by their own words
    "input": "send a text or a list of texts",
    "inputs": "send a text, a pair of texts, or a list of lists of one text or two",
    "name": "send a name of 1 to 200 characters, without blanks and slashes",
    "There was an error parsing the body": "the body is not UTF-8, or is nested too deeply",
    "Not Found": "nothing has this address: see /openapi.json",
    "Method Not Allowed": "this address does not take this method: see /openapi.json",
}
NO_OBJECT = (
    "send a JSON object, and the header content-type: application/json "
    "(CSV files: to /v1/predict_csv)"
)
UNKNOWN = "extra_forbidden"  # pydantic's type of error for an unknown name


def refusals(*statuses: int) -> dict[int, dict]:
    """Describe error answers for the schema."""
    return {status: {"description": STATUSES[status][1]} for status in statuses}


def kind_of(error: HTTPException) -> str:
    """Return the type of an error, for clients and metrics."""
    return STATUSES.get(error.status_code, STATUSES[400])[0]


def error_response(path: str, error: HTTPException) -> Response:
    """Answer as clients of the path expect it.

    /predict: those of text-embeddings-inference; others: those of vLLM and OpenAI.
    """
    status, message = error.status_code, REWORDED.get(error.detail, error.detail)
    content = {"error": {"message": message, "type": kind_of(error), "code": status}}
    if path == "/predict":
        content = {"error": message, "error_type": kind_of(error)}
    return JSONResponse(content, status, error.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Answer with an error; what a bug was, only the server's log says."""
    if not isinstance(error, HTTPException):
        status = 499 if isinstance(error, ClientDisconnect) else 500
        error = HTTPException(status, STATUSES[status][1])
    request.app.state.engine.metrics.failures.labels(kind_of(error)).inc()
    return error_response(request.url.path, error)


async def on_invalid(request: Request, error: RequestValidationError) -> Response:
    """Name the first field that does not fit; an unknown one, if any, since it may be misspelt."""
    first = min(error.errors(), key=lambda entry: entry["type"] != UNKNOWN)
    (place, *names), kind = map(str, first["loc"]), first["type"]
    if kind == "json_invalid":
        return await on_error(request, HTTPException(400, "the body is not JSON"))
    if kind == UNKNOWN:
        what = "query parameter" if place == "query" else "field"
        known = ", ".join(known_names(request, place)) or "none"
        message = f"unknown {what} {names[0][:100]!a}; this endpoint takes {known}"
    elif not names:
        message = first["msg"] if kind == "string_unicode" else NO_OBJECT
    elif kind != "missing" and names[0] in REWORDED:
        message = f"{names[0]}: {REWORDED[names[0]]}"
    else:
        message = f"{'.'.join(names)}: {first['msg']}"
    return await on_error(request, HTTPException(422, message))


def known_names(request: Request, place: str) -> list[str]:
    """Return the fields that an endpoint takes in its "body", or in its query or form."""
    dependant = request.scope["route"].dependant
    params = dependant.body_params if place == "body" else dependant.query_params
    kinds = [(param.name, param.field_info.annotation) for param in params]
    return [name for one, kind in kinds for name in getattr(kind, "model_fields", (one,))]


async def check_query(request: Request) -> None:
    """Check the names of query parameters, except of probes. Raises: RequestValidationError."""
    known = known_names(request, "query")
    unknown = [name for name in request.query_params if name not in known]
    if unknown and request.method == "POST":
        raise RequestValidationError([{"type": UNKNOWN, "loc": ("query", unknown[0])}])


HANDLERS = {
    HTTPException: on_error,
    RequestValidationError: on_invalid,
    ClientDisconnect: on_error,
    Exception: on_error,
}
