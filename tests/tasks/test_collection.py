"""Any data set by its address: what is found, how it is split, and how problems are named."""

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from esper.tasks import TaskDataError, TaskSetup, named_task
from esper.tasks.collection import data as image_data
from esper.tasks.collection.address import parse_address
from esper.tasks.collection.columns import ImageColumns, TextColumn
from esper.tasks.collection.data import ImageBatches, Split, load_images
from esper.tasks.collection.source import open_source
from esper.tasks.collection.text_data import load_text

pytestmark = pytest.mark.usefixtures("offline")

ImageFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    for cached in (open_source, load_images, load_text):
        cached.cache_clear()


def build(task: str, random_seed: int = 0) -> TaskSetup:
    return named_task(task).build(random_seed)


def images_of(task: str) -> image_data.Images:
    return load_images(parse_address(task), ImageColumns("image", "label"))


def text_of(task: str, column: str = "text") -> tuple[dict[str, bytes], tuple[str, ...]]:
    splits, notes = load_text(parse_address(task), TextColumn(column))
    return {name: bytes(getattr(splits, name).tolist()) for name in vars(splits)}, notes


def write_parquet(path: Path, columns: dict[str, list[object]], **features: object) -> None:
    kinds = datasets.Features(features) if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=kinds).with_format("arrow")[:]
    datasets.Dataset(table, info=datasets.DatasetInfo(features=kinds)).to_parquet(path)


def flat(split: Split) -> set[bytes]:
    return {bytes(image.flatten().tolist()) for image in split.images}


# addresses


def test_address_has_a_name_and_settings() -> None:
    address = parse_address("hf:uoft-cs/cifar100,label=fine_label,samples=50")
    assert (address.scheme, address.name) == ("hf", "uoft-cs/cifar100")
    assert (address.label, address.samples, address.image) == ("fine_label", 50, None)


def test_comma_without_a_key_belongs_to_the_name() -> None:
    assert parse_address("folder:/data/a,b/c,size=8").name == "/data/a,b/c"
    assert parse_address("folder:C:/x").name == "C:/x"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("C:/x", "no kind of task 'C:'; there are hf:NAME, folder:PATH and python:MODULE:NAME$"),
        ("hff:x", "; did you mean 'hf:x'"),
        ("my.tasks:RING", "; did you mean 'python:my.tasks:RING'"),
        ("ring.py:RING", "; did you mean 'python:ring:RING'"),
        ("folder:", "lacks a name"),
        ("folder:x,lable=y", "did you mean 'label'"),
        ("folder:x,size=-3", "whole number of at least 1, got '-3'"),
        ("folder:x,samples=many", "whole number of at least 1, got 'many'"),
        ("folder:x,config=raw", "a folder has no configurations"),
    ],
)
def test_bad_address_is_named(task: str, message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        named_task(task)


@pytest.mark.parametrize("setting", ["image=title", "label=kind", "size=8"])
def test_a_setting_of_images_is_refused_for_text(tmp_path: Path, setting: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"title": "a", "body": "b", "kind": 1}\n' * 20)
    named_task(f"folder:{tmp_path},text=body")
    key = setting.partition("=")[0]
    with pytest.raises(
        TaskDataError, match=rf"read as text, of column 'body', where {key}= has no"
    ):
        named_task(f"folder:{tmp_path},text=body,{setting}")


# images


def test_folder_of_class_folders_is_split_without_overlap(
    tmp_path: Path, image_folder: ImageFolder
) -> None:
    root = image_folder(tmp_path / "[pets]", classes=("dog", "cat", "owl"), count=10)
    images = images_of(f"folder:{root}")
    assert images.classes == ("cat", "dog", "owl")
    parts = [flat(part) for part in (images.train, images.validation, images.test)]
    assert [len(part) for part in parts] == [24, 3, 3]
    assert len(set.union(*parts)) == 30
    assert images.notes == (
        "validation: 3 of 30 rows taken from train, as it has no split",
        "test: 3 of 30 rows taken from train, as it has no split",
    )
    assert images.train.images.dtype == torch.uint8
    assert len(torch.cat([images.validation.labels, images.test.labels]).unique()) == 3


def test_labels_belong_to_their_images(tmp_path: Path) -> None:
    for level, name in ((10, "dark"), (200, "light")):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("L", (8, 8), level + number).save(tmp_path / name / f"{number}.png")
    images = images_of(f"folder:{tmp_path}")
    for part in (images.train, images.validation, images.test):
        assert torch.equal(part.images[:, 0, 0, 0] > 100, part.labels == 1)


def test_folders_named_as_splits_are_splits(tmp_path: Path, image_folder: ImageFolder) -> None:
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        image_folder(tmp_path / split, count=count)
    images = images_of(f"folder:{tmp_path}")
    sizes = [len(part.labels) for part in (images.train, images.validation, images.test)]
    assert sizes == [12, 6, 4]
    assert images.notes == ()


def test_without_a_split_to_train_on_such_folders_are_classes(
    tmp_path: Path, image_folder: ImageFolder
) -> None:
    image_folder(tmp_path, classes=("test", "val"))
    assert images_of(f"folder:{tmp_path}").classes == ("test", "val")


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [((28, 20), "", 28), ((100, 80), "", 64), ((28, 20), ",size=12", 12)],
)
def test_images_become_squares_of_the_common_size(
    size: tuple[int, int],
    settings: str,
    expected: int,
    tmp_path: Path,
    image_folder: ImageFolder,
) -> None:
    image_folder(tmp_path, count=3, size=size, mode="RGBA")
    images = images_of(f"folder:{tmp_path}{settings}")
    assert images.train.images.shape[1:] == (3, expected, expected)


