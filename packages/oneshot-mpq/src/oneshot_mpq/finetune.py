"""Training one configuration further, alone: what a retraining-free search must not need (specification, section 4)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from papercore import training
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.losses import wide
from oneshot_mpq.optimizer import SandwichOptimizer
from oneshot_mpq.supernet import Supernet


class Alone(training.Method):
    """Cross entropy of the network at the bits that are set."""

    def __init__(self, net: Supernet, step_learning_rate: float) -> None:
        self.net, self.step_learning_rate = net, step_learning_rate

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        x, y = batch
        yield functional.cross_entropy(wide(model(x)), y)

    def optimizer(self, model: nn.Module, config: training.TrainConfig) -> SandwichOptimizer:
        optimizer = SandwichOptimizer(
            self.net, config.learning_rate, self.step_learning_rate, weight_decay=config.weight_decay
        )
        for group in optimizer.param_groups:
            if group["rule"] == "adam rows":
                group["lr_scale"] = self.step_learning_rate / config.learning_rate
        return optimizer


def finetune(
    net: Supernet,
    config: BitConfig,
    dataset: Dataset[Any],
    *,
    epochs: int,
    batch_size: int,
    out: Path,
    learning_rate: float = 0.01,
    step_learning_rate: float = 1e-4,
    seed: int = 0,
    device: str = "auto",
    label: str = "oneshot-mpq: fine-tuning",
) -> None:
    """Trains `net` in place at `config`, at a tenth or less of the supernet's rates, cosine to zero."""
    net.set_bits(config)
    per_epoch = max(1, len(dataset) // batch_size)  # pyright: ignore[reportArgumentType]
    loop = training.TrainConfig(
        steps=epochs * per_epoch,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=2.5e-5,
        clip_norm=None,
        clip_value=1.0,
        checkpoint_every=10 * per_epoch,
        log_every=per_epoch,
        seed=seed,
    )
    training.train(
        net,
        dataset,
        Alone(net, step_learning_rate),
        loop,
        out,
        device=device,
        label=label,
        provenance={"weight_bits": list(config.weight_bits), "act_bits": list(config.act_bits)},
    )
