"""GetLogEvents as CloudWatch answers it: pages end at 1 MB too, and may be short or empty before the end. moto's end
at a number of events only, and its tokens are places in a list that grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.services.aws.account import Account
from tests.services.aws.shapes import check_request
from tests.services.aws.wire import AwsError, Json

__all__ = ["EVENT_BYTES", "LogPages", "cut_event"]

EVENT_BYTES = 262_144 - 26
"""Of the text of an event; AWS counts 26 besides."""

_PAGE_BYTES = 1 << 20
_PAGE_EVENTS = 10_000
_PLACE = (0, -1)


@dataclass
class LogPages:
    """page: the most events of a page, if the caller doesn't ask for fewer. empty: so many of the next pages are."""

    account: Account
    page: int = _PAGE_EVENTS
    empty: int = 0

    def clear(self) -> None:
        self.page, self.empty = _PAGE_EVENTS, 0

    def get_log_events(self, body: Json, region: str) -> Json:
        try:
            check_request("logs", "GetLogEvents", body)
        except AwsError as error:
            raise AwsError("InvalidParameterException", error.message) from error
        group = str(body.get("logGroupName") or body.get("logGroupIdentifier", "")).rpartition("log-group:")[2]
        events = self.account.events(group, body["logStreamName"], region)
        if events is None:
            raise AwsError("ResourceNotFoundException", "The specified log group or log stream does not exist.")
        wanted = [event for event in events if body.get("startTime", 0) <= event.timestamp < _until(body)]
        return self._page(wanted, body)

    def _page(self, events: Sequence[Any], body: Json) -> Json:
        token = body.get("nextToken", "")
        direction, mark, turn = _read(token) if token else ("f" if body.get("startFromHead") else "b", None, 0)
        if mark is not None:
            events = [e for e in events if (_place(e) > mark if direction == "f" else _place(e) < mark)]
        if self.empty and events:
            self.empty -= 1
            at = mark or _PLACE
            return {"events": [], **_tokens(at, at, turn + 1)}
        limit = min(self.page, body.get("limit", _PAGE_EVENTS))
        page = _fitting(events, limit) if direction == "f" else _fitting(events[::-1], limit)[::-1]
        at = mark or _PLACE
        first, last = (_place(page[0]), _place(page[-1])) if page else (at, at)
        return {"events": [event.to_response_dict() for event in page], **_tokens(first, last, 0 if page else turn)}


def _fitting(events: Sequence[Any], limit: int) -> list[Any]:
    page, size = [], 0
    for event in events[:limit]:
        size += len(event.message.encode()) + 26
        if page and size > _PAGE_BYTES:
            break
        page.append(event)
    return page


def _until(body: Json) -> float:
    return float(body.get("endTime", "inf"))


def _place(event: Any) -> tuple[int, int]:
    return event.timestamp, event.event_id


def _tokens(first: tuple[int, int], last: tuple[int, int], turn: int) -> Json:
    return {"nextForwardToken": _token("f", last, turn), "nextBackwardToken": _token("b", first, turn)}


def _token(direction: str, place: tuple[int, int], turn: int) -> str:
    return f"{direction}/{place[0]:020d}{place[1] + 1:030d}{turn:06d}/s"


def _read(token: str) -> tuple[str, tuple[int, int], int]:
    """(direction, where the page ended, how many empty ones came since)"""
    direction, _, digits = token.removesuffix("/s").partition("/")
    if direction not in ("f", "b") or len(digits) != 56 or not digits.isdigit():
        raise AwsError("InvalidParameterException", "The specified nextToken is invalid.")
    return direction, (int(digits[:20]), int(digits[20:50]) - 1), int(digits[50:])


def cut_event(text: str) -> list[str]:
    """A line that is longer than an event may be goes on in further ones."""
    data = text.encode()
    if len(data) <= EVENT_BYTES:
        return [text]
    parts = (data[at : at + EVENT_BYTES] for at in range(0, len(data), EVENT_BYTES))
    return [part.decode(errors="replace") for part in parts]
