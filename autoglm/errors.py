"""Every exception class of the package, and the exit code or HTTP status each one ends in.

A message says what is wrong, where, what was got, what was expected and the mend. It never quotes
a prompt, a key or any other content of a request.
"""

from __future__ import annotations


class AutoglmError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1
    status = 500
    type = "server_error"


class ConfigError(AutoglmError):
    """A wrong flag, setting or combination of settings."""

    exit_code = 2


class FormatError(AutoglmError):
    """A model file that is damaged, hostile or of a kind this build cannot run; an answer that is no action."""

    exit_code = 3


class TrainingError(AutoglmError):
    """Training cannot go on: the loss is no number any more, or a stage ran out of batches."""


class DownloadError(AutoglmError):
    """A model could not be fetched, or what arrived is not what was pinned."""

    exit_code = 4


class RequestError(AutoglmError):
    """The client's fault: HTTP 400 in OpenAI's error object.

    param names the offending field, code is OpenAI's machine-readable code where one exists.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or prompt plus max_tokens, does not fit the context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    status = 404

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class CapacityError(AutoglmError):
    """The queue is full (429) or the server is loading or draining (503); retry_after_s says when to come back."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, status: int = 429, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        if status == 503:
            self.type = "service_unavailable_error"


class EngineError(AutoglmError):
    """A bug of ours: the sequence it happened in fails, the server goes on."""
