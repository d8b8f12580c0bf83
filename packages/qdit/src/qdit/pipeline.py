"""Models on disk: diffusers' layout, config.json and safetensors, with packed integers for quantised layers.

A quantised layer `<m>` is stored as `<m>.qweight` (packed codes), `<m>.scale` (the bits of float16 or float32 numbers
as integers, so that loaders that cast floating tensors leave them alone), `<m>.zero`, `<m>.bias`, and for static
activations `<m>.act_scale` and `<m>.act_zero`. `config.json` tells the rest under `quantization_config`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from papercore.errors import InputError, located
from papercore.report import Table
from papercore.rundir import atomic, check_output_folder, read_json, write_json
from safetensors.torch import save_file
from torch import Tensor, nn

from qdit.blockwise import LayerRecord
from qdit.conditioning import SHARED_KEY, follow_first_embedder
from qdit.config import QDiTConfig
from qdit.convert import attach
from qdit.layers import Backend, QuantLinear, scale_values
from qdit.original import SHIFT_KEY, set_frequency_shift
from qdit.targets import Target, find_targets, full_precision_layers, install
from qdit.weights import WEIGHTS, component, read_weights

FORMAT = 1

LEGACY_CLASS = "Transformer2DModel"
LEGACY_FIELDS = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
}
"""what the former class could be besides a DiT, and the value that says it is not"""


def save_pretrained(model: nn.Module, path: Path) -> None:
    """Writes a full-precision or quantised DiT to the folder `path`; `load_pretrained` reads it.

    Raises:
        InputError: not a DiT of diffusers.
    """
    if not isinstance(model, DiTTransformer2DModel):
        raise InputError("model", found=type(model).__name__, expected="DiTTransformer2DModel")
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    config = {"_class_name": "DiTTransformer2DModel", **config}
    quantised: QDiTConfig | None = getattr(model, "qdit_config", None)
    if quantised is not None:
        config["quantization_config"] = describe(model)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    folder = Path(path)
    check_output_folder(folder)
    # a folder is a model only with its configuration: it goes first and comes last
    (folder / "config.json").unlink(missing_ok=True)
    for stale in folder.glob(f"{Path(WEIGHTS).stem}*"):  # an index, shards, or weights of another model
        if stale.name != WEIGHTS:
            stale.unlink()
    with atomic(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def describe(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a quantised model."""
    config: QDiTConfig = model.qdit_config  # pyright: ignore[reportAssignmentType]
    targets: list[Target] = model.qdit_targets  # pyright: ignore[reportAssignmentType]
    granularity = {target.name: target.spec.act_granularity for target in targets if target.spec.abits < 16}
    one = set(granularity.values())
    return {
        "quant_method": "qdit",
        "format": FORMAT,
        "wbits": config.wbits,
        "abits": config.abits,
        "w_sym": config.w_sym,
        "a_sym": config.a_sym,
        "act": config.act,
        "act_granularity": granularity if len(one) > 1 else one.pop() if one else "token",
        "scale_dtype": config.scale_dtype,
        "group_sizes": {target.name: target.spec.group_size for target in targets},
        "modules_to_not_convert": list(config.modules_to_not_convert),
        "adaln_bits": config.adaln_bits,
        "gptq": {"percdamp": config.percdamp, "block_size": 128, "act_order": config.act_order}
        if config.gptq
        else None,
        "search": None,
    }


