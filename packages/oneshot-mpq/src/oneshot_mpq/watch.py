"""What is written down about the interference of bit-widths while a supernet is trained."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from oneshot_mpq.lsq import FLOAT
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.turbulence import Oscillation, turbulence
from oneshot_mpq.validation import accuracies


class Watch:
    """Called after every step; at the end of an epoch it gives, for the log,

    "turbulence" (mean over the layers, all their candidates counted, also frozen ones), "oscillation W2", ... (share
    of weights that change their mind in a step) and "accuracy W2A2", ... of every uniform width.
    """

    def __init__(self, net: Supernet, loader: DataLoader[Any], steps_per_epoch: int) -> None:
        self.net, self.loader, self.steps_per_epoch = net, loader, steps_per_epoch
        self.meters = {bits: Oscillation(net.layers, bits) for bits in net.bits if bits < FLOAT}

    def __call__(self, step: int) -> dict[str, float | Tensor]:
        for meter in self.meters.values():
            meter.update()
        if (step + 1) % self.steps_per_epoch:
            return {}
        layers = self.net.layers.values()
        report: dict[str, float | Tensor] = {
            "epoch": (step + 1) // self.steps_per_epoch,
            "turbulence": sum(float(turbulence(layer, layer.weight_choices)) for layer in layers) / len(layers),
        }
        report |= {f"oscillation W{bits}": meter.rate() for bits, meter in self.meters.items()}
        return report | {f"accuracy W{b}A{b}": value for b, value in accuracies(self.net, self.loader).items()}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            f"watch.{bits}.{name}": value
            for bits, meter in self.meters.items()
            for name, value in meter.state().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        for bits, meter in self.meters.items():
            prefix = f"watch.{bits}."
            meter.load_state({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
