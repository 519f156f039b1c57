"""Small data sets on disk, written by the tests, and a library kept from home and network."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

ImageFolder = Callable[..., Path]


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give `datasets` a cache of its own, and fail if anything asked for the network."""
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        yield
    assert asked == []


@pytest.fixture
def image_folder() -> ImageFolder:
    """Return a function that writes PNG files of noise into class folders."""

    def write(
        root: Path,
        *,
        classes: tuple[str, ...] = ("cat", "dog"),
        count: int = 10,
        size: tuple[int, int] = (8, 8),
        mode: str = "L",
    ) -> Path:
        generator = torch.Generator().manual_seed(len(str(root)))
        for name in classes:
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                data = torch.randint(0, 256, (size[0] * size[1] * 4,), generator=generator)
                channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
                pixels = bytes(data[: size[0] * size[1] * channels].tolist())
                Image.frombytes(mode, size, pixels).save(root / name / f"{number}.png")
        return root

    return write
