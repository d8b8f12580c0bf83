"""How commands get a meta-network: by a name of timm, or from published weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from papercore.errors import InputError

if TYPE_CHECKING:
    from prance.decision import Decision
    from prance.space import SearchSpace
    from prance.supernet import MetaViT


def open_network(source: str, size: str | None = None, *, pretrained: bool = False) -> "MetaViT":
    """A meta-network, in evaluation mode on the CPU.

    Args:
        source: the name of a timm vision transformer, or a file with weights under the published names.
        size: "tiny", "small" or "base", the space of published weights.
        pretrained: download the weights of a timm model; random ones otherwise.

    Raises:
        InputError: neither of them, or weights of another network.
    """
    path = Path(source)
    if path.is_file():
        from prance.original import load_reference, read_weights
        from prance.space import SearchSpace
        from prance.supernet import MetaViT

        if size is None:
            raise InputError("--size", found="none", expected="tiny, small or base, for published weights")
        weights = read_weights(path)
        if "head.weight" not in weights:
            raise InputError("not a meta-network", where=path, found=sorted(weights)[:5], expected="head.weight")
        net = MetaViT(SearchSpace.reference(size), len(weights["head.weight"]))
        return load_reference(net, weights).eval()
    if path.exists():
        raise InputError("is a folder", where=path, expected="a file of published weights, or a model of timm")
    from prance.elastic import elastic

    return elastic(source, pretrained=pretrained).eval()


def static_decision(
    space: "SearchSpace",
    embed: tuple[int, ...],
    mlp_ratio: tuple[float, ...],
    prune: tuple[float, ...],
    merge: tuple[float, ...],
) -> "Decision":
    """From options: none for the largest choice, one number for all places, or a number for each.

    Raises:
        InputError: another number of numbers, or a value out of range.
    """
    from prance.decision import Decision

    given = {"embed": embed, "mlp-ratio": mlp_ratio, "prune": prune, "merge": merge}
    depth, points = space.depth, len(space.points)
    lengths = {"embed": depth, "mlp-ratio": depth, "prune": points, "merge": points}
    defaults = {"embed": space.embed[-1], "mlp-ratio": space.mlp_ratio[-1], "prune": 1.0, "merge": 1.0}
    rows = {}
    for name, values in given.items():
        if len(values) not in (0, 1, lengths[name]):
            raise InputError(f"--{name}", found=f"{len(values)} numbers", expected=f"1 or {lengths[name]}")
        rows[name] = list(values) if len(values) > 1 else [*values, defaults[name]][0]
    return Decision.static(space, rows["embed"], rows["mlp-ratio"], prune=rows["prune"], merge=rows["merge"])