def test_pixels_are_not_changed_where_nothing_must_be(
    tmp_path: Path, image_folder: ImageFolder
) -> None:
    image_folder(tmp_path, count=2, size=(9, 9), mode="RGB")
    images = images_of(f"folder:{tmp_path}")
    on_disk = set()
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            pixels = torch.tensor(list(image.tobytes())).view(9, 9, 3).permute(2, 0, 1)
        on_disk.add(bytes(pixels.flatten().tolist()))
    assert flat(images.train) | flat(images.validation) | flat(images.test) == on_disk


@pytest.mark.parametrize("labels", [["b", "a"] * 15, [7, 3] * 15])
def test_parquet_with_images_and_plain_labels(
    labels: list[object], tmp_path: Path, image_folder: ImageFolder
) -> None:
    files = sorted(image_folder(tmp_path / "png", count=15).rglob("*.png"))
    kind = datasets.Value("string" if labels[0] == "b" else "int64")
    write_parquet(
        tmp_path / "table[1]" / "train.parquet",
        {"image": [{"bytes": path.read_bytes(), "path": None} for path in files], "label": labels},
        image=datasets.Image(),
        label=kind,
    )
    task = f"folder:{tmp_path / 'table[1]'}"
    images = images_of(task)
    assert images.classes == (("a", "b") if labels[0] == "b" else ("3", "7"))
    assert images.train.images.shape == (24, 1, 8, 8)
    setup = build(task)
    assert setup.model(setup.example).shape == (2, 2)


def test_several_labels_ask_for_a_choice_and_take_it(
    tmp_path: Path, image_folder: ImageFolder
) -> None:
    files = sorted(image_folder(tmp_path / "png", count=10).rglob("*.png"))
    write_parquet(
        tmp_path / "table" / "data.parquet",
        {"img": [str(path) for path in files], "fine": [*range(4)] * 5, "coarse": [0, 1] * 10},
        img=datasets.Image(),
        fine=datasets.ClassLabel(num_classes=4),
        coarse=datasets.ClassLabel(names=["a", "b"]),
    )
    task = f"folder:{tmp_path / 'table'}"
    with pytest.raises(TaskDataError, match=r"2 columns could be the label: fine, coarse") as told:
        named_task(task)
    assert "img (image), fine (4 classes), coarse (2 classes)" in str(told.value)
    assert "label=fine_label" in str(told.value)
    assert build(f"{task},label=coarse").model(torch.zeros(1, 1, 8, 8)).shape == (1, 2)
    with pytest.raises(TaskDataError, match="there is no column 'corse'"):
        named_task(f"{task},label=corse")
    with pytest.raises(TaskDataError, match="column 'img' cannot be the label"):
        named_task(f"{task},label=img")


