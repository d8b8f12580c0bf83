"""Metrics against numbers of the ADM evaluator's code, and evaluation from files."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import qdit
import torch
from papercore.errors import InputError
from papercore.images import images_to_uint8, write_images
from qdit.cli import main
from qdit.evaluate import Features, compare, describe, feature_space, reference_images
from qdit.metrics import inception_score, precision_recall

with np.load(Path(__file__).parent / "golden" / "metrics_a.npz") as archive:
    DATA = dict(archive)
META = json.loads(str(DATA["meta"]))


def test_golden_metrics():
    statistics = [
        (x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False))
        for x in (DATA["sample"], DATA["ref"])
    ]
    assert qdit.frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(META["fid"], rel=1e-6)
    assert precision_recall(DATA["ref"], DATA["sample"], k=META["k"]) == (META["precision"], META["recall"])
    for split in (5000, 40):
        expected = META[f"inception_score_split{split}"]
        assert inception_score(DATA["probs"], split) == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(images_to_uint8(torch.from_numpy(DATA["decoded"])).numpy(), DATA["decoded_uint8"])


def test_precision_and_recall_against_the_definition():
    generator = np.random.default_rng(0)
    real, made = generator.normal(size=(30, 3)), 1.5 * generator.normal(size=(25, 3))

    def share(points, centres, k=3):
        radii = [np.sort(((centres - c) ** 2).sum(1))[k] for c in centres]
        return np.mean([any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    assert precision_recall(real, made) == (pytest.approx(share(made, real)), pytest.approx(share(real, made)))
    assert precision_recall(real, real) == (1.0, 1.0)


def test_inception_score_of_known_distributions():
    assert inception_score(np.eye(10)[np.arange(50) % 10]) == pytest.approx(10)
    assert inception_score(np.full((20, 4), 0.25)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), ("reference features", "n >= 4")),
        (lambda: precision_recall(np.zeros((5, 2)), np.zeros((5, 3))), ("3 dimensions", "expected 2")),
        (lambda: precision_recall(np.full((5, 2), np.nan), np.zeros((5, 2))), ("not finite",)),
        (lambda: inception_score(np.ones((3, 4))), ("probabilities", "no distribution")),
        (lambda: inception_score(np.ones((0, 4))), ("probabilities",)),
        (lambda: compare(Features(np.zeros((9, 2))), None), ("reference", "mu and sigma")),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def evaluate(*arguments: object) -> int:
    sys.argv = ["qdit", "evaluate", *map(str, arguments)]
    return main()


def test_files_of_images_features_and_statistics(tmp_path, capsys):
    real = reference_images("digits")
    write_images(tmp_path / "a.npz", real[::2])
    write_images(tmp_path / "b.npz", real[1::2])
    assert evaluate(tmp_path / "a.npz", "--reference", tmp_path / "b.npz", "--json") == 0
    images = json.loads(capsys.readouterr().out)
    assert set(images) == {"frechet_distance", "inception_score", "precision", "recall", "samples", "reference"}
    assert images["precision"] > 0.9
    assert images["inception_score"] > 8
    features = [describe(part, feature_space("digits")) for part in (real[::2], real[1::2])]
    for name, part in zip("cd", features, strict=True):
        np.savez(
            tmp_path / f"{name}.npz", features=part.features, probabilities=part.probabilities, spatial=part.features
        )
    assert evaluate(tmp_path / "c.npz", "--reference", tmp_path / "d.npz", "--json") == 0
    from_features = json.loads(capsys.readouterr().out)
    assert from_features["sfid"] == pytest.approx(from_features["frechet_distance"])
    assert {name: from_features[name] for name in images} == pytest.approx(images)
    other = features[1].features.astype(np.float64)
    np.savez(tmp_path / "s.npz", mu=other.mean(0), sigma=np.cov(other, rowvar=False))
    assert evaluate(tmp_path / "a.npz", "--reference", tmp_path / "s.npz", "--json") == 0
    from_statistics = json.loads(capsys.readouterr().out)
    assert from_statistics["frechet_distance"] == pytest.approx(images["frechet_distance"], rel=1e-5)
    assert "precision" not in from_statistics
    assert from_statistics["reference"] == "statistics"


def test_bad_files_are_one_line(tmp_path, capsys):
    real = reference_images("digits")
    write_images(tmp_path / "a.npz", real[:30])
    np.savez(tmp_path / "ints.npz", features=np.zeros((5, 3), int))
    np.savez(tmp_path / "odd.npz", features=np.zeros((5, 3)), nothing=np.zeros(1))
    np.savez(tmp_path / "small.npz", features=np.zeros((5, 3)))
    write_images(tmp_path / "rgb.npz", torch.zeros(30, 16, 16, 3, dtype=torch.uint8))
    for arguments, words in (
        ((tmp_path / "ints.npz",), ("ints.npz", "key features", "int64")),
        ((tmp_path / "odd.npz",), ("odd.npz", "key nothing")),
        ((tmp_path / "small.npz",), ("small.npz", "Frechet statistics")),
        ((tmp_path / "absent.npz",), ("absent.npz", "cannot be read")),
        ((tmp_path / "rgb.npz",), ("rgb.npz", "image size", "(8, 8, 1)")),
        ((tmp_path / "rgb.npz", "--features", "pixels"), ("rgb.npz", "image size", "(16, 16, 3)")),
        ((tmp_path / "a.npz", "--features", "qdit:nothing"), ("feature space", "qdit:nothing")),
        ((tmp_path / "a.npz", "--features", "inception"), ("inception",)),
    ):
        assert evaluate(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("error: ")
        for word in words:
            assert word in err, err
    assert evaluate(tmp_path / "a.npz") == 0
    assert "30 samples for 64 feature dimensions" in capsys.readouterr().err


def test_features_of_ones_own(tmp_path, capsys, monkeypatch):
    module = types.ModuleType("my_features")
    module.means = lambda images: images.float().mean((1, 2))  # type: ignore[attr-defined]
    module.wrong = lambda images: images.float().mean()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_features", module)
    write_images(tmp_path / "a.npz", reference_images("digits")[:50])
    assert evaluate(tmp_path / "a.npz", "--features", "my_features:means", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"frechet_distance", "precision", "recall"}
    assert evaluate(tmp_path / "a.npz", "--features", "my_features:wrong") == 2


def test_the_inception_adapter(tmp_path, monkeypatch):
    """With a network of torch-fidelity's interface in its place: which layers are read, in which order."""
    from torch import nn

    class Network(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            self.Mixed_6d = nn.Module()
            self.Mixed_6d.branch1x1 = nn.Identity()

        def forward(self, x):
            assert x.dtype == torch.uint8
            spatial = torch.arange(9 * 17 * 17).float().reshape(1, 9, 17, 17).expand(len(x), -1, -1, -1)
            self.Mixed_6d.branch1x1(spatial)
            return x.float().flatten(1)[:, :5], torch.zeros(len(x), 1008)

    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    weights = tmp_path / "w.pth"
    with pytest.raises(InputError, match="--inception-weights"):
        feature_space("inception", weights)
    torch.save({}, weights)
    found = describe(torch.zeros(40, 8, 8, 3, dtype=torch.uint8), feature_space("inception", weights))
    assert found.features.shape == (40, 5)
    assert found.spatial is not None
    assert found.spatial.shape == (40, 7 * 17 * 17)
    assert found.spatial[0, :8].tolist() == [*(289.0 * c for c in range(7)), 1.0]  # height, width, channel
    assert found.probabilities is not None
    with pytest.raises(InputError, match="three channels"):
        feature_space("inception", weights)(torch.zeros(4, 8, 8, 1, dtype=torch.uint8))
    torch.save({"x": print}, weights)  # more than tensors
    with pytest.raises(InputError, match="Inception weights"):
        feature_space("inception", weights)
