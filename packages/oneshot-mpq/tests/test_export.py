"""ONNX files against torch, number by number."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from oneshot_mpq import BitConfig, Supernet, freeze
from oneshot_mpq.export import export_onnx, stored_bytes
from oneshot_mpq.onnx_graph import packed_bytes, storage_bits
from papercore.data.cifar import cifar
from papercore.data.cifar_resnet import load_cifar_resnet, normalise
from papercore.errors import WorkError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def initializers(path):
    return {i.name: i for i in onnx.load(str(path)).graph.initializer}


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "opset"),
    [([2, 3, 4], [2, 3, 6], 25), ([5, 4, 6], [6, 6, 6], 21), ([3, 3, 3], [4, 5, 2], 21)],
)
@pytest.mark.parametrize("storage", ["packed", "int8"])
def test_codes_lie_in_the_file_and_outputs_agree(net, images, tmp_path, weight_bits, act_bits, opset, storage):
    net.eval()
    config = BitConfig.of(net, weight_bits, act_bits)
    before = net.config()
    done = export_onnx(net, config, tmp_path / "a.onnx", storage, images=images)
    assert net.config() == before and done.opset == (opset if storage == "packed" else 21)
    assert done.difference < 1e-5 and done.optimised_difference < 1e-5
    net.set_bits(config)
    torch.testing.assert_close(run(done.path, images), freeze(net)(images), rtol=1e-4, atol=1e-5)
    found = initializers(done.path)
    total = 0
    for name, layer in {**net.layers, **net.fixed}.items():
        stored = found[f"{name}.codes"]
        expected = layer.weight_quantizer.codes(layer.weight, layer.weight_bits).numpy()
        assert np.array_equal(np.asarray(onnx.numpy_helper.to_array(stored)).astype(np.int32), expected)
        total += len(stored.raw_data)
    assert total == done.weight_bytes == stored_bytes(net, config, storage == "packed")
    assert not any(i.name.endswith("weight") and len(i.dims) == 4 for i in found.values())  # no float copy is left
    assert done.file_bytes == done.path.stat().st_size and not list(tmp_path.glob("*.part"))


def test_where_storage_is_the_bits_the_file_is_the_cost_model(net, tmp_path):
    config = BitConfig.of(net, [4, 4, 2], [6, 6, 6])
    done = export_onnx(net.eval(), config, tmp_path / "a.onnx")
    assert done.weight_bytes == done.nominal_bytes == config.size_MiB * 2**20


def test_a_step_for_every_channel_and_negative_inputs(small, images, tmp_path):
    net = Supernet(small, images[:1], per_channel=True, act_sign="signed")
    net.calibrate(images)
    done = export_onnx(net.eval(), BitConfig.of(net, [2, 4, 5], [3, 6, 4]), tmp_path / "a.onnx", images=images)
    assert done.difference < 1e-5


def test_a_transformer(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=5, img_size=32, depth=2, embed_dim=32, num_heads=2
    ).eval()
    images = torch.randn(5, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Supernet(model, images[:1], bits=(4, 8))
    net.calibrate(images)
    config = BitConfig.uniform(net, 4, 8)
    done = export_onnx(net.eval(), config, tmp_path / "vit.onnx", images=images)
    net.set_bits(config)
    with torch.no_grad():
        expected = net(images)
    assert (run(done.path, images) - expected).norm() < 1e-2 * expected.norm()
    assert done.weight_bytes == pytest.approx(config.size_MiB * 2**20)


@pytest.mark.parametrize(
    ("bits", "packed", "width"), [(2, True, 2), (3, True, 4), (4, True, 4), (5, True, 8), (2, False, 8)]
)
def test_widths_of_storage(bits, packed, width):
    assert storage_bits(bits, packed) == width


def test_packing_puts_the_first_code_lowest():
    assert packed_bytes(np.array([1, -2, 0, -1, 1], np.int8), 2) == bytes([0b11_00_10_01, 0b01])
    assert packed_bytes(np.array([7, -8, -1], np.int8), 4) == bytes([0x87, 0x0F])


def test_what_differs_leaves_no_file(net, tmp_path, monkeypatch):
    monkeypatch.setattr("oneshot_mpq.export.difference", lambda *rest: 0.5)
    with pytest.raises(WorkError, match=r"differ by 0\.5"):
        export_onnx(net.eval(), net.config(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_questions_are_named(net, small, images, tmp_path):
    with pytest.raises(ValueError, match="weight_storage"):
        export_onnx(net, net.config(), tmp_path / "a.onnx", "int4")
    with pytest.raises(ValueError, match="never set"):
        export_onnx(Supernet(small, images[:1]), net.config(), tmp_path / "a.onnx")
    other = Supernet(small, images[:1], name="other").config()
    with pytest.raises(ValueError, match="model other"):
        export_onnx(net, other, tmp_path / "a.onnx")


@pytest.mark.skipif(not REAL.exists(), reason="the data folder is not beside the repository")
def test_a_trained_network_on_real_pictures(tmp_path):
    """ResNet-20 of CIFAR-10 without supernet training: the file classifies as torch does at the same bits."""
    pictures = cifar(REAL, "test", "cifar10", limit=500)
    x, y = normalise(pictures.images), pictures.labels
    model = load_cifar_resnet(REAL, 20)
    net = Supernet(model, x[:1], bits=(4, 8))
    net.calibrate(x[:200])
    for bits in (8, 4):
        config = BitConfig.uniform(net, bits, bits)
        net.set_bits(config)
        done = export_onnx(net.eval(), config, tmp_path / f"{bits}.onnx", images=x[200:264])
        assert done.weight_bytes == pytest.approx(config.size_MiB * 2**20)
        found, expected = run(done.path, x[200:]).argmax(1), freeze(net)(x[200:]).argmax(1)
        assert (found == expected).float().mean() > 0.99
        if bits == 8:  # the untrained steps clip weights beyond three deviations, which costs some points
            assert (found == y[200:]).float().mean() > 0.75
