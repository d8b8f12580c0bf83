"""One training loop: mixed precision, accumulation, EMA, schedules, several processes, exact resume.

Everything random in a step (which samples, their noise, dropout) is a function of the seed, the step and the process
alone. A checkpoint therefore needs no generator states, and a run killed at any moment goes on to the same bits.
The loop itself is Accelerate's: the same call trains in one process or in several under `torchrun` or
`accelerate launch`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from papercore.errors import InputError, WorkError
from papercore.progress import Progress
from papercore.rundir import RunDir
from papercore.trainstate import State

Loss = Callable[[nn.Module, Any, torch.Generator], Tensor]
"""(model, batch, generator on the model's device) -> mean loss of the batch, a scalar with gradient."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the loop does. Two runs with equal configuration on one machine give equal bits."""

    steps: int = 1000
    """optimiser steps"""
    batch_size: int = 64
    """samples a step, over all processes and accumulated micro-batches"""
    learning_rate: float = 1e-3
    """the largest value the schedule reaches"""
    final_learning_rate: float = 0.0
    """where the cosine ends"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """the rule that moves the weights"""
    momentum: float = 0.9
    """of sgd"""
    nesterov: bool = False
    """sgd looks ahead along its momentum"""
    weight_decay: float = 0.01
    """on tensors of two and more dimensions; decoupled in adamw, added to the gradient in sgd"""
    schedule: Literal["constant", "cosine", "one-cycle", "steps"] = "cosine"
    """cosine: down; one-cycle: up from a 25th over the first 30 % of the steps, then down to 0, both as cosines;
    steps: times `gamma` at every milestone"""
    milestones: tuple[int, ...] = ()
    """optimiser steps after which the schedule "steps" lowers the rate"""
    gamma: float = 0.1
    """what it multiplies the rate with"""
    warmup: int = 0
    """steps of linear warm-up before it"""
    ema: float | None = None
    """decay of the exponential moving average of the weights; none: no average is kept"""
    clip_norm: float | None = 1.0
    """largest gradient norm; none: no clipping"""
    clip_value: float | None = None
    """largest absolute value of an element of a gradient; none: no clipping"""
    accumulate: int = 1
    """micro-batches a step"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """data type of the forward pass"""
    checkpoint_every: int = 200
    """steps between two checkpoints"""
    log_every: int = 50
    """steps between two lines of the log"""
    seed: int = 0
    """of the sample order and of everything random in the loss"""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("checkpoint_every", 1),
            ("log_every", 1),
            ("warmup", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"field {name}", found=value, expected=f"a whole number of at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError("field learning_rate", found=self.learning_rate, expected="a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError("field weight_decay", found=self.weight_decay, expected="a number of at least 0")
        if not 0 <= self.final_learning_rate < math.inf:
            raise InputError(
                "field final_learning_rate", found=self.final_learning_rate, expected="a number of at least 0"
            )
        if not 0 <= self.momentum < 1:
            raise InputError("field momentum", found=self.momentum, expected="in [0, 1)")
        if not 0 < self.gamma <= 1:
            raise InputError("field gamma", found=self.gamma, expected="in (0, 1]")
        if any(a >= b for a, b in itertools.pairwise((0, *self.milestones))):
            raise InputError("field milestones", found=self.milestones, expected="ascending steps above 0")
        for name in ("clip_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"field {name}", found=value, expected="a number above 0, or nothing")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError("field ema", found=self.ema, expected="in [0, 1)")
        for name, allowed in (
            ("optimizer", ("adamw", "sgd")),
            ("schedule", ("constant", "cosine", "one-cycle", "steps")),
            ("mixed_precision", ("no", "fp16", "bf16")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"field {name}", found=getattr(self, name), expected=" or ".join(allowed))


class Method:
    """A loss that takes part in the loop: several backward passes, its own optimiser, its own state.

    Every hook has a default; `losses` must be given. What is random in a hook must come from the generator, or from
    torch's global one, which is seeded before every micro-batch.
    """

    passes: int = 1
    """losses a micro-batch"""

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        """Yields `passes` mean losses; each is propagated back before the next is asked for, their gradients add up.

        Args:
            model: as it must be called, that is with what Accelerate wrapped around it.
        """
        raise NotImplementedError

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Before the batches of step `step`, counted from 0; `model` without wrapping, here and below."""

    def after_backward(self, model: nn.Module, step: int) -> None:
        """The gradients of the step are complete, exchanged between processes, and not yet clipped."""

    def after_step(self, model: nn.Module, step: int) -> Mapping[str, float | Tensor] | None:
        """The weights have moved. What it returns goes into the next line of the log: the mean of every tensor (one
        number, over the steps since the last line and over the processes), the last value of every float."""

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer | None:
        """Instead of the configuration's; a group's "lr_scale" (default 1) multiplies the schedule's rate."""

    def state(self) -> Mapping[str, Tensor]:
        """What an exact resume needs beside the model's weights and the optimiser's moments."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""


class _Plain(Method):
    """A loss without further parts."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        yield self.loss(model, batch, generator)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained model and what the loop saw."""

    model: nn.Module
    """with the averaged weights if an average was kept, else the last ones; in evaluation mode, on the CPU"""
    loss: float
    """mean over the last logged stretch"""
    steps: int
    seconds: float
    """of this process, without the steps of earlier ones"""
    is_main: bool
    """whether this process is the one that writes files"""


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    loss: Loss | Method,
    config: TrainConfig,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = True,
    label: str = "train",
    provenance: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains `model` in place and leaves `config.json`, `log.jsonl` and `checkpoint.safetensors` in `out`.

    Called again with the same arguments it goes on from the last checkpoint; a finished run is only loaded.

    Args:
        model: its weights at the start must be the same at every call (seed before you build it).
        dataset: map-style, with a length; items are collated by torch's default rule.
        loss: see `Loss` and `Method`; must take what is random from the generator, or from torch's global one.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        resume: False starts anew and overwrites the folder.
        provenance: further entries that a resumed run must share (model and data settings).

    Raises:
        InputError: the folder holds another run, the checkpoint is damaged, or the batch does not divide.
        WorkError: the loss is not finite.
    """
    accelerator = make_accelerator(config, device)
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    micro = config.batch_size // (world * config.accumulate)
    if micro * world * config.accumulate != config.batch_size:
        raise InputError(
            "field batch_size",
            found=config.batch_size,
            expected=f"a multiple of {world * config.accumulate} (processes x accumulated micro-batches)",
        )
    out = Path(out)
    described = {"train": dataclasses.asdict(config), "processes": world, **(provenance or {})}
    checkpoint = out / "checkpoint.safetensors"
    run = open_run(accelerator, out, checkpoint, described, resume)

    model.to(accelerator.device)
    method = loss if isinstance(loss, Method) else _Plain(loss)
    optimizer = method.optimizer(model, config) or make_optimizer(model, config)
    state = State(
        model,
        optimizer,
        method,
        config.ema,
        accelerator,
        f"{mix(json.dumps(described, sort_keys=True, default=str)):x}",
    )
    begin = state.load(checkpoint) if checkpoint.exists() else 0
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if main:
        run.keep_records(lambda record: record.get("step", math.inf) <= begin)

    sampler = StepSampler(len(dataset), config, micro, world, rank, begin)  # pyright: ignore[reportArgumentType]
    batches = iter(DataLoader(dataset, batch_sampler=sampler))
    started = time.monotonic()
    wrapped.train()
    with Progress(label, config.steps, start=begin, show=main) as progress:
        for step in range(begin, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step) * group.get("lr_scale", 1.0)
            method.begin_step(model, step)
            for part in range(config.accumulate):
                seed = mix(config.seed, "step", step, part, rank)
                torch.manual_seed(seed)  # before the batch is read: data may be augmented with torch's generator
                batch = send_to_device(next(batches), accelerator.device)
                generator = torch.Generator(accelerator.device).manual_seed(seed)
                losses = method.losses(wrapped, batch, generator)
                for index in range(method.passes):
                    last = part == config.accumulate - 1 and index == method.passes - 1
                    with accelerator.autocast(), _synchronised(accelerator, wrapped, last):
                        value = next(losses) / config.accumulate
                        accelerator.backward(value)
                    state.total += value.detach()
                if next(losses, None) is not None:
                    raise RuntimeError(f"{type(method).__name__}.losses yields more than its {method.passes} passes")
            method.after_backward(model, step)
            if config.clip_value is not None:
                accelerator.clip_grad_value_(wrapped.parameters(), config.clip_value)
            if config.clip_norm is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_norm)
            optimizer.step()
            wrapped.zero_grad()  # also what the optimiser does not hold: clipping sees every gradient
            state.average()
            state.observe(method.after_step(model, step) or {})
            state.stretch += 1
            done = step + 1
            logging = done % config.log_every == 0 or done == config.steps
            saving = done % config.checkpoint_every == 0 or done == config.steps
            if logging or saving:
                state.reduce()
                mean = float(state.total) / state.stretch
                if not math.isfinite(mean):
                    raise WorkError(f"{label}: the loss is {mean} at step {done}; lower the learning rate")
            if logging:
                state.loss = mean
                observed = state.observed()
                state.start_stretch()
                if main:
                    run.log(
                        {"step": done, "loss": state.loss, "learning_rate": learning_rate(config, step), **observed}
                    )
            if saving and main:
                state.save(checkpoint, done)
            progress.advance("" if math.isnan(state.loss) else f"loss {state.loss:.4f}")
    accelerator.wait_for_everyone()
    seconds = time.monotonic() - started
    state.use_average()
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).to("cpu").eval()
    return TrainResult(model, state.loss, config.steps, seconds, main)


def open_run(
    accelerator: Accelerator, out: Path, checkpoint: Path, described: Mapping[str, Any], resume: bool
) -> RunDir:
    """The run's folder, made or checked by the main process; what it finds wrong is raised in all of them."""
    problem = None
    if accelerator.is_main_process:
        try:
            if not resume:
                checkpoint.unlink(missing_ok=True)  # first: a checkpoint without its configuration must not survive
            RunDir.open(out, described, resume=resume)
        except InputError as error:
            problem = str(error)
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise InputError(problem)
    return RunDir(out)


def make_accelerator(config: TrainConfig, device: str) -> Accelerator:
    """Accelerate's object for this process, with nothing left over from an earlier run in it."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError("device", found=device, expected="auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", found="cuda", expected="a CUDA GPU in this machine")
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(reset_partial_state=True)
        if "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
            sys.stderr.write(
                "accelerate launch started one process (it needs MPI for several on a CPU); "
                "torchrun --standalone --nproc-per-node N starts N\n"
            )
    return Accelerator(mixed_precision=config.mixed_precision, cpu=device == "cpu", step_scheduler_with_optimizer=False)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The configuration's optimiser over every parameter that wants a gradient."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (biases, norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step` (counted from 0)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "steps":
        return config.learning_rate * config.gamma ** sum(step >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        low = config.final_learning_rate
        return low + (config.learning_rate - low) * (1 + math.cos(math.pi * share)) / 2
    rise = 0.3
    if share < rise:
        return config.learning_rate * (0.04 + 0.96 * (1 - math.cos(math.pi * share / rise)) / 2)
    return config.learning_rate * (1 + math.cos(math.pi * (share - rise) / (1 - rise))) / 2


def mix(*parts: object) -> int:
    """A 63-bit seed from what it may depend on."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class StepSampler(Sampler[list[int]]):
    """The indices of every micro-batch from step `begin` on: one endless shuffled pass after another.

    Position p of the stream is element p mod n of the permutation of pass p // n; every process takes its share of
    a step's positions. No state but the position.
    """

    def __init__(self, items: int, config: TrainConfig, micro: int, world: int, rank: int, begin: int) -> None:
        if items < 1:
            raise InputError("the data set", found="no sample", expected="at least one")
        self.items, self.config, self.micro, self.world, self.rank, self.begin = (
            items,
            config,
            micro,
            world,
            rank,
            begin,
        )

    def __iter__(self) -> Iterator[list[int]]:
        number, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.begin, self.config.steps):
            for part in range(self.config.accumulate):
                first = step * self.config.batch_size + (part * self.world + self.rank) * self.micro
                indices = []
                for position in range(first, first + self.micro):
                    if position // self.items != number:
                        number = position // self.items
                        generator = torch.Generator().manual_seed(mix(self.config.seed, "pass", number))
                        order = torch.randperm(self.items, generator=generator)
                    indices.append(int(order[position % self.items]))
                yield indices


def _synchronised(accelerator: Accelerator, model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are exchanged between processes only with the last micro-batch of a step."""
    return contextlib.nullcontext() if now else accelerator.no_sync(model)
