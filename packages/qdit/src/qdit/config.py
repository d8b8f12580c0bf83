"""What to quantise, to how many bits, in groups of what size (Q-DiT, arXiv 2406.17343, section 3)."""

import dataclasses
import enum
import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from papercore.config import build
from papercore.errors import InputError
from papercore.rundir import read_json

GroupSize = int | None
"""columns a group; None: whole rows of a weight, whole tokens of an activation"""

GRANULARITIES = ("token", "sample", "tensor")


class QuantMethod(enum.StrEnum):
    """The name of the method in `quantization_config`; diffusers wants a text that is an enumeration."""

    QDIT = "qdit"


@dataclasses.dataclass(frozen=True)
class QDiTConfig:
    """The setting of a quantised model."""

    wbits: int = 4
    """bits of a weight, 2 to 8; 16 leaves weights alone"""
    abits: int = 8
    """bits of an activation, 2 to 8; 16 leaves activations alone"""
    group_size: int | dict[str, int | None] | tuple[int | None, ...] | None = 128
    """one size for all layers; or sizes by pattern of layer names, the first that matches; or one size a layer in the
    order qkv, attention output, first and second layer of the MLP, block after block. The activation of a layer has
    the size of its weight"""
    w_sym: bool = False
    """symmetric weights"""
    a_sym: bool = False
    """symmetric activations"""
    act: Literal["dynamic", "static", "none"] = "dynamic"
    """activation ranges from the data at hand, from calibration, or activations left alone"""
    act_granularity: str | dict[str, str] = "token"
    """what shares a dynamic range, in every group: a token, the tokens of a sample, or the whole tensor; one for all
    layers or by pattern"""
    gptq: bool = True
    """round weights with GPTQ (needs calibration); False rounds to nearest"""
    act_order: bool = False
    """GPTQ takes columns with large inputs first; scales then come from the uncorrected weights"""
    percdamp: float = 0.01
    """GPTQ's damping, as a share of the mean diagonal of the Hessian"""
    adaln_bits: int | None = None
    """bits of the adaLN layers' weights; None leaves them alone"""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """precision in which weight scales are used and stored"""
    modules_to_not_convert: tuple[str, ...] = ()
    """patterns of layer names to leave in full precision"""

    quant_method: ClassVar[QuantMethod] = QuantMethod.QDIT

    def __post_init__(self) -> None:
        for name in ("wbits", "abits"):
            bits = getattr(self, name)
            if not _is_int(bits) or not (2 <= bits <= 8 or bits == 16):
                raise InputError(f"field {name}", found=bits, expected="2 to 8, or 16 for none")
        if self.wbits == 16 and self.abits == 16:
            raise InputError("fields wbits and abits", found="16 and 16", expected="at least one below 16")
        if self.adaln_bits is not None and (not _is_int(self.adaln_bits) or not 2 <= self.adaln_bits <= 8):
            raise InputError("field adaln_bits", found=self.adaln_bits, expected="2 to 8, or nothing")
        for name, allowed in (("act", ("dynamic", "static", "none")), ("scale_dtype", ("float16", "float32"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"field {name}", found=getattr(self, name), expected=" or ".join(allowed))
        damping = self.percdamp
        if not isinstance(damping, int | float) or isinstance(damping, bool) or not 0 <= damping < math.inf:
            raise InputError("field percdamp", found=damping, expected="a number of at least 0")
        if self.act == "static" and self.a_sym:
            raise InputError("field a_sym", found=True, expected="false: static ranges are asymmetric")
        for size in self._sizes():
            check_group_size(size, "field group_size")
        granularities = self.act_granularity
        for value in granularities.values() if isinstance(granularities, Mapping) else (granularities,):
            if value not in GRANULARITIES:
                raise InputError("field act_granularity", found=value, expected=" or ".join(GRANULARITIES))

    def _sizes(self) -> Sequence[GroupSize]:
        if isinstance(self.group_size, Mapping):
            return list(self.group_size.values())
        return list(self.group_size) if isinstance(self.group_size, list | tuple) else [self.group_size]

    @property
    def needs_calibration(self) -> bool:
        return (self.gptq and self.wbits < 16) or (self.act == "static" and self.abits < 16)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the name of the method, as diffusers passes settings around."""
        return {"quant_method": str(self.quant_method), **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: object) -> "QDiTConfig":
        """The configuration of a checkpoint's `quantization_config` or of a settings file.

        Raises:
            InputError: unknown key, wrong type, value out of range; names `where` and the key.
        """
        return build(cls, values, where)


def check_group_size(size: object, what: str) -> None:
    """Raises InputError unless `size` is None or a whole number of at least 1."""
    if size is not None and (not _is_int(size) or size < 1):  # pyright: ignore[reportOperatorIssue]
        raise InputError(what, found=size, expected="a whole number of at least 1, or 'row' for whole rows")


def read_plan(path: Path) -> tuple[dict[str, GroupSize], dict[str, str]]:
    """Group sizes and granularities by layer pattern, from a JSON file.

    `{"transformer_blocks.0.attn1.qkv": 32, "*.ff.*": "row", "*": {"group_size": 64, "act_granularity": "sample"}}`

    Raises:
        InputError: not such a file; names file and key.
    """
    plan = read_json(path)
    if not isinstance(plan, dict) or not plan:
        raise InputError(
            "the whole file", where=path, found=plan, expected="a mapping of layer patterns to group sizes"
        )
    sizes: dict[str, GroupSize] = {}
    granularities: dict[str, str] = {}
    for pattern, value in plan.items():
        entry = value if isinstance(value, dict) else {"group_size": value}
        unknown = set(entry) - {"group_size", "act_granularity"}
        if unknown or "group_size" not in entry:
            raise InputError(
                f"layer {pattern}",
                where=path,
                found=f"{value}",
                expected="a group size, or group_size and act_granularity",
            )
        size = None if entry["group_size"] == "row" else entry["group_size"]
        if entry["group_size"] is None or (size is not None and (not _is_int(size) or size < 1)):
            raise InputError(
                f"layer {pattern}: group_size",
                where=path,
                found=repr(size),
                expected="a whole number of at least 1 or 'row'",
            )
        granularity = entry.get("act_granularity", "token")
        if granularity not in GRANULARITIES:
            raise InputError(
                f"layer {pattern}: act_granularity",
                where=path,
                found=repr(granularity),
                expected=" or ".join(GRANULARITIES),
            )
        sizes[pattern], granularities[pattern] = size, granularity
    return sizes, granularities


def match(patterns: Mapping[str, Any], name: str) -> str | None:
    """The first pattern that is or matches `name`; an exact name wins."""
    if name in patterns:
        return name
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
