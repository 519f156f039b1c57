"""A convolutional network small enough to want more capacity.

Legend: B batch, C channels, H height, W width.
"""

from torch import Tensor, nn


class DigitsHost(nn.Module):
    """Two stages of convolution and pooling, then a linear classifier.

    Args:
        widths: Channels of the two stages.
    """

    def __init__(self, widths: tuple[int, int] = (4, 8)) -> None:
        super().__init__()
        self.stage1 = _stage(1, widths[0])
        self.stage2 = _stage(widths[0], widths[1])
        self.classifier = nn.Linear(widths[1] * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits, shape `B 10`, for images of shape `B 1 8 8`."""
        features: Tensor = self.stage2(self.stage1(images))
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
