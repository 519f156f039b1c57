"""Opening a data set: its splits under our names, nothing decoded yet."""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from esper.tasks.collection.address import Address, expanded
from esper.tasks.task import TaskDataError

_SPLIT_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
_KINDS: Mapping[str, str] = {
    **dict.fromkeys(_IMAGE_SUFFIXES, "images"),
    "parquet": "parquet",
    "csv": "csv",
    "json": "json",
    "jsonl": "json",
    "txt": "txt",
}
"""Kind of file by suffix, in the order in which a folder of several kinds is looked at."""

_CAUSE_CHARACTERS = 200


@dataclass(frozen=True)
class Source:
    """An open data set.

    Attributes:
        splits: "train", and "validation" and "test" where there are any, to a `datasets.Dataset`.
        notes: What was left aside.
    """

    splits: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@lru_cache(maxsize=2)
def open_source(address: Address) -> Source:
    """Open a data set; one from the hub is downloaded into the `datasets` library's cache.

    Raises:
        ModuleNotFoundError: The `datasets` library is not installed.
        TaskDataError: There is no such data set or folder, it is empty, or it cannot be read.
    """
    try:
        import datasets  # noqa: PLC0415 – an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{address.scheme}: tasks need the datasets library: pip install 'esper-lite[data]'"
        ) from error
    if address.scheme == "folder":
        return _open_folder(datasets, expanded(address.name))
    return _open_hub(datasets, address)


def _open_hub(datasets: Any, address: Address) -> Source:
    local = expanded(address.name)
    name = str(local) if local.is_dir() else address.name
    try:
        loaded = datasets.load_dataset(name, address.config)
    except Exception as error:
        # The library raises a dozen unrelated types here; the first cause is what helps.
        raise TaskDataError(
            f"data set {address.name!r} cannot be loaded: {_causes(error)}. A name on "
            "huggingface.co/datasets needs the network once; config= chooses among several "
            "configurations; folder:PATH reads local files"
        ) from error
    splits: dict[str, Any] = {}
    aside = []
    for split in loaded:
        word = _SPLIT_WORDS.get(split)
        if word is None or word in splits:
            aside.append(split)
        else:
            splits[word] = loaded[split]
    if "train" not in splits:
        if len(loaded) != 1:
            raise TaskDataError(
                f"data set {address.name!r} has no split named train, but {', '.join(loaded)}; "
                "save the one to train on as train.parquet in a folder, and use folder:PATH"
            )
        splits, aside = {"train": next(iter(loaded.values()))}, []
    notes = [f"left aside: split {split} of {len(loaded[split]):,} rows" for split in aside]
    return Source(splits, tuple(notes))


def _causes(error: BaseException) -> str:
    """Return an error and what first caused it, short."""
    root, earlier = error, _cause(error)
    while earlier is not None:
        root, earlier = earlier, _cause(earlier)
    words = [f"{type(error).__name__}: {error}"]
    if root is not error and str(root) not in str(error):
        words.append(f"{type(root).__name__}: {root}")
    return " – ".join(" ".join(part.split())[:_CAUSE_CHARACTERS] for part in words)


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _open_folder(datasets: Any, root: Path) -> Source:
    if not root.is_dir():
        problem = "is a file; name its folder" if root.exists() else "does not exist"
        raise TaskDataError(f"folder {str(root)!r} {problem}")
    files = _files_by_kind(root)
    if not files:
        raise TaskDataError(
            f"folder {str(root)!r} holds no data: it needs images in one sub-folder per class "
            f"({', '.join(_IMAGE_SUFFIXES)}), or parquet, csv, json, jsonl or txt files"
        )
    (kind, chosen), *others = files.items()
    notes = [f"left aside: {len(paths):,} {other} files" for other, paths in others]
    splits = _files_by_split(root, chosen, by_name=kind != "images")
    if kind == "images":
        return Source(_image_splits(datasets, root, splits), tuple(notes))
    if kind == "txt":
        rows = {split: _text_rows(datasets, root, paths) for split, paths in splits.items()}
        return Source(rows, tuple(notes))
    return Source(_table_splits(datasets, kind, splits), tuple(notes))


