"""A small set of decisions instead of a continuum: prototypes of the policy's actions at every decision point."""

import torch
from jaxtyping import Float
from papercore.errors import InputError
from sklearn.cluster import KMeans
from torch import Tensor, nn


class Codebook(nn.Module):
    """Prototypes of actions; an action is replaced by the nearest one.

    Args:
        prototypes: one row of actions for every decision point and prototype.
    """

    def __init__(self, prototypes: Float[Tensor, "points prototypes actions"]) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes)
        self.prototypes: Tensor

    def forward(self, point: int, action: Float[Tensor, "batch actions"]) -> Float[Tensor, "batch actions"]:
        """The nearest prototype (Euclidean) of every action."""
        table = self.prototypes[point].to(action)
        return table[torch.cdist(action, table).argmin(1)]


def fit_codebook(
    actions: Float[Tensor, "points batch actions"], prototypes: int, *, seed: int = 0, weight: Tensor | None = None
) -> Codebook:
    """k-means of the policy's actions on a set of images, at every decision point.

    Args:
        weight: of every image, for example how often it occurs.

    Raises:
        InputError: fewer images than prototypes.
    """
    if not 1 <= prototypes <= actions.shape[1]:
        raise InputError("prototypes", found=prototypes, expected=f"1 to {actions.shape[1]}, the number of images")
    tables = []
    for at_point in actions:
        distinct = len(at_point.unique(dim=0))
        means = KMeans(min(prototypes, distinct), random_state=seed)
        means.fit(at_point.cpu().double().numpy(), sample_weight=None if weight is None else weight.cpu().numpy())
        table = torch.as_tensor(means.cluster_centers_, dtype=torch.float32)
        tables.append(table[torch.arange(prototypes) % len(table)])
    return Codebook(torch.stack(tables))
