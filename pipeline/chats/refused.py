"""Why a conversation cannot be used: one of them, never the run."""

from xtoken.schemas.errors import XtokenError


class Refused(XtokenError):
    """A conversation that cannot be used; who reads many counts it by its reason and goes on, or stops.

    Attributes:
        reason: what is counted, the same words for all such conversations.
        detail: this one's case, with the value.
        fix: the way out.
    """

    def __init__(self, reason: str, detail: str, fix: str) -> None:
        """Carry all three."""
        super().__init__(f"{reason}: {detail}; {fix}")
        self.reason, self.detail, self.fix = reason, detail, fix


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
