"""VGG with batch norm for CIFAR (Simonyan & Zisserman, arXiv 1409.1556): five stages, the last two at 4 x 4 pixels."""

from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn

STAGES = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """3 x 3 convolutions with bias, batch norm, ReLU; three poolings; one linear layer.

    Raises:
        InputError: a depth without a configuration.
    """

    def __init__(self, depth: int, classes: int = 100) -> None:
        super().__init__()
        if depth not in STAGES:
            raise InputError("depth", found=depth, expected=", ".join(map(str, STAGES)))
        before = 3
        for stage, (count, width) in enumerate(zip(STAGES[depth], WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            setattr(self, f"block{stage}", nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        for stage in range(5):
            x = getattr(self, f"block{stage}")(x)
            if stage < 3:
                x = self.pool(x)
        return self.classifier(x.mean((2, 3)))
