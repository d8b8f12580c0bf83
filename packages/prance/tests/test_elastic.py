"""Meta-networks around timm's models: the same function at the largest choice, the same subnets by every path."""

import dataclasses

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError
from prance.decision import Decision
from prance.elastic import elastic, resized, sort_channels
from prance.executor import execute
from prance.macs import active_parameters, macs
from prance.space import SearchSpace
from prance.supernet import MetaViT
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

KINDS = {
    "class token": {},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "pooled with class token": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "registers without position": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.3},
    "LayerScale, normalised keys": {"init_values": 0.5, "qk_norm": True},
    "norm before the blocks": {"pre_norm": True, "qkv_bias": False},
    "no position": {"pos_embed": "none"},
}


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    model = VisionTransformer(**(small | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def space(**options) -> SearchSpace:
    return SearchSpace(**({"embed": (24, 32, 48), "mlp_ratio": (1, 2.5, 4), "group": 1, "depth": 4} | options))


def images(count: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_largest_choice_is_the_model(kind):
    model = vit(**KINDS[kind])
    x = images(3)
    for residual in (False, True):
        net = elastic(model, space(), residual_projection=residual)
        for path in ("sliced", "masked", "packed", "bucketed"):
            torch.testing.assert_close(net(x, path=path), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
@torch.no_grad()
def test_models_of_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(elastic(model)(x), model(x), rtol=1e-5, atol=1e-5)


SPACES = st.sampled_from(list(KINDS))
MODES = st.sampled_from([None, "prune", "merge", "prune_merge"])


@given(
    kind=SPACES,
    mode=MODES,
    seed=st.integers(0, 2**31),
    mean=st.sampled_from(["mean", "size_mean"]),
    group=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_four_paths_give_one_answer(kind, mode, seed, mean, group):
    """On every image, for any batch composition, in float64 to 1e-10."""
    net = elastic(vit(**KINDS[kind]), space(group=group), residual_projection=bool(seed % 2)).double()
    x = images(5, torch.float64)
    decision = Decision.random(net.space, torch.Generator().manual_seed(seed), batch=5, tokens=mode)
    alone = [execute(net, x[i : i + 1], decision[i], path="sliced", mean=mean) for i in range(5)]
    for path in ("masked", "packed", "bucketed"):
        outcome = execute(net, x, decision, path=path, mean=mean)
        torch.testing.assert_close(outcome.logits, torch.cat([o.logits for o in alone]), rtol=0, atol=1e-10)
        assert torch.equal(outcome.count, torch.cat([o.count for o in alone]))
        assert torch.equal(outcome.origin, torch.cat([o.origin for o in alone]))
        for state, own in zip(outcome.states, zip(*(o.states for o in alone), strict=True), strict=True):
            torch.testing.assert_close(state, torch.cat(own), rtol=0, atol=1e-10)
        part = execute(net, x[[3, 1]], decision[[3, 1]], path=path, mean=mean)
        torch.testing.assert_close(part.logits, outcome.logits[[3, 1]], rtol=0, atol=1e-10)


@torch.no_grad()
def test_four_paths_agree_in_single_precision():
    net = elastic(vit(), space())
    x = images(16)
    decision = Decision.random(net.space, torch.Generator().manual_seed(1), batch=16, tokens="prune_merge")
    masked = net(x, decision, path="masked")
    for path in ("packed", "bucketed"):
        torch.testing.assert_close(net(x, decision, path=path), masked, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="one for all images"):
        net(x, decision, path="sliced")


def test_the_masked_and_the_sliced_path_have_the_same_gradients():
    net = elastic(vit(init_values=0.5), space(), residual_projection=True).double()
    x = images(3, torch.float64)
    decision = Decision.random(net.space, torch.Generator().manual_seed(5), batch=3, tokens="prune_merge", same=True)
    found = []
    for path in ("sliced", "masked"):
        net.zero_grad()
        net(x, decision, path=path).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-9, msg=name)


@torch.no_grad()
def test_counts_equal_what_is_run():
    """torch's own counter, on the sliced path."""
    net = elastic(vit(), space(), residual_projection=True)
    for seed in range(3):
        decision = Decision.random(net.space, torch.Generator().manual_seed(seed), tokens="prune")
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            net(images(1), decision, path="sliced")
        points = len(net.space.points)
        counted = counter.get_total_flops() // 2
        # ranking asks for the class token's attention once more at every decision point
        extra = sum(int(n) for n in _attended(net, decision)) * net.space.attention
        assert int(macs(net, decision)) == counted - extra, points


def _attended(net: MetaViT, decision: Decision) -> list[int]:
    from prance.macs import Geometry, token_counts

    attention, _ = token_counts(decision, Geometry.of(net))
    return [int(attention[0, i]) for i in net.space.points]


def test_active_parameters_of_the_largest_subnet_are_all_parameters():
    net = elastic(vit(), space(), residual_projection=True)
    assert int(active_parameters(net, Decision.largest(net.space))) == sum(p.numel() for p in net.parameters())


@torch.no_grad()
def test_sorting_keeps_the_function_and_helps_prefixes():
    model = vit(init_values=0.5)
    matters = torch.linspace(0.05, 2, 48)  # the last channels most
    model.patch_embed.proj.weight.mul_(matters[:, None, None, None])
    for block in model.blocks:
        for reader in (block.attn.qkv, block.mlp.fc1):
            reader.weight.mul_(matters)
        for writer in (block.attn.proj, block.mlp.fc2):
            writer.weight.mul_(matters[:, None])
    plain = elastic(model, space(), sort=False, residual_projection=True)
    ordered = elastic(model, space(), sort=True, residual_projection=True)
    x = images(4)
    torch.testing.assert_close(plain(x), ordered(x), rtol=1e-4, atol=1e-4)
    small = Decision.static(plain.space, 32, 2.5)
    error = [(net(x, small) - plain(x)).square().mean() for net in (ordered, plain)]
    assert error[0] < error[1]
    before = ordered(x)
    sort_channels(ordered)
    torch.testing.assert_close(ordered(x), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_image_sizes():
    net = elastic(vit(reg_tokens=1), space())
    with pytest.raises(InputError, match=r"images: found \(1, 3, 24, 24\), expected \(batch, 3, 16, 16\)"):
        net(torch.zeros(1, 3, 24, 24))
    larger = resized(net, 24)
    assert larger.tokens == 36 + 2
    assert larger(torch.zeros(1, 3, 24, 24)).shape == (1, 7)
    torch.testing.assert_close(resized(net, 16)(images(2)), net(images(2)))
    with pytest.raises(InputError, match="multiple of the patch size 4"):
        resized(net, 18)


def test_an_empty_batch_gives_empty_outputs():
    net = elastic(vit(), space())
    outcome = execute(net, torch.zeros(0, 3, 16, 16), Decision.largest(net.space), path="packed")
    assert outcome.logits.shape == (0, 7)
    assert outcome.count.shape == (0, len(net.space.points))


def test_pixels_that_are_no_numbers_are_named():
    x = images(4)
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"pixels of images \[2\]"):
        elastic(vit(), space())(x)


def test_models_and_choices_that_do_not_fit():
    for options, words in (
        ({"global_pool": "map"}, "attention pooling"),
        ({"num_classes": 0}, "no classifier"),
        ({"drop_rate": 0.1}, "dropout"),
        ({"img_size": (16, 8)}, "not square"),
    ):
        with pytest.raises(InputError, match=words):
            elastic(vit(**options), space())
    with pytest.raises(InputError, match="width 48, MLP ratio 4"):
        elastic(vit(), space(embed=(24, 32)))
    with pytest.raises(InputError, match="depth"):
        elastic(vit(), space(depth=8, group=2))
    with pytest.raises(InputError, match="the name of a model"):
        elastic("no_such_model")
    with pytest.raises(InputError, match="timm's VisionTransformer"):
        elastic(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed": (32, 24)}, "field embed"),
        ({"embed": (24, 24)}, "field embed"),
        ({"embed": ()}, "field embed"),
        ({"mlp_ratio": (2, 1)}, "field mlp_ratio"),
        ({"mlp_ratio": (float("nan"),)}, "field mlp_ratio"),
        ({"super_embed": 40}, "field super_embed"),
        ({"group": 3}, "field group"),
        ({"heads": 0}, "field heads"),
    ],
)
def test_spaces_that_are_wrong(options, words):
    with pytest.raises(InputError, match=words):
        space(**options)


def test_widths_that_slow_a_gpu_down_are_named():
    with pytest.warns(UserWarning, match=r"widths \[44\]"):
        space(embed=(44, 48))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune": 0.0}, "decision prune of point 0"),
        ({"prune": 1.5}, "decision prune of point 0"),
        ({"merge": [1.0, float("nan"), 1.0]}, "decision merge of point 1"),
        ({"embed": 64}, "image 0, block 0"),
        ({"mlp_ratio": 9.0}, "image 0, block 0"),
        ({"embed": [24, 24]}, "decision embed"),
        ({"prune": [0.5, 1, 1, 1]}, "1 outside"),
    ],
)
def test_decisions_that_are_wrong(options, words):
    wide = space(group=1)
    with pytest.raises(InputError, match=words):
        Decision.static(wide, **({"embed": 24, "mlp_ratio": 1.0} | options))


def test_the_wrong_number_of_decisions():
    net = elastic(vit(), space())
    with pytest.raises(InputError, match="1 or 3"):
        net(images(3), Decision.largest(net.space, 2))
    assert dataclasses.replace(net.space, group=2).points == (2,)
