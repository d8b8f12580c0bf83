"""Two published small networks for MNIST, read from their weight files: a UNet and a class-conditional DiT.

Their architecture follows from the tensors of the files; both predict noise on the schedule of 1000 linear betas from
1e-4 to 0.02. Every matrix product is in a layer or an attention of a kind that the precision solver knows: a 2x2
transposed convolution of stride 2 is written as the 1x1 convolution and pixel shuffle that it equals.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from papercore.weights import load_exactly, read_tensors
from torch import Tensor, nn

SIDE = 28


class Block(nn.Module):
    """Layer norm over everything, two convolutions, and the input added."""

    def __init__(self, before: int, width: int, side: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm([before, side, side])
        self.conv1, self.conv2 = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.residual_conv = nn.Conv2d(before, width, 1) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(self.ln(x))))
        return torch.relu(y + (x if self.residual_conv is None else self.residual_conv(x)))


class MnistUNet(nn.Module):
    """Noise of pictures whose clean values are in [0, 1].

    Args:
        channels: of the three levels and the middle.
    """

    low = 0.0
    """smallest value of a clean picture; the largest is 1"""
    input_shape = (1, SIDE, SIDE)

    def __init__(self, channels: tuple[int, ...] = (10, 20, 40, 80)) -> None:
        super().__init__()
        *levels, middle = channels
        self.embedding = nn.Embedding(1000, 128)
        self.time_in, self.encoders, self.downs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.ups, self.time_out, self.decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before, side = 1, SIDE
        sides = []
        for width in levels:
            self.time_in.append(nn.Sequential(nn.Linear(128, before), nn.ReLU(), nn.Linear(before, before)))
            self.encoders.append(nn.Sequential(Block(before, width, side), Block(width, width, side)))
            self.downs.append(nn.Conv2d(width, width, 2, 2))
            sides.append(side)
            before, side = width, side // 2
        self.time_middle = nn.Linear(128, before)
        self.middle = nn.Sequential(Block(before, middle, side), Block(middle, middle, side))
        before = middle
        for width, side in zip(reversed(levels), reversed(sides), strict=True):
            self.ups.append(nn.Conv2d(before, 4 * width, 1))
            self.time_out.append(nn.Linear(128, 2 * width))
            self.decoders.append(nn.Sequential(Block(2 * width, width, side), Block(width, width, side)))
            before = width
        self.conv_out = nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, x: Float[Tensor, "n 1 28 28"], t: Int[Tensor, " n"]) -> Float[Tensor, "n 1 28 28"]:
        time = self.embedding(t)
        skips = []
        for bias, blocks, down in zip(self.time_in, self.encoders, self.downs, strict=True):
            x = blocks(x + bias(time)[:, :, None, None])
            skips.append(x)
            x = down(x)
        x = self.middle(x + self.time_middle(time)[:, :, None, None])
        for up, bias, blocks in zip(self.ups, self.time_out, self.decoders, strict=True):
            skip, x = skips.pop(), F.pixel_shuffle(up(x), 2)
            x = F.pad(x, (0, skip.shape[-1] - x.shape[-1], 0, skip.shape[-2] - x.shape[-2]))
            x = blocks(torch.cat([skip, x], 1) + bias(time)[:, :, None, None])
        return self.conv_out(x)

    @staticmethod
    def names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file under this module's names."""
        made = {}
        for name, value in tensors.items():
            for old, new in (("pe.embedding", "embedding"), ("pe_linears_en", "time_in"), ("pe_linears_de", "time_out"),
                             ("pe_mid", "time_middle"), ("mid.", "middle.")):  # fmt: skip
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            if name.startswith("ups.") and value.ndim == 4:
                value = value.permute(1, 2, 3, 0).reshape(-1, len(value), 1, 1)
            elif name.startswith("ups."):
                value = value.repeat_interleave(4)
            made[name] = value
        return made


