"""Where a quantised model errs: every layer's own error by timestep, and its pictures beside the original's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from papercore.errors import InputError
from papercore.images import grid_png, images_to_uint8
from papercore.quant import fake_quantize
from papercore.report import Picture, Section, Table
from torch import Tensor, nn
from torch.nn import functional

from qdit.blockwise import BATCH
from qdit.calibration import Calibration
from qdit.convert import noise_error
from qdit.granularity import sizes_picture
from qdit.layers import QuantLinear
from qdit.sampling import sample_many
from qdit.targets import Target, full_weight

HALF_MAX = 65504.0
"""the largest float16 number"""


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """Relative errors [layers, buckets]; NaN where no input fell into a bucket."""

    layers: list[str]
    buckets: list[tuple[int, int]]
    """first and last timestep of every bucket"""
    values: Float[Tensor, "layers buckets"]
    largest: Float[Tensor, "layers buckets"]
    """the largest magnitude of an input"""
    inputs: Float[Tensor, "layers 2"]
    """squared change of the input over its square when it is quantised token by token, asymmetric and symmetric; NaN
    for layers whose input is left alone"""


@torch.no_grad()
def layer_errors(model: nn.Module, quantised: nn.Module, calibration: Calibration, buckets: int = 10) -> LayerErrors:
    """Every quantised layer alone, on the inputs that it gets in the full-precision model.

    The error is the squared change of the layer's output over its square, summed over the inputs of a timestep bucket:
    what the layer does by itself, without the errors of the layers before it.

    Args:
        model: full precision.
        quantised: made from it.
        calibration: inputs; their timesteps are cut into `buckets` equal ranges of 0..999.

    Raises:
        InputError: the second model is not a quantised form of the first.
    """
    targets: list[Target] = getattr(quantised, "qdit_targets", None) or []
    if not targets:
        raise InputError("quantised model", found="no quantised layer", expected="a model of qdit.quantize")
    width = 1000 // buckets
    sums = torch.zeros(2, len(targets), buckets, dtype=torch.float64)
    largest = torch.full((len(targets), buckets), -torch.inf)
    changed, square = torch.zeros(len(targets), 2, dtype=torch.float64), torch.zeros(len(targets), dtype=torch.float64)
    bucket = torch.zeros(0, dtype=torch.long)

    def watch(index: int, layer: QuantLinear, weight: Tensor, bias: Tensor | None):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            plain = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            change = (layer.forward(x) - plain).double().square().flatten(1).sum(1).cpu()
            total = plain.double().square().flatten(1).sum(1).cpu()
            sums[0, index].index_add_(0, bucket, change)
            sums[1, index].index_add_(0, bucket, total)
            largest[index].scatter_reduce_(0, bucket, x.abs().flatten(1).amax(1).float().cpu(), "amax")
            square[index] += x.double().square().sum().cpu()
            for kind in (0, 1):
                spec = layer.spec
                near = x if spec.act == "none" else fake_quantize(x, spec.abits, spec.group_size, symmetric=kind == 1)
                changed[index, kind] += (near - x).double().square().sum().cpu()

        return hook

    handles = []
    for index, target in enumerate(targets):
        try:
            member = model.get_submodule(target.members[0])
            layer = quantised.get_submodule(target.name)
            weight, bias = full_weight(model, target)
        except AttributeError as error:
            raise InputError(
                "full-precision model", found=f"no layer {target.members[0]}", expected="the original"
            ) from error
        if not isinstance(layer, QuantLinear) or weight.shape != (layer.rows, layer.columns):
            raise InputError(
                f"layer {target.name}", found=tuple(weight.shape), expected=f"{target.rows} x {target.columns}"
            )
        handles.append(member.register_forward_pre_hook(watch(index, layer, weight, bias)))
    try:
        for batch in calibration.batches(BATCH):
            bucket = (batch.t.cpu() // width).clamp(max=buckets - 1)
            calibration.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    ranges = [(i * width, (i + 1) * width - 1 if i + 1 < buckets else 999) for i in range(buckets)]
    largest[largest.isinf() & (largest < 0)] = torch.nan
    quantised_inputs = torch.tensor([target.spec.act != "none" for target in targets])
    inputs = torch.where(quantised_inputs[:, None], changed / square[:, None], torch.nan)
    return LayerErrors([target.name for target in targets], ranges, sums[0] / sums[1], largest, inputs)


def errors_picture(errors: LayerErrors) -> Picture:
    """The errors as a heat map."""
    title, note = "Error by layer and timestep", "Every layer alone, on full-precision inputs."
    return heat_map(errors, errors.values, title, "relative error of the output", note)


def ranges_picture(errors: LayerErrors) -> Picture:
    """The largest inputs as a heat map."""
    note = "The largest magnitude among the inputs of every layer, in full precision."
    return heat_map(errors, errors.largest, "Range of the inputs by layer and timestep", "largest magnitude", note)


def heat_map(errors: LayerErrors, values: Tensor, title: str, label: str, note: str) -> Picture:
    """Values [layers, buckets], layers from top to bottom, timesteps from left to right, logarithmic colours."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 * len(errors.buckets) + 4, 0.22 * len(errors.layers) + 1.5))
    axes = figure.add_subplot()
    image = axes.imshow(values.clamp(min=1e-12).numpy(), aspect="auto", cmap="magma_r", norm=LogNorm())
    figure.colorbar(image, ax=axes, label=label)
    axes.set_yticks(range(len(errors.layers)), errors.layers, fontsize=6)
    axes.set_xticks(range(len(errors.buckets)), [f"{a}-{b}" for a, b in errors.buckets], fontsize=6, rotation=45)
    axes.set_xlabel("timestep")
    return Picture.of_figure(title, figure, note)


