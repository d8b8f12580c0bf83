"""SGD for weights and Adam for steps, in one optimiser (specification of the method, section 3).

The steps of a layer, and its batch norms, are rows of one tensor. A row that no pass of a training step used has a
gradient of zero; it keeps its value and its moments, as a parameter of its own without gradient would.
"""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.sgd import sgd

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.lsq import LSQ, STEP_FLOOR
from oneshot_mpq.supernet import Supernet

BETAS, EPSILON = (0.9, 0.999), 1e-8


def used_rows(gradient: Tensor) -> Bool[Tensor, "rows *ones"]:
    """Which rows have a gradient, in a shape that spreads over them."""
    rows = gradient.reshape(len(gradient), -1).ne(0).any(1)
    return rows.reshape(-1, *[1] * (gradient.ndim - 1))


class SandwichOptimizer(torch.optim.Optimizer):
    """Groups have a "rule": "sgd", "sgd rows" or "adam rows".

    Args:
        learning_rate: of the weights; `step_learning_rate` that of the steps.
    """

    def __init__(
        self,
        net: Supernet,
        learning_rate: float,
        step_learning_rate: float,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 2.5e-5,
    ) -> None:
        steps, rows = [], []
        for module in net.modules():
            if isinstance(module, LSQ) and module.steps.requires_grad:
                steps.append(module.steps)
            if isinstance(module, BatchNormBank):
                rows += [p for p in (module.weight, module.bias) if p is not None]
        apart = {id(p) for p in (*steps, *rows)}
        searched = {id(layer.weight) for layer in net.layers.values()}
        rest = [p for p in net.parameters() if p.requires_grad and id(p) not in apart]
        decay = [p for p in rest if p.ndim == 4 or id(p) in searched]
        chosen = {id(p) for p in decay}
        plain = [p for p in rest if id(p) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": decay, "rule": "sgd", "weight_decay": weight_decay},
            {"params": plain, "rule": "sgd"},
            {"params": rows, "rule": "sgd rows"},
            {"params": steps, "rule": "adam rows", "lr": step_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": learning_rate, "weight_decay": 0.0})
        self.momentum, self.nesterov = momentum, nesterov
        self.lifted = torch.zeros((), dtype=torch.float64, device=steps[0].device if steps else None)
        """how many steps fell to zero or below and were put on the floor, so far"""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["rule"] == "sgd":
                self._sgd(parameters, group["lr"], group["weight_decay"])
            else:
                update = self._sgd_rows if group["rule"] == "sgd rows" else self._adam_rows
                for p in parameters:
                    update(p, group["lr"])

    def _sgd(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        buffers: list[Tensor | None] = [self.state[p].get("momentum_buffer") for p in parameters]
        sgd(
            parameters,  # pyright: ignore[reportArgumentType]
            [p.grad for p in parameters if p.grad is not None],
            buffers,
            weight_decay=decay,
            momentum=self.momentum,
            lr=rate,
            dampening=0,
            nesterov=self.nesterov,
            maximize=False,
        )
        for p, buffer in zip(parameters, buffers, strict=True):
            self.state[p]["momentum_buffer"] = buffer

    def _sgd_rows(self, p: nn.Parameter, rate: float) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        used, buffer = used_rows(p.grad), state["momentum_buffer"]
        buffer.copy_(torch.where(used, self.momentum * buffer + p.grad, buffer))
        direction = p.grad + self.momentum * buffer if self.nesterov else buffer
        p.sub_(torch.where(used, rate * direction, 0.0))

    def _adam_rows(self, p: nn.Parameter, rate: float) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            state["count"] = torch.zeros(len(p), *[1] * (p.ndim - 1), dtype=p.dtype, device=p.device)
        used = used_rows(p.grad)
        first, second = BETAS
        mean, square, count = state["mean"], state["square"], state["count"]
        mean.copy_(torch.where(used, torch.lerp(mean, p.grad, 1 - first), mean))
        square.copy_(torch.where(used, torch.lerp(square, p.grad.square(), 1 - second), square))
        count.add_(used)
        n = count.clamp(min=1)
        change = rate * (mean / (1 - first**n)) / ((square / (1 - second**n)).sqrt() + EPSILON)
        p.sub_(torch.where(used, change, 0.0))
        self.lifted += (p < STEP_FLOOR).sum()
        p.clamp_(min=STEP_FLOOR)
