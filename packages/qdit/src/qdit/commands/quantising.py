"""Commands on the way to a quantised model: calibration, search, quantisation."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError, located
from papercore.rundir import check_output_file, check_output_folder

from qdit.commands.options import Device, Positional, parse_limit, pick_device, say

PROGRESS = "gptq-progress"
"""folder in --out with the blocks that GPTQ has finished"""


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
    fitness: Literal["noise", "frechet"] = "noise"
    """what candidates are ranked by: error of the predicted noise, or Frechet distance of sampled pictures"""
    rerank: bool = False
    """rank the best ten again by Frechet distance at the end"""
    reference: str = "digits"
    """real pictures for the Frechet distance: .npz of uint8 images, or digits"""
    features: str = "digits"
    """feature space of the Frechet distance: digits, pixels, inception, or module:function"""
    pictures: int = 2000
    """sampled for a Frechet distance, the same noise and labels for every candidate"""
    steps: int = 50
    """sampling steps of those pictures"""
    guidance: float = 1.5
    """classifier-free guidance weight of those pictures; 1 for none"""
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
        distance = self.frechet(model) if self.rerank or self.fitness == "frechet" else None
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
                distance if distance is not None and self.fitness == "frechet" else noise_fitness(model, inputs[0]),
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
                rerank=distance if self.rerank else None,
                notes={"fitness": self.fitness, "frechet": self.frechet_notes() if self.fitness == "frechet" else {}},
                alone=not self.join,
            )
        write_json(self.out / "plan.json", result.best)
        sections = [
            Section("Group sizes", tables=(result.table, result.pareto), pictures=(sizes_picture(result.best),))
        ]
        write_html(self.out / "report.html", "Search for group sizes", sections)
        write_markdown(self.out / "report.md", "Search for group sizes", sections)
        return {"plan": self.out / "plan.json", "candidates": result.table, "evaluations": len(result.evaluations)}

    def frechet(self, model: Any) -> Any:
        """The fitness that samples pictures."""
        import torch

        from qdit.evaluate import reference_images
        from qdit.granularity import frechet_fitness

        if self.pictures < 2 or self.steps < 1:
            raise InputError(
                "--pictures and --steps", found=f"{self.pictures} and {self.steps}", expected="at least 2 and 1"
            )
        if model.config.in_channels not in (1, 3):
            raise InputError(
                "field in_channels",
                where=self.model,
                found=model.config.in_channels,
                expected="1 or 3, which are pixels, for a Frechet distance",
            )
        labels = torch.arange(self.pictures) % model.config.num_embeds_ada_norm
        return frechet_fitness(
            reference_images(self.reference),
            self.features,
            labels,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
        )

    def frechet_notes(self) -> dict[str, Any]:
        """What the Frechet distance depends on."""
        return {
            name: getattr(self, name) for name in ("reference", "features", "pictures", "steps", "guidance", "seed")
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(cli.Command):
    """Quantise a DiT and save it as packed integers."""

    model: Positional[Path]
    """folder of a full-precision DiT (config.json and safetensors)"""
    out: Path
    """folder for the quantised model; finished blocks are kept in it, so that the same call goes on when interrupted"""
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
    act_order: bool = False
    """GPTQ: columns with large inputs first"""
    percdamp: float = 0.01
    """GPTQ: damping, as a share of the Hessian's mean diagonal"""
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
                act_order=self.act_order,
                percdamp=self.percdamp,
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
            quantised = quantize(model, config, calibration, inplace=True, progress=self.out / PROGRESS)
        save_pretrained(quantised, self.out)
        shutil.rmtree(self.out / PROGRESS, ignore_errors=True)
        return {"model": self.out, **report(quantised)}
