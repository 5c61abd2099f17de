"""Errors of the HTTP interface as `application/problem+json` (RFC 9457)."""

from __future__ import annotations

from typing import Any

from raylway.bundle.mistakes import InvalidRows

TITLES = {
    400: "The request can't be read",
    401: "An API key is needed",
    404: "There is nothing at this path",
    405: "This path takes another method",
    408: "The body takes too long",
    413: "The body is too large",
    415: "The body is of another media type",
    422: "The rows can't be answered",
    429: "Too many requests",
    500: "The model failed",
    503: "Too busy",
}
"""Every error that this application gives, with its title."""


class HttpProblem(Exception):
    """A request that ends in an error.

    Args:
        status: One of `TITLES`.
        detail: What happened to this request.
        headers: Further response headers.
        errors: For 422, one `{row, feature, reason}` a mistake.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(status, detail, headers, errors)
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {
            "type": "about:blank",
            "title": TITLES[status],
            "status": status,
            "detail": detail,
        }
        if errors is not None:
            self.body["errors"] = errors


def unprocessable(found: InvalidRows) -> HttpProblem:
    """422 with every mistake; the detail is the first one as a sentence."""
    first = found.problems[0]
    place = "" if first.row is None else f"row {first.row}"
    sentence = ": ".join(filter(None, (place, " ".join(filter(None, (first.feature, first.reason))))))
    more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
    errors = [{"row": each.row, "feature": each.feature, "reason": each.reason} for each in found.problems]
    return HttpProblem(422, f"{sentence}{more}", errors=errors)


def busy(detail: str, retry_after_s: int) -> HttpProblem:
    """503 that says when to come again."""
    return HttpProblem(503, detail, ((b"retry-after", str(retry_after_s).encode()),))
