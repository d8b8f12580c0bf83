"""The `qdit` command."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from papercore import cli
from papercore.errors import InputError, located

Device = Literal["auto", "cpu", "cuda"]
Positional = tyro.conf.Positional


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


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
        if self.width % self.heads or self.width < 4 or self.width % 4:
            raise InputError("--width", found=self.width, expected=f"a multiple of 4 and of the {self.heads} heads")
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
class Quantize(cli.Command):
    """Quantise a DiT and save it as packed integers."""

    model: Positional[Path]
    """folder of a full-precision DiT (config.json and safetensors)"""
    out: Path
    """folder for the quantised model"""
    wbits: int = 4
    """bits of a weight, 2 to 8; 16 leaves weights alone"""
    abits: int = 8
    """bits of an activation, 2 to 8; 16 leaves activations alone"""
    group_size: int | Literal["row"] = 128
    """input channels a group, for weight and activation of every layer; row: one group"""
    group_sizes: Path | None = None
    """JSON plan with a group size (and granularity) for every layer pattern, instead of --group-size"""
    w_sym: bool = False
    """symmetric weights"""
    a_sym: bool = False
    """symmetric activations"""
    act: Literal["dynamic", "static", "none"] = "dynamic"
    """activation ranges: from the data at hand, from calibration, or activations left alone"""
    act_granularity: Literal["token", "sample", "tensor"] = "token"
    """what shares a dynamic range"""
    gptq: bool = True
    """GPTQ rounding; --no-gptq rounds to nearest"""
    adaln_bits: int | None = None
    """bits of the adaLN weights; None leaves them alone"""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """precision of stored weight scales"""
    keep: tuple[str, ...] = ()
    """patterns of layers to leave in full precision"""
    calibration: Path | None = None
    """file of qdit calibrate; when one is needed and none is given, 256 inputs are sampled from the model"""
    seed: int = 0
    """of the calibration inputs sampled here"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from qdit.config import QDiTConfig, read_plan

        sizes: Any = None if self.group_size == "row" else self.group_size
        granularity: Any = self.act_granularity
        if self.group_sizes is not None:
            sizes, granularity = read_plan(self.group_sizes)
        with located("qdit quantize"):
            config = QDiTConfig(
                wbits=self.wbits,
                abits=self.abits,
                group_size=sizes,
                w_sym=self.w_sym,
                a_sym=self.a_sym,
                act=self.act,
                act_granularity=granularity,
                gptq=self.gptq,
                adaln_bits=self.adaln_bits,
                scale_dtype=self.scale_dtype,
                modules_to_not_convert=self.keep,
            )
        from qdit.calibration import Calibration, collect_calibration
        from qdit.convert import quantize
        from qdit.pipeline import load_pretrained, report, save_pretrained
        from qdit.targets import find_targets

        device = pick_device(self.device)
        model = load_pretrained(self.model).to(device)  # pyright: ignore[reportArgumentType]
        with located(self.group_sizes or self.model):
            find_targets(model, config)
        calibration: Calibration | None = None
        if self.calibration is not None:
            calibration = Calibration.load(self.calibration)
            calibration.check_fits(model, self.calibration)
        elif config.needs_calibration:
            say("no calibration file given: sampling 256 inputs from the model")
            calibration = collect_calibration(model, seed=self.seed)
        with located(self.model):
            quantised = quantize(model, config, calibration, inplace=True)
        save_pretrained(quantised, self.out)
        return {"model": self.out, **report(quantised)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(cli.Command):
    """Collect calibration inputs while a DiT samples."""

    model: Positional[Path]
    """folder of a full-precision DiT"""
    out: Path
    """file to write, safetensors"""
    samples: int = 256
    """inputs to keep"""
    steps: int = 50
    """sampling steps"""
    guidance: float = 1.5
    """classifier-free guidance weight; 1 for none"""
    null_fraction: float = 0.5
    """share of inputs kept without their label"""
    seed: int = 0
    """of noise, labels and choice"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from qdit.calibration import collect_calibration
        from qdit.pipeline import load_pretrained

        model = load_pretrained(self.model).to(pick_device(self.device))  # pyright: ignore[reportArgumentType]
        calibration = collect_calibration(
            model,
            samples=self.samples,
            steps=self.steps,
            guidance=self.guidance,
            null_fraction=self.null_fraction,
            seed=self.seed,
        )
        calibration.save(self.out)
        return {"calibration": self.out, "inputs": len(calibration)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(cli.Command):
    """Sample pictures: an .npz of uint8 images and a grid as PNG."""

    model: Positional[Path]
    """folder of a DiT, full-precision or quantised"""
    out: Path
    """file to write, .npz; the grid lies beside it as .png"""
    labels: str = "0,1,2,3,4,5,6,7,8,9"
    """classes, separated by commas; a row of the grid each"""
    count: int = 8
    """pictures of every class"""
    steps: int = 50
    """sampling steps"""
    guidance: float = 1.5
    """classifier-free guidance weight; 1 for none"""
    seed: int = 0
    """of the noise"""
    backend: Literal["auto", "simulate", "integer"] = "auto"
    """how quantised layers compute"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        classes = parse_labels(self.labels)
        if self.count < 1:
            raise InputError("--count", found=self.count, expected="at least 1")
        import torch
        from papercore.images import grid_png, images_to_uint8, write_images
        from papercore.rundir import atomic

        from qdit.pipeline import load_pretrained
        from qdit.sampling import sample_many

        model = load_pretrained(self.model, backend=self.backend).to(pick_device(self.device))  # pyright: ignore[reportArgumentType]
        if model.config.in_channels not in (1, 3):  # pyright: ignore[reportAttributeAccessIssue]
            raise InputError(
                "field in_channels",
                where=self.model / "config.json",
                found=model.config.in_channels,  # pyright: ignore[reportAttributeAccessIssue]
                expected="1 or 3: this command writes pixels and decodes no latents",
            )
        labels = torch.tensor(classes).repeat_interleave(self.count)
        with located("--labels"):
            samples = sample_many(model, labels, self.steps, guidance=self.guidance, seed=self.seed)
        images = images_to_uint8(samples)
        write_images(self.out, images)
        grid = self.out.with_suffix(".png")
        with atomic(grid) as temporary:
            temporary.write_bytes(grid_png(images, self.count, zoom=max(1, 32 // images.shape[1])))
        return {"samples": self.out, "grid": grid, "images": len(images)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Command):
    """Frechet distance between sampled and real pictures."""

    samples: Positional[Path]
    """.npz of uint8 images (key arr_0)"""
    reference: str = "digits"
    """.npz of real images, or digits"""
    features: str = "digits"
    """feature space: digits (a classifier trained on them), pixels, or module:function"""

    def run(self) -> Mapping[str, Any]:
        from papercore.images import read_images

        from qdit.evaluate import image_distance, reference_images

        samples, reference = read_images(self.samples), reference_images(self.reference)
        with located(self.samples):
            distance, dimensions = image_distance(samples, reference, self.features)
        few = min(len(samples), len(reference))
        if few < dimensions:
            say(f"warning: {few} images for {dimensions} feature dimensions: the distance is biased upward")
        return {
            "frechet_distance": distance,
            "features": self.features,
            "samples": len(samples),
            "reference": len(reference),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Command):
    """Re-test the paper's claims and write a report."""

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, two minutes, embedded data"""
    out: Path = Path("report")
    """folder for report.html, report.md and claims.json"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from papercore.errors import WorkError
        from papercore.reproduce import Settings, reproduce, reproduction_result

        from qdit.reproduce import PAPER

        if self.scale not in PAPER.scales:
            raise InputError("--scale", found=self.scale, expected=" or ".join(PAPER.scales))
        summary, errors = reproduce([PAPER], Settings(self.scale, self.out, None, self.device, self.seed, say))
        if errors:
            raise WorkError("; ".join(errors.values()))
        return reproduction_result(summary, errors, self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(cli.Command):
    """Time quantised linear layers against float32 ones, and against torchao where it is installed.

    Ratios are times divided by that of float32: below 1 is faster. Everything is measured in one run in alternating
    order; a line that is slower than float32 is marked as losing.
    """

    shapes: tuple[str, ...] = ("3456x1152", "1152x1152", "4608x1152", "1152x4608")
    """layers as rows x columns; the default are those of DiT-XL/2"""
    tokens: int = 256
    """rows of the activation"""
    groups: tuple[int, ...] = (32, 128, 288)
    """group sizes of the integer products; whole rows are always measured"""
    wbits: int = 8
    """bits of a weight, 2 to 8"""
    threads: int = 1
    """threads a product may use"""
    repeats: int = 15
    """timings of each line; the median is shown"""
    out: Path | None = None
    """JSON file for every single timing, the versions and the processor's features"""

    def run(self) -> Mapping[str, Any]:
        from qdit.benchmark import benchmark, parse_shape

        shapes = [parse_shape(shape) for shape in self.shapes]
        return benchmark(
            shapes, self.tokens, self.groups, self.wbits, threads=self.threads, repeats=self.repeats, out=self.out
        )


COMMANDS: dict[str, type[cli.Command]] = {
    "train": Train,
    "calibrate": Calibrate,
    "quantize": Quantize,
    "sample": Sample,
    "evaluate": Evaluate,
    "benchmark": Benchmark,
    "reproduce": Reproduce,
}


def pick_device(device: Device) -> str:
    """ "auto" resolved.

    Raises:
        InputError: "cuda" without a GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def parse_labels(text: str) -> list[int]:
    """Raises InputError unless `text` is whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--labels", found=text, expected="whole numbers separated by commas") from None


def main() -> int:
    return cli.main("qdit", COMMANDS, "Quantises diffusion transformers after training (Q-DiT).")


if __name__ == "__main__":
    sys.exit(main())
