"""The safetensors files of a model folder in diffusers' layout; pickles are refused."""

from collections.abc import Sequence
from pathlib import Path

from papercore.errors import InputError
from papercore.rundir import read_json
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"


def component(path: Path, name: str) -> Path:
    """The folder of a model: `path` itself, or its sub-folder `name` when `path` is a pipeline of diffusers."""
    path = Path(path)
    return path / name if (path / "model_index.json").exists() else path


def read_weights(path: Path) -> dict[str, tuple[Tensor, Path]]:
    """All tensors of a model folder and the file each came from."""
    return read_files(weight_files(path))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or shards with an index.

    Raises:
        InputError: there are none (pickles are refused), or the index points outside the folder.
    """
    index = path / f"{WEIGHTS}.index.json"
    files = [path / WEIGHTS]
    if index.exists():
        content = read_json(index)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(Path(str(name)).name == name for name in names.values()):
            raise InputError(
                "weight_map", where=index, found=names, expected="tensor names to file names in this folder"
            )
        files = [path / name for name in sorted(set(names.values()))]
    elif not files[0].exists():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
        if pickles:
            raise InputError(
                "pickled weights are refused",
                where=path / pickles[0],
                expected=WEIGHTS,
                hint="convert them to safetensors",
            )
        raise InputError("no weights", where=path, expected=WEIGHTS)
    return files


def read_files(files: Sequence[Path]) -> dict[str, tuple[Tensor, Path]]:
    """All tensors of safetensors files and the file each came from.

    Raises:
        InputError: a damaged file, or one of another format.
    """
    tensors: dict[str, tuple[Tensor, Path]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensors[name] = (opened.get_tensor(name), file)
        except (SafetensorError, OSError) as error:
            raise InputError(
                "damaged weights", where=file, found=str(error), expected="a whole safetensors file"
            ) from error
    return tensors
