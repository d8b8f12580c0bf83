"""Saved supernets and data sets."""

import json

import numpy as np
import pytest
import torch
from oneshot_mpq import Supernet, load_supernet, save_supernet
from oneshot_mpq.checkpoint import NOTES, TENSORS, read_notes
from oneshot_mpq.data import NOISE, Shifted, load_splits
from oneshot_mpq.models import seeded_model
from papercore.data.digits import digits
from PIL import Image

from .conftest import Small

ARCHITECTURE = {"name": "digits", "classes": 10, "channels": 1}


@pytest.fixture
def saved(tmp_path):
    """A digits supernet whose every part differs from a fresh one, and its folder."""
    x = torch.randn(8, 1, 8, 8)
    net = Supernet(seeded_model("digits", 10, 1, 0), x, (2, 4, 8))
    net.calibrate(x)
    for p in net.parameters():
        p.data += 0.01 * torch.rand_like(p)
    net.train()(x)
    next(iter(net.layers.values())).allow((4, 8))
    save_supernet(net, tmp_path, architecture=ARCHITECTURE, notes={"dataset": "digits"})
    return net.eval(), tmp_path


def test_a_supernet_comes_back_whole(saved):
    net, folder = saved
    other = load_supernet(folder)
    x = torch.randn(4, 1, 8, 8)
    for bits in (2, 4, 8):
        for each in (net, other):
            each.select([bits] * 6, [bits] * 6)
        assert torch.equal(net(x), other(x))
    assert next(iter(other.layers.values())).allowed_weight_bits == (4, 8)
    assert other.bits == (2, 4, 8) and other.calibrated and not other.training
    assert read_notes(folder)["notes"] == {"dataset": "digits"}


def test_a_model_of_ones_own_must_be_given(net, tmp_path, images):
    save_supernet(net, tmp_path)
    with pytest.raises(ValueError, match="the model as an argument"):
        load_supernet(tmp_path)
    other = load_supernet(tmp_path, Small())
    assert torch.equal(other(images), net.eval()(images))


def test_damaged_files_are_named_with_what_is_missing(saved):
    _, folder = saved
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=TENSORS):
        load_supernet(folder)
    (folder / TENSORS).write_bytes(whole)
    notes = json.loads((folder / NOTES).read_text())
    (folder / NOTES).write_text(json.dumps({**notes, "bits": [2, 4]}))
    with pytest.raises(ValueError, match=rf"{TENSORS}: tensor .*found shape"):
        load_supernet(folder)
    (folder / NOTES).write_text(json.dumps({k: v for k, v in notes.items() if k != "bits"}))
    with pytest.raises(ValueError, match=rf"{NOTES}: key bits"):
        load_supernet(folder)
    (folder / NOTES).write_text(json.dumps({**notes, "version": 3}))
    with pytest.raises(ValueError, match="format"):
        load_supernet(folder)
    with pytest.raises(ValueError, match="nowhere"):
        load_supernet(folder / "nowhere")


def test_digits_are_split_without_overlap_and_noisy():
    splits = load_splits("digits", seed=3)
    parts = [splits.train, splits.search, splits.test]
    assert [len(part) for part in parts] == [1000, 200, 597]
    together = torch.cat([part.tensors[0] for part in parts]).flatten(1)
    assert len(together.unique(dim=0)) == 1797
    clean = digits().images.flatten(1)
    noise = together - clean[torch.cdist(together, clean).argmin(1)]
    assert float(noise.std()) == pytest.approx(NOISE, rel=0.05)
    assert torch.equal(load_splits("digits", seed=3).test.tensors[0], splits.test.tensors[0])
    assert not torch.equal(load_splits("digits", seed=4).test.tensors[0], splits.test.tensors[0])


@pytest.fixture
def cifar_folder(tmp_path):
    (tmp_path / "images" / "cifar10").mkdir(parents=True)
    for part in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 3200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "cifar10" / f"{part}_00.webp", lossless=True)
    return tmp_path


def test_cifar_keeps_a_tenth_of_the_training_part_for_the_search(cifar_folder):
    splits = load_splits("cifar10", cifar_folder)
    assert [len(part) for part in (splits.train, splits.plain, splits.search, splits.test)] == [90, 90, 10, 100]
    assert isinstance(splits.train, Shifted) and splits.shape == (3, 32, 32) and splits.classes == 10
    with pytest.raises(ValueError, match="--data"):
        load_splits("cifar10")


def test_shifted_images_are_crops_of_the_padded_ones():
    images = torch.arange(2 * 16, dtype=torch.float).reshape(2, 1, 4, 4) + 1
    shifted = Shifted(images, torch.tensor([0, 1]))
    torch.manual_seed(0)
    batch = shifted.__getitems__([0, 1, 0, 1] * 20)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    windows = {0: set(), 1: set()}
    for label in (0, 1):
        for top in range(9):
            for left in range(9):
                window = padded[label, 0, top : top + 4, left : left + 4]
                windows[label] |= {tuple(window.flatten().tolist()), tuple(window.flip(1).flatten().tolist())}
    seen = {(int(y), tuple(x.flatten().tolist())) for x, y in batch}
    assert all(values in windows[label] for label, values in seen)
    assert len(seen) > 40
    assert shifted[1][0].shape == (1, 4, 4)


def test_a_folder_of_pictures(tmp_path):
    for part, count in (("train", 10), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    splits = load_splits("folder", tmp_path, size=32)
    assert [len(p) for p in (splits.train, splits.plain, splits.search, splits.test)] == [18, 18, 2, 4]
    assert splits.plain[0][0].shape == splits.train[0][0].shape == (3, 32, 32) and splits.classes == 2
    with pytest.raises(ValueError, match="train/CLASS"):
        load_splits("folder", tmp_path / "nowhere")
    (tmp_path / "val" / "eel").mkdir()
    Image.fromarray(pixels).save(tmp_path / "val" / "eel" / "0.png")
    with pytest.raises(ValueError, match="classes"):
        load_splits("folder", tmp_path, size=32)
