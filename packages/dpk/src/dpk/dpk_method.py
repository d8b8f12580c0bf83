"""Dynamic prior knowledge: the student's features with a share of the teacher's, completed and compared with the
teacher's full ones (arXiv 2206.06067; what its abstract and the authors' notes leave open: decision 0016)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from dpk.gap import FeatureGap, Samples
from dpk.integrator import ConvIntegrator, Integrator, TransformerIntegrator, fit
from dpk.method import FeatureInfo, Method, Outputs
from dpk.prior import Strategy, prior_mask, ratio, scores_of

Norm = Literal["none", "layernorm", "batch"]
Ratio = Literal["dynamic"] | float | Sequence[float] | Callable[[int], float]


class DPK(Method):
    """Losses "feature.NAME" for every stage, "logit" if asked for, "ce".

    Args:
        pairs, stages, preactivation, ce_weight: see `Method`.
        dim: width of a token; none: the teacher's channels, at least 64 and at most 256.
        ratio: share of the teacher's tokens: "dynamic" (1 - CKA), a number, (first, last, epochs) for a straight line
            over epochs, or a function of the epoch.
        rho_min, rho_max: bounds of the dynamic ratio; at 1 the student would get no gradient from the stage.
        momentum: of a smoothed CKA; 0: the CKA of the step.
        per_image: a dynamic ratio for every image, from the CKA of its pixels.
        samples: what a sample of CKA is, see `FeatureGap`.
        mask: which tokens: "random", "block" (those around a random place), "highest-error".
        integrator: "transformer", or "conv" for large maps.
        heads: of attention; none: one for every 32 of `dim`.
        mlp_ratio, encoder_depth, decoder_depth: of the transformer.
        target_norm: "none"; "layernorm": over the channels of every pixel; "batch": by channel over the batch. The
            normalised map is what the student is given and what it is compared with.
        weight: of the feature losses, one for all or one for each stage.
        logit: a loss on the logits besides, "kd" or "dkd", with its `logit_weight` and `temperature`; `alpha` and
            `beta` are DKD's.
        warmup: epochs over which the weight of the feature losses grows.
    """

    def __init__(
        self,
        *,
        pairs: Any = "auto",
        stages: int | Literal["all"] = 2,
        preactivation: bool = True,
        ce_weight: float = 1.0,
        dim: int | None = None,
        ratio: Ratio = "dynamic",
        rho_min: float = 0.0,
        rho_max: float = 0.9,
        momentum: float = 0.0,
        per_image: bool = False,
        samples: Samples = "images",
        mask: Strategy = "random",
        integrator: Literal["transformer", "conv"] = "transformer",
        heads: int | None = None,
        mlp_ratio: float = 2.0,
        encoder_depth: int = 1,
        decoder_depth: int = 1,
        target_norm: Norm = "none",
        weight: float | Sequence[float] = 1.0,
        logit: Literal["kd", "dkd"] | None = None,
        logit_weight: float = 1.0,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup: int = 5,
    ) -> None:
        super().__init__(pairs=pairs, stages=stages, preactivation=preactivation, ce_weight=ce_weight, warmup=warmup)
        for name, value, allowed in (
            ("mask", mask, get_args(Strategy)),
            ("integrator", integrator, ("transformer", "conv")),
            ("target_norm", target_norm, get_args(Norm)),
            ("samples", samples, get_args(Samples)),
            ("logit", logit, (None, "kd", "dkd")),
        ):
            if value not in allowed:
                raise InputError(name, found=value, expected=" or ".join(map(str, allowed)))
        if not 0 <= rho_min <= rho_max <= 1:
            raise InputError("rho_min, rho_max", found=(rho_min, rho_max), expected="0 <= rho_min <= rho_max <= 1")
        if not 0 <= momentum < 1:
            raise InputError("momentum", found=momentum, expected="in [0, 1)")
        self.schedule = schedule_of(ratio)
        if self.schedule is not None and per_image:
            raise InputError("per_image", found="a ratio that is not dynamic", expected='ratio="dynamic"')
        self.share = None if self.schedule is None else share_of(self.schedule, 0)
        """the ratio of this epoch where it is not dynamic"""
        self.dim, self.heads, self.mlp_ratio = dim, heads, mlp_ratio
        self.encoder_depth, self.decoder_depth, self.integrator = encoder_depth, decoder_depth, integrator
        self.rho_min, self.rho_max, self.momentum, self.per_image = rho_min, rho_max, momentum, per_image
        self.samples: Samples = samples
        self.strategy: Strategy = mask
        self.target_norm: Norm = target_norm
        self.weight = weight
        self.logit, self.logit_weight, self.temperature, self.alpha, self.beta = (
            logit,
            logit_weight,
            temperature,
            alpha,
            beta,
        )
        self.needs_logits = logit is not None
        self.integrators = nn.ModuleList()
        self._info: dict[str, Tensor] = {}

    def make(
        self,
        student: Sequence[FeatureInfo],
        teacher: Sequence[FeatureInfo],
        classes: tuple[int, int],
        pooled: tuple[int, int] | None,
    ) -> None:
        weights = [self.weight] * len(student) if isinstance(self.weight, int | float) else list(self.weight)
        if len(weights) != len(student):
            raise InputError("weight", found=f"{len(weights)} numbers", expected=f"one or {len(student)}")
        self.weights = [weight * info.weight for weight, info in zip(weights, student, strict=True)]
        self.names = [info.name for info in student]
        self.gap = FeatureGap(self.names, self.samples, self.momentum)
        for ours, theirs in zip(student, teacher, strict=True):
            if self.integrator == "conv":
                self.integrators.append(ConvIntegrator(ours, theirs, patch=theirs.patch))
                continue
            dim = self.dim or min(256, max(64, -(-theirs.channels // 32) * 32))
            made = TransformerIntegrator(
                ours,
                theirs,
                dim=dim,
                heads=self.heads or max(1, dim // 32),
                mlp_ratio=self.mlp_ratio,
                encoder_depth=self.encoder_depth,
                decoder_depth=self.decoder_depth,
                patch=theirs.patch,
            )
            self.integrators.append(made)

    def epoch(self, number: int) -> None:
        super().epoch(number)
        if self.schedule is not None:
            self.share = share_of(self.schedule, number)

    def forward(
        self, student: Outputs, teacher: Outputs, targets: Int[Tensor, " batch"], *, generator: torch.Generator | None
    ) -> dict[str, Float[Tensor, ""]]:
        losses = self.cross_entropy(student, targets)
        losses |= self.feature_losses(student.features, teacher.features, generator=generator)
        if self.logit is not None:
            losses["logit"] = self.logit_weight * self.logit_loss(student.logits, teacher.logits, targets)
        return losses

    def feature_losses(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, generator: torch.Generator | None
    ) -> dict[str, Float[Tensor, ""]]:
        """The stages' weighted losses alone, for lists of maps [B, C, H, W] such as a detector's levels.

        Updates what `info` tells.
        """
        rhos, ckas = self.prior(student, teacher)
        losses = {}
        for index, name in enumerate(self.names):
            loss = self.stage_loss(index, student[index], teacher[index], rhos[index], generator)
            losses[f"feature.{name}"] = self.warm * self.weights[index] * loss
        self._info = {"rho": torch.stack([self._mean(rho, ckas) for rho in rhos]), "cka": ckas.float()}
        if self.samples != "images":
            self._info["tokenwise"] = ckas.new_full((), float(self.gap.tokenwise(len(student[0]))))
        return losses

    def prior(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> tuple[list[float | Tensor], Float[Tensor, " s"]]:
        """The ratio of every stage (a number, a scalar, or one for every image) and the CKA to log."""
        student, teacher = [x.detach() for x in student], [x.detach() for x in teacher]
        ckas = self.gap(student, teacher)
        if self.share is not None:
            return [self.share] * len(self.names), ckas
        if self.per_image:
            each = [self.gap.by_image(x, y) for x, y in zip(student, teacher, strict=True)]
            return [ratio(cka, self.rho_min, self.rho_max) for cka in each], torch.stack([x.mean() for x in each])
        return list(ratio(ckas, self.rho_min, self.rho_max).unbind()), ckas

    def stage_loss(
        self, index: int, student: Tensor, teacher: Tensor, rho: float | Tensor, generator: torch.Generator | None
    ) -> Float[Tensor, ""]:
        """Mean squared difference between the completed map and the teacher's, in float32."""
        integrator: Integrator = self.integrators[index]  # pyright: ignore[reportAssignmentType]
        size = (teacher.shape[-2], teacher.shape[-1])
        target = normalise(teacher.detach(), self.target_norm)
        embedded = integrator.embed(fit(student, size), target)
        scores = scores_of(
            self.strategy,
            len(student),
            integrator.grid(size),
            generator=generator,
            device=student.device,
            error=integrator.token_error(embedded) if self.strategy == "highest-error" else None,
        )
        generated = integrator(embedded, prior_mask(scores, rho), size)
        return functional.mse_loss(generated.float(), target.float())

    def logit_loss(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        from dpk.methods.logits import dkd_loss, kd_loss

        if self.logit == "kd":
            return kd_loss(student, teacher, self.temperature)
        return dkd_loss(student, teacher, targets, self.alpha, self.beta, self.temperature)

    @torch.no_grad()
    def feature_gap(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, " s"]:
        """The unweighted losses without any of the teacher's tokens: how well the student's features do alone."""
        pairs = enumerate(zip(student, teacher, strict=True))
        return torch.stack([self.stage_loss(index, ours, theirs, 0.0, None) for index, (ours, theirs) in pairs])

    def info(self) -> dict[str, Tensor]:
        """ "rho" and "cka" [S] of the last step; "tokenwise" 1 where pixels were the samples of CKA."""
        return self._info

    def check(self) -> None:
        if self.built:
            self.gap.check()

    @staticmethod
    def _mean(rho: float | Tensor, like: Tensor) -> Tensor:
        return rho.mean().float() if isinstance(rho, Tensor) else like.new_full((), rho, dtype=torch.float32)


def normalise(x: Float[Tensor, "b c h w"], norm: Norm) -> Float[Tensor, "b c h w"]:
    """A teacher's map with mean 0 and variance 1 over the channels of each pixel, or by channel over the batch."""
    if norm == "none":
        return x
    axes = 1 if norm == "layernorm" else (0, 2, 3)
    x = x.float()
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-6)


def schedule_of(given: Ratio) -> Callable[[int], float] | None:
    """The ratio as a function of the epoch; None for the dynamic one."""
    if isinstance(given, str):
        if given != "dynamic":
            raise InputError("ratio", found=given, expected='"dynamic", a number, (first, last, epochs), or a function')
        return None
    if callable(given):
        return given
    if isinstance(given, int | float):
        constant = float(given)
        return lambda number: constant
    if len(given) != 3 or given[2] < 1:
        raise InputError("ratio", found=given, expected="(first, last, epochs)")
    first, last, epochs = given
    return lambda number: first + (last - first) * min(1.0, number / max(1, epochs - 1))


def share_of(schedule: Callable[[int], float], number: int) -> float:
    """The ratio of an epoch, checked."""
    share = float(schedule(number))
    if not 0 <= share <= 1:
        raise InputError(f"ratio in epoch {number}", found=share, expected="in [0, 1]")
    return share
