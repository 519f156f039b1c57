"""Growing a network on a data set of images or text."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esper.policies.growth_schedule import GrowthScheduleConfig
from esper.policies.heuristic import HeuristicConfig
from esper.slots.config import SlotConfig
from esper.slots.modes import forked_random_state
from esper.tasks.collection.address import Address, parse_address
from esper.tasks.collection.columns import ImageColumns, TextColumn, choose_columns
from esper.tasks.collection.data import HeldOutImages, ImageBatches, Split, load_images
from esper.tasks.collection.host import ImageHost
from esper.tasks.collection.source import open_source
from esper.tasks.collection.text_data import load_text
from esper.tasks.task import Task, TaskSetup
from esper.tasks.text.task import TEXT, text_setup
from esper.training.held_out import HeldOut


def collection_task(name: str) -> Task:
    """Return the task that an address names; whether images or text is read off the data.

    Raises:
        ModuleNotFoundError: The `datasets` library is not installed.
        TaskDataError: The address is wrong, or the data set cannot be opened or used.

    Effects: opens the data set, which downloads one from the hub the first time.
    """
    address = parse_address(name)
    features = open_source(address).splits["train"].features
    columns = choose_columns(features, address)
    if isinstance(columns, TextColumn):
        return replace(
            TEXT,
            name=name,
            summary=f"The host of the text task on column {columns.text!r}",
            build=partial(_build_text, address, columns),
        )
    return Task(
        name=name,
        summary=f"A small CNN that tells {columns.label!r} from {columns.image!r}",
        build=partial(_build_images, address, columns),
        metric="accuracy",
        epochs=40,
        learning_rate=5e-3,
        slot=SlotConfig(),
        heuristic=HeuristicConfig(
            blueprints=("conv_heavy",), warmup_epochs=3, plateau_fraction=1.0, max_living=2
        ),
        growth_schedule=GrowthScheduleConfig(blueprint="conv_heavy", factor=2),
    )


def _build_text(address: Address, column: TextColumn, random_seed: int) -> TaskSetup:
    splits, notes = load_text(address, column)
    return text_setup(splits, random_seed, notes=(*open_source(address).notes, *notes))


def _build_images(address: Address, columns: ImageColumns, random_seed: int) -> TaskSetup:
    images = load_images(address, columns)
    with forked_random_state(torch.device("cpu")):
        torch.manual_seed(random_seed)
        model = ImageHost(
            channels=images.channels, num_classes=len(images.classes), size=images.size
        )

    def held_out(split: Split) -> HeldOut:
        return HeldOut(
            model, HeldOutImages(split), loss=_sample_losses, metrics={"accuracy": _sample_hits}
        )

    return TaskSetup(
        model=model,
        targets=("stage*",),
        example=HeldOutImages(images.validation)[0][0][:2],
        batches=ImageBatches(images.train, random_seed=random_seed),
        loss=cross_entropy,
        validation=held_out(images.validation),
        test=held_out(images.test),
        notes=(*open_source(address).notes, *images.notes),
    )


def _sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def _sample_hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float()
