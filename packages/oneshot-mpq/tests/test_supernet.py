"""The converted network: what is found, what is searchable, what the bits do."""

import copy
import time
import warnings

import pytest
import timm
import torch
import torchvision
from oneshot_mpq import BitConfig, Supernet
from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.lsq import FLOAT
from oneshot_mpq.models import DigitsNet, build_model
from oneshot_mpq.paths import aligned, largest_path, sample_paths
from torch import nn
from torch.nn import functional

from .conftest import Small


def convert(model, shape=(1, 3, 32, 32), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers without a batch norm
        return Supernet(model.eval(), torch.randn(*shape, generator=torch.Generator().manual_seed(0)), **options)


def test_layers_banks_and_candidates(net):
    assert list(net.layers) == ["a", "d", "p"]
    assert {name: (layer.weight_bits, layer.act_bits) for name, layer in net.fixed.items()} == {
        "conv1": (8, None),
        "fc": (8, 8),
    }
    assert net.layers["a"].weight_choices == net.layers["a"].act_choices == (2, 3, 4, 5, 6)
    assert net.layers["d"].weight_choices == net.layers["d"].act_choices == (3, 4, 5, 6)
    assert net.layers["d"].depthwise and not net.layers["a"].depthwise
    assert [len(layer.batchnorm.pairs) for layer in net.layers.values()] == [25, 16, 25]
    assert isinstance(net.model.bn1, nn.BatchNorm2d)
    assert all(not layer.act_quantizer.signed for layer in net.layers.values())


def test_the_float_network_is_untouched_and_reproduced(small, images):
    small.eval()
    before, state = small(images), copy.deepcopy(small.state_dict())
    net = Supernet(small, images[:1])
    net.calibrate(images)
    net.eval()
    with net.floating():
        torch.testing.assert_close(net(images), before)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    assert not torch.equal(net(images), before)


def test_thirty_two_bits_everywhere_are_the_float_network(small, images):
    small.eval()
    net = Supernet(small, images[:1], (4, FLOAT), {"conv1": (32, None), "fc": (32, None)})
    net.calibrate(images)
    net.eval().set_bits(BitConfig.of(net, [FLOAT] * 3, [FLOAT] * 3))
    assert torch.equal(net(images), small(images))


def test_more_bits_are_nearer_to_the_float_network(net, images):
    net.eval()
    with net.floating():
        exact = net(images)
    errors = []
    for bits in (3, 4, 5, 6):
        net.select([bits] * 3, [bits] * 3)
        errors.append((net(images) - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("name", "searchable", "signed"),
    [("resnet18", 19, 0), ("mobilenet_v2", 51, 17)],
)
def test_torchvision_networks_are_found_by_tracing(name, searchable, signed):
    net = convert(getattr(torchvision.models, name)(weights=None), (2, 3, 64, 64))
    assert len(net.layers) == searchable
    assert len(net.fixed) == 2
    assert all(layer.batchnorm is not None for layer in net.layers.values())
    assert sum(layer.act_quantizer.signed for layer in net.layers.values()) == signed


def test_efficientnet_lite_keeps_its_fused_batch_norms():
    net = convert(timm.create_model("efficientnet_lite0", pretrained=False), (2, 3, 64, 64))
    assert len(net.layers) == 48
    banks = [m for m in net.modules() if isinstance(m, BatchNormBank)]
    assert len(banks) == 48
    assert any(isinstance(bank.act, nn.ReLU6) for bank in banks)
    assert {len(bank.pairs) for bank in banks} == {16, 25}
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "regnetx_002", "tf_efficientnet_b0"])
def test_networks_of_timm(name):
    """A transformer, one without batch norm, grouped convolutions, padding in the forward pass with squeeze-excite."""
    options = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    net = convert(model, x.shape)
    with net.floating(), torch.no_grad():
        torch.testing.assert_close(net.eval()(x), model(x))
    net.calibrate(x)
    net.select([layer.weight_choices[0] for layer in net.layers.values()], [4] * len(net.layers))
    assert torch.isfinite(net(x)).all()
    assert len(net.layers) + len(net.fixed) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.same, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.same(self.same(self.first(x))).mean((2, 3)))


class Functional(Twice):
    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.extra = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.extra(functional.conv2d(self.first(x), self.kernel)).mean((2, 3)))


class Tied(Twice):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.same.weight

    def forward(self, x):
        return self.last(self.same(self.other(self.first(x))).mean((2, 3)))