def read_quantization_config(values: Mapping[str, Any], where: Path) -> QDiTConfig:
    """The setting in a checkpoint's `quantization_config`.

    Raises:
        InputError: another method or format, unknown key, wrong type; names the file and the field.
    """
    if not isinstance(values, Mapping):
        raise InputError("quantization_config", where=where, found=values, expected="a mapping")
    values = dict(values)
    for key, expected in (("quant_method", "qdit"), ("format", FORMAT)):
        found = values.pop(key, None)
        if found != expected or isinstance(found, bool):
            raise InputError(f"quantization_config.{key}", where=where, found=repr(found), expected=repr(expected))
    if not isinstance(values.get("group_sizes"), Mapping):
        raise InputError(
            "quantization_config.group_sizes", where=where, found=values.get("group_sizes"), expected="sizes by layer"
        )
    values["group_size"] = dict(values.pop("group_sizes"))
    rounding = values.get("gptq")
    values["gptq"] = rounding is not None
    if rounding is not None:
        if not isinstance(rounding, Mapping) or set(rounding) - {"percdamp", "block_size", "act_order"}:
            expected = "nothing, or percdamp, block_size and act_order"
            raise InputError("quantization_config.gptq", where=where, found=rounding, expected=expected)
        values |= {key: value for key, value in rounding.items() if key != "block_size"}
    values.pop("search", None)
    with located(where):
        return QDiTConfig.from_dict(values, f"{where}: quantization_config")


def load_pretrained(path: Path, *, backend: Backend = "auto", check_finite: bool = False) -> DiTTransformer2DModel:
    """The DiT in the folder `path`, full-precision or quantised, on the CPU, in evaluation mode.

    Args:
        path: of the model, or of a pipeline of diffusers that has it as `transformer`. Published folders that call
            the class by its former name Transformer2DModel are read, too.
        backend, check_finite: of quantised layers, see `qdit.quantize`.

    Raises:
        InputError: a file is missing, damaged, of another format or model; names file and field or tensor. Pickled
            weights are refused.
    """
    path = component(path, "transformer")
    where = path / "config.json"
    config = read_json(where)
    found = config.get("_class_name") if isinstance(config, dict) else config
    if not isinstance(config, dict) or found not in ("DiTTransformer2DModel", LEGACY_CLASS):
        raise InputError("_class_name", where=where, found=repr(found), expected="'DiTTransformer2DModel'")
    if found == LEGACY_CLASS:
        config = without_legacy_fields(config, where)
    quantisation = config.pop("quantization_config", None)
    model = build_model(config, where)
    weights = read_weights(path)
    if quantisation is not None:
        setting = read_quantization_config(quantisation, where)
        with located(where):
            targets = find_targets(model, setting)
        for target in targets:
            layer = install(model, target)
            layer.backend, layer.check_finite = backend, check_finite
        attach(model, setting, targets, [])
    fill(model, weights)
    return model.eval()


