"""CKA of all layers against all layers, against one pair at a time."""

import json

import pytest
import torch
from dpk.alignment import MinibatchCKA
from dpk.cka_report import cka_matrix, write_report
from papercore.errors import InputError, WorkError
from torch import nn


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 1, 8, 8, generator=generator) for size in sizes]


def test_every_entry_is_the_minibatch_estimate_of_its_pair(net, tmp_path):
    first, second, images = net(4, 0), net(6, 1), batches(12, 9, 3)
    matrix = cka_matrix(first, second, images)
    parts = [f"stage{k}.{i}" for k in (1, 2) for i in range(3)]  # a stage gives what its ReLU gives: listed once
    assert matrix.first == ("stem", *parts, "head")
    assert (matrix.batches, matrix.samples) == (2, 21)  # three images are too few
    for i, name in enumerate(matrix.first):
        for j, other in enumerate(matrix.second):
            meter, seen = MinibatchCKA(), {}
            handles = [
                dict(network.named_modules())[layer].register_forward_hook(
                    lambda m, x, y, key=key, seen=seen: seen.__setitem__(key, y.detach().clone())
                )
                for key, network, layer in (("a", first, name), ("b", second, other))
            ]
            with torch.no_grad():
                for batch in images:
                    first.eval()(batch)
                    second.eval()(batch)
                    meter.update(seen["a"], seen["b"])
            for handle in handles:
                handle.remove()
            assert float(matrix.values[i, j]) == pytest.approx(float(meter.compute()), abs=1e-6)
    write_report(matrix, tmp_path, ("first", "second"))
    record = json.loads((tmp_path / "cka.json").read_text())
    assert record["cka"] == matrix.values.tolist()
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")


def test_a_network_is_like_itself_and_its_mode_is_kept(net):
    model = net(4).train()
    matrix = cka_matrix(model, model, batches(16))
    torch.testing.assert_close(matrix.values.diagonal(), torch.ones(len(matrix.first), dtype=torch.float64))
    torch.testing.assert_close(matrix.values, matrix.values.T)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_by_name_and_what_cannot_be_compared(net):
    matrix = cka_matrix(net(4), net(6), batches(8), first_layers=["stage1"], second_layers=["stage1", "stage2"])
    assert matrix.values.shape == (1, 2)
    with pytest.raises(InputError, match="layer stage9"):
        cka_matrix(net(4), net(4), batches(8), first_layers=["stage9"])
    windows = nn.Sequential(nn.Flatten(0, 2), nn.Unflatten(0, (-1, 8)), nn.Flatten())
    assert cka_matrix(windows, windows, batches(8)).first == ("1", "2")  # rows of the first are not images
    with pytest.raises(InputError, match="output of layer 0: found none"):
        cka_matrix(windows, net(4), batches(8), first_layers=["0"])
    with pytest.raises(InputError, match="no batch of at least 4"):
        cka_matrix(net(4), net(4), batches(3))
    broken = net(4)
    nn.init.constant_(broken.stem.weight, float("nan"))
    with pytest.raises(WorkError, match="not finite"):
        cka_matrix(broken, net(4), batches(8))


def test_a_constant_layer_is_like_nothing(net):
    constant = net(4)
    nn.init.zeros_(constant.head.weight)
    values = cka_matrix(constant, net(4), batches(8), first_layers=["head"]).values
    assert float(values.abs().max()) == 0


def test_layers_are_told_once_and_in_the_order_of_the_pass():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.drop, self.skip = nn.BatchNorm2d(3), nn.ReLU(True), nn.Dropout(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.act(self.norm(x))) + self.skip(x)

    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Sequential(Block(), Block()), nn.Flatten())
    found = cka_matrix(model, model, batches(6))
    # in place is new, what is handed on is not
    assert found.first == ("0", *(f"1.{k}{part}" for k in (0, 1) for part in (".norm", ".act", "")), "2")
    assert cka_matrix(model, model, batches(6), first_layers="stages").first == ("0", "1.0", "1.1", "2")
    assert cka_matrix(model, model, batches(6), first_layers=["1", "1.1"]).first == ("1", "1.1")
