"""The small scale, on a made-up data folder of the right layout; and on the real one when a path to it is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.data.cifar_resnet import CifarFeatures, resnet_file
from papercore.errors import InputError
from papercore.reproduce import Settings
from qdit import small
from qdit.calibration import Calibration
from qdit.cifar10 import DIT, load_dit
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


def test_missing_and_damaged_files_are_named(data):
    with pytest.raises(InputError, match="--data"):
        small.run(Settings("small", data, None, "cpu", 0, lambda text: None), small.TINY)
    resnet_file(data, 56).write_bytes(b"junk")
    with pytest.raises(InputError, match=r"cifar10_resnet56\.safetensors: weights"):
        CifarFeatures(data)
    (data / f"{DIT}.json").write_text('{"config": 3}')
    with pytest.raises(InputError, match=r"\.json: config"):
        load_dit(data)


@pytest.mark.skipif(not resnet_file(REAL, 56).exists(), reason="the CIFAR-10 data folder is not beside the repository")
def test_the_real_weights():
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
