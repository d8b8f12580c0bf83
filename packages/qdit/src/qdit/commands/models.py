"""Commands that make or fetch a full-precision model."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError, located
from papercore.rundir import check_output_folder

from qdit.commands.options import Device, Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(cli.Command):
    """Train a small class-conditional DiT on handwritten digits.

    Interrupted, it goes on where it stopped when it is called again. In several processes:
    torchrun --standalone --nproc-per-node 2 -m qdit.cli train ...
    """

    out: Path
    """folder for the model; its run/ holds log and checkpoint"""
    steps: int = 2000
    """optimiser steps"""
    batch_size: int = 64
    """images a step, over all processes"""
    learning_rate: float = 2e-3
    """largest value of the one-cycle schedule"""
    width: int = 64
    """channels of a token"""
    depth: int = 3
    """transformer blocks"""
    heads: int = 4
    """attention heads"""
    checkpoint_every: int = 200
    """steps between two checkpoints"""
    log_every: int = 100
    """steps between two lines of the log"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """data type of the forward pass"""
    seed: int = 0
    """of the first weights, the order of images and the noise"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with the run in --out; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        for name in ("heads", "depth"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}", found=getattr(self, name), expected="at least 1")
        if self.width % self.heads or self.width < 4 or self.width % 4:
            raise InputError("--width", found=self.width, expected=f"a multiple of 4 and of the {self.heads} heads")
        check_output_folder(self.out)
        from qdit.train import DEFAULT, ModelSize, train_digits

        config = dataclasses.replace(
            DEFAULT,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            mixed_precision=self.mixed_precision,
            seed=self.seed,
        )
        size = ModelSize(self.width, self.depth, self.heads)
        result = train_digits(self.out, config, size, device=self.device, resume=self.resume)
        if not result.is_main:
            sys.exit(cli.DONE)  # one of several processes speaks
        parameters = sum(p.numel() for p in result.model.parameters())
        return {"model": self.out, "parameters": parameters, "loss": result.loss, "seconds": result.seconds}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import(cli.Command):
    """Convert a DiT checkpoint in the original naming to a model folder.

    The folder keeps the original's timestep embedding (frequency shift 0), which diffusers' own differs from.
    """

    checkpoint: Positional[Path]
    """.safetensors, or .pt that holds tensors only (pickled objects are refused)"""
    heads: int
    """attention heads"""
    patch: int
    """height and width of a patch"""
    input_size: int
    """height and width of the input in (latent) pixels"""
    classes: int
    """classes, without "no class" """
    out: Path
    """folder for the model"""
    share_embedders: bool = True
    """keep one timestep and label embedder for all blocks, as the original does, instead of one a block"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        for name in ("heads", "patch", "input_size", "classes"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", found=getattr(self, name), expected="at least 1")
        from qdit.original import from_original, read_original
        from qdit.pipeline import save_pretrained

        tensors = read_original(self.checkpoint)
        with located(self.checkpoint):
            model = from_original(
                tensors,
                num_heads=self.heads,
                patch_size=self.patch,
                input_size=self.input_size,
                num_classes=self.classes,
                shared_embedders=self.share_embedders,
            )
        save_pretrained(model, self.out)
        config: Any = model.config
        return {
            "model": self.out,
            "parameters": sum(p.numel() for p in model.parameters()),
            "blocks": config.num_layers,
            "width": config.num_attention_heads * config.attention_head_dim,
        }
