"""The `qdit` command."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from papercore import cli
from papercore.errors import InputError, located
from papercore.rundir import check_output_file, check_output_folder

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

        if self.out.resolve() == self.model.resolve():
            raise InputError("--out", found=str(self.out), expected="another folder than that of the model")
        sizes: Any = None if self.group_size == "row" else self.group_size
        granularity: Any = self.act_granularity
        if self.group_sizes is not None:
            if self.act_granularity != "token":
                raise InputError("--act-granularity", found=self.act_granularity, expected="none beside --group-sizes")
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
        check_output_folder(self.out)
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

        check_output_file(self.out)
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
class Search(cli.Command):
    """Search one group size per layer under a cost limit.

    Writes plan.json, for qdit quantize --group-sizes, and the search's log into --out; called again it goes on.
    """

    model: Positional[Path]
    """folder of a full-precision DiT"""
    out: Path
    """folder for plan.json, search.jsonl, report.html and report.md"""
    limit: str = "uniform=128"
    """what may not be exceeded: uniform=SIZE, or bits=NUMBER (bits per weight), rescales=NUMBER (per token), or both
    with a comma between"""
    menu: tuple[int, ...] = (32, 64, 128, 192, 288)
    """group sizes to choose from"""
    wbits: int = 4
    """bits of a weight"""
    abits: int = 8
    """bits of an activation"""
    gptq: bool = True
    """round candidates with GPTQ; --no-gptq rounds to nearest"""
    calibration: Path | None = None
    """file of qdit calibrate; without one, 256 inputs are sampled from the model"""
    held_out: Path | None = None
    """other calibration inputs, to measure the best on; without a file, 256 are sampled"""
    population: int = 50
    """candidates of a generation"""
    top_k: int = 10
    """parents"""
    iterations: int = 10
    """generations"""
    mutation: float = 0.1
    """probability that a size is redrawn"""
    storage: str | None = None
    """database URL or file for the search, instead of search.jsonl in --out"""
    join: bool = False
    """other workers are searching on the same storage now"""
    seed: int = 0
    """of the search and of sampled inputs"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        limit = parse_limit(self.limit)
        check_output_folder(self.out)
        from papercore.report import Section, write_html, write_markdown
        from papercore.rundir import write_json

        from qdit.calibration import Calibration, collect_calibration
        from qdit.config import QDiTConfig
        from qdit.granularity import noise_fitness, search_group_sizes, sizes_picture
        from qdit.pipeline import load_pretrained

        with located("qdit search"):
            config = QDiTConfig(wbits=self.wbits, abits=self.abits, gptq=self.gptq)
        model = load_pretrained(self.model).to(pick_device(self.device))  # pyright: ignore[reportArgumentType]
        inputs = []
        for path, seed in ((self.calibration, self.seed), (self.held_out, self.seed + 1)):
            if path is None:
                say("sampling 256 inputs from the model")
                inputs.append(collect_calibration(model, seed=seed))
            else:
                inputs.append(Calibration.load(path))
                inputs[-1].check_fits(model, path)
        with located("qdit search"):
            result = search_group_sizes(
                model,
                config,
                noise_fitness(model, inputs[0]),
                menu=self.menu,
                limit=limit,
                population=self.population,
                top_k=self.top_k,
                iterations=self.iterations,
                mutation=self.mutation,
                seed=self.seed,
                storage=self.storage or self.out / "search.jsonl",
                calibration=inputs[0],
                held_out=noise_fitness(model, inputs[1]),
                alone=not self.join,
            )
        write_json(self.out / "plan.json", result.best)
        sections = [
            Section("Group sizes", tables=(result.table, result.pareto), pictures=(sizes_picture(result.best),))
        ]
        write_html(self.out / "report.html", "Search for group sizes", sections)
        write_markdown(self.out / "report.md", "Search for group sizes", sections)
        return {"plan": self.out / "plan.json", "candidates": result.table, "evaluations": len(result.evaluations)}


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
    vae: Path | None = None
    """folder of an AutoencoderKL (config.json and safetensors) that turns latents into pixels"""
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
        model = load_pretrained(self.model, backend=self.backend).to(device)  # pyright: ignore[reportArgumentType]
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
class Reproduce(cli.Command):
    """Re-test the paper's claims and write a report."""

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, two minutes, embedded data; small: the CIFAR-10 DiT on one GPU, with --data"""
    out: Path = Path("report")
    """folder for report.html, report.md and claims.json"""
    data: Path | None = None
    """folder with the CIFAR-10 DiT, ResNet-56 and pictures, for small"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from papercore.reproduce import Settings, reproduce

        from qdit.reproduce import PAPER

        if self.scale not in PAPER.scales:
            raise InputError("--scale", found=self.scale, expected=" or ".join(PAPER.scales))
        check_output_folder(self.out)
        claims = reproduce([PAPER], Settings(self.scale, self.out, self.data, self.device, self.seed, say))
        return {"claims": claims, "report": self.out / "report.html"}


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
        if self.out is not None:
            check_output_file(self.out)
        from qdit.benchmark import benchmark, parse_shape

        shapes = [parse_shape(shape) for shape in self.shapes]
        return benchmark(
            shapes, self.tokens, self.groups, self.wbits, threads=self.threads, repeats=self.repeats, out=self.out
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(cli.Command):
    """Size and cost of a setting, from a model's config.json alone."""

    model: Positional[Path]
    """folder of a DiT, or its config.json; weights are not needed"""
    wbits: int = 4
    """bits of a weight"""
    abits: int = 8
    """bits of an activation"""
    group_size: int | Literal["row"] = 128
    """input channels a group; row: one group"""
    group_sizes: Path | None = None
    """JSON plan, instead of --group-size"""
    w_sym: bool = False
    """symmetric weights"""
    adaln_bits: int | None = None
    """bits of the adaLN weights; None leaves them alone"""
    rest_bits: int = 16
    """bits of every parameter that is not quantised"""

    def run(self) -> Mapping[str, Any]:
        from qdit.config import QDiTConfig, read_plan
        from qdit.estimate import as_result, model_cost

        if self.rest_bits not in (16, 32):
            raise InputError("--rest-bits", found=self.rest_bits, expected="16 or 32")
        sizes: Any = None if self.group_size == "row" else self.group_size
        if self.group_sizes is not None:
            sizes = read_plan(self.group_sizes)[0]
        with located(self.group_sizes or "qdit estimate"):
            config = QDiTConfig(self.wbits, self.abits, sizes, w_sym=self.w_sym, gptq=False, adaln_bits=self.adaln_bits)
            return as_result(model_cost(self.model, config, rest_bits=self.rest_bits))


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


COMMANDS: dict[str, type[cli.Command]] = {
    "train": Train,
    "import": Import,
    "calibrate": Calibrate,
    "search": Search,
    "quantize": Quantize,
    "sample": Sample,
    "evaluate": Evaluate,
    "estimate": Estimate,
    "report": Report,
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


def parse_limit(text: str) -> int | dict[str, float]:
    """Raises InputError unless `text` is uniform=SIZE or bits=NUMBER and rescales=NUMBER."""
    names = {"bits": "bits_per_weight", "rescales": "rescales_per_token"}
    limits: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name == "uniform" and part == text:
                return int(value)
            limits[names[name]] = float(value)
    except (KeyError, ValueError):
        raise InputError(
            "--limit", found=text, expected="uniform=SIZE, or bits=NUMBER,rescales=NUMBER or one of them"
        ) from None
    return limits


def parse_labels(text: str) -> list[int]:
    """Raises InputError unless `text` is whole numbers separated by commas."""
    try:
        labels = [int(part) for part in text.split(",")]
        if max(map(abs, labels)) < 2**31:
            return labels
        raise ValueError
    except ValueError:
        raise InputError("--labels", found=text, expected="whole numbers separated by commas") from None


def main() -> int:
    return cli.main("qdit", COMMANDS, "Quantises diffusion transformers after training (Q-DiT).")


if __name__ == "__main__":
    sys.exit(main())
