"""One batch norm for every pair of a layer's weight and activation bits (specification of the method, 2.2).

The sets lie in one tensor of each kind, a row a pair: a layer with 25 pairs has one module, and the parameters of
all pairs take part in every backward pass, as training in several processes wants.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from oneshot_mpq.features import Features


class BatchNormBank(nn.Module):
    """Takes the place of a batch norm; starts with its affine and statistics in every pair.

    Args:
        norm: BatchNorm1d or 2d, or timm's BatchNormAct2d, whose dropout and activation follow as before.
        weight_bits, act_bits: candidates of the layer in front.
    """

    weight: Float[nn.Parameter, "pairs channels"] | None
    bias: Float[nn.Parameter, "pairs channels"] | None
    running_mean: Float[Tensor, "pairs channels"] | None
    running_var: Float[Tensor, "pairs channels"] | None
    num_batches_tracked: Int[Tensor, " pairs"] | None

    def __init__(self, norm: nn.Module, weight_bits: Sequence[int], act_bits: Sequence[int]) -> None:
        super().__init__()
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        self.pairs = [(w, a) for w in weight_bits for a in act_bits]
        self._index = {pair: i for i, pair in enumerate(self.pairs)}
        self.selected = len(self.pairs) - 1
        """row in use"""
        self.channels, self.eps = norm.num_features, norm.eps
        self._plain = nn.BatchNorm1d if isinstance(norm, nn.BatchNorm1d) else nn.BatchNorm2d
        self.momentum: float | None = norm.momentum
        """of the running statistics; nothing: plain mean over the batches since `reset`"""
        count = len(self.pairs)

        def rows(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().expand(count, *value.shape).clone()

        for name in ("weight", "bias"):
            value = rows(getattr(norm, name))
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, rows(getattr(norm, name)))
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.tap: Features | None = None
        self.layer = ""
        """name of the layer in front"""
        self.train(norm.training)

    def select(self, weight_bits: int, act_bits: int) -> None:
        """The pair in use from now on."""
        self.selected = self._index[weight_bits, act_bits]

    def reset(self) -> None:
        """Forgets the running statistics of the selected pair."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean[self.selected].zero_()
            self.running_var[self.selected].fill_(1)
            self.num_batches_tracked[self.selected] = 0

    def forward(self, x: Float[Tensor, "n channels *space"]) -> Float[Tensor, "n channels *space"]:
        i = self.selected
        mean = None if self.running_mean is None else self.running_mean[i]
        variance = None if self.running_var is None else self.running_var[i]
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked[i] += 1
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked[i])
        y = functional.batch_norm(
            x,
            mean,
            variance,
            None if self.weight is None else self.weight[i],
            None if self.bias is None else self.bias[i],
            self.training or mean is None,
            momentum,
            self.eps,
        )
        y = self.act(self.drop(y))
        if self.tap is not None:
            self.tap.take(self.layer, y)
        return y

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """The selected pair as an ordinary batch norm (followed by dropout and activation where it had them)."""
        i = self.selected
        norm = self._plain(
            self.channels,
            self.eps,
            self.momentum,
            affine=self.weight is not None,
            track_running_stats=self.running_mean is not None,
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            value = getattr(self, name)
            if value is not None:
                target = getattr(norm, name)
                if isinstance(target, nn.Parameter):
                    target.data = value[i].detach().clone()
                else:
                    setattr(norm, name, value[i].clone())
        after = [m for m in (self.drop, self.act) if not isinstance(m, nn.Identity)]
        norm.train(self.training)
        return nn.Sequential(norm, *after) if after else norm

    def extra_repr(self) -> str:
        return f"{self.channels}, pairs={len(self.pairs)}"