def _files_by_kind(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {kind: [] for kind in dict.fromkeys(_KINDS.values())}
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        kind = _KINDS.get(path.suffix[1:].lower())
        if kind is not None and not hidden and path.is_file():
            found[kind].append(path)
    return {kind: paths for kind, paths in found.items() if paths}


def _files_by_split(root: Path, files: list[Path], *, by_name: bool) -> dict[str, list[Path]]:
    """Sort files into splits if there is a split to train on, else take all for one.

    The first folder says the split, or if `by_name` the first word of the file's name, as in
    `test-0001.parquet`.
    """
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path.relative_to(root), by_name=by_name), []).append(path)
    if "train" not in splits:
        return {"train": files}
    if None in splits:
        raise TaskDataError(
            f"folder {str(root)!r} has a split to train on, but {len(splits[None]):,} files are in "
            f"no split, as {str(splits[None][0].relative_to(root))!r}; move each into train/, "
            "validation/ or test/, or rename what is no split"
        )
    return {split: paths for split, paths in splits.items() if split is not None}


def _split_of(relative: Path, *, by_name: bool) -> str | None:
    if len(relative.parts) > 1 and relative.parts[0].lower() in _SPLIT_WORDS:
        return _SPLIT_WORDS[relative.parts[0].lower()]
    word = re.split(r"[-._ \d]", relative.stem.lower())[0] if by_name else ""
    return _SPLIT_WORDS.get(word)


def _image_splits(
    datasets: Any, root: Path, splits: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    first = splits["train"][0].relative_to(root)
    folder_depth = 1 if _split_of(first, by_name=False) == "train" else 0
    labels: dict[str, list[str]] = {}
    for split, paths in splits.items():
        labels[split] = []
        for path in paths:
            parts = path.relative_to(root).parts[folder_depth:]
            if len(parts) < 2:
                raise TaskDataError(
                    f"image {str(path)!r} is in no class; put images into a sub-folder per class, "
                    "as cats/1.png and dogs/2.png, below train/ and test/ where there are splits"
                )
            labels[split].append(parts[0])
    classes = sorted({label for values in labels.values() for label in values})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    return {
        split: datasets.Dataset.from_dict(
            {
                "image": [str(path) for path in paths],
                "label": [classes.index(label) for label in labels[split]],
            },
            features=features,
        )
        for split, paths in splits.items()
    }


def _text_rows(datasets: Any, root: Path, paths: Sequence[Path]) -> Any:
    """Return one row per file, in an order that is fixed but does not follow the names.

    A file is read when its row is, as bytes: whatever its encoding and line ends are, they stay.
    """
    mixed = sorted(
        paths, key=lambda path: (zlib.crc32(path.relative_to(root).as_posix().encode()), path)
    )
    rows = datasets.Dataset.from_dict({"text": [str(path) for path in mixed]})
    return rows.with_transform(
        lambda batch: {"text": [Path(path).read_bytes() for path in batch["text"]]}
    )


def _table_splits(
    datasets: Any, kind: str, splits: Mapping[str, Sequence[Path]]
) -> Mapping[str, Any]:
    # Unlike load_dataset, the readers ask nothing of the network.
    read = getattr(datasets.DatasetDict, f"from_{kind}")
    patterns = {split: [_escaped(path) for path in paths] for split, paths in splits.items()}
    try:
        tables: Mapping[str, Any] = read(patterns)
    except Exception as error:
        raise TaskDataError(f"the {kind} files cannot be read: {_causes(error)}") from error
    return tables


def _escaped(path: Path) -> str:
    """Return a path in which nothing is a pattern."""
    return re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))
