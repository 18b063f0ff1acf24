"""The limits of a server."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests.

    Attributes:
      body_bytes: of a request's body.
      body_seconds: in which it must be received.
      seconds: from the body to the end of the answer.
      max_tokens: of one answer; None for as many as the context holds.
      choices: prompts times n of one request.
      requests: how many are handled at once, in whatever state.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0
    max_tokens: int | None = None
    choices: int = 64
    requests: int = 1024
