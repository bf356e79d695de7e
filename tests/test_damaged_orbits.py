"""What the orbit dataset says of bad lists and damaged orbits, and what takes their place."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from orbit_folders import SIZE, Epoch, orbit_dataset, same, write_noise
from PIL import Image
from torch.utils.data import DataLoader

from ouroboros3d.config.schema import Config
from ouroboros3d.data.orbit_files import DamagedOrbit, DataError, read_ids
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.data.splits import build_dataset


@pytest.fixture
def root(tmp_path) -> Path:
    """One orbit that a test may spoil."""
    write_noise(tmp_path / "object")
    (tmp_path / "train.txt").write_text("object\n")
    return tmp_path


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbfa\r\nb c\r\n", b"a;\nb c;\n", b"id;split\na;train\nb c;val\n", "a\nb c\n".encode("utf-16")]
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
    location = meta["locations"][3]
    matrix = np.array(location["transform_matrix"])
    matrices = {
        "singular": matrix[[1, 1, 2, 3]],
        "scaled": matrix * [[1.01], [1.01], [1.01], [1]],
        "mirrored": matrix * [[-1], [1], [1], [1]],
        "last row": matrix + np.outer([0, 0, 0, 1], [0, 0, 0.1, 0]),
        "not finite": matrix + np.diag([np.nan, 0, 0, 0]),
    }
    location["transform_matrix"] = matrices.get(kind, matrix).tolist()
    names = {"elsewhere": "../other/render_0000.webp", "no name": 3}
    location["frames"][0]["name"] = names.get(kind, "render_0003.webp")
    if kind == "no angle":
        del meta["camera_angle_x"]
    if kind == "a frame too few":
        del meta["locations"][-1]
    return "{" if kind == "not JSON" else json.dumps(meta)


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
        write_noise(root / f"object_{k}", elevation=3.0 * k)
    (root / "train.txt").write_text("".join(f"object_{k}\n" for k in range(10)))
    (root / "val.txt").write_text("object_0\nobject_2\n")
    picture = root / "object_2" / "render_0005.webp"
    picture.write_bytes(picture.read_bytes()[:40])
    (root / "object_3" / "meta.json").unlink()
    return root


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
    for data in (used, dataset(cache="memory"), dataset(cache="disk")):
        for epoch, items in enumerate(reference):
            assert all(same(item, data.example(epoch, k)) for k, item in enumerate(items))
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
