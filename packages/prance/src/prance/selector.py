"""The selector: a small actor-critic that sees the keys of a group's last block (PRANCE, section on the selector)."""

import torch
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn

from prance.decision import Decision, Tokens, action_length, decode_action
from prance.space import SearchSpace


class Actor(nn.Module):
    """state -> mean of the action, in [0, 1]."""

    def __init__(self, state: int, actions: int, hidden: int = 256) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(state, hidden), nn.Linear(hidden, hidden)
        self.fc_mu = nn.Linear(hidden, actions)
        orthogonal(self, last=self.fc_mu, gain=0.01)

    def forward(self, state: Float[Tensor, "*batch state"]) -> Float[Tensor, "*batch actions"]:
        x = torch.relu(self.fc2(torch.relu(self.fc1(state))))
        return (torch.tanh(self.fc_mu(x)) + 1) / 2


class Critic(nn.Module):
    """state -> expected discounted reward."""

    def __init__(self, state: int, hidden: int = 256) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(state, hidden), nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 1)
        orthogonal(self)

    def forward(self, state: Float[Tensor, "*batch state"]) -> Float[Tensor, " *batch"]:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(state))))).squeeze(-1)


def orthogonal(module: nn.Module, last: nn.Module | None = None, gain: float = 1.0) -> None:
    """Orthogonal weights of gain 1 (the last layer's `gain`), biases 0 (reference code)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain if layer is last else 1.0)
            nn.init.zeros_(layer.bias)


class Selector(nn.Module):
    """Actor, critic, and how states are normalised.

    Args:
        space: whose choices it takes.
        tokens: N of the network, the length of a state.
        mode: which keep ratios it decides.
        normalise: subtract a running mean of each state entry and divide by its deviation; off for published weights.
        budget: append the budget (a fraction of the largest subnet's MACs) to the state: one selector for all.
    """

    def __init__(
        self,
        space: SearchSpace,
        tokens: int,
        mode: Tokens = "prune_merge",
        *,
        hidden: int = 256,
        normalise: bool = True,
        budget: bool = False,
    ) -> None:
        super().__init__()
        self.space, self.tokens, self.normalise, self.budget = space, tokens, normalise, budget
        self.mode: Tokens = mode
        length = tokens + int(budget)
        self.actor = Actor(length, action_length(space, mode), hidden)
        self.critic = Critic(length, hidden)
        self.register_buffer("mean", torch.zeros(tokens))
        self.register_buffer("square", torch.ones(tokens))
        self.register_buffer("seen", torch.zeros(()))
        self.mean: Tensor
        self.square: Tensor
        self.seen: Tensor

    def forward(self, prepared: Float[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
        """(mean of the action, value) for prepared states."""
        return self.actor(prepared), self.critic(prepared)

    def observe(self, state: Float[Tensor, "batch tokens"]) -> None:
        """Takes states into the running mean and deviation."""
        sums = torch.stack([state.sum(0), state.square().sum(0), torch.full_like(state[0], len(state))]).to(self.mean)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        count = sums[2, 0]
        rate = count / (self.seen + count)
        self.mean += rate * (sums[0] / count - self.mean)
        self.square += rate * (sums[1] / count - self.square)
        self.seen += count

    def prepared(
        self, state: Float[Tensor, "batch tokens"], budget: Float[Tensor, " batch"] | float | None = None
    ) -> Float[Tensor, "batch length"]:
        """What actor and critic see.

        Raises:
            InputError: a state of another length, or no budget where one is needed.
        """
        if state.shape[-1] != self.tokens:
            raise InputError("selector's state", found=state.shape[-1], expected=f"{self.tokens} tokens")
        state = state.to(self.mean)
        if self.normalise:
            deviation = (self.square - self.mean.square()).clamp(min=0).sqrt()
            state = (state - self.mean) / (deviation + 1e-5)
        if not self.budget:
            return state
        if budget is None:
            raise InputError("budget", found="none", expected="a fraction of the largest subnet's MACs")
        column = torch.as_tensor(budget, dtype=state.dtype, device=state.device).expand(len(state))
        return torch.cat([state, column[:, None]], 1)

    def policy(self, point: int, state: Tensor, decision: Decision) -> Decision:
        """Sets a group to what the actor's mean says: a `Policy` for `execute`."""
        action = self.actor(self.prepared(state))
        ratio, embed, prune, merge = decode_action(action, self.space, self.mode)
        return decision.replaced(point, embed, ratio, prune, merge)
