"""The peer: it is timm's model without merging, and it merges as the token functions do."""

import pytest
import timm
import torch
from papercore.errors import InputError
from prance.tokens import TokenBatch, bipartite_merge
from prance.tome import ToMeViT, merge_alternate


def model(**options):
    torch.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=3, num_classes=7, **options
    )
    return made.double().eval()


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}, {"qk_norm": True}], ids=str)
@torch.no_grad()
def test_without_merging_it_is_the_model(options):
    images, plain = torch.randn(2, 3, 64, 64).double(), model(**options)
    torch.testing.assert_close(ToMeViT(plain, 0)(images), plain(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [17, 18])
@torch.no_grad()
def test_merging_equals_the_token_function(tokens):
    generator = torch.Generator().manual_seed(0)
    x, metric = (torch.randn(3, tokens, n, generator=generator).double() for n in (6, 4))
    expected = TokenBatch.start(x)
    size = None
    for removed in (3, 2, 20):
        expected = bipartite_merge(expected, removed, metric)
        x, size = merge_alternate(x, size, metric, removed)
        torch.testing.assert_close(x, expected.x)
        assert size is not None
        torch.testing.assert_close(size.double(), expected.size.double())
        metric = x[:, :, :4].contiguous()


@torch.no_grad()
def test_it_runs_and_refuses():
    images = torch.randn(2, 3, 64, 64).double()
    assert ToMeViT(model(), 4)(images).isfinite().all()
    with pytest.raises(InputError, match="removed"):
        ToMeViT(model(), -1)
    with pytest.raises(InputError, match="one class token"):
        ToMeViT(model(class_token=False, global_pool="avg"), 1)
