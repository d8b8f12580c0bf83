"""The static subnet is the meta-network's, as a module and in ONNX."""

import pytest
import timm
import torch
from papercore.errors import InputError, WorkError
from prance.decision import Decision
from prance.elastic import elastic
from prance.executor import execute
from prance.export import StaticViT, export_onnx
from prance.space import SearchSpace
from prance.supernet import MetaViT

SPACE = SearchSpace((16, 24, 32), (1.0, 1.5, 2.0), group=2, depth=6, heads=2, head_dim=8)


def network(**options) -> MetaViT:
    torch.manual_seed(0)
    net = MetaViT(SPACE, 10, image_size=32, patch_size=8, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


def decision(mode: str, keep: float = 0.6, space: SearchSpace = SPACE) -> Decision:
    drawn = Decision.random(space, torch.Generator().manual_seed(3))
    ratio = {"prune": 1.0, "merge": 1.0}
    ratio |= {name: keep for name in ratio if name in mode.split("_")}
    points = len(space.points)
    return Decision(space, drawn.embed, drawn.mlp_ratio, *(torch.full((1, points), ratio[n]) for n in ratio))


MODES = ("none", "prune", "merge", "prune_merge")


@pytest.mark.parametrize("mean", ["mean", "size_mean"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", [0.6, 0.1])
@torch.no_grad()
def test_module_equals_the_sliced_path(mode, mean, keep):
    net, images = network(layer_scale=True).double(), torch.randn(5, 3, 32, 32).double()
    chosen = decision(mode, keep)
    expected = execute(net, images, chosen, path="sliced", mean=mean).logits
    torch.testing.assert_close(StaticViT(net, chosen, mean)(images), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "pool": "avg"},
        {"registers": 3},
        {"registers": 2, "pool": "avg", "qkv_bias": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_heads_and_prefixes(options):
    net, images = network(**options).double(), torch.randn(3, 3, 32, 32).double()
    for mode in MODES:
        for keep in (0.5, 0.05):
            chosen = decision(mode, keep)
            expected = execute(net, images, chosen, path="sliced").logits
            torch.testing.assert_close(StaticViT(net, chosen)(images), expected, rtol=0, atol=1e-11)


def test_it_holds_only_what_it_uses():
    net, chosen = network(), decision("none")
    module = StaticViT(net, chosen)
    # position and class token are one parameter here
    assert sum(p.numel() for p in module.parameters()) == module.active_parameters - int(chosen.embed[0, 0])
    storage = sum(p.untyped_storage().nbytes() for p in module.parameters())
    assert storage == 4 * sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_onnx_of_the_meta_network(tmp_path, mode):
    pytest.importorskip("onnxruntime")
    exported = export_onnx(StaticViT(network(), decision(mode)), tmp_path / "net.onnx")
    assert exported.path.is_file()
    assert exported.difference < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_onnx_of_a_timm_model(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=4, qk_norm=True, init_values=0.1
    ).eval()
    net = elastic(model)
    chosen = Decision.static(net.space, net.space.embed[1], net.space.mlp_ratio[1], prune=0.8, merge=0.6)
    exported = export_onnx(StaticViT(net, chosen), tmp_path / "net.onnx")
    assert exported.difference < 1e-4
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        largest = StaticViT(net, Decision.largest(net.space))(images)
        torch.testing.assert_close(largest, model(images), rtol=0, atol=1e-5)


def test_refusals(tmp_path):
    pytest.importorskip("onnxruntime")
    net = network()
    several = Decision.random(SPACE, torch.Generator().manual_seed(0), batch=4)
    with pytest.raises(InputError, match="one for all images"):
        StaticViT(net, several)
    module = StaticViT(net, decision("prune"))
    with pytest.raises(InputError, match="opset"):
        export_onnx(module, tmp_path / "net.onnx", opset=11)
    with pytest.raises(InputError, match="float32"):
        export_onnx(StaticViT(net.double(), decision("prune")), tmp_path / "net.onnx")
    with pytest.raises(WorkError, match="differ"):
        export_onnx(module, tmp_path / "net.onnx", tolerance=-1)
    assert not list(tmp_path.iterdir())
