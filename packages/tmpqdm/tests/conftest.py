"""What several tests share."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import save_file
from tmpqdm.mnist import MnistDiT, MnistUNet
from tmpqdm.train import DIGITS, reduced, train_unet


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """The digits UNet after a few steps, as `tmpqdm train` leaves it."""
    folder = tmp_path_factory.mktemp("trained") / "digits"
    train_unet(folder, "digits", reduced(DIGITS, 4), device="cpu")
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """An untrained UNet that is faster still."""
    folder = tmp_path_factory.mktemp("small") / "unet"
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def mnist_files(tmp_path_factory) -> dict[str, Path]:
    """Small networks with random weights under the names of the published files."""
    folder = tmp_path_factory.mktemp("mnist")
    torch.manual_seed(0)
    unet, dit = MnistUNet((4, 6, 8)), MnistDiT(16, depth=2, heads=2)
    back = (("embedding", "pe.embedding"), ("time_in", "pe_linears_en"), ("time_out", "pe_linears_de"),
            ("time_middle", "pe_mid"), ("middle.", "mid."))  # fmt: skip
    tensors = {}
    for name, value in unet.state_dict().items():
        for new, old in back:
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        if name.startswith("ups.") and value.ndim == 4:
            value = value.reshape(-1, 2, 2, value.shape[1]).permute(3, 0, 1, 2)
        elif name.startswith("ups."):
            value = value[::4]
        tensors[name] = value.contiguous()
    save_file(tensors, folder / "unet.safetensors")
    tensors = {}
    for name, value in dit.state_dict().items():
        for new, old in (("to_q", "wq"), ("to_k", "wk"), ("to_v", "wv"), ("to_out.0", "lv")):
            name = name.replace(f"attention.{new}", old)
        if name.startswith("time."):
            name = f"time_emb.{int(name.split('.')[1]) + 1}.{name.split('.')[2]}"
        tensors["time_emb.0.half_emb" if name == "frequencies" else name] = value.contiguous()
    save_file(tensors, folder / "dit.safetensors")
    (folder / "notes.json").write_text(json.dumps({}))
    return {"unet": folder / "unet.safetensors", "dit": folder / "dit.safetensors"}
