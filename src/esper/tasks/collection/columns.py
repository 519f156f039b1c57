"""What a data set is about, read off its features: images with classes, or text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from esper.tasks.collection.address import SETTINGS_HELP, Address
from esper.tasks.task import TaskDataError


@dataclass(frozen=True)
class ImageColumns:
    """Columns of a classification task."""

    image: str
    label: str


@dataclass(frozen=True)
class TextColumn:
    """Column of a language modelling task."""

    text: str


def choose_columns(features: Mapping[str, Any], address: Address) -> ImageColumns | TextColumn:
    """Return the columns that the address names, or the only ones there are.

    An image column makes it a classification task, whose label is the only column of classes, or
    without one the only column of whole numbers or strings. Without an image column, the only
    column of strings is the text.

    Raises:
        TaskDataError: A named column does not exist or holds something else, there is not exactly
            one candidate, or settings of images are given for text.
    """
    images = _named(features, _is_image)
    if address.text is not None or (address.image is None and not images):
        text = _column(features, "text", address.text, [_named(features, _is_text)])
        of_images = [key for key in ("image", "label", "size") if getattr(address, key) is not None]
        if of_images:
            raise TaskDataError(
                f"{address.name} is read as text, of column {text!r}, where {of_images[0]}= has no "
                "meaning; leave it out, or leave out text= if its images are meant"
            )
        return TextColumn(text)
    image = _column(features, "image", address.image, [images])
    classes = [_named(features, _is_class), _named(features, _is_plain_label)]
    return ImageColumns(image, _column(features, "label", address.label, classes))


def _column(
    features: Mapping[str, Any], role: str, chosen: str | None, candidates: list[list[str]]
) -> str:
    """Return the chosen column, or the only one of the first candidates that there are."""
    fitting = [name for names in candidates for name in names]
    if chosen is not None:
        if chosen in fitting:
            return chosen
        problem = (
            f"column {chosen!r} cannot be the {role}"
            if chosen in features
            else (f"there is no column {chosen!r}")
        )
    else:
        first = next((names for names in candidates if names), [])
        if len(first) == 1:
            return first[0]
        problem = (
            f"{len(first)} columns could be the {role}: {', '.join(first)}"
            if first
            else f"no column can be the {role}"
        )
    columns = ", ".join(f"{name} ({_words(feature)})" for name, feature in features.items())
    raise TaskDataError(f"{problem}; columns: {columns}. {SETTINGS_HELP}")


def _named(features: Mapping[str, Any], fits: Callable[[Any], bool]) -> list[str]:
    return [name for name, feature in features.items() if fits(feature)]


def _kind(feature: Any) -> str:
    """Return the feature's class name: Image, ClassLabel, Value or another."""
    return type(feature).__name__


def _words(feature: Any) -> str:
    if _kind(feature) == "ClassLabel":
        return f"{feature.num_classes} classes"
    return str(feature.dtype) if _kind(feature) == "Value" else _kind(feature).lower()


def _is_image(feature: Any) -> bool:
    return _kind(feature) == "Image"


def _is_class(feature: Any) -> bool:
    return _kind(feature) == "ClassLabel"


def _is_plain_label(feature: Any) -> bool:
    return _kind(feature) == "Value" and feature.dtype.startswith(("int", "uint", "string", "bool"))


def _is_text(feature: Any) -> bool:
    return _kind(feature) == "Value" and feature.dtype in ("string", "large_string")