def samples_picture(
    model: nn.Module, quantised: nn.Module, *, steps: int, guidance: float | None, seed: int
) -> Picture:
    """Twenty pictures in full precision, quantised, and their difference, from the same noise and labels."""
    classes: int = model.config.num_embeds_ada_norm  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    labels = torch.arange(20) % classes
    first, second = (sample_many(of, labels, steps, guidance=guidance, seed=seed) for of in (model, quantised))
    images = images_to_uint8(torch.cat([first, second, second - first]))
    grid = grid_png(images, 20, zoom=max(1, 40 // images.shape[1]))
    return Picture("Samples from the same noise", grid, "Rows: full precision, quantised, difference (grey is none).")


def diagnose(
    model: nn.Module, quantised: nn.Module, calibration: Calibration, *, steps: int, guidance: float | None, seed: int
) -> tuple[Mapping[str, Any], list[Section]]:
    """What `qdit report` prints, and the sections of its page."""
    errors = layer_errors(model, quantised, calibration)
    targets: list[Target] = quantised.qdit_targets  # pyright: ignore[reportAssignmentType]
    rows = [
        (
            t.name,
            f"{t.rows} x {t.columns}",
            t.spec.wbits,
            t.spec.abits,
            t.spec.group_size,
            float(v.nanmean()),
            float(v.nan_to_num(0).max()),
            *(None if value.isnan() else float(value) for value in inputs),
            float(r.nan_to_num(0).max()),
        )
        for t, v, inputs, r in zip(targets, errors.values, errors.inputs, errors.largest, strict=True)
    ]
    columns = (
        "layer",
        "shape",
        "weight bits",
        "activation bits",
        "group",
        "mean error",
        "worst bucket",
        "input error, asymmetric",
        "input error, symmetric",
        "largest input",
    )
    table = Table("quantised layers", columns, rows)
    sizes = sizes_picture({target.name: target.spec.group_size for target in targets})
    pictures = [errors_picture(errors), ranges_picture(errors), sizes]
    if quantised.config.in_channels in (1, 3):  # pyright: ignore[reportAttributeAccessIssue]
        pictures.append(samples_picture(model, quantised, steps=steps, guidance=guidance, seed=seed))
    p = noise_error(model, quantised, calibration)
    text = f"P, the relative error of the predicted noise, is {p:.4g} on {len(calibration)} inputs."
    over = [
        name for name, most in zip(errors.layers, errors.largest, strict=True) if most.nan_to_num(0).max() > HALF_MAX
    ]
    if over:
        text += f" Inputs above {HALF_MAX:.0f}, which float16 cannot hold: {', '.join(over)}."
    return {"noise_error": p, "layers": table, "above_float16": over}, [Section("Errors", text, (table,), pictures)]
