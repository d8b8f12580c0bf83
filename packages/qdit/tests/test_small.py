"""The small scale, on a made-up data folder of the right layout; and on the real one when a path to it is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.errors import InputError
from papercore.reproduce import Settings
from PIL import Image
from qdit import small
from qdit.calibration import Calibration
from qdit.cifar10 import DIT, RESNET, ResNetFeatures, load_dit
from qdit.cifar10 import test_images as read_test_images
from qdit.config import QDiTConfig
from qdit.convert import noise_error, quantize

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_the_whole_of_it_runs_at_smallest_size(data, tmp_path):
    settings = Settings("small", tmp_path / "out", data, "cpu", 0, lambda text: None)
    result = small.run(settings, small.TINY)
    assert [claim.name for claim in result.claims] == ["C1", "C2", "C3", "C4", "C5"]
    rows = {row[0]: row for row in result.tables[0].rows}
    assert len(rows) == 19
    assert all(np.isfinite(row[2]) for row in rows.values())
    assert rows["W8A8 g64"][1] < rows["W4A8 g128 nearest dynamic"][1]
    assert result.tables[1].records()[0]["second fitness"] is not None
    assert (tmp_path / "out" / "search.jsonl").exists()


def test_mosaics_are_read_in_order(data):
    images = read_test_images(data)
    assert images.shape == (200, 32, 32, 3)
    mosaic = np.asarray(Image.open(data / "images" / "cifar10" / "test_00.webp"))
    assert np.array_equal(images[101].numpy(), mosaic[32:64, 32:64])


def test_missing_and_damaged_files_are_named(data):
    with pytest.raises(InputError, match="--data"):
        small.run(Settings("small", data, None, "cpu", 0, lambda text: None), small.TINY)
    (data / RESNET).write_bytes(b"junk")
    with pytest.raises(InputError, match=r"cifar10_resnet56\.safetensors: weights"):
        ResNetFeatures(data, "cpu")
    (data / "images" / "cifar10" / "test_00.webp").unlink()
    with pytest.raises(InputError, match="no test pictures"):
        read_test_images(data)
    (data / f"{DIT}.json").write_text('{"config": 3}')
    with pytest.raises(InputError, match=r"\.json: config"):
        load_dit(data)


@pytest.mark.skipif(not (REAL / RESNET).exists(), reason="the CIFAR-10 data folder is not beside the repository")
def test_the_real_weights():
    images = read_test_images(REAL)
    assert len(images) == 10_000
    found = ResNetFeatures(REAL, "cpu")(images[:200])
    accuracy = (found["probabilities"].argmax(1) == torch.arange(200) % 10).float().mean()
    assert accuracy >= 0.88
    generator = torch.Generator().manual_seed(0)
    model = load_dit(REAL)
    inputs = Calibration(
        torch.randn(4, 3, 32, 32, generator=generator),
        torch.tensor([999, 950, 900, 990]),
        torch.tensor([1, 2, 3, 10]),
    )
    # at the start of sampling the predicted noise is nearly the noise
    assert (inputs.run(model, inputs) - inputs.x).norm() < 0.25 * inputs.x.norm()
    errors = [noise_error(model, quantize(model, QDiTConfig(4, 8, g, gptq=False)), inputs) for g in (None, 32)]
    assert errors[1] < errors[0] < 0.05
