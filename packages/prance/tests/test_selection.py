"""Result-to-go, the selector's training, budgets, adaptive models."""

import dataclasses
import math
import warnings

import pytest
import torch
from papercore.errors import InputError, WorkError
from papercore.training import TrainConfig
from prance.adaptive import AdaptiveViT
from prance.budget import capped, parse_macs, reachable
from prance.codebook import fit_codebook
from prance.decision import Decision
from prance.macs import Geometry, macs
from prance.ppo import PPOConfig, RewardConfig
from prance.rollout import Rollout, result_to_go_rollout
from prance.selection import Budget, Selection, select
from prance.selector import Selector
from prance.space import SearchSpace
from prance.stages import PretrainConfig, finetune, pretrain
from prance.supernet import MetaViT
from torch.utils.data import TensorDataset

SPACE = SearchSpace((16, 24, 32), (1, 2), group=2, depth=6, heads=2, head_dim=8)


def network(seed: int = 0) -> MetaViT:
    torch.manual_seed(seed)
    net = MetaViT(SPACE, 10, image_size=8, patch_size=2, channels=1).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def selector(mode="prune_merge", seed: int = 0, **options) -> Selector:
    torch.manual_seed(seed)
    return Selector(SPACE, 17, mode, hidden=16, **options)


def pictures(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("path", ["masked", "packed", "bucketed"])
@pytest.mark.parametrize("delayed", [False, True])
def test_kept_runs_give_what_whole_runs_give(path, delayed):
    net, chooser, (images, labels) = network().double(), selector().double(), pictures()
    target = torch.rand(12, generator=torch.Generator().manual_seed(1)) < 0.5

    def roll(reuse: bool) -> Rollout:
        return result_to_go_rollout(
            net,
            chooser,
            images.double(),
            labels,
            target,
            std=0.3,
            generator=torch.Generator().manual_seed(2),
            path=path,
            reuse=reuse,
            delayed=delayed,
        )

    kept, whole = roll(True), roll(False)
    torch.testing.assert_close(kept.rewards, whole.rewards)
    torch.testing.assert_close(kept.states, whole.states)
    torch.testing.assert_close(kept.decision.prune, whole.decision.prune)
    assert torch.equal(kept.correct, whole.correct)
    # the last step pays what the images were given
    outcome = AdaptiveViT(net, decision=kept.decision, engine="masked")(images.double())
    assert torch.equal(outcome.logits.argmax(1) == labels, kept.correct)
    full = macs(net, Decision.largest(SPACE)).double()
    torch.testing.assert_close(kept.cost, macs(net, kept.decision).double() / full)
    tokens = 0.1 * kept.decision.prune[:, -1] + 0.1 * kept.decision.merge[:, -1]
    right = (kept.correct | (kept.correct == target)).double()
    torch.testing.assert_close(kept.rewards[-1].double(), right - 0.187 * kept.cost - tokens, rtol=0, atol=1e-6)
    if delayed:
        torch.testing.assert_close(
            kept.rewards[0].double(),
            -0.1 * kept.decision.prune[:, 0] - 0.1 * kept.decision.merge[:, 0],
            rtol=0,
            atol=1e-6,
        )


def test_rewards_that_are_not_finite_stop_the_run():
    net, (images, labels) = network(), pictures()
    with torch.no_grad():
        net.head.weight[0, 0] = torch.nan
    with pytest.raises(WorkError, match=r"logits of images \[0, 1"):
        result_to_go_rollout(
            net, selector(), images, labels, labels > 4, std=0.3, generator=torch.Generator().manual_seed(0)
        )


def toy_rollout(net, chooser, images, labels, target, *, std, generator, **options) -> Rollout:
    """Three steps whose best action is known: all numbers at what the state says."""
    states = torch.rand(3, len(images), 17, generator=generator)
    prepared = torch.stack([chooser.prepared(state) for state in states])
    mean = chooser.actor(prepared).detach()
    actions = (mean + std * torch.randn(mean.shape, generator=generator)).clamp(0, 1)
    goal = states[..., :1].round() * 0.8 + 0.1
    rewards = -(actions - goal).square().mean(-1)
    none = torch.zeros(len(images))
    return Rollout(prepared, actions, rewards, Decision.largest(SPACE, len(images)), none.bool(), none.double())


def test_a_selector_learns_what_is_best_in_a_toy(tmp_path):
    chooser = selector(normalise=False)
    config = PPOConfig(actor_learning_rate=3e-3, critic_factor=2.0)
    method = Selection(network(), chooser, config, make_rollout=toy_rollout)
    images, labels = pictures(64)
    result = select(
        network(), chooser, TensorDataset(images, labels), labels > 4, tmp_path, rollouts=60, images=64, device="cpu",
        method=method,
    )  # fmt: skip
    state = torch.rand(200, 17, generator=torch.Generator().manual_seed(9))
    goal = state[:, :1].round() * 0.8 + 0.1
    trained = result.model
    assert isinstance(trained, Selector)
    with torch.no_grad():
        error = (trained.actor(state) - goal).square().mean()
        before = (selector(normalise=False).actor(state) - goal).square().mean()
    assert error < before / 3


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_stopped_selection_goes_on_to_the_same_bits(tmp_path, conditioned):
    net, (images, labels) = network(), pictures(32)
    samples, target = TensorDataset(images, labels), labels > 4

    class Dying(Selection):
        def collect(self, batch, generator):
            if self.updates == 12:
                raise KeyboardInterrupt
            super().collect(batch, generator)

    def run(name: str, kind=Selection):
        chooser = selector(budget=conditioned)
        method = kind(net, chooser, PPOConfig(epochs=3), budget=None if conditioned else Budget(0.5))
        return select(
            net, chooser, samples, target, tmp_path / name, rollouts=15, images=8, device="cpu", method=method
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", Dying)
    resumed = run("cut")
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_the_price_of_macs_follows_the_budget():
    net, (images, labels) = network(), pictures(16)
    chooser = selector()
    method = Selection(net, chooser, PPOConfig(epochs=1), budget=Budget(0.2, rate=0.5))
    generator = torch.Generator().manual_seed(0)
    before = method.price
    for _ in range(3):
        list(method.losses(chooser, (images, labels, labels > 4), generator))
        method.after_step(chooser, 0)
    assert method.report["cost"] > 0.2
    assert method.price > before  # too dear: MACs become more expensive
    for share in (0, 1.5, math.nan):
        with pytest.raises(InputError, match="budget"):
            Budget(share)


def test_the_stages_train_and_go_on(tmp_path):
    images, labels = pictures(24)
    samples = TensorDataset(images, labels)
    config = TrainConfig(steps=6, batch_size=8, learning_rate=1e-3, checkpoint_every=2, log_every=2)
    stage = PretrainConfig(largest=True, smallest=True, random=2, tokens="prune_merge", mixup=0.2)
    first = pretrain(network(), samples, tmp_path / "net", config, stage, device="cpu")
    again = pretrain(network(), samples, tmp_path / "net", config, stage, device="cpu")
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.model.head.weight, network().head.weight)
    net = first.model
    tuned = finetune(net, selector(), samples, tmp_path / "tuned", config, device="cpu")
    assert isinstance(tuned.model, MetaViT)
    assert math.isfinite(tuned.loss)
    for options, words in (
        ({"random": 0, "largest": False}, "field random"),
        ({"distil": 2}, "field distil"),
        ({"mixup": -1}, "field mixup"),
    ):
        with pytest.raises(InputError, match=words):
            PretrainConfig(**options)


@torch.no_grad()
def test_adaptive_models_decide_for_every_image_alone():
    net, chooser, (images, _) = network().double(), selector(seed=3).double(), pictures(9)
    for parameter in chooser.actor.parameters():
        parameter.mul_(3)
    images = images.double()
    whole = AdaptiveViT(net, chooser, "prune_merge")(images)
    for engine in ("sliced", "masked", "bucketed"):
        other = AdaptiveViT(net, chooser, engine=engine)(images)
        torch.testing.assert_close(other.logits, whole.logits, rtol=0, atol=1e-10)
        assert torch.equal(other.macs, whole.macs)
        assert torch.equal(other.tokens, whole.tokens)
        assert torch.equal(other.assignment, whole.assignment)
    part = AdaptiveViT(net, chooser)(images[[7, 2]])
    torch.testing.assert_close(part.logits, whole.logits[[7, 2]], rtol=0, atol=1e-10)
    assert torch.equal(part.macs, whole.macs[[7, 2]])
    assert torch.equal(whole.macs, macs(net, whole.decisions))
    empty = AdaptiveViT(net, chooser)(images[:0])
    assert empty.logits.shape == (0, 10)
    assert len(empty.macs) == 0


@torch.no_grad()
def test_no_image_exceeds_its_cap():
    net, chooser, (images, _) = network(), selector(), pictures(9)
    low, high = reachable(Decision.largest(SPACE), Geometry.of(net))
    free = AdaptiveViT(net, chooser)(images)
    for cap in (low, (2 * low + high) // 3, high):
        found = AdaptiveViT(net, chooser, max=cap)(images)
        assert int(found.macs.max()) <= cap
        inside = free.macs <= cap
        assert torch.equal(found.macs[inside], free.macs[inside])  # who can keep to it is left alone
    with pytest.raises(InputError, match=f"from {low / 1e9:.4g} to {high / 1e9:.4g} GMAC"):
        AdaptiveViT(net, chooser, max=low - 1)
    with pytest.raises(InputError, match="GMAC"):
        AdaptiveViT(net, chooser, budget=high + 1)
    largest = Decision.largest(SPACE, 2)
    assert torch.equal(capped(largest, 0, high, Geometry.of(net)).embed, largest.embed)


@torch.no_grad()
def test_the_mean_over_a_stream_comes_to_the_budget():
    net, chooser, (images, _) = network(), selector("prune"), pictures(16)
    low, high = reachable(Decision.largest(SPACE), Geometry.of(net))
    goal = low + (high - low) // 3
    model = AdaptiveViT(net, chooser, budget=goal)
    assert model.controller is not None
    spent = torch.cat([model(images).macs for _ in range(40)])
    assert float(spent[-160:].double().mean()) == pytest.approx(goal, rel=0.15)
    assert model.controller.images == 640


@torch.no_grad()
def test_a_selector_may_be_told_its_budget_and_a_codebook_bounds_the_decisions():
    net, (images, _) = network(), pictures(30)
    told = selector(budget=True)
    assert AdaptiveViT(net, told, budget=0.7 * int(macs(net, Decision.largest(SPACE))))(images).logits.shape == (30, 10)
    with pytest.raises(InputError, match="budget: found none"):
        told.prepared(torch.zeros(2, 17))
    chooser = selector(seed=5)
    for parameter in chooser.actor.parameters():
        parameter.mul_(4)
    free = AdaptiveViT(net, chooser)(images)
    states = torch.stack([chooser.actor(chooser.prepared(state)) for state in free.outcome.states])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        book = fit_codebook(states, 3)
    bound = AdaptiveViT(net, chooser, codebook=book)(images)
    for point in range(len(SPACE.points)):
        blocks = SPACE.decided(point)
        rows = torch.cat(
            [bound.decisions.embed[:, blocks.start : blocks.stop], bound.decisions.prune[:, point, None]], 1
        )
        assert len(rows.unique(dim=0)) <= 3
    with pytest.raises(InputError, match="prototypes"):
        fit_codebook(states, 31)


def test_selectors_and_budgets_that_do_not_fit():
    net = network()
    other = dataclasses.replace(SPACE, embed=(8, 32))
    for chooser, words in (
        (Selector(SPACE, 18, "prune"), "length of the state: found 18, expected 17"),
        (Selector(other, 17, "prune"), "widths"),
        (selector("prune"), "token mode: found prune, expected merge"),
    ):
        with pytest.raises(InputError, match=words):
            AdaptiveViT(net, chooser, "merge" if "mode" in words else None)
    with pytest.raises(InputError, match="a selector, or one decision"):
        AdaptiveViT(net)
    with pytest.raises(InputError, match="none without a selector"):
        AdaptiveViT(net, decision=Decision.largest(SPACE), budget=int(macs(net, Decision.largest(SPACE))))
    with pytest.raises(InputError, match="selector's state"):
        selector().prepared(torch.zeros(1, 5))
    assert parse_macs("2.2G") == 2_200_000_000
    assert parse_macs(5e6) == 5_000_000
    for text in ("", "G", "2.2X", "-1", "nan", "1.2.3"):
        with pytest.raises(InputError, match="budget"):
            parse_macs(text)


def test_rewards_may_ask_a_selector_to_keep_to_its_budget():
    from prance.ppo import reward

    yes = torch.ones(2, dtype=torch.bool)
    cost, keep = torch.tensor([0.4, 0.8]), torch.ones(2)
    config = RewardConfig(0.1, 0.0, 0.0, over_budget=2.0)
    found = reward(yes, yes, cost, keep, keep, config, budget=torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found, torch.tensor([1 - 0.04, 1 - 0.08 - 0.6]).double(), rtol=0, atol=1e-6)
