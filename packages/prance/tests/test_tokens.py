"""Token reduction against the reference's numbers and slow references."""

from pathlib import Path

import numpy as np
import pytest
import torch
from prance.tokens import TokenBatch, bipartite_merge, merge_tokens, prune_tokens, rank_tokens, reorder

GOLDEN = np.load(Path(__file__).parent / "golden" / "token_ops.npz", allow_pickle=False)
CASES = sorted({name.split("/")[0] for name in GOLDEN.files})


def case(k: str) -> dict[str, torch.Tensor]:
    return {name.split("/")[1]: torch.as_tensor(GOLDEN[name]) for name in GOLDEN.files if name.split("/")[0] == k}


def ranked(c) -> tuple[TokenBatch, torch.Tensor]:
    tokens = TokenBatch.start(c["x"])
    tokens = TokenBatch(tokens.x, c["size"][..., 0], tokens.count, tokens.origin)
    order = rank_tokens(c["attn_cls_row"].mean(1), tokens.count)
    return reorder(tokens, order), order


def same(tokens: TokenBatch, c, name: str) -> None:
    torch.testing.assert_close(tokens.x, c[f"{name}_x"], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens.size, c[f"{name}_size"][..., 0], rtol=0, atol=1e-6)
    assert tokens.count.tolist() == [int(c[f"{name}_n"])] * len(tokens.x)


@pytest.mark.parametrize("k", CASES)
def test_golden(k):
    c = case(k)
    tokens, order = ranked(c)
    assert torch.equal(order, c["order"])
    batch = len(order)
    p, m = (c[name].double().expand(batch) for name in "pm")
    pruned = prune_tokens(tokens, p)
    same(pruned, c, "prune")
    if int(c["merge_n"]):
        same(merge_tokens(tokens, m), c, "merge")
    if int(c["prune_merge_n"]):
        same(merge_tokens(pruned, m), c, "prune_merge")
    for name, start in (("merge", tokens), ("prune_merge", pruned)):
        if not int(c[f"{name}_n"]):
            continue
        double = TokenBatch(start.x.double(), start.size.double(), start.count, start.origin)
        weighted = merge_tokens(double, m, mean="size_mean")
        torch.testing.assert_close(weighted.x, c[f"{name}_x_sizemean"], rtol=0, atol=1e-6)
        n, kept = start.x.shape[1], int(c[f"{name}_n"])
        # where each merged token (in rank order) went: follow an original token that was in it
        identity = TokenBatch.start(double.x)
        identity = TokenBatch(identity.x, double.size, identity.count, identity.origin)
        assert torch.equal(merge_tokens(identity, m).origin[:, kept:n], c[f"{name}_dst"])
    plain = TokenBatch.start(c["x"])
    plain = TokenBatch(plain.x, c["size"][..., 0], plain.count, plain.origin)
    merged = bipartite_merge(plain, int(c["r"]))
    torch.testing.assert_close(merged.x, c["tome_x"], rtol=0, atol=2e-6)
    torch.testing.assert_close(merged.size, c["tome_size"][..., 0], rtol=0, atol=1e-6)
