"""What the endpoints take and return, as OpenAPI shows it."""

from collections.abc import Collection, Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from runtime.flags import DELIMITERS

UNKNOWN = "unknown_name"  # type of the error


def find_unknown(what: str, given: Iterable[str], known: Collection[str]) -> str | None:
    """Return a message that names the first unknown name and all known ones; None if all are known.

    An unknown one may be misspelt, so it is not ignored.
    """
    unknown = next((name for name in given if name not in known), None)
    if unknown is None:
        return None
    return f"unknown {what} {unknown[:100]!a}; this endpoint takes {', '.join(known) or 'none'}"


class Body(BaseModel):
    """The body of a request; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def check_names(cls, body: Any) -> Any:
        """Check the names of the fields. Raises: PydanticCustomError."""
        if isinstance(body, dict) and (message := find_unknown("field", body, cls.model_fields)):
            raise PydanticCustomError(UNKNOWN, message)
        return body


class ClassifyRequest(Body):
    """What /v1/classify takes."""

    model: str | None = Field(None, description="A served model; optional if there is one only.")
    input: str | list[str] = Field(description="A text, or several.")
    top_k: int | None = Field(None, ge=1, description="Also return the k likeliest labels.")
    explain: bool = Field(False, description="Also return what each word contributes.")


class PredictRequest(Body):
    """What /predict takes: a text, a pair of texts, or a list of lists of one text or two."""

    inputs: str | list[str] | list[list[str]]
    model: str | None = None
    raw_scores: bool = Field(False, description="Logits instead of probabilities.")
    truncate: bool = Field(True, description="Cut long texts; if false, refuse them.")
    truncation_direction: Literal["Right", "right"] = Field("Right", description="Cut the end.")


class CsvOptions(Body):
    """What /v1/predict_csv takes beside the file, as query parameters or fields of a form."""

    model: str | None = None
    text_column_names: str | None = Field(
        None, description="Separated by commas; else those of the model."
    )
    column_names: str | None = Field(
        None, description="Of all columns, separated by commas, if the file has no header."
    )
    delimiter: Literal[tuple(DELIMITERS)] | None = Field(
        None, description="Between columns; else found by the header."
    )
    quoting: Literal["minimal", "none"] | None = None
    csv_encoding: str | None = Field(None, description="Else UTF-8, or that of the model.")
    drop_empty: bool = Field(False, description="Leave out rows without a text.")
    drop_malformed: bool = Field(False, description="Leave out rows that cannot be read.")


FILE_FIELD = {"file": {"type": "string", "format": "binary"}}
CSV_FORM = CsvOptions.model_json_schema() | {"required": ["file"]}
CSV_FORM["properties"] |= FILE_FIELD
CSV_BODY = {"text/csv": {}, "multipart/form-data": {"schema": CSV_FORM}}  # for OpenAPI


class LoadRequest(Body):
    """What /v1/load_adapter takes."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^/\\\s]+$")
    path: str = Field(min_length=1, description="Below the folder of updates.")


class UnloadRequest(Body):
    """What /v1/unload_adapter takes."""

    name: str


class Score(BaseModel):
    """A label and its probability."""

    label: str
    score: float


class Classified(BaseModel):
    """One text's prediction."""

    index: int
    label: str
    confidence: float
    probs: list[float]
    num_classes: int
    scores: list[Score] | None = None
    words: list[tuple[str, float]] | None = None


class Usage(BaseModel):
    """The tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class ClassifyResponse(BaseModel):
    """What /v1/classify returns."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: Usage


def refusals(*statuses: int) -> dict:
    """Describe error answers for the schema."""
    meanings = {
        400: "not JSON, or an unknown host",
        401: "the API key is missing or wrong",
        403: "updates are not allowed",
        404: "no such model",
        408: "the body came too slowly",
        413: "too many bytes or texts",
        422: "the request is not valid",
        429: "the queue is full: try again after Retry-After seconds",
        503: "the model's folder has changed, or the server is stopping",
    }
    return {status: {"description": meanings[status]} for status in (400, 401, 422, *statuses)}
