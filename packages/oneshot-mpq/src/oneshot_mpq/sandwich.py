"""One training step of the supernet: the largest path, then random ones (specification of the method, 2.3)."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from papercore import training
from papercore.errors import InputError, WorkError
from torch import Tensor, nn
from torch.nn import functional

from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.losses import dampening, distillation, distortion, region_decay, wide
from oneshot_mpq.optimizer import SandwichOptimizer
from oneshot_mpq.paths import Path, aligned, largest_path, sample_paths
from oneshot_mpq.schedule import Dampening, FreezeScheduler
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.watch import Watch

if TYPE_CHECKING:
    from oneshot_mpq.fit import TrainConfig


class Sandwich(training.Method):
    """The method as the training loop takes it.

    Args:
        net: calibrated.
        steps_per_epoch: optimiser steps.
        teacher: a network whose logits the largest path is drawn to as well.
        watch: called after every optimiser step with its number; what it returns goes into the log.
    """

    def __init__(
        self,
        net: Supernet,
        config: "TrainConfig",
        steps_per_epoch: int,
        teacher: nn.Module | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.net, self.config, self.steps_per_epoch = net, config, steps_per_epoch
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.watch = watch
        self.passes = 1 + config.paths
        self.scheduler = FreezeScheduler(config.epochs)
        self.damping = Dampening(config.epochs, steps_per_epoch, config.dampening, config.dampening_start)
        self.number = 0
        self.paths: list[Path] = []
        self.dampening_weight = 0.0
        self.terms: list[dict[str, Tensor]] = []
        """the parts of the loss of every pass since the step began"""
        self._optimizer: SandwichOptimizer | None = None

    def optimizer(self, model: nn.Module, config: training.TrainConfig) -> SandwichOptimizer:
        self._optimizer = SandwichOptimizer(
            self.net,
            config.learning_rate,
            self.config.step_learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        return self._optimizer

    def begin_step(self, model: nn.Module, step: int) -> None:
        self.number, self.terms = step, []
        epoch, within = divmod(step, self.steps_per_epoch)
        if self.config.scheduler and within == 0 and self.scheduler.due(epoch):
            self.scheduler.update(self.net, epoch)
        # a generator of its own from seed and step: equal in all processes, whatever else draws random numbers
        generator = torch.Generator().manual_seed(training.mix(self.config.seed, "paths", step))
        self.paths = sample_paths(self.net, self.config.paths, generator)
        self.dampening_weight = self.damping.weight(step) if self.damping.active(step) else 0.0
        if self._optimizer is not None:
            whole = self.config.epochs * self.steps_per_epoch
            for group in self._optimizer.param_groups:
                if group["rule"] == "adam rows":  # a cosine to zero of its own, without warm-up
                    group["lr"] = self.config.step_learning_rate * (1 + math.cos(math.pi * step / whole)) / 2

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        x, y = batch
        net, features = self.net, self.net.features
        path = largest_path(net)
        net.select(*path)
        compared = [aligned(net, p) if self.config.idm else frozenset[str]() for p in self.paths]
        features.want(frozenset().union(*compared))  # only outputs that some path is compared with are kept
        logits = model(x)
        targets = {name: value.detach() for name, value in features.collect().items()}
        self._check(x, y, logits)
        terms = {"ce": self._cross_entropy(logits, y)}
        total = terms["ce"]
        if self.teacher is not None:
            with torch.no_grad():
                expected = self.teacher(x)
            terms["kl"] = distillation(expected, logits)
            total = (terms["ce"] + terms["kl"]) / 2
        yield self._note(terms, total + self._region(terms), "the largest path", x)
        guide = logits.detach()
        del logits
        for number, (path, names) in enumerate(zip(self.paths, compared, strict=True), start=1):
            net.select(*path)
            features.want(names)
            logits = model(x)
            terms = {"ce": self._cross_entropy(logits, y), "kl": distillation(guide, logits)}
            total = (terms["ce"] + terms["kl"]) / 2
            if names:
                terms["idm"] = distortion(features.collect(), targets)
                total = total + self.config.idm * terms["idm"]
            if self.dampening_weight:
                terms["dampening"] = dampening(net.layers.values())
                total = total + self.dampening_weight * terms["dampening"]
            yield self._note(terms, total + self._region(terms), f"random path {number}", x)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(wide(logits), labels, label_smoothing=self.config.label_smoothing)

    def _region(self, terms: dict[str, Tensor]) -> Tensor | float:
        region = region_decay(self.net.layers.values(), self.config.weight_decay, self.config.region_decay)
        if region is None:
            return 0.0
        terms["region"] = region
        return region

    def _note(self, terms: dict[str, Tensor], total: Tensor, where: str, x: Tensor) -> Tensor:
        self.terms.append({**{name: value.detach() for name, value in terms.items()}, "total": total.detach()})
        if not math.isfinite(float(total.detach())):
            raise WorkError(f"the loss of {where} is {float(total.detach())} at step {self.number}: {self._culprit(x)}")
        return total

    def _check(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        """Raises what is wrong with a batch; one wait for the device."""
        classes = logits.shape[-1]
        fine = torch.isfinite(x).all() & (y >= 0).all() & (y < classes).all()
        if bool(fine):
            return
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"the images of step {self.number}", found="NaN or infinity", expected="numbers")
        raise InputError(
            f"the labels of step {self.number}",
            found=f"{int(y.min())} to {int(y.max())}",
            expected=f"0 to {classes - 1}",
        )

    @torch.no_grad()
    def _culprit(self, x: Tensor | None = None) -> str:
        """The first layer whose weight, step or (for a batch) output is not finite."""
        layers = {**self.net.fixed, **self.net.layers}
        for name, layer in layers.items():
            if not bool(torch.isfinite(layer.weight).all()):
                return f"the weight of {name} is not finite"
            found = _bad_step(layer)
            if found:
                return f"{found} of {name} is not finite"
        outputs: list[str] = []

        def look(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            assert isinstance(layer, QuantLayer)
            if not bool(torch.isfinite(output).all()):
                outputs.append(f"the output of {layer.name} at W{layer.weight_bits}A{layer.act_bits} is not finite")

        if x is not None:
            handles = [layer.register_forward_hook(look) for layer in layers.values()]
            self.net(x)
            for handle in handles:
                handle.remove()
        return outputs[0] if outputs else "weights and steps are finite; lower the learning rate"

    def after_step(self, model: nn.Module, step: int) -> Mapping[str, float | Tensor]:
        net = self.net
        watched = [p for p in net.parameters() if p.requires_grad]
        norms = torch.stack(torch._foreach_norm([p.detach() for p in watched], torch.inf))  # pyright: ignore[reportPrivateImportUsage]
        if not bool(torch.isfinite(norms).all()):
            raise WorkError(f"step {step}: {self._culprit()}")
        report: dict[str, float | Tensor] = {}
        for name in ("ce", "kl", "idm", "dampening", "region"):
            values = [terms[name] for terms in self.terms if name in terms]
            if values:
                report[name] = torch.stack(values).mean()
        report["frozen"] = float(
            sum(len(layer.allowed_weight_bits) < len(layer.weight_choices) for layer in net.layers.values())
        )
        if self._optimizer is not None:
            report["lifted_steps"] = float(self._optimizer.lifted)
        if self.watch is not None:
            report |= self.watch(step)
        return report

    def state(self) -> Mapping[str, Tensor]:
        """Beside what the network's buffers hold (candidate sets): a count, and what is watched."""
        watched = {} if self.watch is None else self.watch.state()
        lifted = {} if self._optimizer is None else {"lifted": self._optimizer.lifted}
        return {**lifted, **watched}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if self._optimizer is not None:
            self._optimizer.lifted.copy_(tensors["lifted"])
        if self.watch is not None:
            self.watch.load_state(tensors)


def _bad_step(layer: QuantLayer) -> str | None:
    for kind, quantizer in (("weight", layer.weight_quantizer), ("activation", layer.act_quantizer)):
        if quantizer is not None and not bool(torch.isfinite(quantizer.steps).all()):
            bits = [b for b in quantizer.bits if not bool(torch.isfinite(quantizer.step(b)).all())]
            return f"the {bits[0]}-bit {kind} step"
    return None
