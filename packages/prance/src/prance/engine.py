"""What the ways of running a meta-network have in common: the steps of the network, as `executor` calls them."""

import dataclasses
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from prance.decision import Decision
from prance.supernet import MetaViT


class Engine(Protocol):
    """The steps of a network; `flow` is whatever the engine keeps between them and is never changed in place."""

    net: MetaViT

    def begin(self, images: Tensor, decision: Decision) -> Any: ...

    def attend(self, block: int, flow: Any, decision: Decision, scores: bool, state: bool) -> "Attended": ...

    def reduce(self, point: int, flow: Any, scores: Any, decision: Decision) -> Any: ...

    def feed(self, block: int, flow: Any, decision: Decision) -> Any: ...

    def head(self, flow: Any, decision: Decision) -> Float[Tensor, "batch classes"]: ...

    def count(self, flow: Any) -> Int[Tensor, " batch"]: ...

    def origin(self, flow: Any) -> Int[Tensor, "batch tokens"]: ...


@dataclasses.dataclass(frozen=True)
class Attended:
    """After the attention of a block, its residual added."""

    flow: Any
    scores: Any = None
    """how much attention the class token pays to every token, in the engine's own layout"""
    state: Float[Tensor, "batch tokens"] | None = None
    """mean of every token's key over heads and channels, zero where there is no token"""
