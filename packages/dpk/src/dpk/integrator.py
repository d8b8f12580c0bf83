"""The networks that complete a student's feature map with part of the teacher's (decision 0016 for the sizes)."""

import itertools
import warnings

import torch
from jaxtyping import Bool, Float
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from dpk.method import FeatureInfo
from dpk.prior import pixel_mask

TokenPair = tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]


def choose_patch(height: int, width: int) -> int:
    """The smallest power of two with at most 64 tokens for maps of 8 to 16 pixels, 196 otherwise.

    14 counts among the others: it is a stage of 224-pixel networks and stays whole.
    """
    side = max(height, width)
    limit = 64 if 8 <= side <= 16 and side != 14 else 196
    return next(p for p in (2**k for k in itertools.count()) if -(-height // p) * -(-width // p) <= limit)


def fit(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """A map on another grid: averaged where it is larger, bilinear where it is smaller."""
    if x.shape[-2:] == size:
        return x
    smaller = (min(x.shape[-2], size[0]), min(x.shape[-1], size[1]))
    if smaller != x.shape[-2:]:
        x = functional.adaptive_avg_pool2d(x, smaller)
    return x if smaller == size else functional.interpolate(x, size, mode="bilinear", align_corners=False)


def stitch(tokens: TokenPair, mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The teacher's tokens where the mask is true, the student's elsewhere; tokens are (student's, teacher's)."""
    return torch.where(mask[:, :, None], tokens[1], tokens[0])


def unpatchify(
    patches: Float[Tensor, "b n cpp"], grid: tuple[int, int], patch: int, size: tuple[int, int] | None = None
) -> Float[Tensor, "b c h w"]:
    """Patches in row-major order, each as (channel, row, column), as a map, cut to `size`."""
    maps = patches.mT.unflatten(2, grid)
    maps = functional.pixel_shuffle(maps, patch) if patch > 1 else maps
    return maps if size is None else maps[..., : size[0], : size[1]]


class Integrator(nn.Module):
    """What both share: the grid of tokens, which follows the map's present size.

    Args:
        student, teacher: the taps; the student's map is brought to the teacher's grid before it is used.
        patch: side of a token in teacher pixels; none: `choose_patch`.
    """

    def __init__(self, student: FeatureInfo, teacher: FeatureInfo, patch: int | None) -> None:
        super().__init__()
        self.patch = patch or choose_patch(teacher.height, teacher.width)
        if self.patch < 1 or self.patch > max(teacher.height, teacher.width):
            raise InputError(
                f"patch of {teacher.name}",
                found=self.patch,
                expected=f"1 to {max(teacher.height, teacher.width)}, the side of the teacher's map",
            )
        if teacher.height % self.patch or teacher.width % self.patch:
            warnings.warn(
                f"{teacher.name}: {teacher.height} x {teacher.width} is no multiple of the patch {self.patch}: the "
                "map is padded, the loss is on its own pixels",
                stacklevel=2,
            )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of a teacher map of this size."""
        return -(-size[0] // self.patch), -(-size[1] // self.patch)

    def embed(self, student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b d h w"]) -> tuple[Tensor, Tensor]:
        """Both maps, of equal size, in a common space."""
        raise NotImplementedError

    def token_error(self, embedded: tuple[Tensor, Tensor]) -> Float[Tensor, "b n"]:
        """Mean squared difference of the embedded maps by token, without gradient."""
        raise NotImplementedError

    def forward(
        self, embedded: tuple[Tensor, Tensor], mask: Bool[Tensor, "b n"], size: tuple[int, int]
    ) -> Float[Tensor, "b d h w"]:
        """The generated teacher map of `size`, from the student's with the teacher's tokens where the mask is true."""
        raise NotImplementedError


class TransformerIntegrator(Integrator):
    """Patch embeddings with fixed positions, an encoder for each stream, stitching, a joint decoder, LN and a linear
    layer to patches of the teacher's map.

    Args:
        dim: of a token, a multiple of 4 and of `heads`.
        encoder_depth, decoder_depth: blocks, 0 to 4.
    """

    def __init__(
        self,
        student: FeatureInfo,
        teacher: FeatureInfo,
        *,
        dim: int,
        heads: int,
        mlp_ratio: float = 2.0,
        encoder_depth: int = 1,
        decoder_depth: int = 1,
        patch: int | None = None,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__(student, teacher, patch)
        if dim < 4 or dim % 4 or dim % heads:
            raise InputError("dim", found=dim, expected=f"a multiple of 4 and of the {heads} heads")
        for name, depth in (("encoder_depth", encoder_depth), ("decoder_depth", decoder_depth)):
            if not 0 <= depth <= 4:
                raise InputError(name, found=depth, expected="0 to 4")

        def blocks(depth: int) -> nn.Sequential:
            return nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)))

        p = self.patch
        self.student_embed = nn.Conv2d(student.channels, dim, p, p)
        self.teacher_embed = nn.Conv2d(teacher.channels, dim, p, p)
        self.student_encoder, self.teacher_encoder = blocks(encoder_depth), blocks(encoder_depth)
        self.decoder = blocks(decoder_depth)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, teacher.channels * p * p)
        self.dim = dim
        self.register_buffer("positions", torch.empty(0), persistent=False)
        self._place(self.grid((teacher.height, teacher.width)))

    def _place(self, grid: tuple[int, int]) -> None:
        """The table of positions for a grid; the last one is kept."""
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

        table = build_sincos2d_pos_embed(list(grid), dim=self.dim, device=self.output.weight.device)
        self.positions, self.placed = table.to(self.output.weight.dtype)[None], grid

    def embed(self, student: Tensor, teacher: Tensor) -> TokenPair:
        grid = self.grid((teacher.shape[-2], teacher.shape[-1]))
        if grid != self.placed:
            self._place(grid)
        short = [g * self.patch - side for g, side in zip(grid, teacher.shape[-2:], strict=True)]
        if any(short):
            student, teacher = (functional.pad(x, (0, short[1], 0, short[0])) for x in (student, teacher))
        tokens = (
            embed(x).flatten(2).mT + self.positions
            for embed, x in ((self.student_embed, student), (self.teacher_embed, teacher))
        )
        first, second = tokens
        return first, second

    @torch.no_grad()
    def token_error(self, embedded: TokenPair) -> Tensor:
        return (embedded[0] - embedded[1]).float().square().mean(2)

    def forward(self, embedded: TokenPair, mask: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = self.student_encoder(embedded[0]), self.teacher_encoder(embedded[1])
        completed = self.decoder(stitch(tokens, mask))
        return unpatchify(self.output(self.norm(completed)), self.grid(size), self.patch, size)


class ConvIntegrator(Integrator):
    """The light one, for the large maps of detectors: 1x1 convolutions with batch norm to the teacher's channels, the
    token mask on pixels, two 3x3 convolutions with a ReLU between them."""

    def __init__(self, student: FeatureInfo, teacher: FeatureInfo, *, patch: int | None = None) -> None:
        super().__init__(student, teacher, patch)
        channels = teacher.channels

        def embed(before: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels))

        self.student_embed, self.teacher_embed = embed(student.channels), embed(channels)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def embed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.student_embed(student), self.teacher_embed(teacher)

    @torch.no_grad()
    def token_error(self, embedded: tuple[Tensor, Tensor]) -> Tensor:
        error = (embedded[0] - embedded[1]).float().square().mean(1, keepdim=True)
        return functional.avg_pool2d(error, self.patch, ceil_mode=True, count_include_pad=False).flatten(1)

    def forward(self, embedded: tuple[Tensor, Tensor], mask: Tensor, size: tuple[int, int]) -> Tensor:
        student, teacher = embedded
        return self.decoder(torch.where(pixel_mask(mask, self.grid(size), size, self.patch), teacher, student))
