"""Bit configurations as values and as files."""

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oneshot_mpq import BitConfig
from oneshot_mpq.bitconfig import FORMAT


def test_uniform_bits_round_up_where_there_are_none_and_say_so(net):
    four = BitConfig.uniform(net, 4, 3)
    assert four.weight_bits == (4, 4, 4) and four.act_bits == (3, 3, 3)
    with pytest.warns(UserWarning, match="W2A2 is not possible everywhere: d W3A3"):
        two = BitConfig.uniform(net, 2, 2)
    assert two.weight_bits == two.act_bits == (2, 3, 2)
    with pytest.raises(ValueError, match="uniform bits at a: found 7"):
        BitConfig.uniform(net, 7, 2)
    with pytest.raises(ValueError, match="uniform bits at a: found 0"):
        BitConfig.uniform(net, 4, 0)


def test_what_is_set_comes_back(net):
    config = BitConfig.of(net, [2, 3, 4], [5, 6, 2])
    net.set_bits(config)
    assert net.config() == config
    assert [layer.weight_bits for layer in net.layers.values()] == [2, 3, 4]
    assert net.layers["a"].batchnorm.pairs[net.layers["a"].batchnorm.selected] == (2, 5)
    assert config.bitops_G == net.cost().bitops_G > 0
    assert config.fixed[0].name == "conv1" and config.fixed[0].act_bits is None


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(3, 6), min_size=6, max_size=6), st.dictionaries(st.text(max_size=5), st.integers()))
def test_files_hold_everything(net, tmp_path, bits, metrics):
    config = BitConfig.of(net, bits[:3], bits[3:], metrics=metrics, extra={"note": [1, {"x": None}]})
    config.save(tmp_path / "bits.json")
    assert BitConfig.load(tmp_path / "bits.json") == config
    values = json.loads((tmp_path / "bits.json").read_text())
    assert values["format"] == "oneshot-mpq/bitconfig" and values["version"] == 1 and values["note"] == [1, {"x": None}]
    assert values["layers"][0] == {"name": "a", "weight_bits": bits[0], "act_bits": bits[3], "act_signed": False}


def other(config, **changes):
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: other(c, model="Large"), "model Large, not Small"),
        (lambda c: other(c, layers=c.layers[1:]), "layer a missing"),
        (lambda c: other(c, layers=(*c.layers, dataclasses.replace(c.layers[0], name="z"))), "layer z unknown"),
        (lambda c: other(c, layers=c.layers[::-1]), "layer 0 is p, not a"),
        (
            lambda c: other(c, layers=(dataclasses.replace(c.layers[0], weight_bits=7), *c.layers[1:])),
            "a: weight bits 7",
        ),
        (
            lambda c: other(c, layers=(c.layers[0], dataclasses.replace(c.layers[1], act_bits=2), c.layers[2])),
            "d: activ",
        ),
        (lambda c: other(c, fixed=c.fixed[:1]), "fixed layer fc missing"),
        (
            lambda c: other(c, fixed=(dataclasses.replace(c.fixed[0], weight_bits=4), c.fixed[1])),
            "conv1 has other bits",
        ),
    ],
)
def test_another_networks_configuration_is_refused_and_nothing_changes(net, change, message):
    net.select([3, 4, 5], [3, 4, 5])
    config = change(BitConfig.uniform(net, 6, 6))
    with pytest.raises(ValueError, match=message):
        net.set_bits(config)
    assert [layer.weight_bits for layer in net.layers.values()] == [3, 4, 5]


def test_only_the_first_differences_are_listed(net):
    config = BitConfig.uniform(net, 6, 6)
    wrong = other(
        config, layers=tuple(dataclasses.replace(layer, weight_bits=8, act_bits=8) for layer in config.layers)
    )
    with pytest.raises(ValueError, match="and 3 more"):
        wrong.check(net)


def test_differences(net):
    first, second = BitConfig.of(net, [2, 3, 4], [5, 6, 2]), BitConfig.of(net, [2, 4, 4], [5, 6, 3])
    assert first.diff(second) == [("d", "W3A6", "W4A6"), ("p", "W4A2", "W4A3")]
    assert first.diff(first) == []
    assert first.diff(other(second, layers=second.layers[:2])) == [("d", "W3A6", "W4A6"), ("p", "W4A2", "-")]


GOOD = {
    "format": FORMAT,
    "version": 1,
    "model": "Small",
    "input": [1, 3, 10, 10],
    "layers": [{"name": "a", "weight_bits": 2, "act_bits": 2}],
    "fixed": [{"name": "fc", "weight_bits": 8, "act_bits": None}],
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "format: found list"),
        ({**GOOD, "format": "else"}, "format: found else"),
        ({**GOOD, "version": 2}, "version: found 2"),
        ({k: v for k, v in GOOD.items() if k != "layers"}, "key layers"),
        ({**GOOD, "input": "x"}, "input: found x"),
        ({**GOOD, "layers": {}}, "layers: found dict"),
        ({**GOOD, "layers": [3]}, r"layers\[0\]: found int"),
        ({**GOOD, "layers": [{"name": "a", "weight_bits": 2}]}, r"layers\[0\].act_bits: found nothing"),
        ({**GOOD, "layers": [{"name": "a", "weight_bits": "2", "act_bits": 2}]}, r"layers\[0\].weight_bits: found 2"),
        ({**GOOD, "layers": [{"name": "a", "weight_bits": True, "act_bits": 2}]}, r"layers\[0\].weight_bits"),
        ({**GOOD, "layers": [{"name": "a", "weight_bits": 2, "act_bits": None}]}, r"layers\[0\].act_bits"),
    ],
)
def test_files_that_are_no_configuration_are_named(tmp_path, values, message):
    path = tmp_path / "bits.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        BitConfig.load(path)
    assert str(path) in str(error.value)


def test_files_that_are_not_there_or_no_json_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json"):
        BitConfig.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=r"torn\.json.*expected JSON"):
        BitConfig.load(tmp_path / "torn.json")


def test_bits_change_the_result(net, images):
    net.eval().set_bits(BitConfig.uniform(net, 6, 6))
    six = net(images)
    net.set_bits(BitConfig.uniform(net, 3, 3))
    assert not torch.equal(net(images), six)
