"""Counts against the published code's numbers and torch's own counter."""

import json
from pathlib import Path

import pytest
import torch
from prance.decision import Decision
from prance.macs import Geometry, active_parameters, macs, merge_macs, token_counts
from prance.space import SearchSpace

GOLDEN = json.loads((Path(__file__).parent / "golden" / "flops.json").read_text())
ROWS = [(size, i) for size in ("tiny", "small", "base") for i in range(len(GOLDEN[size]["rows"]))]


@pytest.mark.parametrize(("size", "index"), ROWS)
def test_golden(size, index):
    entry = GOLDEN[size]
    row, space = entry["rows"][index], SearchSpace.reference(size)
    assert (space.width, space.heads, list(space.embed)) == (
        entry["super_embed"],
        entry["heads"],
        entry["embed_choices"],
    )
    decision = Decision.static(space, row["embed"], row["ratio"], prune=row["prune"], merge=row["merge"])
    shape = Geometry(197, 1, entry["patch"], 3, entry["classes"], space.projected)
    attention, mlp = token_counts(decision, shape)
    assert mlp[0].tolist() == row["tokens_mlp"]
    tokens = None
    if row["mode"] == "prune_merge":  # these rows have the published code's count of tokens in the attention
        tokens = torch.tensor([row["tokens_attn"]]), torch.tensor([row["tokens_mlp"]])
    else:
        assert attention[0].tolist() == row["tokens_attn"]
        assert merge_macs(shape, decision).tolist() == [row["merge_similarity_macs"]]
    assert macs(shape, decision, tokens=tokens).tolist() == [row["macs_canonical"]]
    assert macs(shape, decision, "reference", tokens).tolist() == [pytest.approx(row["flops_reference"], rel=1e-9)]
    assert active_parameters(shape, decision).tolist() == [row["params_reference"]]


def test_plain_vision_transformers_have_the_known_counts():
    for width, heads, known in ((192, 3, 1_253_683_200), (384, 6, 4_598_882_304), (768, 12, 17_563_828_224)):
        space = SearchSpace((width,), (4,), heads=heads)
        assert macs(Geometry(projected=()), Decision.largest(space)).tolist() == [known]
