"""`tmpqdm calibrate` and `tmpqdm export`."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_file, check_output_folder

if TYPE_CHECKING:
    from tmpqdm.plan import Plan

Positional = tyro.conf.Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(cli.Command):
    """Calibrate all bit-widths of a network once: a solver file that serves every plan.

    Long calibrations go on where they stopped when the same command is called again.
    """

    model: Positional[Path]
    """diffusers folder, or .safetensors file with its configuration beside it"""
    out: Path
    """the solver file, .safetensors"""
    data: Path | None = None
    """calibration set (.safetensors, .npz) or Q-Diffusion's .pt file; none: sampled with the network"""
    samples: int = 32
    """trajectories to sample"""
    steps: int = 100
    """steps of a trajectory"""
    use: int = 20
    """steps that are kept"""
    timesteps: tuple[int, ...] = ()
    """visit and keep exactly these, ascending, instead of --steps and --use"""
    labels: tuple[int, ...] = ()
    """classes of the trajectories, repeated as needed"""
    guidance: float | None = None
    """classifier-free guidance of class-conditional networks; both kinds of input are kept"""
    save_data: Path | None = None
    """also write the calibration set here"""
    bits: tuple[int, ...] = (8, 7, 6, 5)
    """the menu"""
    activations: Literal["symmetric", "asymmetric"] = "symmetric"
    """codes of activations"""
    softmax_bits: int = 8
    """bits of the softmax matrix; 0 leaves it in floating point"""
    search_softmax: bool = False
    """give the softmax matrix bits of its own in every attention"""
    split_shortcuts: bool = True
    """quantise the two inputs of a decoder's shortcut alone"""
    pin: tuple[str, ...] = ()
    """PATTERN=BITS of operations with fixed bits; first=8 and last=8 for the ends of the network"""
    method: Literal["adaround", "minmax", "mse"] = "adaround"
    """learned rounding and steps, whole ranges, or ranges that lose least"""
    weight_iters: int = 20000
    """iterations of rounding for every unit and bit-width"""
    act_iters: int = 5000
    """iterations of step sizes for every unit and bit-width"""
    batch_size: int = 32
    """samples an iteration"""
    prefix: Literal["same", "mixed"] = "same"
    """earlier units at the same bits, or at bits drawn at random"""
    seed: int = 0
    """of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    resume: bool = True
    """go on with an interrupted calibration; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        check_output_file(self.out, ".safetensors")
        pins = parse_pins(self.pin)
        from papercore.rundir import RunDir

        from tmpqdm.calibration import CalibrationSet, collect_calibration
        from tmpqdm.loading import load_model, load_scheduler
        from tmpqdm.solver import PrecisionSolver

        model = load_model(self.model).to(pick_device(self.device))
        solver = PrecisionSolver.from_model(
            model,
            bits=self.bits,
            act_symmetric=self.activations == "symmetric",
            softmax_bits="search" if self.search_softmax else self.softmax_bits or None,
            split_shortcuts=self.split_shortcuts,
            pin=pins,
        )
        settings = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in ("config", "json", "out", "resume", "save_data", "device", "model")
        }
        run = RunDir.open(
            self.out.with_suffix(".run"), settings | {"model_hash": solver.model_hash}, resume=self.resume
        )
        kept = run.path / "calibration.safetensors"
        units = run.path / "units"
        if not self.resume:
            kept.unlink(missing_ok=True)
            for file in units.glob("*.safetensors"):
                file.unlink()
        if self.data is not None and self.data.suffix in (".pt", ".pth"):
            data = CalibrationSet.from_q_diffusion(self.data, use=self.use, samples=self.samples)
        elif self.data is not None:
            data = CalibrationSet.load(self.data)
        elif kept.exists():
            data = CalibrationSet.load(kept)
        else:
            data = collect_calibration(
                model,
                load_scheduler(self.model),
                samples=self.samples,
                steps=self.steps,
                use=self.use,
                timesteps=list(self.timesteps) or None,
                labels=list(self.labels) or None,
                guidance=self.guidance,
                seed=self.seed,
            )
            data.save(kept)
        if self.save_data is not None:
            data.save(self.save_data)
        solver.calibrate(
            data,
            method=self.method,
            weight_iters=self.weight_iters,
            act_iters=self.act_iters,
            batch_size=self.batch_size,
            prefix=self.prefix,
            seed=self.seed,
            progress=say,
            resume=units,
        )
        errors = {bits: solver.errors(data, solver.uniform(bits), batch_size=self.batch_size) for bits in solver.bits}
        solver.save(self.out)
        for file in units.glob("*.safetensors"):
            file.unlink()
        return {
            "solver": self.out,
            "operations": len(solver.ops),
            "genes": sum(len(op.genes) for op in solver.ops),
            "split shortcuts": len(solver.splits),
            "unused layers": list(solver.unused),
            "samples": len(data),
            "mean relative error of the units' outputs": {
                f"{bits} bits": sum(found.values()) / len(found) for bits, found in errors.items()
            },
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(cli.Command):
    """Write the network of a plan: packed integer weights that load without calibration, or torchao's configuration.

    The exported network is loaded again, and its outputs must equal those of the simulated one.
    """

    plan: Positional[Path]
    """plan.json of a search"""
    model: Path
    """the network the plan is for: diffusers folder or .safetensors file"""
    solver: Path
    """the solver file of `calibrate`"""
    out: Path
    """folder for model.safetensors and config.json, or for torchao.json"""
    to: Literal["safetensors", "torchao"] = "safetensors"
    """packed integers, or a configuration file for torchao's linear layers"""
    data: Path | None = None
    """calibration set whose first samples are compared; none: random inputs"""
    samples: int = 8
    """inputs to compare on"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if self.samples < 1:
            raise InputError("--samples", found=self.samples, expected="at least 1")
        plan = read_plan(self.plan)
        from papercore.rundir import write_json

        from tmpqdm.calibration import CalibrationSet
        from tmpqdm.export import check_equal, export, load_exported, torchao_config
        from tmpqdm.loading import load_model
        from tmpqdm.models import example_inputs
        from tmpqdm.solver import PrecisionSolver

        model = load_model(self.model)
        solver = PrecisionSolver.load(self.solver, model)
        plan.check_model(solver.model_hash)
        if self.to == "torchao":
            written = torchao_config(solver, plan.bits)
            write_json(self.out / "torchao.json", written)
            return {
                "file": self.out / "torchao.json",
                "linear layers": len(written["modules"]),
                "layers that stay in floating point": written["not_covered"],
            }
        inputs = example_inputs(model, self.samples)
        if self.data is not None:
            data = CalibrationSet.load(self.data)[: self.samples]
            data.validate(model)
            inputs = (data.x, data.t, dict(data.cond))
        extra = {"timesteps": plan.timesteps, "sampler": plan.sampler, "schedule": dict(plan.schedule)}
        size = export(solver, plan.bits, self.out, extra)
        difference = check_equal(solver.apply(plan.bits), load_exported(self.out), inputs)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {
            "folder": self.out,
            "bytes": size,
            "bytes in float32": 4 * parameters,
            "largest difference to the simulated network": difference,
            "inputs compared": len(inputs[0]),
        }


def read_plan(path: Path) -> "Plan":
    """A plan with one set of bits.

    Raises:
        InputError: no plan, or one whose bits differ from step to step.
    """
    from tmpqdm.plan import Plan

    plan = Plan.load(path)
    if plan.per_step_bits:
        raise InputError("per_step_bits", where=path, found="bits of every step", expected="one set for all steps",
                         hint="export every step's bits as a plan of its own")  # fmt: skip
    return plan


def parse_pins(texts: tuple[str, ...]) -> dict[str, int]:
    """Raises InputError unless every text is PATTERN=BITS."""
    pins = {}
    for text in texts:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdigit():
            raise InputError("--pin", found=text, expected="PATTERN=BITS")
        pins[pattern] = int(bits)
    return pins


def pick_device(device: str) -> str:
    """ "auto" resolved.

    Raises:
        InputError: "cuda" without a GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def say(text: str) -> None:
    """A line for the user on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
