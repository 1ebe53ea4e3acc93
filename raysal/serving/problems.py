"""What the endpoint answers when it does not answer with a mask: problem+json (RFC 9457) that says what to do."""

import json
from typing import Any

from starlette.responses import Response

TYPE = "application/problem+json"

STATUSES = {
    400: "The request can't be read",
    401: "A token is needed",
    404: "There is no such page",
    405: "That method is not answered here",
    406: "That form of answer does not exist",
    408: "The time is over",
    413: "Too large",
    415: "That is no image that can be read",
    422: "The image can't be used",
    429: "Busy",
    500: "Something failed here",
    503: "Not ready",
}
"""Every status of a problem, and what it means in general."""


class Problem(Exception):
    """Ends a request.

    Args:
        status: Of the answer.
        title: One sentence that says what was seen and what to do.
        reason: A short word for metrics.
        headers: More headers of the answer.
    """

    def __init__(self, status: int, title: str, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(title)
        self.status, self.title, self.reason, self.headers = status, title, reason, headers or {}

    def body(self, request_id: str) -> dict[str, Any]:
        return {"type": "about:blank", "status": self.status, "title": self.title, "reason": self.reason, "request_id": request_id}

    def response(self, request_id: str) -> Response:
        return Response(json.dumps(self.body(request_id)), self.status, self.headers, TYPE)
