"""Errors in the format of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from lora_jax.serving.api.driver import FAILED
from lora_jax.serving.request import Refused

_STATUS = {"queue_full": 429, "unknown_adapter": 404, "too_long": 400, "invalid": 400}
_CODE = {
    "queue_full": "queue_full",
    "unknown_adapter": "model_not_found",
    "too_long": "context_length_exceeded",
    "invalid": "invalid_value",
}
# An engine's fields by the names that they have in a body.
_PARAM = {"adapter": "model", "tokens": "prompt", "max_new_tokens": "max_tokens"}


class ApiError(Exception):
    """An answer that is an error, with the status and headers it is sent with."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": _type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    return ApiError(
        404,
        f"The model {shown(name)} does not exist here; GET /v1/models lists those that do.",
        param="model",
        code="model_not_found",
    )


def busy(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def ended(reason: str) -> ApiError:
    """Of a driver that takes no more requests."""
    if reason == FAILED:
        return ApiError(503, "The engine failed; the server has to be restarted.", code=FAILED)
    return ApiError(503, "The server is shutting down.", code="shutting_down")


def not_recorded(what: str, error: Exception) -> ApiError:
    """Of a change that a restart would not know of."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    message = f"{what}: the list of adapters for the next start cannot be written: {reason}."
    return ApiError(500, message, code="not_recorded", headers={"x-should-retry": "false"})


def generation_failed() -> ApiError:
    message = "The model's logits are not numbers, or its adapter is gone: nothing to answer with."
    return ApiError(500, message, code="generation_failed", headers={"x-should-retry": "false"})


def too_slow(seconds: float) -> ApiError:
    """Without the header, the openai client would repeat the request."""
    return ApiError(
        504,
        f"The request took longer than this server's limit of {seconds:g} seconds. Ask for fewer "
        "tokens, or stream.",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def refusal(refused: Refused, *, is_chat: bool) -> ApiError:
    """An engine's refusal as an error of the API."""
    if refused.reason == "queue_full":
        return busy(str(refused))
    param = _PARAM.get(refused.field, refused.field)
    if is_chat and param == "prompt":
        param = "messages"
    status, code = _STATUS[refused.reason], _CODE[refused.reason]
    return ApiError(status, str(refused), param=param, code=code)


def shown(value: Any) -> str:
    """A value of a body, short enough for a message."""
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
