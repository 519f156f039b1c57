"""What every event shares."""

from enum import StrEnum

from esper.lifecycle.record import Record


class Priority(StrEnum):
    """How urgently an event must reach a person."""

    CRITICAL = "critical"
    WARNING = "warning"
    NORMAL = "normal"


class BaseEvent(Record):
    """A priority derived from its type and content, and words for a person."""

    @property
    def priority(self) -> Priority:
        return Priority.NORMAL

    def __str__(self) -> str:
        """Return it in words, or what it holds; `repr` is exact."""
        fields = self.model_dump(mode="json")
        kind = fields.pop("type")
        return f"{kind}: {', '.join(f'{name}={value}' for name, value in fields.items())}"
