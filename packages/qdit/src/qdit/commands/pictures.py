"""Commands that look at what a model draws and where it errs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError, located
from papercore.rundir import check_output_file, check_output_folder

from qdit.commands.options import Device, Positional, parse_labels, pick_device, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(cli.Command):
    """Sample pictures: an .npz of uint8 images and a grid as PNG."""

    model: Positional[Path]
    """folder of a DiT, full-precision or quantised, or of a pipeline that has one"""
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
    check_finite: bool = False
    """stop at the first quantised layer whose input is not finite, and name it"""
    vae: Path | None = None
    """folder of an AutoencoderKL (config.json and safetensors), or of a pipeline that has one, that turns latents into
    pixels"""
    precompute: bool = False
    """compute the modulation of all blocks for all steps and labels beforehand; takes memory for every pair of them"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        classes = parse_labels(self.labels)
        if self.count < 1:
            raise InputError("--count", found=self.count, expected="at least 1")
        if self.steps < 1:
            raise InputError("--steps", found=self.steps, expected="at least 1")
        check_output_file(self.out, ".npz")
        import torch
        from papercore.images import grid_png, images_to_uint8, write_images
        from papercore.rundir import atomic

        from qdit.decoding import decode, load_decoder
        from qdit.pipeline import load_pretrained
        from qdit.sampling import sample_many

        device = pick_device(self.device)
        model = load_pretrained(self.model, backend=self.backend, check_finite=self.check_finite)
        model.to(device)  # pyright: ignore[reportArgumentType]
        channels: int = model.config.in_channels  # pyright: ignore[reportAttributeAccessIssue]
        decoder = None if self.vae is None else load_decoder(self.vae, channels).to(device)  # pyright: ignore[reportArgumentType]
        if decoder is None and channels not in (1, 3):
            raise InputError(
                "field in_channels",
                where=self.model / "config.json",
                found=channels,
                expected="1 or 3, which are pixels",
                hint="give the folder of the autoencoder that decodes these latents as --vae",
            )
        labels = torch.tensor(classes).repeat_interleave(self.count)
        with located("qdit sample"):
            samples = sample_many(
                model, labels, self.steps, guidance=self.guidance, seed=self.seed, precompute=self.precompute
            )
        if not torch.isfinite(samples).all():
            raise InputError(
                "samples", found="values that are not finite", expected="finite ones (is --guidance too large?)"
            )
        images = images_to_uint8(samples if decoder is None else decode(decoder, samples))
        write_images(self.out, images)
        grid = self.out.with_suffix(".png")
        with atomic(grid) as temporary:
            temporary.write_bytes(grid_png(images, self.count, zoom=max(1, 32 // images.shape[1])))
        return {"samples": self.out, "grid": grid, "images": len(images)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Command):
    """Compare sampled with real pictures: Frechet distance, sFID, inception score, precision, recall.

    Which of them depends on what the feature space gives; digits gives all but sFID.
    """

    samples: Positional[Path]
    """.npz of uint8 images (key arr_0), or of features (key features)"""
    reference: str = "digits"
    """.npz of real images, of features, or of statistics (mu, sigma); or digits"""
    features: str = "digits"
    """feature space: digits (a classifier trained on them), pixels, inception, or module:function"""
    inception_weights: Path | None = None
    """torch-fidelity's weight file, for --features inception"""

    def run(self) -> Mapping[str, Any]:
        from qdit.evaluate import evaluate_files

        return evaluate_files(self.samples, self.reference, self.features, self.inception_weights, say)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(cli.Command):
    """Compare a quantised with its full-precision DiT: errors by layer and timestep, pictures side by side."""

    model: Positional[Path]
    """folder of the full-precision DiT"""
    quantised: Positional[Path]
    """folder of the quantised one"""
    out: Path
    """folder for report.html and report.md"""
    calibration: Path | None = None
    """file of qdit calibrate to measure on; without one, 256 inputs are sampled from the model"""
    steps: int = 50
    """sampling steps of the pictures"""
    guidance: float = 1.5
    """classifier-free guidance weight of the pictures; 1 for none"""
    seed: int = 0
    """of sampled inputs and pictures"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if self.steps < 1:
            raise InputError("--steps", found=self.steps, expected="at least 1")
        from papercore.report import write_html, write_markdown

        from qdit.calibration import Calibration, collect_calibration
        from qdit.diagnose import diagnose
        from qdit.pipeline import load_pretrained

        device = pick_device(self.device)
        model, quantised = (load_pretrained(path).to(device) for path in (self.model, self.quantised))  # pyright: ignore
        if self.calibration is None:
            say("sampling 256 inputs from the model")
            calibration = collect_calibration(model, seed=self.seed)
        else:
            calibration = Calibration.load(self.calibration)
            calibration.check_fits(model, self.calibration)
        with located(self.quantised):
            result, sections = diagnose(
                model, quantised, calibration, steps=self.steps, guidance=self.guidance, seed=self.seed
            )
        write_html(self.out / "report.html", "Errors of a quantised DiT", sections)
        write_markdown(self.out / "report.md", "Errors of a quantised DiT", sections)
        return {**result, "report": self.out / "report.html"}
