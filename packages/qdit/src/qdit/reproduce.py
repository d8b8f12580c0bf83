"""The claims of Q-DiT, re-tested on handwritten digits (arXiv 2406.17343, sections 3 and 4).

A small DiT is trained here, the channel spread of large DiTs is folded into it without changing its function, and
every setting is measured on inputs that calibration has not seen. The criteria are fixed in the code below and were
fixed before the measurement; none depends on another's outcome.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from papercore.data.digits import CLASSES
from papercore.images import grid_png, images_to_uint8
from papercore.progress import track
from papercore.report import Picture, Table
from papercore.reproduce import Claim, Paper, Reproduction, Settings
from papercore.training import TrainResult
from torch import Tensor, nn

from qdit.blockwise import cost_of
from qdit.calibration import Calibration, collect_calibration
from qdit.config import QDiTConfig
from qdit.convert import noise_error, quantize
from qdit.evaluate import image_distance, reference_images
from qdit.granularity import SearchResult, noise_fitness, search_group_sizes, sizes_picture
from qdit.layers import QuantLinear
from qdit.original import fold_channel_spread
from qdit.pipeline import WEIGHTS, load_pretrained, save_pretrained
from qdit.sampling import sample_many
from qdit.train import DEFAULT, train_digits

SAMPLES, STEPS = 600, 20
"""pictures for a Frechet distance, and sampling steps"""

DRAWS = 3
"""random channel spreads over which P is averaged; Frechet distances are measured with the first"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting and its figures."""

    name: str
    config: QDiTConfig
    error: float
    """P: mean squared change of the predicted noise over its mean square, mean over the draws"""
    frechet: float
    pixels: float
    """the same distance in the space of pixels"""


def setting(wbits: int, abits: int, group_size: int | None, *, act: str = "dynamic", gptq: bool = False) -> QDiTConfig:
    return QDiTConfig(wbits, abits, group_size, act=act, gptq=gptq)  # pyright: ignore[reportArgumentType]


GRID: Mapping[str, QDiTConfig] = {
    "W8A8 g32": setting(8, 8, 32),
    "W6A8 g32": setting(6, 8, 32),
    "W4A8 row": setting(4, 8, None),
    "W4A8 g64": setting(4, 8, 64),
    "W4A8 g32": setting(4, 8, 32),
    "W4A8 g16": setting(4, 8, 16),
    "W4A8 g8": setting(4, 8, 8),
    "W4A8 g32 GPTQ": setting(4, 8, 32, gptq=True),
    "W4A8 row static": setting(4, 8, None, act="static"),
    "W4A8 g32 static": setting(4, 8, 32, act="static"),
    "W16A8 g32": setting(16, 8, 32),
    "W16A8 g32 static": setting(16, 8, 32, act="static"),
    "W16A4 g32": setting(16, 4, 32),
    "W16A4 g32 static": setting(16, 4, 32, act="static"),
}


def run(settings: Settings) -> Reproduction:
    """The claims at the scale that is asked for."""
    if settings.scale == "small":
        from qdit import small

        return small.run(settings)
    return run_tiny(settings)


def run_tiny(settings: Settings) -> Reproduction:
    """Trains, folds, quantises in all settings of `GRID`, measures, judges."""
    config = dataclasses.replace(DEFAULT, seed=settings.seed)
    folder = settings.out / f"model-seed{settings.seed}"
    result = train_digits(folder, config, device=settings.device, label="qdit: training the digits DiT")
    assert isinstance(result.model, DiTTransformer2DModel)
    calibration = collect_calibration(result.model, samples=256, seed=settings.seed + 1)
    held_out = collect_calibration(result.model, samples=512, seed=settings.seed + 2)
    models = []
    for draw in range(DRAWS):
        models.append(copy.deepcopy(result.model))
        fold_channel_spread(models[-1], torch.Generator().manual_seed(settings.seed + draw))
    reference = reference_images("digits")
    labels = torch.arange(SAMPLES) % CLASSES

    def pictures(of: nn.Module) -> Tensor:
        return images_to_uint8(sample_many(of, labels, STEPS, guidance=None, seed=settings.seed + 3))

    def distances(images: Tensor) -> tuple[float, float]:
        return image_distance(images, reference, "digits")[0], image_distance(images, reference, "pixels")[0]

    full = pictures(models[0])
    full_distances = distances(full)
    rows: dict[str, Row] = {}
    grids = {"full precision": full}
    for name, chosen in track(GRID.items(), "qdit: settings", len(GRID)):
        quantised = [quantize(model, chosen, calibration) for model in models]
        error = sum(noise_error(*pair, held_out) for pair in zip(models, quantised, strict=True)) / DRAWS
        grids[name] = pictures(quantised[0])
        rows[name] = Row(name, chosen, error, *distances(grids[name]))
    claims = judge(rows, full_distances)
    searched, claim = search_claim(models, calibration, held_out, settings.seed)
    claims += [claim, integer_claim(models[0], held_out), checkpoint_claim(models[0], calibration)]
    claims.sort(key=lambda claim: claim.name)
    return Reproduction(
        claims,
        [error_table(rows, full_distances), ablation_table(rows), searched.table],
        [sample_picture(grids), error_picture(rows), sizes_picture(searched.best)],
        text=describe(result, len(held_out), image_distance(reference[::2], reference[1::2], "digits")[0]),
    )


