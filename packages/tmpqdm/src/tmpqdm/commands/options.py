"""What several commands share."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from papercore import cli

if TYPE_CHECKING:
    from tmpqdm.workflow import ScoreOptions

Positional = tyro.conf.Positional
Device = Literal["auto", "cpu", "cuda"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring(cli.Command):
    """How pictures are scored."""

    features: str = "digits"
    """space of the distance: digits, pixels, cifar (with --data), inception (with --weights), module:function"""
    reference: str = "digits"
    """.npz of real pictures, or of mu and sigma; or digits"""
    data: Path | None = None
    """data folder with the trained ResNet-56, for cifar"""
    weights: Path | None = None
    """torch-fidelity's weight file, for inception"""
    images: int = 2000
    """pictures of a score"""
    labels: tuple[int, ...] = ()
    """classes of class-conditional networks, repeated over the pictures"""
    guidance: float | None = None
    """classifier-free guidance"""
    eta: float = 0.0
    """noise of DDIM's steps"""
    batch_size: int = 128
    """pictures at a time; no influence on the result"""

    def score_options(self, seed: int, **others: object) -> "ScoreOptions":
        from tmpqdm.workflow import ScoreOptions

        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Scoring)}
        known = {field.name for field in dataclasses.fields(ScoreOptions)}
        return ScoreOptions(**{k: v for k, v in given.items() if k in known}, seed=seed, **others)  # pyright: ignore
