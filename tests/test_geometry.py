"""Cameras, rays and coordinates maps, against numbers worked out by hand."""

import math

import pytest
import torch

from ouroboros3d import geometry
from ouroboros3d.build import build_cameras
from ouroboros3d.cameras import (
    Cameras,
    frame_indices,
    intrinsics_from_fov,
    opengl_to_opencv,
    orbit,
    orbit_poses,
    relative_to_first,
)
from ouroboros3d.feedback import coordinates_map


def level_cameras(*azimuths: float, distance: float = 2.0, fov: float = 90.0) -> Cameras:
    return orbit(list(azimuths), distance=distance, fov=fov)


class TestCameras:
    def test_the_first_camera_is_at_plus_z_and_looks_along_minus_z(self):
        c2w = level_cameras(0.0).c2w[0, 0]
        expected = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 2], [0, 0, 0, 1]])
        torch.testing.assert_close(c2w, expected)

    def test_azimuth_grows_from_plus_z_towards_plus_x(self):
        centres = level_cameras(0, 90, 180, 270).centers[0]
        torch.testing.assert_close(centres, torch.tensor([[0.0, 0, 2], [2, 0, 0], [0, 0, -2], [-2, 0, 0]]))

    def test_every_camera_looks_at_the_origin_upright(self):
        cameras = orbit([0, 50, 200], elevation=25, distance=1.7, relative=False)
        origin = cameras.w2c[0] @ torch.tensor([0.0, 0, 0, 1])
        torch.testing.assert_close(origin, torch.tensor([[0.0, 0, 1.7, 1]] * 3))
        down_in_world = cameras.c2w[0, :, :3, 1]
        assert (down_in_world[:, 1] < -0.5).all()  # y of the camera points down in a y-up world
        assert (cameras.c2w[0, :, :3, 0][:, 1].abs() < 1e-6).all()  # no roll
        assert (cameras.centers[0, :, 1] > 0).all()

    def test_an_elevated_input_tilts_the_orbit_and_not_the_first_camera(self):
        level, elevated = level_cameras(0, 180), orbit([0, 180], elevation=30, distance=2.0, fov=90.0)
        torch.testing.assert_close(elevated.c2w[:, 0], level.c2w[:, 0])
        # Seen from 30 degrees above, the camera behind the object is 60 degrees off the opposite direction.
        torch.testing.assert_close(elevated.centers[0, 1], 2 * torch.tensor([0.0, math.sin(math.pi / 3), -0.5]))

    def test_relative_poses_keep_what_lies_between_cameras(self):
        c2w = orbit_poses([10.0, 70.0, 200.0], 20.0, 1.5)
        moved = relative_to_first(c2w)
        between = torch.linalg.inv(c2w[0]) @ c2w
        torch.testing.assert_close(torch.linalg.inv(moved[0]) @ moved, between)
        assert moved.dtype == torch.float64

    def test_w2c_is_the_inverse(self):
        cameras = orbit([0, 33, 250], elevation=12)
        torch.testing.assert_close(cameras.w2c @ cameras.c2w, torch.eye(4).expand(1, 3, 4, 4), atol=1e-6, rtol=0)

    def test_fov_and_focal_length(self):
        K = intrinsics_from_fov(90.0)
        torch.testing.assert_close(K, torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]]))
        torch.testing.assert_close(level_cameras(0, fov=39.598).fov, torch.tensor([[39.598]]))

    def test_opengl_axes_flip_y_and_z(self):
        c2w = torch.arange(16.0).reshape(4, 4)
        expected = c2w.clone()
        expected[:, 1:3] *= -1
        assert torch.equal(opengl_to_opencv(c2w), expected)

    def test_choosing(self, make_cameras):
        cameras = make_cameras(2)
        assert torch.equal(cameras.views([1, 3]).c2w, cameras.c2w[:, [1, 3]])

    def test_shapes_that_are_no_cameras_are_refused(self):
        with pytest.raises(ValueError, match=r"\(4, 4\)"):
            Cameras(torch.eye(4), torch.eye(3))

    @pytest.mark.parametrize("elevation", [90.0, -90.0])
    def test_the_poles_are_refused(self, elevation):
        with pytest.raises(ValueError, match="strictly between -90 and 90"):
            orbit_poses([0.0], elevation, 1.0)


