"""The orbit dataset: the release's values, mirrored poses, random choices, and its complaints."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ouroboros3d.cameras import opengl_to_opencv, orbit_poses, relative_to_first
from ouroboros3d.data.orbits import DataError, OrbitDataset, mirror_poses, read_meta

PARITY = Path(os.environ.get("OUROBOROS3D_PARITY", Path(__file__).parents[1] / "../shared/parity"))
needs_parity = pytest.mark.skipif(
    not (PARITY / "cameras.safetensors").is_file(), reason="no reference tensors (set OUROBOROS3D_PARITY)"
)
SIZE = 8


def write_orbit(folder: Path, elevation: float = 20.0, azimuth: float = 33.0) -> None:
    """16 views of a coloured point cloud: each point is one pixel, drawn where the camera says it is."""
    folder.mkdir(parents=True)
    to_opengl = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    z_up = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    poses = z_up @ orbit_poses([azimuth + 22.5 * k for k in range(16)], elevation, 1.7417) @ to_opengl
    rng = np.random.default_rng(0)
    locations = []
    for k, pose in enumerate(poses):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
        pixels[0, 0, 0] = 10 * k  # tells the frame
        pixels[..., 3] = 255
        Image.fromarray(pixels).save(folder / f"render_{k:04d}.webp", lossless=True)
        locations.append({"transform_matrix": pose.tolist(), "frames": [{"name": f"render_{k:04d}.webp"}]})
    meta = {"camera_angle_x": float(np.radians(39.598)), "locations": locations}
    (folder / "meta.json").write_text(json.dumps(meta))
    depth = np.zeros((16, 4, 4), np.float16)
    depth[:, :, 0] = np.arange(16)[:, None] + 1
    np.savez(folder / "depth.npz", depth=depth)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("orbits")
    for k in range(3):
        write_orbit(root / f"object_{k}", elevation=10.0 * k)
    (root / "train.txt").write_text("object_0\nobject_1\nobject_2\n")
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    """One orbit that a test may spoil."""
    write_orbit(tmp_path / "object")
    (tmp_path / "train.txt").write_text("object\n")
    return tmp_path


def first_numbers(item: dict) -> list[int]:
    """Which frames the pictures really are."""
    return ((item["images"][:, 0, 0, 0] + 1) / 2 * 255 / 10).round().int().tolist()


@needs_parity
def test_equals_the_release():
    from safetensors.torch import load_file

    expected = load_file(PARITY / "cameras.safetensors")
    for name, start in (("dataset", 0), ("dataset_start5", 5)):
        data = OrbitDataset(PARITY / "orbit", "ids.txt", size=64, start_view=start)
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
    data = OrbitDataset(shared_root, size=16, load_alpha=True, load_depth=True, extra_views=4)
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
    even = OrbitDataset(shared_root, size=SIZE, start_view=3, view_selection="even")[0]
    assert even["frames"].tolist() == [3, 5, 7, 9, 11, 13, 15, 1] == first_numbers(even)
    release = OrbitDataset(shared_root, size=SIZE, start_view=3)[0]
    assert release["frames"].tolist() == [3, 5, 7, 9, 11, 13, 15, 2] == first_numbers(release)


def test_mirrored_examples_are_orbits_of_mirrored_objects(shared_root):
    data = OrbitDataset(shared_root, size=SIZE, mirror=True, load_depth=True, start_view=5, view_selection="even")
    plain = OrbitDataset(shared_root, size=SIZE, load_depth=True, start_view=5, view_selection="even")[2]
    for epoch in range(20):
        data.set_epoch(epoch)
        item = data[2]
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
    def items(workers: int, epoch: int, seed: int = 0, cache: str = "none") -> list[dict]:
        data = OrbitDataset(
            shared_root, size=SIZE, mirror=True, color_jitter=0.5, background="random", seed=seed, cache=cache
        )
        data.set_epoch(epoch)
        return list(DataLoader(data, batch_size=None, num_workers=workers))

    def same(a: list[dict], b: list[dict]) -> bool:
        return all(torch.equal(x["images"], y["images"]) for x, y in zip(a, b, strict=True))

    reference = items(0, epoch=1)
    assert same(reference, items(2, epoch=1))
    assert same(reference, items(0, epoch=1, cache="memory"))
    assert not same(reference, items(0, epoch=2))
    assert not same(reference, items(0, epoch=1, seed=7))


def test_persistent_workers_notice_the_epoch(shared_root):
    data = OrbitDataset(shared_root, size=SIZE)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        epochs.append([item["frames"].tolist() for item in loader])
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    assert epochs[2] == [data[k]["frames"].tolist() for k in range(3)]


def test_background_and_colour_jitter(root):
    transparent = np.zeros((SIZE, SIZE, 4), np.uint8)
    transparent[:, : SIZE // 2] = (200, 40, 40, 255)
    for k in range(16):
        Image.fromarray(transparent).save(root / "object" / f"render_{k:04d}.webp", lossless=True)
    item = OrbitDataset(root, size=SIZE, background=(0.0, 0.5, 1.0), color_jitter=0.5)[0]
    right = item["images"][:, :, :, -1]
    torch.testing.assert_close(right, torch.tensor([-1.0, 0.0, 1.0])[None, :, None].expand_as(right))
    left = item["images"][:, :, :, 0]
    assert left.std((0, 2)).max() < 1e-6  # the same change in all views
    assert (left[0, :, 0] - torch.tensor([200, 40, 40]) / 127.5 + 1).abs().max() > 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"background": "pink"},
        {"background": (2, 0, 0)},
        {"cache": "tape"},
        {"max_damaged": 1.0},
        {"color_jitter": 2.0},
        {"start_view": 16},
        {"num_views": 12, "extra_views": 5},
        {"view_selection": "odd"},
    ],
)
def test_refuses_bad_settings(shared_root, settings):
    with pytest.raises(ValueError):
        OrbitDataset(shared_root, **settings)


def test_missing_root_and_lists(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        OrbitDataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train\.txt.*cannot be read"):
        OrbitDataset(tmp_path)
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        OrbitDataset(tmp_path)


def test_damaged_orbits_are_named(root):
    data = OrbitDataset(root, size=SIZE, load_depth=True)
    data[0]
    picture = root / "object" / "render_0000.webp"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    first = OrbitDataset(root, size=SIZE, start_view=0)
    with pytest.raises(DataError, match=r"render_0000\.webp.*render this orbit again"):
        first[0]
    picture.unlink()
    with pytest.raises(DataError, match=r"render_0000\.webp.*No such file"):
        first[0]
    picture.write_bytes(whole)
    (root / "object" / "depth.npz").unlink()
    with pytest.raises(DataError, match=r"depth\.npz.*--depth"):
        data[0]
    path = root / "object" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(DataError, match=r"meta\.json: cannot be read"):
        data[0]
    path.write_text(json.dumps({"locations": meta["locations"]}))
    with pytest.raises(DataError, match="camera_angle_x"):
        data[0]
    path.write_text(json.dumps(meta | {"locations": meta["locations"][:-1]}))
    with pytest.raises(DataError, match="15 frames instead of 16"):
        data[0]