def test_local_folder_works_as_a_name_of_the_library_too(
    tmp_path: Path, image_folder: ImageFolder
) -> None:
    image_folder(tmp_path)
    assert images_of(f"hf:{tmp_path}").classes == ("cat", "dog")


def test_what_does_not_fit_into_memory_is_left_out_and_told(
    tmp_path: Path, image_folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path, count=50)
    monkeypatch.setattr(image_data, "MAX_TRAIN_BYTES", 64 * 20)
    monkeypatch.setattr(image_data, "MAX_VALIDATION_IMAGES", 5)
    images = images_of(f"folder:{tmp_path}")
    assert (len(images.train.labels), len(images.validation.labels)) == (20, 5)
    assert "train: 20 of 80 images, drawn at random, always the same" in images.notes
    assert "validation: 5 of 10 images, drawn at random, always the same" in images.notes
    assert len(images_of(f"folder:{tmp_path},samples=7").train.labels) == 7


def test_batches_follow_the_random_seed_and_pass_over_every_image() -> None:
    count = 2 * image_data.BATCH_IMAGES
    split = Split(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count))
    first, same, other = (ImageBatches(split, random_seed=seed) for seed in (1, 1, 2))
    epoch, again = list(first), list(same)
    assert len(epoch) == len(first) == image_data.EPOCH_BATCHES
    assert all(torch.equal(x[1], y[1]) for x, y in zip(epoch, again, strict=True))
    assert not torch.equal(epoch[0][1], next(iter(other))[1])
    for one, two in zip(epoch[::2], epoch[1::2], strict=True):
        assert torch.cat([one[1], two[1]]).sort().values.tolist() == list(range(count))
    images, labels = epoch[0]
    torch.testing.assert_close(images.flatten() * 255, labels.float())


