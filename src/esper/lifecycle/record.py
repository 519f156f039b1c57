"""The base of every typed record: frozen, keyword-only, unknown fields refused."""

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
