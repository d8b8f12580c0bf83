"""Centred kernel alignment with linear kernels, unbiased and pooled over minibatches.

HSIC1 is the unbiased estimator of Song et al. 2012 (JMLR 13, section 3); pooling over minibatches follows Nguyen,
Raghu, Kornblith (ICLR 2021, section 3.1). Each feature matrix meets its Gram matrix once; the products of features
are in their own precision (float32 at least), everything of size n x n in float64. Nothing waits for the device, and
no gradient flows.

(The module is not called `cka`: it would hide the function in the package.)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn

LEAST = 4
"""samples that HSIC1 needs"""


def cka(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], unbiased: bool = True) -> Float[Tensor, ""]:
    """CKA of two feature matrices of one minibatch, as a float64 scalar; what follows the first axis is flattened.

    Args:
        unbiased: HSIC1, otherwise HSIC0 (with few samples and many features close to 1 even for unrelated features).

    Returns:
        At most 1 with HSIC0; HSIC1 may leave [-1, 1]. 0 where it is undefined: a constant matrix, or n <= 3 with HSIC1.

    Raises:
        InputError: the two have different numbers of samples, or none.
    """
    return ratio_of_sums(hsics(x, y, unbiased))


class MinibatchCKA(nn.Module):
    """CKA over minibatches: the mean HSIC of the pairs over the root of the mean HSICs of each with itself.

    Minibatches too small for HSIC1 (n <= 3) are left out. The sums are buffers.
    """

    sums: Tensor
    count: Tensor

    def __init__(self, unbiased: bool = True) -> None:
        super().__init__()
        self.unbiased = unbiased
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> None:
        """Takes up one minibatch."""
        if self.unbiased and len(x) < LEAST:
            return
        self.sums += hsics(x, y, self.unbiased).to(self.sums.device)
        self.count += 1

    def compute(self) -> Float[Tensor, ""]:
        """The estimate so far; 0 where it is undefined. The number of minibatches cancels."""
        return ratio_of_sums(self.sums)

    def reset(self) -> None:
        """Forgets all minibatches."""
        self.sums.zero_()
        self.count.zero_()

    def reduce(self) -> None:
        """Adds up the sums of all processes of the default group, on all of them."""
        torch.distributed.all_reduce(self.sums)
        torch.distributed.all_reduce(self.count)


@torch.no_grad()
def hsics(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], unbiased: bool = True) -> Float[Tensor, " 3"]:
    """HSIC(x, y), HSIC(x, x), HSIC(y, y) in float64; zeros where n is too small.

    Raises:
        InputError: see `cka`.
    """
    if len(x) != len(y) or not len(x):
        raise InputError("samples", found=f"{len(x)} and {len(y)}", expected="equal numbers, at least one")
    return stacked_hsics(torch.stack([gram(x), gram(y)])[None], unbiased)[0]


@torch.no_grad()
def gram(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    """The linear kernel of the centred features, in float64; what follows the first axis is flattened."""
    flat = x.reshape(len(x), -1)
    return gram_in_blocks(flat) if x.device.type == "cpu" else grams(flat[None])[0]


BLOCK = (64, 4096)
"""samples and features of a block: what is centred stays in a processor's cache until it has been multiplied"""


@torch.no_grad()
def gram_in_blocks(x: Float[Tensor, "n p"]) -> Float[Tensor, "n n"]:
    """The same on a CPU, without a centred copy of all features, and only one half of the symmetric product."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    n, (rows, columns) = len(x), BLOCK
    total = x.new_zeros(n, n)
    with torch.autocast("cpu", enabled=False):
        for part in x.split(columns, 1):
            part = part - part[:1]  # as in `grams`
            part -= part.mean(0)
            for begin in range(0, n, rows):
                end = min(begin + rows, n)
                total[begin:end, :end].addmm_(part[begin:end], part[:end].T)
    return (total.tril() + total.tril(-1).T).double()


@torch.no_grad()
def grams(x: Float[Tensor, "s n p"]) -> Float[Tensor, "s n n"]:
    """The same for a stack of matrices.

    HSIC does not depend on the centre; without it float32 loses the differences between samples. The first sample is
    subtracted before the mean, so that a constant matrix gives exactly 0.
    """
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    x = x - x[:, :1]
    x = x - x.mean(1, keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        return (x @ x.mT).double()


@torch.no_grad()
def stacked_hsics(pairs: Float[Tensor, "s 2 n n"], unbiased: bool = True) -> Float[Tensor, "s 3"]:
    """HSIC(x, y), HSIC(x, x), HSIC(y, y) for every pair of Gram matrices at once."""
    n = pairs.shape[-1]
    if n < (LEAST if unbiased else 2):
        return pairs.new_zeros(len(pairs), 3)
    if unbiased:
        pairs = pairs - torch.diag_embed(torch.diagonal(pairs, dim1=-2, dim2=-1))
    else:  # the features are centred, but only up to rounding
        pairs = pairs - pairs.mean(-1, keepdim=True)
        pairs = pairs - pairs.mean(-2, keepdim=True)
    flat = pairs.flatten(-2)
    inner = flat @ flat.mT  # tr(K L): the matrices are symmetric
    if unbiased:
        rows = pairs.sum(-1)
        totals = rows.sum(-1)
        inner = inner + totals[:, :, None] * totals[:, None, :] / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.mT)
        inner = inner / (n * (n - 3))
    else:
        inner = inner / (n - 1) ** 2
    return torch.stack([inner[:, 0, 1], inner[:, 0, 0], inner[:, 1, 1]], 1)


def ratio_of_sums(sums: Float[Tensor, "*s 3"]) -> Float[Tensor, "*s"]:
    """CKA from (sums of) the three HSICs; 0 where one of the last two is not above 0, NaN where one is NaN."""
    cross, x, y = sums.unbind(-1)
    undefined = (x <= 0) | (y <= 0)
    scale = torch.where(undefined, 1, x).sqrt() * torch.where(undefined, 1, y).sqrt()
    return torch.where(undefined, 0, cross / scale)


def token_samples(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b d h2 w2"], side: int = 16, most: int = 256
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n d"]]:
    """Every pixel a sample, for batches too small for images as samples (detection).

    Both maps are averaged down to one grid of at most `side` x `side`; evenly spaced pixels are taken if these are
    more than `most`.
    """
    grid = (min(side, x.shape[-2], y.shape[-2]), min(side, x.shape[-1], y.shape[-1]))
    samples: Sequence[Tensor] = [
        nn.functional.adaptive_avg_pool2d(of.float(), grid).permute(0, 2, 3, 1).flatten(0, 2) for of in (x, y)
    ]
    total = len(samples[0])
    if total > most:
        chosen = torch.arange(most, device=x.device) * total // most
        samples = [of[chosen] for of in samples]
    return samples[0], samples[1]
