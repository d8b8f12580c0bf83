"""The original's greedy search and the exact optimum beside it (golden/README.md)."""

import numpy as np
import pytest
from oneshot_mpq.search.ilp import cheapest_pairs
from oneshot_mpq.search.reference_greedy import level, reference_greedy
from papercore.errors import WorkError

from .conftest import golden

LAYERS = [layer for layer in golden("bitops")[0]["resnet18"]["layers"] if layer["fixed"] is None]
MACS = [layer["macs"] for layer in LAYERS]


def error_of(given):
    weights, activations = np.array(given["weight_coefficient"]), np.array(given["act_coefficient"])
    return lambda w, a, step: 0.25 + float(np.mean(weights * 4.0 ** -np.array(w) + activations * 4.0 ** -np.array(a)))


@pytest.mark.parametrize("name", ["greedy_a", "greedy_b"])
def test_every_move_is_the_originals(name):
    given, _ = golden(name)
    found = reference_greedy(
        given["weight_candidates"],
        given["act_candidates"],
        MACS,
        given["fixed_layers_G"],
        given["target_G"],
        error_of(given),
        start_bits=given["start_bits"],
        weight_level=level("resnet18", given["target_G"]),
    )
    assert list(found.weight_bits) == given["final_weight_bits"] and list(found.act_bits) == given["final_act_bits"]
    assert len(found.trace) == len(given["trace"])
    for move, expected in zip(found.trace, given["trace"], strict=True):
        assert (move.phase, move.layer, move.new_bits) == (expected["phase"], expected["layer"], expected["new_bits"])
        assert [move.score, move.error, move.bitops_G] == pytest.approx(
            [expected["score"], expected["error"], expected["bitops_G"]], rel=1e-9
        )


@pytest.mark.parametrize("name", ["greedy_a", "greedy_b"])
def test_the_integer_programme_finds_the_exact_optimum(name):
    given, _ = golden(name)
    layers = [
        [(w, a) for w in weights for a in activations]
        for weights, activations in zip(given["weight_candidates"], given["act_candidates"], strict=True)
    ]
    coefficients = list(zip(given["weight_coefficient"], given["act_coefficient"], strict=True))
    increase = [
        [(cw * 4.0**-w + ca * 4.0**-a) / len(layers) for w, a in pairs]
        for pairs, (cw, ca) in zip(layers, coefficients, strict=True)
    ]
    costs = [[m * w * a / 1e9 for w, a in pairs] for pairs, m in zip(layers, MACS, strict=True)]
    (best, *_), expected = (
        cheapest_pairs(increase, costs, given["target_G"] - given["fixed_layers_G"], 1),
        given["exact_optimum"],
    )
    chosen = [pairs[k] for pairs, k in zip(layers, best, strict=True)]
    value = error_of(given)([w for w, _ in chosen], [a for _, a in chosen], 0)
    assert value == pytest.approx(expected["error"], rel=1e-9)
    assert [w for w, _ in chosen] == expected["weight_bits"] and [a for _, a in chosen] == expected["act_bits"]
    assert value < given["final_error"]


def test_what_the_original_cannot_end_is_said():
    assert level("resnet18", 27.0) is None and level("resnet18", 33.9) == 4 and level("mobilenet_v2", 3.5) == 3
    with pytest.raises(WorkError, match=r"not ended|no move"):  # the weight phase wants less than 3 bits allow
        reference_greedy([[2, 3, 4, 5]] * 3, [[5]] * 3, [10**9] * 3, 0.0, 30.0, lambda w, a, s: 1.0, weight_level=2)