def test_same_seed_gives_the_same_host(tmp_path: Path, image_folder: ImageFolder) -> None:
    image_folder(tmp_path, size=(16, 16))
    state = torch.get_rng_state()
    first, second, other = (build(f"folder:{tmp_path}", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [list(setup.model.parameters()) for setup in (first, second, other)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))
    assert set(first.validation()) == {"loss", "accuracy"}
    assert first.model.get_submodule("stage3") is not None


# text


def test_text_files_are_read_as_bytes_and_split_by_whole_files(tmp_path: Path) -> None:
    contents = [bytes([65 + number]) * 200 + b"\r\n\xe9" for number in range(20)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    splits, notes = text_of(f"folder:{tmp_path}")
    for content in contents:
        assert [content in text for text in splits.values()].count(True) == 1
        letters = [content[:1] in text for text in splits.values()]
        assert letters.count(True) == 1
    assert len(splits["validation"]) == len(splits["test"]) == 2 * 203 + 1
    assert notes[0] == "validation: 2 of 20 rows taken from train, as it has no split"


def test_one_long_file_is_cut_in_three_without_a_loss(tmp_path: Path) -> None:
    text = bytes(range(256)) * 10
    (tmp_path / "book.txt").write_bytes(text)
    splits, notes = text_of(f"folder:{tmp_path}")
    assert splits["train"] + splits["validation"] + splits["test"] == text
    assert len(splits["validation"]) == len(splits["test"]) == 256
    assert "the last 256 bytes each" in notes[0]


@pytest.mark.parametrize(("given", "missing"), [("test", "validation"), ("val", "test")])
def test_one_long_file_to_train_on_is_cut_for_the_part_that_is_missing(
    given: str, missing: str, tmp_path: Path
) -> None:
    text, other = bytes(range(256)) * 10, b"o" * 300
    (tmp_path / "train.txt").write_bytes(text)
    (tmp_path / f"{given}.txt").write_bytes(other)
    splits, notes = text_of(f"folder:{tmp_path}")
    there = {"test": "test", "val": "validation"}[given]
    assert (splits["train"], splits[missing], splits[there]) == (text[:-256], text[-256:], other)
    assert notes == (
        f"{missing}: the last 256 bytes of the text to train on, as it has 1 rows or files only",
    )


def test_parquet_with_text_keeps_its_splits_and_line_order(tmp_path: Path) -> None:
    lines = {
        split: [f"{split} {number}: grün" + "." * 40 for number in range(30)]
        for split in ("train", "test")
    }
    for split, rows in lines.items():
        write_parquet(tmp_path / f"{split}-00000.parquet", {"content": rows, "stars": [1] * 30})
    splits, notes = text_of(f"folder:{tmp_path}", "content")
    assert splits["train"].decode() == "\n".join(lines["train"][:27])
    assert splits["validation"].decode() == "\n".join(lines["train"][27:])
    assert splits["test"].decode() == "\n".join(lines["test"])
    assert notes == ("validation: 3 of 30 rows taken from train, as it has no split",)
    metrics = build(f"folder:{tmp_path}").validation()
    assert 7.8 < metrics["bits_per_byte"] < 8.3


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_tables_work_alike(suffix: str, tmp_path: Path) -> None:
    rows = [f"line {number} of a table" for number in range(100)]
    lines = {
        "csv": ["text", *rows],
        "jsonl": [f'{{"text": "{row}"}}' for row in rows],
    }[suffix]
    (tmp_path / f"data.{suffix}").write_text("\n".join(lines), encoding="utf-8")
    assert text_of(f"folder:{tmp_path}")[0]["train"].decode() == "\n".join(rows[:80])


def test_text_beyond_the_limit_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.tasks.collection.text_data.MAX_BYTES", 2000)
    monkeypatch.setattr("esper.tasks.collection.text_data._CHUNK_ROWS", 10)
    rows = "\n".join(["text", *["a" * 99] * 100])
    (tmp_path / "data.csv").write_text(rows, encoding="utf-8")
    splits, notes = text_of(f"folder:{tmp_path}")
    assert len(splits["train"]) == 2000
    assert "train: the first 30 of 80 rows, 2,000 bytes, are kept in memory" in notes
    assert (
        "train: the first 15 of 80 rows, by samples=" in text_of(f"folder:{tmp_path},samples=15")[1]
    )


def test_other_files_beside_the_data_are_told(tmp_path: Path, image_folder: ImageFolder) -> None:
    image_folder(tmp_path)
    (tmp_path / "licence.txt").write_text("MIT", encoding="utf-8")
    assert "left aside: 1 txt files" in build(f"folder:{tmp_path}").notes


# problems


def _missing(_: Path) -> str:
    return "does not exist"


def _empty(root: Path) -> str:
    root.mkdir()
    (root / "movie.mp4").touch()
    return "holds no data: it needs images in one sub-folder per class"


def _file(root: Path) -> str:
    root.write_text("text", encoding="utf-8")
    return "is a file; name its folder"


def _unsorted_images(root: Path) -> str:
    root.mkdir()
    Image.new("L", (8, 8)).save(root / "1.png")
    return "1.png' is in no class; put images into a sub-folder per class"


def _stray(root: Path) -> str:
    for name in ("train", "test", "more"):
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text("text", encoding="utf-8")
    return r"1 files are in no split, as 'more/a.txt'; move each into train/"


def _broken_table(root: Path) -> str:
    root.mkdir()
    (root / "data.parquet").write_bytes(b"PAR1 but no more")
    return "the parquet files cannot be read: "


def _no_text(root: Path) -> str:
    root.mkdir()
    (root / "data.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    return r"no column can be the text; columns: a \(int64\), b \(int64\)"


def _several_texts(root: Path) -> str:
    root.mkdir()
    (root / "data.csv").write_text("a,b\nx,y\n", encoding="utf-8")
    return "2 columns could be the text: a, b; columns"


@pytest.mark.parametrize(
    "prepare",
    [_missing, _empty, _file, _unsorted_images, _stray, _broken_table, _no_text, _several_texts],
)
def test_data_that_cannot_be_opened_is_named(
    prepare: Callable[[Path], str], tmp_path: Path
) -> None:
    message = prepare(tmp_path / "data")
    with pytest.raises(TaskDataError, match=message):
        named_task(f"folder:{tmp_path / 'data'}")


def _broken_image(root: Path, image_folder: ImageFolder) -> str:
    (image_folder(root) / "cat" / "broken.png").write_bytes(b"no image")
    return "cannot be decoded: cannot identify image file .*broken.png"


def _deep_image(root: Path, image_folder: ImageFolder) -> str:
    Image.new("I;16", (8, 8), 40_000).save(image_folder(root) / "cat" / "deep.png")
    return r"more than 8 bits \(mode I;16\)"


def _few_images(root: Path, image_folder: ImageFolder) -> str:
    image_folder(root, count=1)
    return "2 rows are too few"


def _one_class(root: Path, image_folder: ImageFolder) -> str:
    image_folder(root, classes=("cat",))
    return "'label' has the same class in all 10 rows of split 'train', and it takes 2"


def _one_class_of_two(root: Path, image_folder: ImageFolder) -> str:
    image_folder(root / "train", classes=("cat",))
    image_folder(root / "test", classes=("cat", "dog"))
    return "'label' has the same class in all 10 rows of split 'train', and it takes 2"


def _short_text(root: Path, _: ImageFolder) -> str:
    root.mkdir()
    (root / "a.txt").write_text("short", encoding="utf-8")
    return "the train text has 5 bytes, and one window takes 129"


def _labels_that_are_no_classes(root: Path, image_folder: ImageFolder) -> str:
    files = sorted(image_folder(root / "png").rglob("*.png"))
    columns: dict[str, list[object]] = {"image": list(map(str, files)), "label": [*range(20)]}
    write_parquet(
        root / "table.parquet", columns, image=datasets.Image(), label=datasets.Value("int64")
    )
    for path in files:
        path.rename(root.parent / f"{path.parent.name}{path.name}")
    return "20 different values in 20 rows, which is no classification"


def _unknown_class_in_test(root: Path, image_folder: ImageFolder) -> str:
    files = sorted(image_folder(root.parent / "png").rglob("*.png"))
    kinds = {"image": datasets.Image(), "label": datasets.Value("string")}
    for split, label in (("train", "b"), ("test", "c")):
        columns: dict[str, list[object]] = {
            "image": [str(path) for path in files],
            "label": ["a", label] * 10,
        }
        write_parquet(root / f"{split}.parquet", columns, **kinds)
    return "a row of split 'test' has 'c' in 'label', which is none of the 2 classes"


@pytest.mark.parametrize(
    "prepare",
    [
        _broken_image,
        _deep_image,
        _few_images,
        _one_class,
        _one_class_of_two,
        _short_text,
        _labels_that_are_no_classes,
        _unknown_class_in_test,
    ],
)
def test_data_that_cannot_be_used_is_named(
    prepare: Callable[[Path, ImageFolder], str], tmp_path: Path, image_folder: ImageFolder
) -> None:
    message = prepare(tmp_path / "data", image_folder)
    with pytest.raises(TaskDataError, match=message):
        build(f"folder:{tmp_path / 'data'}")


def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'esper-lite\[data\]'"):
        named_task(f"folder:{tmp_path}")


def test_unreachable_hub_is_told_with_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object) -> None:
        first = OSError("Name or service not known")
        raise ConnectionError("Couldn't reach 'me/mine' on the Hub") from first

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(TaskDataError, match="me/mine") as told:
        named_task("hf:me/mine")
    assert "ConnectionError: Couldn't reach 'me/mine' on the Hub" in str(told.value)
    assert "OSError: Name or service not known" in str(told.value)
