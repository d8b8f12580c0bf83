"""What the pictures show is what the network did."""

import numpy as np
import pytest
import torch
from papercore.errors import InputError
from prance import pictures
from prance.decision import Decision
from prance.executor import execute
from prance.space import SearchSpace
from prance.supernet import MetaViT

SPACE = SearchSpace((16, 24), (1.0, 2.0), group=2, depth=6, heads=2, head_dim=8)


def outcome(**keep):
    torch.manual_seed(0)
    net = MetaViT(SPACE, 5, image_size=16, patch_size=4, channels=1).eval()
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        return images, execute(net, images, Decision.static(SPACE, 16, 1.0, **keep), path="packed")


def test_groups_of_patches():
    # a class token that took up patch 0; token 5 holds patches 1 and 2, token 7 patches 3, 4, 5; 6 alone; 7, 8 dropped
    assignment = torch.tensor([0, 0, 5, 5, 7, 7, 7, 2, -1, -1])
    expected = [[-1, 2, 2], [1, 1, 1], [0, -1, -1]]
    assert pictures.patch_groups(assignment, 1, 3).tolist() == expected


def test_dropped_patches_are_grey_and_single_ones_untouched():
    image = np.random.default_rng(0).random((16, 16, 3))
    groups = np.array([[0, -1], [1, 1]])
    large = pictures.painted(image, groups)
    assert large.shape == (192, 192, 3)
    whole = image.repeat(12, 0).repeat(12, 1)
    assert np.array_equal(large[:96, :96], whole[:96, :96])
    assert np.ptp(large[:96, 96:], axis=2).max() < 1e-12
    assert np.allclose(large[96, 40], pictures.colour(1))
    # no outline inside a group
    assert not np.allclose(large[140, 95], pictures.colour(1))


@pytest.mark.parametrize("keep", [{"prune": 0.5}, {"merge": 0.5}, {"prune": 0.7, "merge": 0.5}], ids=str)
def test_kept_patches(tmp_path, keep):
    images, made = outcome(**keep)
    figure = pictures.kept_patches(images, made, titles=["a"], most=2)
    axes = figure.axes
    assert len(axes) == 2 * 3
    assert axes[0].get_title() == "a"
    title = axes[1].get_title()
    assert f"{int(made.count[0, 0])} tokens" in title
    dropped = int((made.assignments[0][0, 1:] == -1).sum())
    assert f"{dropped} patches dropped" in title
    assert (dropped > 0) == ("prune" in keep)
    assert pictures.save(figure, tmp_path / "a" / "kept.png").stat().st_size > 1000
    with pytest.raises(InputError, match="images"):
        pictures.kept_patches(images[:2], made)
    with pytest.raises(InputError, match="kind of picture"):
        pictures.save(figure, tmp_path / "kept.nonsense")


def test_histogram_and_front(tmp_path):
    cost = torch.tensor([5, 1, 3, 2, 4]) * 10**8
    images = torch.rand(5, 3, 8, 8)
    figure = pictures.macs_histogram(cost, images, correct=torch.tensor([1, 0, 1, 1, 1]), shown=2)
    titles = [axis.get_title() for axis in figure.axes[1:]]
    assert titles == ["fewest: 0.1 GMAC", "0.2 GMAC", "most: 0.5 GMAC", "0.4 GMAC"]
    pictures.save(figure, tmp_path / "histogram.svg")
    plot = pictures.pareto_plot({"random": [(3e8, 0.5), (1e8, 0.4), (2e8, 0.3)], "none": []}, full=5e8)
    line = plot.axes[0].lines[0]
    assert line.get_xdata().tolist() == pytest.approx([0.1, 0.3])
    assert line.get_ydata().tolist() == pytest.approx([40, 50])
    pictures.save(plot, tmp_path / "front.png")
    with pytest.raises(InputError, match="as many as"):
        pictures.macs_histogram(cost, images[:2])
    with pytest.raises(InputError, match="finite"):
        pictures.pareto_plot({"a": [(1.0, float("nan"))]})
