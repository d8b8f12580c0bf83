"""Small models that several tests use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from papercore.data.cifar_resnet import CifarResNet, resnet_file
from PIL import Image
from qdit.calibration import Calibration
from qdit.cifar10 import DIT
from safetensors.torch import save_file


@pytest.fixture
def model() -> DiTTransformer2DModel:
    """An untrained DiT of two blocks whose layers all matter."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


@pytest.fixture
def inputs() -> Calibration:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 1, 8, 8, generator=generator)
    return Calibration(
        x, torch.randint(1000, (24,), generator=generator), torch.randint(11, (24,), generator=generator)
    )


@pytest.fixture
def data(tmp_path) -> Path:
    """A one-block DiT, an untrained ResNet and 200 noise pictures."""
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 1,
        "sample_size": 32,
        "patch_size": 16,
        "num_embeds_ada_norm": 10,
    }
    for name in ("weights", "images/cifar10"):
        (tmp_path / name).mkdir(parents=True)
    model = DiTTransformer2DModel(**config)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, tmp_path / f"{DIT}.safetensors")
    (tmp_path / f"{DIT}.json").write_text(json.dumps({"config": {"_class_name": "DiTTransformer2DModel", **config}}))
    resnet = {k: v for k, v in CifarResNet(56).state_dict().items() if not k.endswith("batches_tracked")}
    save_file(resnet, resnet_file(tmp_path, 56))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "cifar10" / "test_00.webp", lossless=True)
    return tmp_path
