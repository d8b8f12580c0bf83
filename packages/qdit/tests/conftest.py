"""Small models that several tests use."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from qdit.calibration import Calibration


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
