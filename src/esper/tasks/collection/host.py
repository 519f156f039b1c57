"""A convolutional network for images of any size and number of classes.

Legend: B batch, C channels, H height, W width.
"""

from torch import Tensor, nn

_WIDTHS = (16, 32, 64)
_MIN_THREE_STAGES_PIXELS = 16


class ImageHost(nn.Module):
    """Stages of convolution, BatchNorm and pooling, the mean over the image, a linear classifier.

    Args:
        channels: 1 for grey, 3 for colour.
        num_classes: Logits.
        size: Pixels of a side. Three stages from 16 on, two below: each halves the side.
    """

    def __init__(self, *, channels: int, num_classes: int, size: int) -> None:
        super().__init__()
        widths = _WIDTHS if size >= _MIN_THREE_STAGES_PIXELS else _WIDTHS[:2]
        self.stages = [f"stage{number}" for number in range(1, len(widths) + 1)]
        for name, inputs, outputs in zip(self.stages, (channels, *widths), widths, strict=False):
            self.add_module(name, _stage(inputs, outputs))
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits for images of shape `B C H W`."""
        features = images
        for name in self.stages:
            features = self.get_submodule(name)(features)
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
