"""Gaussians: layout, covariances and the .ply format."""

import math

import numpy as np
import pytest
import torch
from plyfile import PlyData

from ouroboros3d.cameras import orbit
from ouroboros3d.gaussians import PLY_PROPERTIES, SH_C0, Gaussians, load_ply, save_ply
from ouroboros3d.timing import count_tflop


@pytest.fixture
def gaussians() -> Gaussians:
    """Unit quaternions; ten Gaussians, of which the third is fainter than what a .ply keeps."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 10, 14, generator=g) * 0.8 + 0.1
    x[..., 7:11] = torch.nn.functional.normalize(torch.randn(1, 10, 4, generator=g), dim=-1)
    x[0, 2, 3] = 0.004
    return Gaussians.from_tensor(x)


def test_tensor_layout_is_lgms():
    x = torch.arange(14.0).expand(1, 2, 14)
    g = Gaussians.from_tensor(x)
    assert g.means[0, 0].tolist() == [0, 1, 2] and g.opacities[0, 0] == 3
    assert g.scales[0, 0].tolist() == [4, 5, 6] and g.quats[0, 0].tolist() == [7, 8, 9, 10]
    assert g.rgb[0, 0].tolist() == [11, 12, 13]
    assert torch.equal(g.to_tensor(), x)
    with pytest.raises(ValueError, match=r"\[B, N, 14\], got \(2, 14\)"):
        Gaussians.from_tensor(x[0])


class TestCovariances:
    def test_a_quarter_turn_about_z_exchanges_x_and_y(self):
        half = math.sqrt(0.5)
        quat = torch.tensor([[[half, 0, 0, half]]])
        g = Gaussians(torch.zeros(1, 1, 3), quat, torch.tensor([[[1.0, 2, 3]]]), torch.ones(1, 1), torch.ones(1, 1, 3))
        torch.testing.assert_close(g.covariances()[0, 0], torch.diag(torch.tensor([4.0, 1, 9])))

    def test_of_unit_quaternions_they_have_the_squared_scales_as_eigenvalues(self, gaussians):
        eigenvalues = torch.linalg.eigvalsh(gaussians.covariances())
        torch.testing.assert_close(eigenvalues, gaussians.scales.square().sort(-1).values, atol=1e-5, rtol=1e-4)

    def test_raw_quaternions_are_not_normalised(self, gaussians):
        """Quirk 17: a quaternion of length 0.01 leaves the scales nearly axis-aligned."""
        small = Gaussians(gaussians.means, gaussians.quats * 0.01, gaussians.scales, gaussians.opacities, gaussians.rgb)
        aligned = torch.diag_embed(gaussians.scales.square())
        assert (small.covariances() - aligned).abs().max() < 1e-3
        assert (gaussians.covariances() - aligned).abs().max() > 0.1


def test_covariances_and_poses_are_no_matrix_products(gaussians):
    """TF32, which the release trains with, would round these to a thousandth."""
    cameras = orbit([0.0, 90.0])
    assert count_tflop(gaussians.covariances) == count_tflop(lambda: cameras.w2c) == 0
    assert count_tflop(lambda: torch.ones(2, 2) @ torch.ones(2, 2)) > 0


class TestPly:
    def test_values_before_activation_in_the_usual_layout(self, gaussians, tmp_path):
        save_ply(tmp_path / "a.ply", gaussians)
        ply = PlyData.read(str(tmp_path / "a.ply"))
        vertex = ply["vertex"]
        assert [p.name for p in vertex.properties] == list(PLY_PROPERTIES)
        assert ply.byte_order == "<" and {p.dtype(ply.byte_order) for p in vertex.properties} == {"<f4"}
        assert vertex.count == 9  # one is too faint
        opacity, scale, rgb = gaussians.opacities[0, 0], gaussians.scales[0, 0], gaussians.rgb[0, 0]
        np.testing.assert_allclose(vertex["opacity"][0], torch.logit(opacity), atol=1e-5)
        np.testing.assert_allclose(vertex["scale_1"][0], scale[1].log(), atol=1e-5)
        np.testing.assert_allclose(vertex["f_dc_2"][0], (rgb[2] - 0.5) / SH_C0, atol=1e-5)
        np.testing.assert_allclose(vertex["rot_3"][0], gaussians.quats[0, 0, 3], atol=1e-7)

    @pytest.mark.parametrize("compatible", [True, False])
    def test_round_trip(self, gaussians, tmp_path, compatible):
        save_ply(tmp_path / "a.ply", gaussians, compatible)
        loaded = load_ply(tmp_path / "a.ply", compatible).to_tensor()
        kept = torch.cat([gaussians.to_tensor()[:, :2], gaussians.to_tensor()[:, 3:]], 1)
        torch.testing.assert_close(loaded, kept, atol=1e-5, rtol=0)

    def test_saturated_opacity_stays_finite(self, gaussians, tmp_path):
        full = Gaussians(gaussians.means, gaussians.quats, gaussians.scales, torch.ones(1, 10), gaussians.rgb)
        save_ply(tmp_path / "a.ply", full)
        assert np.isfinite(PlyData.read(str(tmp_path / "a.ply"))["vertex"]["opacity"]).all()
        loaded = load_ply(tmp_path / "a.ply")
        torch.testing.assert_close(loaded.opacities, full.opacities, atol=1e-6, rtol=0)

    def test_a_scene_without_visible_gaussians_is_an_empty_file_that_can_be_read(self, gaussians, tmp_path):
        save_ply(tmp_path / "a.ply", gaussians, min_opacity=1.0)
        assert load_ply(tmp_path / "a.ply").means.shape == (1, 0, 3)

    def test_a_batch_is_refused(self, gaussians, tmp_path):
        batch = Gaussians.from_tensor(gaussians.to_tensor().repeat(2, 1, 1))
        with pytest.raises(ValueError, match="one scene, got a batch of 2"):
            save_ply(tmp_path / "a.ply", batch)


def test_choosing_scenes_and_detaching(gaussians):
    two = Gaussians.from_tensor(torch.cat([gaussians.to_tensor(), 2 * gaussians.to_tensor()]).requires_grad_())
    assert torch.equal(two.scene(1).means, 2 * gaussians.means)
    assert two.means.requires_grad and not two.detach().means.requires_grad
    assert two.to(torch.float64).rgb.dtype == torch.float64
