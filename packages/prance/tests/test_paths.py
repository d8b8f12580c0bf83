"""Four ways of running a network, one answer; and that answer against the published code and a float64 computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from prance.decision import Decision
from prance.executor import execute
from prance.macs import macs
from prance.original import load_reference
from prance.selector import Selector
from prance.space import SearchSpace
from prance.supernet import MetaViT

FOLDER = Path(__file__).parent / "golden"
MICRO = json.loads((FOLDER / "micro_net.json").read_text())
ARRAYS = np.load(FOLDER / "micro_net.npz", allow_pickle=False)
PATHS = ("sliced", "masked", "packed", "bucketed")
pytestmark = pytest.mark.filterwarnings("ignore:widths .* are not multiples of 8")


def space() -> SearchSpace:
    return SearchSpace(MICRO["embed_choices"], MICRO["mlp_choices"], heads=1)


def weights(prefix: str, divisors: dict, kind: torch.dtype) -> dict[str, torch.Tensor]:
    names = [name for name in ARRAYS.files if name.startswith(prefix)]
    return {
        name[len(prefix) :]: (torch.as_tensor(ARRAYS[name]).float() / divisors[name[len(prefix) :]]).to(kind)
        for name in names
    }


def network(kind: torch.dtype) -> MetaViT:
    net = MetaViT(space(), 10, image_size=32, patch_size=8, registers=0).to(kind).eval()
    return load_reference(net, weights("w/", MICRO["weight_divisor"], kind))


def selector(name: str, mode, kind: torch.dtype) -> Selector:
    made = Selector(space(), 17, mode, hidden=32, normalise=False).to(kind)
    made.actor.load_state_dict(weights(name + "/", MICRO["actor_divisor"], kind))
    return made


def golden_decision(case: str, suffix: str = "") -> Decision:
    embed, ratio, prune, merge = (
        ARRAYS[f"{case}/{name}{suffix}"].tolist() for name in ("embed", "ratio", "prune", "merge")
    )
    at = space().points
    rows = [torch.tensor([row]) for row in (embed, ratio, [prune[i] for i in at], [merge[i] for i in at])]
    return Decision(space(), *rows)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MICRO["cases"])
@torch.no_grad()
def test_golden(case, kind, path):
    entry, net = MICRO["cases"][case], network(kind)
    image = torch.as_tensor(ARRAYS[f"{case}/image"])[None].to(kind) / MICRO["image_divisor"]
    expected = golden_decision(case)
    atol = 1e-4 if kind == torch.float32 else 1e-10
    if entry["actor"] is None:
        outcome = execute(net, image, expected, path=path)
    else:
        chosen = selector(entry["actor"], entry["mode"], kind)
        outcome = execute(net, image, Decision.largest(space()), path=path, policy=chosen.policy)
        assert torch.equal(outcome.decision.embed, expected.embed)
        assert torch.equal(outcome.decision.mlp_ratio, expected.mlp_ratio)
        # the stored actions went through float32
        torch.testing.assert_close(outcome.decision.prune, expected.prune, rtol=0, atol=max(atol, 1e-7))
        torch.testing.assert_close(outcome.decision.merge, expected.merge, rtol=0, atol=max(atol, 1e-7))
        action = torch.as_tensor(ARRAYS[f"{case}/action"])
        found = torch.cat([chosen.actor(state.to(kind)) for state in outcome.states]).double()
        torch.testing.assert_close(found, action, rtol=0, atol=max(atol, 1e-7))
    logits = torch.as_tensor(ARRAYS[f"{case}/logits_canonical"])
    torch.testing.assert_close(outcome.logits[0].double(), logits, rtol=0, atol=atol)
    states = torch.cat(outcome.states).double()
    torch.testing.assert_close(states, torch.as_tensor(ARRAYS[f"{case}/state"]), rtol=0, atol=atol)
    assert outcome.count[0].tolist() == ARRAYS[f"{case}/n_after"].tolist()
    assert outcome.origin[0].tolist() == ARRAYS[f"{case}/assign_final"].tolist()
    assert macs(net, outcome.decision).tolist() == [entry["macs_canonical"]]
    weighted = execute(net, image, outcome.decision, path=path, mean="size_mean")
    if entry["actor"] is None:
        logits = torch.as_tensor(ARRAYS[f"{case}/logits_canonical_sizemean"])
        torch.testing.assert_close(weighted.logits[0].double(), logits, rtol=0, atol=atol)


@pytest.mark.parametrize("case", [name for name, entry in MICRO["cases"].items() if entry["reference_runs"]])
@torch.no_grad()
def test_golden_of_the_published_inference(case):
    """Its two faults included, for its weights."""
    entry, net = MICRO["cases"][case], network(torch.float32)
    image = torch.as_tensor(ARRAYS[f"{case}/image"])[None].float() / MICRO["image_divisor"]
    expected = golden_decision(case, "_ref_fast")
    if entry["actor"] is None:
        outcome = execute(net, image, expected, path="reference_fast")
    else:
        policy = selector(entry["actor"], entry["mode"], torch.float32).policy
        outcome = execute(net, image, Decision.largest(space()), path="reference_fast", policy=policy)
        assert torch.equal(outcome.decision.embed, expected.embed)
        assert torch.equal(outcome.decision.mlp_ratio, expected.mlp_ratio)
    assert outcome.count[0].tolist() == ARRAYS[f"{case}/n_after_ref_fast"].tolist()
    logits = torch.as_tensor(ARRAYS[f"{case}/logits_ref_fast"])
    torch.testing.assert_close(outcome.logits[0], logits, rtol=0, atol=1e-4)