class TestFrameIndices:
    def test_bad_requests(self):
        with pytest.raises(ValueError, match="9 views of an orbit of 8"):
            frame_indices(8, 9)
        with pytest.raises(ValueError, match="'release' or 'even', got 'odd'"):
            frame_indices(8, 4, "odd")

    def test_the_default_orbit_is_the_releases(self, make_config):
        """Azimuths 0, 45, ..., 270 and 337.5, distance 1.7417, focal length 1.3889 image widths."""
        cameras = build_cameras(make_config())
        x, _, z = cameras.centers[0].unbind(-1)
        azimuths = torch.rad2deg(torch.atan2(x, z)) % 360
        expected = torch.tensor([0, 45, 90, 135, 180, 225, 270, 337.5])
        torch.testing.assert_close(azimuths, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(cameras.centers[0].norm(dim=-1), torch.full((8,), 1.7417))
        torch.testing.assert_close(cameras.K[0, 0, 0, 0], torch.tensor(1.3889), atol=1e-4, rtol=0)


class TestRays:
    def test_a_pixels_ray_meets_the_point_seen_in_it(self, make_cameras):
        """A world point projected into a picture lies on the ray through that position."""
        cameras = make_cameras(2)
        origins, directions = geometry.camera_rays(cameras, 5)
        points = origins + 1.3 * directions
        inside = torch.einsum("bvij,bvhwj->bvhwi", cameras.w2c[..., :3, :3], points)
        inside = inside + cameras.w2c[..., None, None, :3, 3]
        u = cameras.K[..., 0, 0, None, None] * inside[..., 0] / inside[..., 2] + 0.5
        v = cameras.K[..., 1, 1, None, None] * inside[..., 1] / inside[..., 2] + 0.5
        centres = (torch.arange(5) + 0.5) / 5
        torch.testing.assert_close(u, centres.expand(2, 8, 5, 5), atol=1e-5, rtol=0)
        torch.testing.assert_close(v, centres[:, None].expand(2, 8, 5, 5), atol=1e-5, rtol=0)

    def test_corner_ray_of_the_first_camera(self):
        """90 degrees, one pixel row above and one left of the middle: (-1, 1, -2) / sqrt 6 in a y-up world."""
        _, directions = geometry.camera_rays(level_cameras(0.0), 2)
        expected = torch.tensor([-1.0, 1.0, -2.0]) / math.sqrt(6)
        torch.testing.assert_close(directions[0, 0, 0, 0], expected)

    def test_release_rays_by_their_formula(self, make_cameras):
        """Quirk 3: normalise(R^T p - t), rows of the image as x and columns as y."""
        cameras = make_cameras(2)
        origins, directions = geometry.release_rays(cameras, 4)
        b, view, row, column = 1, 3, 0, 2
        R, t, K = cameras.c2w[b, view, :3, :3], cameras.centers[b, view], cameras.K[b, view]
        p = torch.tensor([((row + 0.5) / 4 - 0.5) / K[0, 0], ((column + 0.5) / 4 - 0.5) / K[1, 1], 1.0])
        expected = torch.nn.functional.normalize(R.T @ p - t, dim=0)
        torch.testing.assert_close(directions[b, view, row, column], expected)
        assert torch.equal(origins[b, view, row, column], t)

    def test_plucker_coordinates_do_not_depend_on_the_point_of_the_ray(self):
        g = torch.Generator().manual_seed(0)
        o, d = torch.randn(7, 3, generator=g), torch.randn(7, 3, generator=g)
        torch.testing.assert_close(geometry.plucker(o + 2.5 * d, d), geometry.plucker(o, d), atol=1e-5, rtol=1e-5)
        x, y, z = torch.eye(3)
        assert torch.equal(geometry.plucker(x, y), torch.cat([z, y]))  # o x d first

    def test_plucker_maps_have_channels_before_pixels(self, make_cameras):
        cameras = make_cameras(2)
        maps = geometry.plucker_maps(cameras, 4)
        rays = geometry.plucker(*geometry.camera_rays(cameras, 4))
        assert maps.shape == (2, 8, 6, 4, 4)
        assert torch.equal(maps[1, 2, :, 3, 0], rays[1, 2, 3, 0])

    def test_harmonic_embedding(self):
        x = torch.tensor([[0.3, -1.0]])
        out = geometry.harmonic_embedding(x, 3)
        phases = [0.3, 0.6, 1.2, -1.0, -2.0, -4.0]  # the frequencies of one number together
        expected = [*map(math.sin, phases), *map(math.cos, phases), 0.3, -1.0]
        torch.testing.assert_close(out, torch.tensor([expected]))
        assert geometry.harmonic_embedding(torch.zeros(1, 6), 6).shape == (1, 78)

    def test_the_convention_chooses_the_rays(self, make_cameras):
        cameras = make_cameras(1)
        for convention, rays in (("release", geometry.release_rays), ("textbook", geometry.camera_rays)):
            expected = geometry.harmonic_embedding(geometry.plucker(*rays(cameras, 4)), 2)
            assert torch.equal(geometry.embedded_rays(cameras, 4, 2, convention), expected)


class TestCoordinatesMaps:
    def test_textbook_map_of_a_plane_in_front_of_the_first_camera(self):
        """The plane z = 0.5 seen from z = 2 has depth 1.5 everywhere; alpha 0.8 scales the accumulated depth."""
        cameras = level_cameras(0.0)
        alpha = torch.full((1, 1, 1, 4, 4), 0.8)
        ccm = coordinates_map(1.5 * alpha, cameras, "textbook", alpha)
        z = ccm[0, 0, 2] * 2 - 1
        torch.testing.assert_close(z, torch.full((4, 4), 0.5))
        # 90 degrees at depth 1.5: the picture is 3 wide, pixel centres at -1.125, -0.375, ...; clamped to [-1, 1].
        torch.testing.assert_close(ccm[0, 0, 0, 0] * 2 - 1, torch.tensor([-1.0, -0.375, 0.375, 1.0]))
        torch.testing.assert_close(ccm[0, 0, 1, :, 0] * 2 - 1, torch.tensor([1.0, 0.375, -0.375, -1.0]))

    @pytest.mark.parametrize("convention", ["release", "textbook"])
    def test_empty_pixels_are_grey(self, convention):
        zero = torch.zeros(1, 1, 1, 4, 4)
        ccm = coordinates_map(zero, level_cameras(0.0), convention, zero)
        assert torch.equal(ccm, torch.full((1, 1, 3, 4, 4), 0.5))

    def test_faint_pixels_are_empty_in_the_textbook_map(self):
        alpha = torch.full((1, 1, 1, 2, 2), 0.4)
        ccm = coordinates_map(1.5 * alpha, level_cameras(0.0), "textbook", alpha)
        assert torch.equal(ccm, torch.full((1, 1, 3, 2, 2), 0.5))

    def test_release_map_by_its_formula(self, make_cameras):
        """Quirk 7: pixel indices meet intrinsics in image widths; 0.001 around 0.5."""
        cameras, size = make_cameras(2), 6
        depth = torch.rand(2, 8, 1, size, size, generator=torch.Generator().manual_seed(0)) + 0.5
        ccm = coordinates_map(depth, cameras)
        b, view, row, column = 1, 5, 2, 4
        K, c2w, d = cameras.K[b, view], cameras.c2w[b, view], depth[b, view, 0, row, column]
        p = torch.stack([(column - 0.5) / K[0, 0] * d, (row - 0.5) / K[1, 1] * d, d])
        expected = (c2w[:3, :3] @ p + c2w[:3, 3]) * 0.001 + 0.5
        torch.testing.assert_close(ccm[b, view, :, row, column], expected)

    def test_unproject_inverts_projection(self, make_cameras):
        cameras = make_cameras(2)
        depth = torch.rand(2, 8, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
        points = geometry.unproject(depth, cameras).permute(0, 1, 3, 4, 2)
        z = torch.einsum("bvj,bvhwj->bvhw", cameras.w2c[..., 2, :3], points) + cameras.w2c[..., 2, 3, None, None]
        torch.testing.assert_close(z, depth[:, :, 0], atol=1e-5, rtol=0)
        origins, directions = geometry.camera_rays(cameras, 4)
        along = torch.nn.functional.normalize(points - origins, dim=-1)
        torch.testing.assert_close(along, directions, atol=1e-5, rtol=0)

    def test_bad_requests(self):
        depth = torch.ones(1, 1, 1, 2, 2)
        with pytest.raises(ValueError, match="needs alpha"):
            coordinates_map(depth, level_cameras(0.0), "textbook")
        with pytest.raises(ValueError, match="'release' or 'textbook', got 'other'"):
            coordinates_map(depth, level_cameras(0.0), "other")
