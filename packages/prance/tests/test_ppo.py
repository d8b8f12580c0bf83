"""Rewards, advantages, losses and updates against the published code's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.errors import InputError
from prance.decision import decode_action
from prance.ppo import (
    PPOConfig,
    RewardConfig,
    actor_loss,
    exploration,
    gae,
    log_probability,
    normalised,
    probability_ratio,
    reward,
    td_targets,
)
from prance.selector import Actor, Critic
from prance.space import SearchSpace

FOLDER = Path(__file__).parent / "golden"
SETTINGS = json.loads((FOLDER / "ppo.json").read_text())
ARRAYS = np.load(FOLDER / "ppo.npz", allow_pickle=False)
MODES = sorted(SETTINGS)


def arrays(mode: str) -> dict[str, torch.Tensor]:
    return {
        name[len(mode) + 1 :]: torch.as_tensor(ARRAYS[name]) for name in ARRAYS.files if name.startswith(mode + "/")
    }


def nets(g, prefix: str) -> tuple[Actor, Critic]:
    first = g["init/actor/fc1.weight"]
    actor, critic = (
        Actor(first.shape[1], len(g["init/actor/fc_mu.bias"]), len(first)),
        Critic(first.shape[1], len(first)),
    )
    for name, net in (("actor", actor), ("critic", critic)):
        net.load_state_dict(
            {k[len(prefix) + len(name) + 2 :]: v for k, v in g.items() if k.startswith(f"{prefix}/{name}/")}
        )
    return actor, critic


def config(mode: str, **options) -> PPOConfig:
    s = SETTINGS[mode]
    return PPOConfig(
        gamma=s["gamma"],
        lam=s["lmbda"],
        clip=s["clip"],
        actor_learning_rate=s["actor_lr"],
        critic_factor=s["critic_lr"] / s["actor_lr"],
        adam_eps=s["adam_eps"],
        clip_norm=s["grad_clip"],
        entropy_coef=s["entropy_coef"],
        std=s["std"],
        **options,
    )


@pytest.mark.parametrize("mode", MODES)
def test_rewards(mode):
    g, s = arrays(mode), SETTINGS[mode]
    prune, merge = g["actions"][..., 6].double(), g["actions"][..., -1].double()
    found = reward(
        g["acc"] > 0,
        (g["target_acc"] > 0).expand_as(g["acc"]),
        g["flops"] / 1e8,
        prune,
        merge,
        RewardConfig(s["flops_coef_per_1e8"], s["prune_coef"], s["merge_coef"]),
        mode=mode,
    )
    torch.testing.assert_close(found, g["reward_total_reward"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_advantages(mode):
    g, s = arrays(mode), SETTINGS[mode]
    _, critic = nets(g, "init")
    with torch.no_grad():
        values = critic(g["states"])
    steps = s["steps"]
    torch.testing.assert_close(values[:steps].reshape(-1, 1), g["value"], rtol=0, atol=1e-5)
    rewards = g["reward_total_reward"]
    target, delta = td_targets(rewards, values[:-1].double(), values[1:].double(), s["gamma"])
    torch.testing.assert_close(target.reshape(-1, 1).float(), g["td_target"], rtol=0, atol=1e-5)
    torch.testing.assert_close(delta.reshape(-1, 1).float(), g["td_delta"], rtol=0, atol=1e-5)
    advantage = gae(delta, s["gamma"], s["lmbda"])
    torch.testing.assert_close(advantage, g["adv_canonical"], rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised(advantage), g["adv_canonical_normalised"], rtol=0, atol=1e-5)
    zero = torch.zeros_like(rewards)
    _, plain = td_targets(rewards, zero, zero, s["gamma"])
    torch.testing.assert_close(gae(plain, s["gamma"], 1.0), g["mc_return"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_losses(mode):
    g, s = arrays(mode), SETTINGS[mode]
    actor, critic = nets(g, "init")
    states = g["states"][:-1].flatten(0, 1)
    actions = g["actions"].flatten(0, 1).float()
    with torch.no_grad():
        torch.testing.assert_close(actor(states), g["mu_T"].flatten(0, 1), rtol=0, atol=1e-5)
        old = log_probability(actions, actor(states), s["std"])
        torch.testing.assert_close(old, g["old_log_prob"], rtol=0, atol=1e-4)
        first = probability_ratio(old, old, False)
        ref = g["adv_ref_flat_normalised"][:, 0]
        loss = actor_loss(first, ref, s["std"], s["action_dim"], config(mode))
        assert float(loss) == pytest.approx(float(g["actor_loss_epoch1_ref"]), abs=2e-5)
        square = (critic(states) - g["td_target"][:, 0]).square().mean()
        assert float(square) == pytest.approx(float(g["critic_loss_epoch1"]), abs=2e-5)
        actor.load_state_dict({k[len("actor_new/") :]: v for k, v in g.items() if k.startswith("actor_new/")})
        new = log_probability(actions, actor(states), s["std"])
        advantage = g["adv_canonical_normalised"].flatten().float()
        for joint, name in ((False, "per_dim"), (True, "joint")):
            ratio = probability_ratio(new, old, joint)
            torch.testing.assert_close(ratio, g[f"ratio_{name}"], rtol=1e-4, atol=1e-4)
            loss = actor_loss(ratio, advantage, s["std"], s["action_dim"], config(mode, joint_ratio=joint))
            assert float(loss) == pytest.approx(float(g[f"clip_loss_{name}"]), abs=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_updates(mode):
    """The published networks after ten passes; they use advantages that run across images."""
    from prance.selection import update

    g, s = arrays(mode), SETTINGS[mode]
    actor, critic = nets(g, "init")
    optimizer = torch.optim.Adam(
        [
            {"params": actor.parameters(), "lr": s["actor_lr"]},
            {"params": critic.parameters(), "lr": s["critic_lr"]},
        ],
        eps=s["adam_eps"],
    )
    update(
        actor,
        critic,
        optimizer,
        states=g["states"][:-1].flatten(0, 1),
        actions=g["actions"].flatten(0, 1).float(),
        advantage=g["adv_ref_flat_normalised"][:, 0],
        target=g["td_target"][:, 0],
        std=s["std"],
        config=config(mode),
    )
    expected = nets(g, "ref_update10")
    for net, twin in zip((actor, critic), expected, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(
                value, twin.state_dict()[name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("mode", MODES)
def test_exploration(mode):
    s = SETTINGS[mode]
    found = [exploration(PPOConfig(), n) for n in s["exploration_steps"]]
    assert found == pytest.approx(s["exploration"])


DECODED = sorted({name.rsplit("/", 1)[0] for name in ARRAYS.files if name.startswith("decode/")})


@pytest.mark.parametrize("case", DECODED)
def test_actions(case):
    _, size, mode = case.split("/")
    g = arrays(case)
    ratio, embed, prune, merge = decode_action(g["action"], SearchSpace.reference(size), mode)
    assert torch.equal(ratio, g["mlp"])
    assert torch.equal(embed, g["embed"])
    assert torch.equal(prune, g["prune"].clamp(0, 1))
    assert torch.equal(merge, g["merge"].clamp(0, 1))


def test_actions_that_are_wrong():
    space = SearchSpace.reference("tiny")
    with pytest.raises(InputError, match=r"expected \(batch, 7\)"):
        decode_action(torch.zeros(1, 8), space, "prune")
    with pytest.raises(InputError, match="not finite"):
        decode_action(torch.full((1, 7), torch.nan), space, "prune")
    with pytest.raises(InputError, match="token mode"):
        decode_action(torch.zeros(1, 7), space, "drop")  # pyright: ignore[reportArgumentType]


def test_settings_that_are_wrong():
    for options in ({"gamma": 1.1}, {"std": 0}, {"epochs": 0}, {"clip_norm": float("inf")}):
        with pytest.raises(InputError, match=f"field {next(iter(options))}"):
            PPOConfig(**options)
