"""The base of every typed record: frozen, keyword-only, unknown fields refused."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable value that survives JSON, non-finite floats included.

    Raises:
        pydantic.ValidationError: A field is unknown, missing or of the wrong type.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        validate_default=True,
    )

    @classmethod
    def from_dump(cls, dump: Mapping[str, Any]) -> Self:
        """Return the record that `model_dump(mode="json")` was taken of.

        A field that has a default is required too: what is missing was lost, not left out.

        Raises:
            ValueError: A field is missing; all of them are named. Or one is unknown or of the wrong
                type, as a `pydantic.ValidationError`.
        """
        record = cls.model_validate(dump)
        missing = list(_missing(dump, record.model_dump(mode="json"), ""))
        if missing:
            raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}")
        return record


def _missing(given: Any, whole: Any, place: str) -> Iterator[str]:
    """Yield the dotted places of what `whole` has and `given` has not."""
    if isinstance(whole, dict) and isinstance(given, Mapping):
        for key, value in whole.items():
            if key in given:
                yield from _missing(given[key], value, f"{place}{key}.")
            else:
                yield f"{place}{key}"
    elif isinstance(whole, list) and isinstance(given, (list, tuple)):
        for index, (item, value) in enumerate(zip(given, whole, strict=True)):
            yield from _missing(item, value, f"{place}{index}.")
