"""What ranks whose traces do not match disagree on."""

from __future__ import annotations

from collections.abc import Sequence


def describe_mismatch(logs: Sequence[Sequence[tuple[object, ...]]]) -> str:
    """Describe the first message that is sent but not expected, or expected but not sent; else a
    collective that its members enter differently."""
    sides: dict[tuple[object, ...], set[object]] = {}
    for log in logs:
        for kind, sender, receiver, number, *rest in log:
            if kind == "message":
                *content, side = rest
                sides.setdefault((sender, receiver, number, *content), set()).add(side)
    for (sender, receiver, number, nbytes, what), message_sides in sides.items():
        if len(message_sides) == 1:
            if "sent" in message_sides:
                problem = f"rank {receiver} does not expect this message"
            else:
                problem = f"rank {sender} does not send this message"
            content_text = f" of {what}" if what else ""
            return (
                f"message {number} from rank {sender} to rank {receiver}, {nbytes} bytes"
                f"{content_text}: {problem}"
            )
    return "a collective that its ranks enter in different order or with different sizes"