class DiTBlock(nn.Module):
    """Attention and two linear layers, each scaled, shifted and gated by the condition."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gamma1, self.beta1, self.alpha1 = (nn.Linear(width, width) for _ in range(3))
        self.gamma2, self.beta2, self.alpha2 = (nn.Linear(width, width) for _ in range(3))
        self.attention = Attention(width, heads=heads, dim_head=width, bias=True, out_bias=True)
        self.attention.scale = tokens**-0.5  # as these weights were trained
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        c = condition[:, None]
        h = h + self.alpha1(c) * self.attention(self.ln1(h) * (1 + self.gamma1(c)) + self.beta1(c))
        return h + self.alpha2(c) * self.ff(self.ln2(h) * (1 + self.gamma2(c)) + self.beta2(c))


class MnistDiT(nn.Module):
    """Noise of pictures in [-1, 1], for a digit."""

    low = -1.0
    classes = 10
    input_shape = (1, SIDE, SIDE)

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patch, self.tokens = patch, (SIDE // patch) ** 2
        self.conv = nn.Conv2d(1, patch**2, patch, patch)
        self.patch_emb = nn.Linear(patch**2, width)
        self.patch_pos_emb = nn.Parameter(torch.zeros(1, self.tokens, width))
        self.frequencies = nn.Parameter(torch.zeros(width // 2), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.label_emb = nn.Embedding(self.classes, width)
        self.dits = nn.ModuleList(DiTBlock(width, heads, self.tokens) for _ in range(depth))
        self.ln, self.linear = nn.LayerNorm(width), nn.Linear(width, patch**2)

    def forward(
        self, x: Float[Tensor, "n 1 28 28"], t: Int[Tensor, " n"], class_labels: Int[Tensor, " n"]
    ) -> Float[Tensor, "n 1 28 28"]:
        angles = t[:, None] * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label_emb(class_labels)
        h = self.patch_emb(self.conv(x).flatten(2).transpose(1, 2)) + self.patch_pos_emb
        for block in self.dits:
            h = block(h, condition)
        side, p = SIDE // self.patch, self.patch
        pixels = self.linear(self.ln(h)).unflatten(1, (side, side)).unflatten(-1, (p, p))
        return pixels.transpose(2, 3).reshape(len(x), 1, SIDE, SIDE)

    @staticmethod
    def names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file under this module's names."""
        made = {}
        for name, value in tensors.items():
            parts = name.split(".")
            if parts[0] == "dits" and parts[2] in ("wq", "wk", "wv", "lv"):
                to = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "lv": "to_out.0"}[parts[2]]
                name = f"dits.{parts[1]}.attention.{to}.{parts[3]}"
            elif parts[0] == "time_emb":
                name = "frequencies" if parts[1] == "0" else f"time.{int(parts[1]) - 1}.{parts[2]}"
            made[name] = value
        return made


def load_mnist(path: Path) -> MnistUNet | MnistDiT | None:
    """The network of a weight file in evaluation mode, or None when the file holds another network.

    Raises:
        InputError: the file is damaged, or its tensors do not fit.
    """
    tensors = read_tensors(Path(path))
    model: MnistUNet | MnistDiT
    if "pe.embedding.weight" in tensors and "conv_out.weight" in tensors:
        levels = [len(tensors[f"downs.{i}.bias"]) for i in range(sum(n.endswith(".bias") and n.startswith("downs.")
                                                                   for n in tensors))]  # fmt: skip
        middle = tensors.get("mid.0.conv1.bias", torch.empty(0))
        model = MnistUNet((*levels, len(middle)))
    elif "patch_pos_emb" in tensors and "label_emb.weight" in tensors:
        width = tensors["patch_pos_emb"].shape[-1]
        model = MnistDiT(
            width,
            depth=len({name.split(".")[1] for name in tensors if name.startswith("dits.")}),
            heads=tensors["dits.0.wq.bias"].numel() // width,
            patch=tensors["conv.weight"].shape[-1],
        )
    else:
        return None
    load_exactly(model, model.names(tensors), Path(path))
    return model.eval()