class Standardised(Twice):
    def __init__(self):
        super().__init__()
        self.same = timm.layers.StdConv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.same(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice, "same: found a layer called more than once.*fixed="),
        (Functional, "the model itself: found a weight applied with a function.*fixed="),
        (Tied, "same and 1 more: found a weight shared"),
        (Standardised, "same: found a StdConv2d"),
    ],
)
def test_layers_that_cannot_be_searched_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        Supernet(model(), torch.randn(1, 3, 4, 4))


def test_what_is_fixed_may_be_called_twice_or_stay_in_float():
    class Both(Twice):
        def __init__(self):
            super().__init__()
            self.more = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(self.more(self.same(self.same(self.first(x)))).mean((2, 3)))

    net = convert(Both(), (1, 3, 4, 4), fixed={"first": (8, None), "same": (8, 8), "last": (8, 8)})
    assert list(net.layers) == ["more"]
    attention = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3)
    with pytest.raises(ValueError, match=r"self_attention.*\(32, None\)"):
        convert(attention)
    net = convert(attention, fixed={"conv_proj": (8, None), "*.self_attention": (32, None), "heads.head": (8, 8)})
    assert set(net.layers) == {"encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0.mlp.3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (1, 2)}, "bits"),
        ({"bits": ()}, "bits"),
        ({"bits": (2,)}, "depthwise layer d"),
        ({"fixed": {"nothing": (8, 8)}}, "fixed: found nothing"),
        ({"fixed": {"conv1": 8}}, "weight bits, activation bits"),
        ({"fixed": {"conv1": (9, None)}}, "fixed"),
        ({"fixed": {"*": (8, 8)}}, "every layer"),
        ({"act_sign": "both"}, "act_sign"),
        ({"act_sign": {"nowhere": "signed"}}, "act_sign"),
    ],
)
def test_wrong_options_are_named(small, images, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Supernet(small, images[:1], **options)


def test_an_input_the_model_does_not_take(small):
    with pytest.raises(ValueError, match="example_input"):
        Supernet(small, torch.randn(1, 5, 8, 8))


def test_a_convolution_without_batch_norm_warns_once_with_its_name(images):
    class Bare(Small):
        def __init__(self):
            super().__init__()
            self.abn = nn.Identity()

    with pytest.warns(UserWarning, match="follows a:"):
        net = Supernet(Bare(), images[:1])
    assert net.layers["a"].batchnorm is None
    net.features.want({"a"})
    net(images)
    assert net.features.collect()["a"].shape == (16, 8, 5, 5)


def test_a_batch_norm_shared_by_two_layers_is_left_alone(images):
    class Shared(Small):
        def forward(self, x):
            x = torch.relu(self.abn(self.conv1(x)))
            x = torch.relu(self.abn(self.a(x)))
            return self.fc(self.p(self.d(x)).mean((2, 3)))

    with pytest.warns(UserWarning, match="follows a, d, p"):
        net = Supernet(Shared(), images[:1])
    assert isinstance(net.model.abn, nn.BatchNorm2d)


def test_signs_are_observed_at_calibration_or_given(images):
    class Linear(Small):
        def forward(self, x):
            x = self.abn(self.a(self.bn1(self.conv1(x))))
            return self.fc(torch.relu(self.pbn(self.p(torch.relu(self.dbn(self.d(x)))))).mean((2, 3)))

    net = Supernet(Linear(), torch.zeros(1, 3, 10, 10))
    net.calibrate(images)
    assert [layer.act_quantizer.signed for layer in net.layers.values()] == [True, True, False]
    forced = Supernet(Linear(), images[:1], act_sign={"a": "unsigned"})
    before = copy.deepcopy(forced.state_dict())
    with pytest.raises(ValueError, match="input of a: found values down to -"):
        forced.calibrate(images)
    assert all(torch.equal(value, before[name]) for name, value in forced.state_dict().items())
    assert Supernet(Linear(), images[:1], act_sign="signed").layers["p"].act_quantizer.signed


def test_calibration_refuses_nothing_and_nan_and_warns_of_zeros(small, images):
    net = Supernet(small, images[:1])
    with pytest.raises(ValueError, match="calibration images"):
        net.calibrate([])
    with pytest.raises(ValueError, match="input of a: found NaN"):
        net.calibrate(images * float("nan"))
    assert not net.calibrated
    nn.init.constant_(net.model.bn1.bias, -100.0)
    with pytest.warns(UserWarning, match="a, d, p, fc: inputs are all zero"):
        net.calibrate(images)
    assert torch.isfinite(net.eval()(images)).all()


def test_steps_come_from_what_the_float_network_sees(net, small, images):
    small.eval()
    seen = torch.relu(small.bn1(small.conv1(images)))
    expected = 2 * seen.abs().mean() / 15**0.5
    assert net.layers["a"].act_quantizer.step(4).item() == pytest.approx(expected.item(), rel=1e-6)


def test_bits_are_set_in_microseconds(net):
    config = BitConfig.uniform(net, 4, 4)
    net.set_bits(config)
    begun = time.perf_counter()
    for _ in range(100):
        net.select(config.weight_bits, config.act_bits)
    assert (time.perf_counter() - begun) / 100 < 1e-3  # generous: the machine may be busy


def test_paths_are_uniform_over_what_is_allowed_and_depend_on_their_generator_alone(net):
    net.layers["a"].allow((3, 4, 5, 6))
    paths = sample_paths(net, 4000, torch.Generator().manual_seed(3))
    assert paths == sample_paths(net, 4000, torch.Generator().manual_seed(3))
    for index, layer in enumerate(net.layers.values()):
        weights = torch.tensor([path.weight_bits[index] for path in paths])
        activations = torch.tensor([path.act_bits[index] for path in paths])
        for values, choices in ((weights, layer.allowed_weight_bits), (activations, layer.act_choices)):
            assert set(values.tolist()) == set(choices)
            shares = torch.stack([(values == bits).float().mean() for bits in choices])
            assert (shares - 1 / len(choices)).abs().max() < 0.03
    largest = largest_path(net)
    assert largest.weight_bits == largest.act_bits == (6, 6, 6)
    assert aligned(net, largest._replace(weight_bits=(3, 4, 2))) == {"a", "p"}


def test_what_is_allowed_survives_a_checkpoint(net, small, images):
    net.layers["a"].allow((4, 5))
    other = Supernet(small, images[:1])
    other.load_state_dict(net.state_dict())
    assert other.layers["a"].allowed_weight_bits == (4, 5)
    assert other.calibrated
    with pytest.raises(ValueError, match="weight bits of a"):
        net.layers["a"].allow((2, 7))


def test_a_copy_stands_on_its_own(net, images):
    twin = copy.deepcopy(net)
    assert twin.layers["a"].batchnorm is twin.model.abn
    assert twin.layers["a"].tap is twin.features is not net.features
    twin.select([3] * 3, [3] * 3)
    assert net.layers["a"].weight_bits == 6


def test_plain_layers_and_banks(net, images):
    net.select([4, 4, 4], [3, 3, 3])
    layer, bank = net.layers["a"], net.layers["a"].batchnorm
    net.train()(images)
    x = torch.randn(2, 8, 10, 10)
    plain = layer.plain()
    assert type(plain) is nn.Conv2d and plain.stride == (2, 2)
    torch.testing.assert_close(plain(x), functional.conv2d(x, layer.weight, None, 2, 1))
    net.eval()
    y = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(bank.plain()(y), bank(y))
    assert isinstance(layer, QuantLayer)


def test_the_bank_is_one_batch_norm_for_every_pair():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight)
    bank = BatchNormBank(norm, (2, 3), (2, 3))
    separate = {pair: copy.deepcopy(norm) for pair in bank.pairs}
    for _ in range(12):
        pair = bank.pairs[int(torch.randint(4, ()))]
        x = torch.randn(8, 4, 3, 3) * 2 + 1
        bank.select(*pair)
        torch.testing.assert_close(bank(x), separate[pair](x))
    bank.eval()
    for pair, alone in separate.items():
        bank.select(*pair)
        alone.eval()
        x = torch.randn(8, 4, 3, 3)
        torch.testing.assert_close(bank(x), alone(x))
        torch.testing.assert_close(bank.plain()(x), alone(x))
    # cumulative means after a reset, as momentum=None of torch
    bank.train().reset()
    bank.momentum = None
    fresh = nn.BatchNorm2d(4, momentum=None)
    fresh.load_state_dict({**alone.state_dict(), **{k: v for k, v in fresh.state_dict().items() if "running" in k}})
    fresh.num_batches_tracked.zero_()
    for _ in range(3):
        x = torch.randn(8, 4, 3, 3)
        torch.testing.assert_close(bank(x), fresh(x))
    torch.testing.assert_close(bank.running_var[bank.selected], fresh.running_var)


def test_models_by_name():
    assert isinstance(build_model("digits", 10, 1), DigitsNet)
    assert build_model("cifar-resnet20", 7)(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(ValueError, match="model: found resnet1x"):
        build_model("resnet1x")
