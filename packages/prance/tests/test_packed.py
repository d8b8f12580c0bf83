"""Which images share a product changes nothing."""

import itertools

import pytest
import torch
from prance import packed
from prance.decision import Decision
from prance.executor import execute
from prance.space import SearchSpace
from prance.supernet import MetaViT

SPACE = SearchSpace((16, 24, 32), (1.0, 1.5, 2.0), group=2, depth=6, heads=2, head_dim=8)


def network() -> MetaViT:
    torch.manual_seed(0)
    net = MetaViT(SPACE, 5, image_size=32, patch_size=8, layer_scale=True).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


@pytest.mark.parametrize(("small", "in_order"), list(itertools.product([0, 3, 20, 10**6], [0, 100])))
@torch.no_grad()
def test_any_grouping_gives_the_masked_answer(monkeypatch, small, in_order):
    monkeypatch.setattr(packed, "SMALL", small)
    monkeypatch.setattr(packed, "IN_ORDER", in_order)
    net, images = network(), torch.randn(7, 3, 32, 32).double()
    generator = torch.Generator().manual_seed(small % 97)
    for tokens in (None, "prune", "prune_merge"):
        decision = Decision.random(SPACE, generator, batch=7, tokens=tokens)
        expected = execute(net, images, decision, path="masked")
        found = execute(net, images, decision, path="packed")
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)
        assert torch.equal(found.origin, expected.origin)


def test_few_rows_share_a_product_and_many_do_not():
    engine = packed.Packed(network(), "mean")
    key = torch.tensor([[32], [24], [16], [32]])

    def products(rows: int) -> list[int]:
        count = torch.full((4,), rows)
        flow = packed.Rows(torch.zeros(4 * rows, 32), torch.ones(4 * rows), count, torch.zeros(4, 17))
        return [len(runs) for _, runs in engine.gathered(flow, key, lambda k: k[0])]

    assert products(5) == [4]
    assert products(1000) == [1, 1, 1]
