"""The commands about cost and speed."""

import pytest
import torch
from papercore.errors import InputError
from PIL import Image
from prance.commands.benchmark import Benchmark
from prance.commands.export import Export
from prance.commands.macs import Macs
from prance.commands.network import open_network
from prance.commands.show import Show, found_pictures, read_picture
from prance.space import SearchSpace
from prance.supernet import MetaViT


def test_macs_of_the_published_sizes():
    # spec of the published networks: largest and smallest subnets, without token reduction
    expected = {"tiny": (2.32, 11.2, 0.84, 3.6), "small": (6.44, 31.1, 2.85, 12.8), "base": (20.7, 102.5, 10.2, 49.2)}
    for size, (most, parameters, least, few) in expected.items():
        rows = Macs(size=size).run()["table"].records()  # pyright: ignore[reportArgumentType]
        assert rows[0] | {"subnet": ""} == rows[1] | {"subnet": ""}
        assert rows[1]["GMAC"] == pytest.approx(most, rel=5e-3)
        assert rows[1]["M parameters"] == pytest.approx(parameters, rel=5e-3)
        assert rows[2]["GMAC"] == pytest.approx(least, rel=1e-2)
        assert rows[2]["M parameters"] == pytest.approx(few, rel=1e-2)


def test_macs_of_a_configuration():
    row = Macs(embed=(352,), mlp_ratio=(3.5,), prune=(0.5, 0.5, 0.5)).run()["table"].records()[0]
    assert row["GMAC"] == pytest.approx(2.03, rel=5e-3)
    assert row["tokens left"] == 24
    merged = Macs(embed=(352,) * 12, mlp_ratio=(3.5,), merge=(0.5,)).run()["table"].records()[0]
    assert merged["GMAC"] == row["GMAC"]
    assert merged["GMAC of merging"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": (352, 320)}, "1 or 12"),
        ({"prune": (0.5, 0.5)}, "1 or 3"),
        ({"prune": (1.5,)}, r"prune of point 0"),
        ({"merge": (0.0,)}, r"in \(0, 1\]"),
        ({"embed": (4096,)}, "at most 448"),
        ({"image_size": 225}, "multiple of the patch size"),
        ({"classes": 0}, "classes"),
    ],
)
def test_macs_refuses(options, message):
    with pytest.raises(InputError, match=message):
        Macs(**options).run()


def test_benchmark_refuses(tmp_path):
    with pytest.raises(InputError, match="batch"):
        Benchmark(batch=0).run()
    with pytest.raises(InputError, match="folder"):
        Benchmark(out=tmp_path).run()


def test_export_and_show(tmp_path):
    pytest.importorskip("onnxruntime")
    timm_name = "vit_tiny_patch16_224"
    exported = Export(model=timm_name, out=tmp_path / "net.onnx", prune=(0.3,), merge=(0.5,)).run()
    assert exported["difference"] < 1e-4
    assert (tmp_path / "net.onnx").stat().st_size > 10**6
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, shape in (("b.png", (40, 60)), ("a.jpg", (300, 200))):
        Image.effect_noise(shape, 90).save(folder / name)
    shown = Show(images=(folder,), model=timm_name, out=tmp_path / "shown.png", prune=(0.5,)).run()
    assert [path.rsplit("/", 1)[-1] for path in shown["images"]] == ["a.jpg", "b.png"]
    assert shown["tokens"] == [[98, 49, 24]] * 2
    assert shown["picture"].stat().st_size > 10**4


def test_published_weights_are_opened(tmp_path):
    space = SearchSpace.reference("tiny")
    torch.manual_seed(0)
    net = MetaViT(space, 4)
    d = space.attention
    weights = {}
    for name, value in net.state_dict().items():
        if name.endswith("qkv_weight"):
            interleaved = torch.zeros(3 * space.width, space.width)
            for offset in range(3):
                interleaved[offset : 3 * d : 3] = value[offset]
            weights[name.replace("qkv_weight", "attn.qkv.weight")] = interleaved
        elif name.endswith("qkv_bias"):
            weights[name.replace("qkv_bias", "attn.qkv.bias")] = value.reshape(-1)
        else:
            weights[name] = value
    path = tmp_path / "tiny.pth"
    torch.save({"model": weights}, path)
    opened = open_network(str(path), "tiny")
    assert all(torch.equal(a, b) for a, b in zip(opened.state_dict().values(), net.state_dict().values(), strict=True))
    with pytest.raises(InputError, match="--size"):
        open_network(str(path))
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a meta-network"):
        open_network(str(path), "tiny")


def test_what_is_no_network_or_picture(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        open_network(str(tmp_path))
    with pytest.raises(InputError, match="name of a model"):
        open_network("no_such_model")
    with pytest.raises(InputError, match="no such file"):
        found_pictures((tmp_path / "none",))
    with pytest.raises(InputError, match="pictures"):
        found_pictures((tmp_path,))
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(InputError, match="not a picture"):
        read_picture(tmp_path / "a.png", 32)
