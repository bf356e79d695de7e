"""Metrics against values worked out by hand, or by another way of computing them."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from ouroboros3d.errors import ConfigError
from ouroboros3d.evaluation.metrics import (
    gradient_distance,
    grey_casts,
    iou,
    nearest_distances,
    picture_silhouette,
    point_scores,
    psnr,
    score_images,
    ssim,
)
from ouroboros3d.models.lpips import make_lpips


def picture(seed: int = 0, count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error():
    a = torch.full((2, 3, 4, 4), 0.5)
    b = a + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert psnr(a, a).tolist() == [100.0, 100.0]


def test_psnr_of_the_foreground_ignores_the_rest():
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    b[..., :2], b[..., 2:] = 0.1, 0.9
    assert psnr(a, b, mask).item() == pytest.approx(20, abs=1e-3)
    assert psnr(a, b).item() == pytest.approx(-10 * math.log10((0.01 + 0.81) / 2), abs=1e-3)


def test_ssim():
    a = picture()
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    # Of two constant pictures only the luminance term is left: (2 x y + c1) / (x^2 + y^2 + c1), c1 = 0.01^2.
    x, y = torch.full((1, 3, 32, 32), 0.2), torch.full((1, 3, 32, 32), 0.6)
    assert ssim(x, y).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-4)
    assert ssim(a[:1], picture(1)[:1]).shape == (1,)
    assert ssim(a, picture(1)).max() < 0.3


def test_gradient_distance_sees_edges_and_not_levels():
    a = picture()
    assert gradient_distance(a, a).tolist() == [0, 0]
    assert gradient_distance(a, a + 0.3).tolist() == pytest.approx([0, 0], abs=1e-6)
    ramp = torch.linspace(0, 1, 5).expand(1, 3, 4, 5)  # rises by 1/4 a pixel along x, not at all along y
    assert gradient_distance(ramp, torch.zeros_like(ramp), scales=1).item() == pytest.approx(0.25 / 2)
    # Halving the picture doubles what a pixel rises by: (1/8 + 1/4) / 2 of a ramp of 8 pixels, an eighth each.
    ramp = (torch.arange(8) / 8).expand(1, 3, 8, 8)
    assert gradient_distance(ramp, torch.zeros_like(ramp), scales=2).item() == pytest.approx((1 / 16 + 1 / 8) / 2)


def test_iou():
    a = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    b = a.clone()
    a[0, 0, :2], b[0, 0, 1:3] = True, True  # 4 of 12 in common
    a[1, 0, 0] = True
    assert iou(a, b).tolist() == pytest.approx([1 / 3, 0, 1])


def test_casts_are_those_of_the_grey_pixels():
    truth, alpha = torch.full((3, 8, 8), 0.4), torch.ones(1, 8, 8)
    truth[0, :4] = 0.9  # red pixels, whatever they become
    made = truth.clone()
    made[1, 4:] += 0.06
    made[2, 4:] -= 0.02
    made[:, :4] = 0
    casts = grey_casts(made, truth, alpha)
    assert casts["green"] == pytest.approx(0.07, abs=1e-6) and casts["red_blue"] == pytest.approx(0.02, abs=1e-6)
    assert math.isnan(grey_casts(made, truth, alpha * 0)["green"])


def test_nearest_distances_do_not_depend_on_the_chunk():
    g = torch.Generator().manual_seed(0)
    points, others = torch.randn(50, 3, generator=g), torch.randn(70, 3, generator=g)
    expected = (points[:, None] - others).norm(dim=-1).min(1).values
    for chunk in (1, 7, 100):
        torch.testing.assert_close(nearest_distances(points, others, chunk), expected, atol=1e-5, rtol=1e-5)


def test_points_beside_a_plane():
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, 11), torch.linspace(0, 1, 11), indexing="ij"), -1)
    surface = torch.cat([grid.reshape(-1, 2), torch.zeros(121, 1)], 1)
    scores = point_scores(surface + torch.tensor([0, 0, 0.03]), surface)
    assert scores == pytest.approx({"chamfer": 0.03, "fscore_0.02": 0, "fscore_0.05": 1}, abs=1e-5)
    # Half of the plane: every point is right, 66 of 121 places of the surface (and the next row at 0.1) are covered.
    half = surface[surface[:, 0] <= 0.5 + 1e-6]
    scores = point_scores(half, surface)
    recall = 66 / 121
    assert scores["fscore_0.02"] == pytest.approx(2 * recall / (1 + recall))
    assert scores["chamfer"] == pytest.approx(sum(0.1 * k * 11 for k in range(1, 6)) / 121 / 2, abs=1e-5)


def test_no_points_at_all():
    scores = point_scores(torch.zeros(0, 3), torch.zeros(5, 3))
    assert math.isnan(scores["chamfer"]) and scores["fscore_0.02"] == scores["fscore_0.05"] == 0


class TestScoresOfPictures:
    """All of them at once, as an evaluation has them."""

    def test_each_is_a_mean_over_the_views_of_an_object(self):
        truth = torch.full((2, 2, 3, 32, 32), 0.5)
        made = truth + torch.tensor([[0.1, 0.01], [0.1, 0.1]])[..., None, None, None]
        scores = score_images(made, truth)
        assert scores["psnr"].tolist() == pytest.approx([30, 20], abs=1e-3)  # not of the pooled error, 22.97
        assert set(scores) == {"psnr", "ssim", "gradient_distance"}

    def test_foreground_and_silhouette(self):
        truth, made = torch.ones(1, 2, 3, 32, 32), torch.ones(1, 2, 3, 32, 32)
        alpha = torch.zeros(1, 2, 1, 32, 32)
        alpha[0, 0, :, 8:24, 8:24] = 1  # the second view shows nothing
        truth[0, 0, :, 8:24, 8:24] = 0.5
        made[0, 0, :, 8:24, 16:32] = 0.6  # half beside it
        scores = score_images(made, truth, alpha, picture_silhouette(made, (1, 1, 1)))
        mse = (0.5**2 + 0.1**2) / 2
        assert scores["psnr_foreground"].item() == pytest.approx(-10 * math.log10(mse), abs=1e-3)
        assert scores["iou"].item() == pytest.approx((1 / 3 + 1) / 2)

    def test_lpips_is_a_column_only_where_there_is_one(self):
        pictures = torch.rand(1, 2, 3, 32, 32)
        scores = score_images(pictures, pictures, lpips=lambda a, b: torch.tensor([0.25, 0.75]))
        assert scores["lpips"].item() == 0.5
        assert "lpips" not in score_images(pictures, pictures)

    def test_what_differs_from_the_background_is_silhouette(self):
        picture = torch.full((1, 3, 1, 3), 0.5)
        picture[0, 1, 0, 1], picture[0, 1, 0, 2] = 0.59, 0.61
        assert picture_silhouette(picture, (0.5, 0.5, 0.5)).flatten().tolist() == [False, False, True]


class FakeNetwork(nn.Module):
    """Stands for LPIPS' network, whose weights may be out of reach: mean |difference| of [-1, 1] pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, a, b, normalize=False):
        assert normalize and a.dtype == b.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return self.weight * 2 * (a - b).abs().flatten(1).mean(1)[:, None, None, None]


