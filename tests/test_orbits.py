"""The orbit dataset: the release's values, mirrored poses, random choices, and its complaints."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from orbit_folders import orbit_dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ouroboros3d.cameras import Cameras, opengl_to_opencv, orbit_poses, relative_to_first
from ouroboros3d.config.schema import Config
from ouroboros3d.data.orbit_files import DamagedOrbit, DataError, read_ids, read_meta
from ouroboros3d.data.orbits import OrbitDataset, mirror_poses
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.errors import ConfigError
from ouroboros3d.files import OutputError
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering import render
from ouroboros3d.training.setup import build_objective

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


class Epoch(Dataset):
    """The items of a dataset in one epoch."""

    def __init__(self, data: OrbitDataset, epoch: int) -> None:
        self.data, self.epoch = data, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        return self.data.example(self.epoch, index)


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
    def items(workers: int, epoch: int, seed: int = 0, cache: str = "none") -> list[dict]:
        data = orbit_dataset(
            shared_root, size=SIZE, mirror=True, color_jitter=0.5, background="random", seed=seed, cache=cache
        )
        return list(DataLoader(Epoch(data, epoch), batch_size=None, num_workers=workers))

    def same(a: list[dict], b: list[dict]) -> bool:
        return all(torch.equal(x["images"], y["images"]) for x, y in zip(a, b, strict=True))

    reference = items(0, epoch=1)
    assert same(reference, items(2, epoch=1))
    assert same(reference, items(0, epoch=1, cache="memory"))
    assert not same(reference, items(0, epoch=2))
    assert not same(reference, items(0, epoch=1, seed=7))


def test_background_and_colour_jitter(root):
    transparent = np.zeros((SIZE, SIZE, 4), np.uint8)
    transparent[:, : SIZE // 2] = (200, 40, 40, 255)
    for k in range(16):
        Image.fromarray(transparent).save(root / "object" / f"render_{k:04d}.webp", lossless=True)
    item = orbit_dataset(root, size=SIZE, background="grey", color_jitter=0.5)[0]
    right = item["images"][:, :, :, -1]
    torch.testing.assert_close(right, torch.zeros_like(right))
    left = item["images"][:, :, :, 0]
    assert left.std((0, 2)).max() < 1e-6  # the same change in all views
    assert (left[0, :, 0] - torch.tensor([200, 40, 40]) / 127.5 + 1).abs().max() > 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"start_view": 16},
        {"view_selection": "odd"},
    ],
)
def test_refuses_bad_settings(shared_root, settings):
    with pytest.raises(ValueError):
        orbit_dataset(shared_root, **settings)


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbfa\r\nb c\r\n", b"a;\nb c;\n", b"id;split\na;train\nb c;val\n", "a\nb c\n".encode("utf-16")],
)
def test_lists_of_every_program(data, tmp_path):
    (tmp_path / "list.csv").write_bytes(data)
    assert read_ids(tmp_path / "list.csv") == ["a", "b c"]


def test_an_id_that_no_folder_can_have_is_a_damaged_orbit(tmp_path):
    for name in ("x" * 300, "a\0b"):
        (tmp_path / "train.txt").write_text(f"{name}\n")
        with pytest.raises(DataError, match=r"too long|null"):
            orbit_dataset(tmp_path, size=8)[0]


def test_lists(tmp_path, caplog):
    with pytest.raises(DataError, match="no such folder"):
        orbit_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train\.txt.*cannot be read"):
        orbit_dataset(tmp_path)
    path = tmp_path / "train.txt"
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"train\.txt: the list is empty"):
        orbit_dataset(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read"):
        orbit_dataset(tmp_path)
    path.write_bytes("\ufeffan old chair\r\n\r\n  b\n\nan old chair\nünïque\nb\n".encode())
    data = orbit_dataset(tmp_path)
    assert list(data.ids) == ["an old chair", "b", "ünïque"] and len(data) == 3
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 2 ids stand there more than once and are read once: an old chair, b"
    ]


def test_a_damaged_orbit_of_one_stops_with_its_name(root):
    data = orbit_dataset(root, size=SIZE, depth=True)
    data[0]
    picture = root / "object" / "render_0000.webp"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    first = orbit_dataset(root, size=SIZE, start_view=0)
    with pytest.raises(DataError, match=r"train\.txt: 1 of 1 orbits.*render_0000\.webp.*render this orbit again"):
        first[0]
    picture.write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"render_0000\.webp: cannot be read \(no picture\)"):
        first[0]
    Image.new("RGBA", (SIZE, SIZE + 1)).save(picture)
    with pytest.raises(DataError, match=rf"render_0000\.webp: is {SIZE} x {SIZE + 1}, not square"):
        first[0]
    picture.unlink()
    with pytest.raises(DataError, match=r"render_0000\.webp.*No such file"):
        first[0]
    picture.write_bytes(whole)
    (root / "object" / "depth.npz").unlink()
    with pytest.raises(DataError, match=r"depth\.npz.*--depth"):
        data[0]


def spoil(meta: dict, kind: str) -> str:
    matrix = meta["locations"][3]["transform_matrix"]
    if kind == "not JSON":
        return "{"
    if kind == "no angle":
        del meta["camera_angle_x"]
    elif kind == "a frame too few":
        del meta["locations"][-1]
    elif kind == "singular":
        matrix[0] = matrix[1]
    elif kind == "scaled":
        matrix[:3] = [[1.01 * x for x in row] for row in matrix[:3]]
    elif kind == "mirrored":
        matrix[0] = [-x for x in matrix[0]]
    elif kind == "last row":
        matrix[3] = [0, 0, 0.1, 1]
    elif kind == "not finite":
        matrix[0][0] = float("nan")
    elif kind == "elsewhere":
        meta["locations"][3]["frames"][0]["name"] = "../other/render_0000.webp"
    elif kind == "no name":
        meta["locations"][3]["frames"][0]["name"] = 3
    return json.dumps(meta)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not JSON", "cannot be read"),
        ("no angle", "has no 'camera_angle_x'"),
        ("a frame too few", "15 frames instead of 16"),
        ("singular", "frame 3 is no rotation"),
        ("scaled", "frame 3 is no rotation"),
        ("mirrored", "frame 3 is no rotation"),
        ("last row", "frame 3 is no rotation"),
        ("not finite", "not 4 x 4 finite"),
        ("elsewhere", "a frame's name is not that of a file"),
        ("no name", "a frame's name is not that of a file"),
    ],
)
def test_what_meta_json_must_hold(root, kind, message):
    path = root / "object" / "meta.json"
    path.write_text(spoil(json.loads(path.read_text()), kind))
    with pytest.raises(DataError, match=rf"meta\.json.*{message}.*; render this orbit again"):
        orbit_dataset(root, size=SIZE)[0]


@pytest.fixture(scope="module")
def damaged_root(tmp_path_factory) -> Path:
    """Ten orbits; of 2 a frame is cut, 3 has no meta.json, 9 is not there."""
    root = tmp_path_factory.mktemp("damaged")
    for k in range(9):
        write_orbit(root / f"object_{k}", elevation=3.0 * k)
    (root / "train.txt").write_text("".join(f"object_{k}\n" for k in range(10)))
    (root / "val.txt").write_text("object_0\nobject_2\n")
    picture = root / "object_2" / "render_0005.webp"
    picture.write_bytes(picture.read_bytes()[:40])
    (root / "object_3" / "meta.json").unlink()
    return root


def same(one: dict, two: dict) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k] for k, v in one.items())


def test_damaged_orbits_are_replaced_by_their_neighbour(damaged_root, caplog):
    data = orbit_dataset(damaged_root, size=SIZE, start_view=5, max_damaged=0.3)
    assert [item["id"] for item in data] == [f"object_{k}" for k in (0, 1, 4, 4, 4, 5, 6, 7, 8, 0)]
    assert [item["index"] for item in data][1:4] == [1, 4, 4]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3  # each once, though all was read twice
    for message, name in zip(messages, ("object_2/render_0005.webp", "object_3/meta.json", "object_9/"), strict=True):
        assert str(damaged_root / name) in message and "\n" not in message
    # What takes the place has the draws of the place: another start than the neighbour's own.
    drawn = orbit_dataset(damaged_root, size=SIZE, max_damaged=0.3)
    starts = {(item := drawn.example(epoch, 3))["id"]: item["frames"][0] for epoch in range(3)}
    assert starts.keys() == {"object_4"}
    assert any(drawn.example(e, 3)["frames"][0] != drawn.example(e, 4)["frames"][0] for e in range(3))


def test_replacement_follows_from_the_files_alone(damaged_root):
    """Not from who read what before: an orbit is read wherever the frames that are wanted are whole."""

    def dataset(**options) -> OrbitDataset:
        return orbit_dataset(damaged_root, size=SIZE, max_damaged=0.3, depth=True, **options)

    reference = [[dataset().example(epoch, k) for k in range(10)] for epoch in range(4)]
    ids = {items[2]["id"] for items in reference}
    assert ids == {"object_2", "object_4"}  # the release's views have frame 5 or not
    used = dataset()
    for k in reversed(range(10)):
        used.example(9, k)
    memory, disk = dataset(cache="memory"), dataset(cache="disk")
    for epoch, items in enumerate(reference):
        assert all(same(item, used.example(epoch, k)) for k, item in enumerate(items))
        assert all(same(item, memory.example(epoch, k)) for k, item in enumerate(items))
        assert all(same(item, disk.example(epoch, k)) for k, item in enumerate(items))
    epoch = next(k for k, items in enumerate(reference) if items[2]["id"] == "object_4")
    data = dataset()
    loaded = DataLoader(Epoch(data, epoch), batch_size=None, num_workers=2)
    assert all(same(a, b) for a, b in zip(loaded, reference[epoch], strict=True))
    assert data._damaged.nonzero().flatten().tolist() == [2, 3, 9]  # what the workers found, here


def test_too_many_damaged_orbits_stop_the_run(damaged_root, caplog):
    data = orbit_dataset(damaged_root, size=SIZE, start_view=5, max_damaged=0.2)
    with pytest.raises(DataError) as caught:
        list(data)
    wanted = (
        "train.txt: 3 of 10 orbits are damaged, more than data.max_damaged = 0.2 allows: object_2, object_3, object_9;"
    )
    assert wanted in str(caught.value) and str(damaged_root / "object_9") in str(caught.value)
    assert len(caplog.records) == 2
    data = orbit_dataset(damaged_root, size=SIZE, start_view=5, max_damaged=0.2)
    batches = iter(DataLoader(data, batch_size=None, num_workers=2))
    with pytest.raises(DataError) as caught:
        list(batches)
    assert "3 of 10 orbits" in str(caught.value) and "\n" not in str(caught.value)  # without the worker's traceback
    batches._shutdown_workers()  # left to the garbage collector they take seconds to end
    with pytest.raises(DataError, match="3 of 10 orbits"):
        orbit_dataset(damaged_root, size=SIZE, max_damaged=0.2, cache="memory")


def test_a_disk_that_fails_is_no_damage(root, monkeypatch):
    """It may work the next time: replacing the orbit could not be repeated."""

    def fail(_path):
        raise OSError(5, "Input/output error")

    data = orbit_dataset(root, size=SIZE, max_damaged=0.9)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"meta\.json: cannot be read \(Input/output error\); see") as caught:
        data[0]
    assert not isinstance(caught.value, DamagedOrbit) and not data._damaged.any()


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


class TestBuild:
    """What the configuration makes of it."""

    @pytest.fixture
    def config(self, make_config, damaged_root):
        def make(**data) -> Config:
            return make_config(
                {"data": {"root": str(damaged_root), "max_damaged": 0.3, "workers": 0} | data}, lean=True
            )

        return make

    def test_views_follow_the_conventions(self, config):
        changed = config()
        assert (build_dataset(changed, "val")[0]["frames"]).tolist() == [0, 2, 4, 6, 8, 10, 12, 15]
        changed.model.conventions.view_selection = "even"
        assert (build_dataset(changed, "val")[0]["frames"]).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]

    def test_validation_replaces_nothing(self, config):
        changed = config()
        changed.model.conventions.view_selection = "even"
        assert build_dataset(changed, "val")[1]["id"] == "object_2"  # its even frames are whole
        assert build_dataset(changed, "train")[3]["id"] == "object_4"
        changed.data.val = "train.txt"
        with pytest.raises(DataError, match=r"max_damaged = 0 allows: object_3"):
            build_dataset(changed, "val")[3]

    def test_disk_cache(self, config, tmp_path):
        build_dataset(config(cache="disk", cache_dir=str(tmp_path / "here")), "train")
        assert len(list((tmp_path / "here").glob("train_32px_*.npy"))) == 1

    def test_background(self, config):
        train, val = (build_dataset(config(background="random"), split) for split in ("train", "val"))
        colours = torch.stack([train[k]["background"] for k in range(5)])
        assert len(colours.unique(dim=0)) == 5 and val[0]["background"].tolist() == [1, 1, 1]
        assert build_dataset(config(background="grey"), "train")[0]["background"].tolist() == [0.5, 0.5, 0.5]

    @pytest.mark.parametrize(
        ("key", "value"), [("background", "pink"), ("cache", "tape"), ("max_damaged", 0.6), ("max_damaged", -0.1)]
    )
    def test_refuses(self, config, key, value):
        with pytest.raises(ConfigError, match=rf"data\.{key} = .*must"):
            config(**{key: value})


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
