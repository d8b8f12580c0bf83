"""Quantised models through diffusers' own `from_pretrained` and `save_pretrained` (specification, section 5.2).

diffusers has no function to register a quantisation method; `register` enters it into the two tables that the loader
reads, and lets DiT models apply what `config.json` says beyond diffusers' fields. Nothing happens on import.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from papercore.errors import InputError, located
from torch import nn

from qdit.conditioning import SHARED_KEY
from qdit.config import QDiTConfig, QuantMethod
from qdit.convert import attach, quantize
from qdit.original import SHIFT_KEY
from qdit.pipeline import apply_notes, check_tensors, describe, read_quantization_config
from qdit.targets import find_targets, install
from qdit.weights import read_files

KEY = "quantization_config"


def register() -> None:
    """Makes diffusers read and make models quantised by this package; may be called any number of times.

    Afterwards `DiTTransformer2DModel.from_pretrained(path)` and `DiTPipeline.from_pretrained(path)` read what
    `qdit.save_pretrained`, `model.save_pretrained` or `pipeline.save_pretrained` wrote, with any `torch_dtype`, and
    apply the original frequency shift and shared embedders of `config.json`. With
    `quantization_config=QDiTConfig(gptq=False, ...)` the model is quantised while it is loaded, from weights rounded to
    `torch_dtype`. A whole pipeline takes the setting as `DiffusersConfig(gptq=False, ...)` in a
    `PipelineQuantizationConfig(quant_mapping={"transformer": ...})`.

    diffusers refuses to cast such a model afterwards (`model.to(torch.float16)`): give `torch_dtype` when loading.
    """
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.QDIT.value] = QDiTQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.QDIT.value] = DiffusersConfig
    DiTTransformer2DModel.from_config = classmethod(_from_config)  # pyright: ignore[reportAttributeAccessIssue]


def _from_config(cls: type[DiTTransformer2DModel], config: Any = None, *arguments: Any, **keywords: Any) -> Any:
    """diffusers' `from_config`, which would ignore fields that the constructor does not have."""
    notes = {}
    if isinstance(config, dict):
        notes = {key: config[key] for key in (SHIFT_KEY, SHARED_KEY) if key in config}
        config = {key: value for key, value in config.items() if key not in notes}
    built = super(DiTTransformer2DModel, cls).from_config(config, *arguments, **keywords)
    with located("config.json"):
        apply_notes(built[0] if isinstance(built, tuple) else built, notes)
    return built


class DiffusersConfig(QuantizationConfigMixin):
    """A `quantization_config` as diffusers passes it around: the fields of `QDiTConfig`, or those of a checkpoint.

    Held as given and checked by the quantiser, which knows the file they came from.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method = QuantMethod.QDIT  # pyright: ignore[reportAttributeAccessIssue]
        self.values = {**values, "quant_method": values.get("quant_method", QuantMethod.QDIT.value)}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def __repr__(self) -> str:
        return f"DiffusersConfig({self.values})"

    def setting(self) -> QDiTConfig:
        """The setting to quantise with while loading.

        Raises:
            InputError: a wrong field, or a setting that needs calibration inputs.
        """
        fields = {key: value for key, value in self.values.items() if key != "quant_method"}
        config = QDiTConfig.from_dict(fields, KEY)
        if config.needs_calibration:
            wrong = ("gptq", True, "False") if config.gptq and config.wbits < 16 else ("act", "static", "dynamic")
            raise InputError(
                f"{KEY}: field {wrong[0]}",
                found=wrong[1],
                expected=f"{wrong[2]}: from_pretrained has no calibration inputs",
                hint="load the model in full precision and call qdit.quantize with calibration inputs",
            )
        return config


class QDiTQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a model."""

    def __init__(self, quantization_config: QDiTConfig | DiffusersConfig, **keywords: Any) -> None:
        if isinstance(quantization_config, QDiTConfig):
            quantization_config = DiffusersConfig(**quantization_config.to_dict())
        super().__init__(quantization_config, **keywords)
        self.config = quantization_config
        self.files: list[Path] = []
        if not self.pre_quantized:
            self.config.setting()  # refuses what cannot work before any weights are read

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Called with the map of devices before and after it is worked out.

        Raises:
            InputError: a model that is quantised while loading is spread over several devices.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise InputError(
                "device_map",
                found="several devices",
                expected="one, to quantise while loading",
                hint="save the quantised model and load that",
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.files = [Path(file) for file in checkpoint_files]
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Puts empty quantised layers in place and checks the files against them.

        diffusers itself would only warn of missing tensors and would silently cast scales of another type.

        Raises:
            InputError: as `qdit.load_pretrained`.
        """
        if not self.pre_quantized:
            find_targets(model, self.config.setting())
            return
        if not self.files:
            raise InputError("loader of diffusers", found="one that names no files", expected="diffusers 0.39 or newer")
        where = self.files[0].parent / "config.json"
        setting = read_quantization_config(self.config.to_dict(), where)
        with located(where):
            targets = find_targets(model, setting)
        with torch.device("meta"):
            for target in targets:
                install(model, target).backend = "auto"
        for file in self.files:
            if file.suffix != ".safetensors":
                raise InputError("weights are refused", where=file, found=file.suffix, expected="safetensors")
        check_tensors(model, read_files(self.files))
        attach(model, setting, targets, [])

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Quantises a model that was loaded in full precision."""
        if not self.pre_quantized:
            quantize(model, self.config.setting(), inplace=True)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def attach_quantizer(model: ModelMixin) -> None:
    """Notes on a quantised model what diffusers' `save_pretrained` asks for."""
    values = describe(model)
    notes: Any = model
    notes.register_to_config(**{KEY: values})
    notes.hf_quantizer = QDiTQuantizer(DiffusersConfig(**values), pre_quantized=True)


def detach_quantizer(model: ModelMixin) -> None:
    """Undoes `attach_quantizer` on a model that is no longer quantised."""
    notes: Any = model
    notes._internal_dict = type(notes.config)({key: value for key, value in notes.config.items() if key != KEY})
    notes.is_quantized = False
    for name in ("hf_quantizer", "quantization_method", "qdit_config", "qdit_targets", "qdit_records"):
        if hasattr(model, name):
            delattr(model, name)