def test_lpips_of_each_picture_or_their_mean(monkeypatch):
    module, built = ModuleType("torchmetrics.image.lpip"), []

    class Metric:
        def __init__(self, net_type, normalize):
            built.append(net_type)
            assert normalize
            self.net = FakeNetwork()

    module.LearnedPerceptualImagePatchSimilarity = Metric
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    a, b = torch.zeros(2, 3, 8, 8), torch.tensor([0.1, 0.3])[:, None, None, None].expand(2, 3, 8, 8)
    assert make_lpips(reduce=False)(a, b).tolist() == pytest.approx([0.2, 0.6])
    with torch.autocast("cpu", torch.bfloat16):  # stays float32
        assert make_lpips("vgg", reduce=False)(a.bfloat16(), b).tolist() == pytest.approx([0.2, 0.6])
    assert built == ["alex", "vgg"]
    loss = make_lpips()
    x = a.clone().requires_grad_()
    loss(x, b).backward()
    assert loss(a, b).item() == pytest.approx(0.4) and x.grad.abs().sum() > 0


def test_the_network_of_lpips_is_torchmetrics_default(monkeypatch):
    """AlexNet, the release's, without its weights, which would be fetched."""
    models = pytest.importorskip("torchvision").models
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    built, make = [], models.alexnet
    monkeypatch.setattr(models, "alexnet", lambda weights: built.append(weights) or make())
    monkeypatch.setattr(models, "vgg16", None)
    LearnedPerceptualImagePatchSimilarity(normalize=True)
    distances = make_lpips(reduce=False)(picture(size=64), picture(1, size=64))
    assert built == [models.AlexNet_Weights.DEFAULT] * 2 and distances.shape == (2,)


def test_lpips_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ConfigError, match=r"objective\.lpips_weight > 0: LPIPS needs") as caught:
        make_lpips()
    assert "\n" not in str(caught.value)
