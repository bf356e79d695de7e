"""The orbit dataset: the release's values, mirrored poses, random choices, backgrounds and its cache."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from orbit_folders import SIZE, TO_OPENGL, Epoch, orbit_dataset, poses_of, same, write_frames, write_noise
from torch import Tensor
from torch.utils.data import DataLoader

from ouroboros3d.cameras import Cameras, opengl_to_opencv, orbit_poses, relative_to_first
from ouroboros3d.data.orbit_files import read_meta
from ouroboros3d.data.orbits import OrbitDataset, mirror_poses
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.files import OutputError
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering import render
from ouroboros3d.training.setup import build_objective

PARITY = Path(os.environ.get("OUROBOROS3D_PARITY", Path(__file__).parents[1] / "../shared/parity"))
needs_parity = pytest.mark.skipif(
    not (PARITY / "cameras.safetensors").is_file(), reason="no reference tensors (set OUROBOROS3D_PARITY)"
)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("orbits")
    for k in range(3):
        write_noise(root / f"object_{k}", elevation=10.0 * k)
    (root / "train.txt").write_text("object_0\nobject_1\nobject_2\n")
    return root


def first_numbers(item: dict) -> list[int]:
    """Which frames the pictures really are."""
    return ((item["images"][:, 0, 0, 0] + 1) / 2 * 255 / 10).round().int().tolist()


@needs_parity
def test_equals_the_release():
    from safetensors.torch import load_file

    expected = load_file(PARITY / "cameras.safetensors")
    for name, start in (("dataset", 0), ("dataset_start5", 5)):
        data = orbit_dataset(PARITY / "orbit", "ids.txt", size=64, start_view=start)
        item = data[0]
        meta = read_meta(PARITY / "orbit" / item["id"] / "meta.json", 16)
        c2w = relative_to_first(opengl_to_opencv(meta.c2w[item["frames"]]))
        torch.testing.assert_close(c2w, expected[f"{name}.c2w"], rtol=0, atol=1e-9)
        torch.testing.assert_close(item["c2w"], c2w.float(), rtol=0, atol=0)
        if start == 0:
            assert item["frames"].tolist() == expected["dataset.select_indices"].tolist()
            torch.testing.assert_close(item["K"], expected["dataset.intrinsics"], rtol=0, atol=1e-6)
            images = item["images"]
            torch.testing.assert_close(images, expected["dataset.diffusion_images"], rtol=0, atol=1e-6)
            torch.testing.assert_close(images[0], expected["dataset.condition_image"], rtol=0, atol=1e-6)
        else:
            assert item["frames"].tolist() == expected["dataset_start5.loaded_renders"].tolist()


def test_shapes_and_first_camera(shared_root):
    data = orbit_dataset(shared_root, size=16, depth=True, extra_views=4)
    item = data[1]
    assert item["images"].shape == (8, 3, 16, 16) and item["images"].dtype == torch.float32
    assert item["alpha"].shape == (8, 1, 16, 16) and item["depth"].shape == (8, 1, 4, 4)
    assert item["K"].shape == (8, 3, 3) and item["extra_images"].shape == (4, 3, 16, 16)
    assert item["extra_depth"].shape == (4, 1, 4, 4) and item["extra_c2w"].shape == (4, 4, 4)
    assert item["images"].abs().max() <= 1 and item["id"] == "object_1" and item["index"] == 1
    assert not set(item["frames"].tolist()) & set(item["extra_frames"].tolist())
    first = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    first[2, 3] = 1.7417
    torch.testing.assert_close(item["c2w"][0], first, rtol=0, atol=1e-6)


def test_view_selection(shared_root):
    even = orbit_dataset(shared_root, size=SIZE, start_view=3, view_selection="even")[0]
    assert even["frames"].tolist() == [3, 5, 7, 9, 11, 13, 15, 1] == first_numbers(even)
    release = orbit_dataset(shared_root, size=SIZE, start_view=3)[0]
    assert release["frames"].tolist() == [3, 5, 7, 9, 11, 13, 15, 2] == first_numbers(release)


def test_mirrored_examples_are_orbits_of_mirrored_objects(shared_root):
    data = orbit_dataset(shared_root, size=SIZE, mirror=True, depth=True, start_view=5, view_selection="even")
    plain = orbit_dataset(shared_root, size=SIZE, depth=True, start_view=5, view_selection="even")[2]
    for epoch in range(20):
        item = data.example(epoch, 2)
        if item["frames"][1] != plain["frames"][1]:
            break
    else:
        pytest.fail("never mirrored")
    # The same azimuths as the orbit that is not mirrored: a mirrored circle, walked backwards, is the circle.
    torch.testing.assert_close(item["c2w"], plain["c2w"], rtol=0, atol=1e-5)
    assert item["frames"].tolist() == [5, 3, 1, 15, 13, 11, 9, 7]
    torch.testing.assert_close(item["images"][0], plain["images"][0].flip(-1))
    assert (item["depth"][:, 0, :, -1] == item["frames"][:, None] + 1).all() and (item["depth"][..., 0] == 0).all()


def test_mirror_poses_projects_mirrored_points_to_mirrored_pixels():
    c2w = relative_to_first(orbit_poses([10, 50, 200, 300], 25.0, 1.7))
    point = torch.tensor([0.2, -0.1, 0.3, 1.0], dtype=torch.float64)
    flip = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    seen = torch.linalg.inv(c2w) @ point
    mirrored = torch.linalg.inv(mirror_poses(c2w)) @ (flip * point)
    torch.testing.assert_close(mirrored, flip * seen)
    assert (torch.linalg.det(mirror_poses(c2w)) > 0).all()


def test_random_choices_depend_on_seed_epoch_and_index_only(shared_root):
    def items(workers: int, epoch: int, seed: int = 0, cache: str = "none"):
        data = orbit_dataset(
            shared_root, size=SIZE, mirror=True, color_jitter=0.5, background="random", seed=seed, cache=cache
        )
        return list(DataLoader(Epoch(data, epoch), batch_size=None, num_workers=workers))

    reference = items(0, epoch=1)
    for again in (items(2, epoch=1), items(0, epoch=1, cache="memory")):
        assert all(same(a, b) for a, b in zip(reference, again, strict=True))
    for other in (items(0, epoch=2), items(0, epoch=1, seed=7)):
        assert not all(torch.equal(a["images"], b["images"]) for a, b in zip(reference, other, strict=True))


def test_background_and_colour_jitter(tmp_path):
    transparent = np.zeros((16, SIZE, SIZE, 4), np.uint8)
    transparent[:, :, : SIZE // 2] = (200, 40, 40, 255)
    write_frames(tmp_path / "object", transparent, poses_of(20.0) @ TO_OPENGL)
    (tmp_path / "train.txt").write_text("object\n")
    item = orbit_dataset(tmp_path, size=SIZE, background="grey", color_jitter=0.5)[0]
    right = item["images"][:, :, :, -1]
    torch.testing.assert_close(right, torch.zeros_like(right))
    left = item["images"][:, :, :, 0]
    assert left.std((0, 2)).max() < 1e-6  # the same change in all views
    assert (left[0, :, 0] - torch.tensor([200, 40, 40]) / 127.5 + 1).abs().max() > 0.02


@pytest.mark.parametrize("settings", [{"start_view": 16}, {"view_selection": "odd"}])
def test_refuses_bad_settings(shared_root, settings):
    with pytest.raises(ValueError):
        orbit_dataset(shared_root, **settings)


def test_disk_cache(shared_root, tmp_path, monkeypatch):
    def dataset(**options) -> OrbitDataset:
        return orbit_dataset(root, size=4, cache="disk", cache_dir=folder, depth=True, **options)

    def files() -> set[Path]:
        return set(folder.glob("*.npy"))

    root, folder = tmp_path / "orbits", tmp_path / "cache"
    shutil.copytree(shared_root, root)
    plain = list(orbit_dataset(root, size=4, depth=True))
    data = dataset(workers=2)
    assert all(same(a, b) for a, b in zip(data, plain, strict=True))
    (first,) = files()
    assert first.name.startswith("train_4px_") and first.stat().st_size > 3 * 16 * 4 * 4 * 4
    monkeypatch.setattr("ouroboros3d.data.orbits.read_rgba", None)  # nothing is decoded again
    monkeypatch.setattr("ouroboros3d.data.orbit_files.read_rgba", None)
    again = dataset()
    assert all(same(a, b) for a, b in zip(again, plain, strict=True))
    assert len(pickle.dumps(again._cache)) < 1000  # a spawned worker opens the file
    assert same(pickle.loads(pickle.dumps(again))[1], plain[1])
    monkeypatch.undo()
    # Another list, other files, another size: another cache.
    (root / "train.txt").write_text("object_1\nobject_0\n")
    assert [item["id"] for item in dataset()] == ["object_1", "object_0"] and len(files()) == 2
    shutil.copy(root / "object_2" / "render_0000.webp", root / "object_0" / "render_0001.webp")
    changed = dataset(start_view=1)[1]
    assert len(files()) == 3
    assert same(changed, orbit_dataset(root, size=4, depth=True, start_view=1)[1])
    orbit_dataset(root, size=2, cache="disk", cache_dir=folder)
    assert len(files()) == 4 and not list(folder.glob(".tmp-*"))


def test_a_cache_that_cannot_be_written_is_an_error(shared_root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is no folder"):
        orbit_dataset(shared_root, size=4, cache="disk", cache_dir=tmp_path / "file")

    def full(self, index, dtype):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OrbitDataset, "record", full)
    with pytest.raises(OutputError, match=r"train_4px_.*\.npy: No space left on device"):
        orbit_dataset(shared_root, size=4, cache="disk", cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".tmp-*"))


class TestRandomBackground:
    """Every object's renderings have the background of its pictures."""

    def test_render(self, make_cameras):
        g = torch.Generator().manual_seed(0)
        rows = torch.rand(2, 20, 14, generator=g) * 0.3
        colours = torch.tensor([[0.9, 0.1, 0.2], [0.0, 0.7, 1.0]])

        def rendering(index: list[int], background) -> tuple[Tensor, Tensor]:
            leaves = rows[index].clone().requires_grad_()
            result = render(Gaussians.from_tensor(leaves), make_cameras(2).scenes(index), 16, background, "dense")
            return result, torch.autograd.grad(result.rgb.square().sum(), leaves)[0]

        together, gradient = rendering([0, 1], colours)
        assert 0.05 < together.alpha.mean() < 0.95
        for k in range(2):
            alone, alone_gradient = rendering([k], colours[k])
            torch.testing.assert_close(together.rgb[k], alone.rgb[0])
            torch.testing.assert_close(together.depth[k], alone.depth[0])
            torch.testing.assert_close(gradient[k], alone_gradient[0])
        with pytest.raises(ValueError, match="must be"):
            rendering([0, 1], colours[:1])

    @pytest.mark.parametrize("name", ["random", "white"])
    def test_objective(self, make_config, make_models, shared_root, name):
        changes = {"data": {"root": str(shared_root), "background": name, "workers": 0}}
        changes["objective"] = {"reconstruction": "both", "extra_views": 2}
        config = make_config(changes, lean=True)
        objective = build_objective(make_models(config), config)
        data = build_dataset(config, "train")
        batch = objective.collate([data[0], data[1]])
        seen, build_renderers = [], objective.renderer

        def renderer(gaussians: Gaussians, cameras: Cameras, size: int, **own) -> Rendering:
            empty = replace(gaussians, opacities=torch.zeros_like(gaussians.opacities))
            seen.append(build_renderers(empty, cameras, size, **own))
            return seen[-1]

        objective.renderer = renderer
        objective(batch, objective.draw(0, 0, [0, 1], batch))
        assert len(seen) == 2  # of the predicted views and of the clean ones
        for result in seen:
            assert result.rgb.shape[1] == 10
            expected = batch.background if name == "random" else torch.ones(2, 3)
            torch.testing.assert_close(result.rgb, expected[:, None, :, None, None].expand_as(result.rgb))
        assert (len(batch.background.unique(dim=0)) == 2) == (name == "random")
