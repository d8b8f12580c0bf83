"""The MNIST networks against their weights' meaning, and searches on the real files where they lie beside the
repository."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from papercore import cli
from papercore.diffusion import add_noise, linear_alphas_cumprod
from papercore.images import write_images
from safetensors.torch import load_file
from tmpqdm.cli import COMMANDS
from tmpqdm.loading import load_model
from tmpqdm.mnist import load_mnist

DATA = Path(__file__).parents[4] / "shared" / "data"
UNET, DIT = (DATA / "weights" / f"mnist_{name}.safetensors" for name in ("ddpm_unet_c10_20_40_80", "dit_w64_d3_h4_p4"))
CIFAR = DATA / "weights" / "cifar10_dit_w256_d8_h4_p4.safetensors"


def test_a_transposed_convolution_is_a_convolution_and_a_shuffle(mnist_files):
    model = load_mnist(mnist_files["unet"])
    tensors = load_file(mnist_files["unet"])
    x = torch.randn(2, tensors["ups.0.weight"].shape[0], 3, 3)
    expected = F.conv_transpose2d(x, tensors["ups.0.weight"], tensors["ups.0.bias"], stride=2)
    torch.testing.assert_close(F.pixel_shuffle(model.ups[0](x), 2), expected, rtol=1e-5, atol=1e-5)


def test_networks_run_from_files(mnist_files):
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([0, 500, 999])
    with torch.no_grad():
        assert load_model(mnist_files["unet"])(x, t).shape == x.shape
        assert load_model(mnist_files["dit"])(x, t, class_labels=torch.tensor([0, 5, 9])).shape == x.shape


def mnist(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    folder = DATA / "images" / "mnist"
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1)[:count]
    return torch.tensor(images), torch.tensor(np.frombuffer(labels, np.uint8, offset=8)[:count].astype(np.int64))


@pytest.mark.skipif(not UNET.exists(), reason="the data folder with MNIST weights is not beside the repository")
@pytest.mark.parametrize(("path", "expected"), [(UNET, 0.0159), (DIT, 0.0411)], ids=["unet", "dit"])
def test_the_published_weights_predict_noise(path, expected):
    images, labels = mnist(200)
    model = load_mnist(path)
    clean = images.permute(0, 3, 1, 2) / 255 * (1 - model.low) + model.low
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (200,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    given = {} if path == UNET else {"class_labels": labels}
    with torch.no_grad():
        found = model(add_noise(clean, noise, t, linear_alphas_cumprod()), t, **given)
    assert float((found - noise).square().mean()) == pytest.approx(expected, rel=0.25)


@pytest.mark.skipif(not UNET.exists(), reason="the data folder with trained networks is not beside the repository")
@pytest.mark.parametrize("path", [UNET, DIT, CIFAR], ids=["mnist-unet", "mnist-dit", "cifar-dit"])
def test_a_search_runs_on_real_files(path, tmp_path, capsys):
    reference = tmp_path / "real.npz"
    if path == CIFAR:
        from papercore.data.cifar import cifar

        write_images(reference, cifar(DATA, "test", limit=200).images)
        space = ["--features", "cifar", "--data", DATA, "--images", "4"]
    else:
        write_images(reference, mnist(300)[0])
        space = ["--features", "digits", "--images", "16"]
    labels = ["--labels", "1", "7"] if path != UNET else []
    arguments = ["search", path, "--out", tmp_path / "run", "--reference", reference, *space, *labels, "--steps", "2",
                 "--bits", "8", "6", "--budget", "uniform:8", "--init", "paper", "--population", "2", "--generations",
                 "1", "--finalists", "1", "--calibration-samples", "1", "--json"]  # fmt: skip
    with pytest.warns(UserWarning, match="feature dimensions"):
        assert cli.main("tmpqdm", COMMANDS, "test", [str(a) for a in arguments]) == 0, capsys.readouterr().err
    plan = json.loads((tmp_path / "run" / "plan-uniform-8.json").read_text())
    assert len(plan["timesteps"]) == 2 and plan["cost"]["bitops"] > 0
