"""The loaders of real pictures, on made-up mosaics; and on the real ones when they are beside the repository."""

from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.data.cifar import cifar
from papercore.data.cifar_resnet import CifarFeatures, CifarResNet, load_cifar_resnet, resnet_file
from papercore.errors import InputError
from papercore.weights import load_exactly, read_tensors
from PIL import Image
from safetensors.torch import save_file

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def mosaic(tmp_path):
    folder = tmp_path / "images" / "cifar100"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3200, 3), dtype=np.uint8)
    for number in (0, 1):
        Image.fromarray(pixels[::-1] if number else pixels).save(folder / f"test_0{number}.webp", lossless=True)
    return pixels


def test_mosaics_are_read_in_order(mosaic, tmp_path):
    images, labels = cifar(tmp_path, "test", "cifar100")
    assert images.shape == (400, 32, 32, 3)
    assert np.array_equal(images[101].numpy(), mosaic[32:64, 32:64])
    assert labels[101] == 1
    assert np.array_equal(images[299].numpy(), mosaic[::-1][:32, 3168:])
    assert torch.equal(cifar(tmp_path, "test", "cifar100", limit=150).images, images[:150])


def test_missing_and_damaged_pictures_are_named(mosaic, tmp_path):
    with pytest.raises(InputError, match="no train pictures"):
        cifar(tmp_path, "train", "cifar100")
    (tmp_path / "images/cifar100/test_00.webp").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"test_00\.webp: picture"):
        cifar(tmp_path, "test", "cifar100")
    Image.new("RGB", (64, 64)).save(tmp_path / "images/cifar100/test_00.webp")
    with pytest.raises(InputError, match="size of a mosaic"):
        cifar(tmp_path, "test", "cifar100")


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_parameters_of_the_residual_networks(depth, parameters):
    """The paper's 0.27, 0.46, 0.85 and 1.7 million."""
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


def test_depth_must_be_one_that_exists():
    with pytest.raises(InputError, match="6n"):
        CifarResNet(18)


def test_weights_are_checked_before_they_are_used(tmp_path):
    model = CifarResNet(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: torch.zeros_like(value) for name, value in before.items() if not name.endswith("tracked")}
    for spoil, said in (
        (lambda t: t.pop("linear.bias"), "tensor linear.bias: found nothing"),
        (lambda t: t.update({"linear.bias": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda t: t.update({"linear.bias": torch.full((10,), float("nan"))}), "not finite"),
        (lambda t: t.update({"extra": torch.zeros(3)}), "tensor extra"),
    ):
        spoiled = dict(tensors)
        spoil(spoiled)
        with pytest.raises(InputError, match=said):
            load_exactly(model, spoiled, tmp_path / "w.safetensors")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_exactly(model, tensors, tmp_path / "w.safetensors")
    assert not model.linear.weight.any()
    (tmp_path / "w.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"w\.safetensors: weights"):
        read_tensors(tmp_path / "w.safetensors")


def test_features_are_those_of_the_network(tmp_path):
    torch.manual_seed(0)
    model = CifarResNet(8).eval()
    (tmp_path / "weights").mkdir()
    save_file(dict(model.state_dict()), resnet_file(tmp_path, 8))
    pictures = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    found = CifarFeatures(tmp_path, depth=8)(pictures)
    x = (pictures.permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        assert torch.allclose(found["probabilities"], model(x).softmax(1), atol=1e-6)
        assert torch.allclose(model.linear(found["features"]), model(x), atol=1e-5)


@pytest.mark.skipif(not resnet_file(REAL, 20).exists(), reason="the CIFAR-10 data folder is not beside the repository")
def test_the_real_weights_and_pictures():
    images, labels = cifar(REAL, "test")
    assert len(images) == 10_000
    model = load_cifar_resnet(REAL, 20)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    found = CifarFeatures(REAL)(images[:200])
    assert (found["probabilities"].argmax(1) == labels[:200]).float().mean() >= 0.88