def describe(result: TrainResult, held_out: int, halves: float) -> str:
    """What was measured, in words."""
    parameters = sum(p.numel() for p in result.model.parameters())
    return (
        f"A DiT of {parameters} parameters trained here on handwritten digits (loss {result.loss:.4f}), with the "
        "channel spread of large DiTs folded in. P is the mean squared change of the predicted noise over its mean "
        f"square on {held_out} inputs that calibration has not seen, averaged over {DRAWS} random spreads; FD the "
        f"Frechet distance of {SAMPLES} pictures ({STEPS} steps, no guidance) to the real digits in the features of a "
        f"classifier of digits (two halves of the real digits: {halves:.3g})."
    )


def judge(rows: Mapping[str, Row], full: tuple[float, float]) -> list[Claim]:
    """The claims that follow from the figures."""
    p = {name: row.error for name, row in rows.items()}
    fd = {name: row.frechet for name, row in rows.items()}
    return [
        Claim(
            "C1",
            "W4A8: smaller groups reduce the error",
            "FID 225.5 without groups, 13.8 with groups of 128 (ImageNet 256)",
            f"P row {p['W4A8 row']:.3g}, g32 {p['W4A8 g32']:.3g}, g16 {p['W4A8 g16']:.3g}",
            "g16 <= 0.6 x g32 and g32 <= 0.8 x row",
            p["W4A8 g16"] <= 0.6 * p["W4A8 g32"] and p["W4A8 g32"] <= 0.8 * p["W4A8 row"],
        ),
        Claim(
            "C2",
            "dynamic activation ranges beat static ones",
            "FID 13.8 static, 6.64 dynamic (W4A8)",
            f"P W16A8 g32 static {p['W16A8 g32 static']:.3g}, dynamic {p['W16A8 g32']:.3g}",
            "dynamic <= 0.5 x static",
            p["W16A8 g32"] <= 0.5 * p["W16A8 g32 static"],
        ),
        Claim(
            "C3",
            "GPTQ beats rounding to nearest",
            "no figure of its own",
            f"P W4A8 g32 rounding {p['W4A8 g32']:.3g}, GPTQ {p['W4A8 g32 GPTQ']:.3g}",
            "GPTQ <= 0.6 x rounding",
            p["W4A8 g32 GPTQ"] <= 0.6 * p["W4A8 g32"],
        ),
        Claim(
            "C5",
            "W8A8 and W6A8 are nearly lossless",
            "FID 5.31 full, 5.32 W6A8",
            f"FD full {full[0]:.4g}, W8A8 {fd['W8A8 g32']:.4g}, W6A8 {fd['W6A8 g32']:.4g}",
            "FD W8A8 <= 1.05 x full and W6A8 <= 1.1 x full",
            fd["W8A8 g32"] <= 1.05 * full[0] and fd["W6A8 g32"] <= 1.1 * full[0],
        ),
    ]


MENU, BUDGET = (8, 16, 32, 64), 32
"""group sizes to choose from, and the uniform size whose storage and rescaling may not be exceeded"""


def search_claim(
    models: Sequence[nn.Module], calibration: Calibration, held_out: Calibration, seed: int
) -> tuple[SearchResult, Claim]:
    """C4: sizes searched on calibration inputs against the uniform size of equal cost, on held-out inputs."""
    results = [
        search_group_sizes(
            model,
            setting(4, 8, BUDGET),
            noise_fitness(model, next(calibration.batches(128))),
            menu=MENU,
            limit=BUDGET,
            population=15,
            top_k=5,
            iterations=7,
            seed=seed,
            held_out=noise_fitness(model, held_out),
        )
        for model in models
    ]
    found, uniform = (
        sum(
            record["held-out fitness"]
            for result in results
            for record in result.table.records()
            if record["candidate"] == name
        )
        / len(results)
        for name in ("searched 1", f"uniform {BUDGET}")
    )
    claim = Claim(
        "C4",
        "searched group sizes beat the uniform size of equal cost",
        "FID 6.64 uniform 128, 6.40 searched (W4A8)",
        f"P on held-out inputs: uniform {BUDGET} {uniform:.3g}, searched {found:.3g}",
        "searched <= 0.9 x uniform",
        found <= 0.9 * uniform,
    )
    return results[0], claim