def without_legacy_fields(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The configuration of a DiT without the fields that the former class had for other models.

    Raises:
        InputError: it describes another model.
    """
    for key, neutral in LEGACY_FIELDS.items():
        if config.get(key, neutral) not in (neutral, None):
            raise InputError(
                f"field {key}", where=where, found=repr(config[key]), expected=f"{neutral!r}, as a DiT has it"
            )
    if config.get("norm_type") != "ada_norm_zero" or config.get("patch_size") is None:
        found = f"{config.get('norm_type')!r} and {config.get('patch_size')!r}"
        raise InputError("norm_type and patch_size", where=where, found=found, expected="those of a DiT")
    return {key: value for key, value in config.items() if key not in LEGACY_FIELDS}


def build_model(config: Mapping[str, Any], where: Path) -> DiTTransformer2DModel:
    """A DiT of the described size with weights not set yet.

    Raises:
        InputError: a field of the wrong type or value.
    """
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    notes = {key: plain.pop(key) for key in (SHIFT_KEY, SHARED_KEY) if key in plain}
    integers = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
    for key in (*integers, "out_channels", "num_embeds_ada_norm"):
        value = plain.get(key)
        if key not in plain or (value is None and key == "out_channels"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"field {key}", where=where, found=repr(value), expected="a whole number of at least 1")
    epsilon = plain.get("norm_eps", 1e-5)
    if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise InputError("field norm_eps", where=where, found=repr(epsilon), expected="a number between 0 and 1")
    try:
        model = DiTTransformer2DModel(**plain)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, RuntimeError, NameError, KeyError) as error:
        raise InputError(
            "configuration of a DiT", where=where, found=str(error), expected="diffusers' fields"
        ) from error
    with located(where):
        apply_notes(model, notes)
    return model


def apply_notes(model: DiTTransformer2DModel, notes: Mapping[str, Any]) -> None:
    """Applies what `config.json` says beyond diffusers' fields: frequency shift and shared embedders.

    Raises:
        InputError: a value of the wrong type.
    """
    if SHIFT_KEY in notes:
        shift = notes[SHIFT_KEY]
        if not isinstance(shift, int | float) or isinstance(shift, bool):
            raise InputError(f"field {SHIFT_KEY}", found=repr(shift), expected="a number")
        set_frequency_shift(model, shift)
    shared = notes.get(SHARED_KEY, False)
    if not isinstance(shared, bool):
        raise InputError(f"field {SHARED_KEY}", found=repr(shared), expected="true or false")
    if shared:
        follow_first_embedder(model)


def fill(model: nn.Module, tensors: Mapping[str, tuple[Tensor, Path]]) -> None:
    """Copies `tensors` into `model` after checking them.

    Raises:
        InputError: see `check_tensors`.
    """
    check_tensors(model, tensors)
    missing, _ = model.load_state_dict({name: tensor for name, (tensor, _) in tensors.items()}, strict=False)
    assert set(missing) <= {"pos_embed.pos_embed"}


def check_tensors(model: nn.Module, tensors: Mapping[str, tuple[Tensor, Path]]) -> None:
    """Checks every name, shape, type and value against `model`, whose quantised layers are installed.

    Raises:
        InputError: names the file and the tensor.
    """
    wanted = model.state_dict()
    integers = {
        f"{name}.{key}": value.dtype
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for key, value in module.named_buffers()
    }
    where = next((file for _, file in tensors.values()), None)
    for name, present in wanted.items():
        if name not in tensors:
            if name.endswith("pos_embed.pos_embed"):
                continue  # a fixed table, made with the model
            raise InputError(f"tensor {name}", where=where, found="nothing", expected=f"shape {tuple(present.shape)}")
        tensor, file = tensors[name]
        if tensor.shape != present.shape:
            raise InputError(
                f"tensor {name}", where=file, found=f"shape {tuple(tensor.shape)}", expected=f"{tuple(present.shape)}"
            )
        integer = integers.get(name)
        if integer is not None and tensor.dtype != integer:
            raise InputError(
                f"tensor {name}",
                where=file,
                found=str(tensor.dtype),
                expected=str(integer),
                hint="scales are stored as integers; the file was cast by another program, quantise again",
            )
        if integer is None and tensor.is_floating_point() != present.is_floating_point():
            raise InputError(f"tensor {name}", where=file, found=str(tensor.dtype), expected=str(present.dtype))
        values = scale_values(tensor) if integer is not None and name.endswith("scale") else tensor
        if values.is_floating_point() and not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            raise InputError(f"tensor {name}", where=file, found=f"{bad} values that are not finite", expected="none")
    for name, (_, file) in tensors.items():
        if name not in wanted:
            raise InputError(f"tensor {name}", where=file, found="a tensor the model does not have", expected="none")


def model_bytes(model: nn.Module) -> int:
    """Bytes of all stored tensors."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def report(model: nn.Module) -> dict[str, Any]:
    """Bits and bytes of a just quantised model, layer by layer, and what was left in full precision."""
    records: list[LayerRecord] = model.qdit_records  # pyright: ignore[reportAssignmentType]
    columns = ("layer", "shape", "group", "short group", "bits/weight", "relative error", "dead inputs", "rounding")
    rows = [
        (
            record.name,
            f"{record.rows} x {record.columns}",
            record.group_size,
            record.short_group or None,
            record.bits_per_weight,
            record.weight_error,
            record.dead_columns or None,
            record.method,
        )
        for record in records
    ]
    weights = sum(record.rows * record.columns for record in records)
    return {
        "layers": Table("quantised layers", columns, rows),
        "bits_per_weight": sum(r.bits_per_weight * r.rows * r.columns for r in records) / weights,
        "bytes": model_bytes(model),
        "full_precision": full_precision_layers(model),
    }