def integer_claim(model: nn.Module, inputs: Calibration) -> Claim:
    """C6: every layer with integer products against the same layer simulated, on the inputs it really gets."""
    quantised = quantize(model, GRID["W4A8 g32"], backend="simulate")
    worst = 0.0

    def compare(layer: QuantLinear, arguments: tuple[Tensor], simulated: Tensor) -> None:
        nonlocal worst
        layer.backend = "integer"
        exact = layer.forward(arguments[0]).double()
        layer.backend = "simulate"
        worst = max(worst, float((exact - simulated).norm() / simulated.double().norm()))

    handles = [
        module.register_forward_hook(compare) for module in quantised.modules() if isinstance(module, QuantLinear)
    ]
    inputs.run(quantised, next(inputs.batches(64)))
    for handle in handles:
        handle.remove()
    return Claim(
        "C6",
        "integer products give what the simulation gives",
        "no integer implementation",
        f"largest relative difference of a layer's output {worst:.1e}",
        "<= 1e-6",
        worst <= 1e-6,
    )


def checkpoint_claim(model: nn.Module, calibration: Calibration) -> Claim:
    """C7: the saved file has the computed size, and the reloaded model gives the same bits."""
    quantised = quantize(model, GRID["W4A8 g32 GPTQ"], calibration)
    x = next(calibration.batches(32))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(quantised, Path(folder))
        reloaded = load_pretrained(Path(folder))
        size = (Path(folder) / WEIGHTS).stat().st_size
        header = 8 + int.from_bytes((Path(folder) / WEIGHTS).read_bytes()[:8], "little")
    same = torch.equal(x.run(quantised, x), x.run(reloaded, x))
    # codes, scales and zero points (a byte each on disk) by the cost model; the rest by its element count
    targets = quantised.qdit_targets  # pyright: ignore[reportAttributeAccessIssue]
    costs = [cost_of(target) for target in targets]  # pyright: ignore[reportGeneralTypeIssues]
    packed = sum(cost.packed_bytes + cost.scale_bytes + cost.groups for cost in costs)
    members = {member for target in targets for member in target.members}  # pyright: ignore[reportGeneralTypeIssues]
    rest = sum(
        value.numel() * value.element_size()
        for name, value in model.state_dict().items()
        if name.removesuffix(".weight") not in members
    )
    return Claim(
        "C7",
        "the packed checkpoint has the computed size and reloads to the same bits",
        "347 MB against 1349 MB (DiT-XL/2, W4A8)",
        f"{size - header} bytes of tensors, computed {packed + rest}; same bits: {'yes' if same else 'no'}",
        "equal, and yes",
        size - header == packed + rest and same,
    )


def error_table(rows: Mapping[str, Row], full: tuple[float, float]) -> Table:
    values = [("full precision", 0.0, *full)] + [
        (row.name, row.error, row.frechet, row.pixels) for row in rows.values()
    ]
    return Table("error and Frechet distance of every setting", ("setting", "P", "FD", "FD in pixels"), values)


def ablation_table(rows: Mapping[str, Row]) -> Table:
    """What each step bought, in the order of the paper's ablation."""
    steps = [
        ("plain rounding, static ranges", "W4A8 row static", 225.50),
        ("+ groups (32 here, 128 in the paper)", "W4A8 g32 static", 13.77),
        ("+ dynamic activations", "W4A8 g32", 6.64),
        ("+ GPTQ", "W4A8 g32 GPTQ", None),
    ]
    values = [(step, rows[name].error, rows[name].frechet, paper) for step, name, paper in steps]
    return Table("what each step bought at W4A8", ("step", "P", "FD", "paper's FID"), values)


def sample_picture(grids: Mapping[str, Tensor]) -> Picture:
    """The first twenty pictures of four settings, from the same noise and labels."""
    chosen = ("full precision", "W8A8 g32", "W4A8 g32 GPTQ", "W4A8 row")
    grid = grid_png(torch.cat([grids[name][:20] for name in chosen]), 20, zoom=5)
    return Picture("Samples from the same noise", grid, "Rows from the top: " + ", ".join(chosen) + ".")


def error_picture(rows: Mapping[str, Row]) -> Picture:
    """P by group size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    names = ("W4A8 row", "W4A8 g64", "W4A8 g32", "W4A8 g16", "W4A8 g8")
    ticks = [name.split()[1] for name in names]
    axes.plot(ticks, [rows[name].error for name in names], "o-", label="W4A8, rounding")
    for name, style in (("W4A8 g32 GPTQ", "v"), ("W4A8 g32 static", "^"), ("W4A8 row static", "^")):
        axes.plot([name.split()[1]], [rows[name].error], style, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("group size (input channels)")
    axes.set_ylabel("P, relative error of the noise")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return Picture.of_figure(
        "Error by group size", figure, "Mean squared change of the predicted noise, held-out inputs."
    )


PAPER = Paper(
    package="qdit",
    title="Q-DiT: accurate post-training quantisation for diffusion transformers",
    reference="arXiv 2406.17343",
    scales=("tiny", "small"),
    run=run,
)
