"""Objaverse, against a stand-in of the package's functions: splits, credits, what fails, what runs again."""

import csv
import inspect
import sys
import urllib.error
from pathlib import Path
from types import ModuleType

import pytest

LVIS = {"chair": ["aa", "bb", "cc"], "mug": ["cc", "dd"], "rug": ["ee", "ff"]}
LICENCES = dict(aa="by", bb="cc0", cc="by-nc", dd="by", ee="by", ff="all-rights")


class FakeObjaverse(ModuleType):
    """Like objaverse 0.1.7, with six objects; those in `gone` cannot be downloaded. `asked` is what was."""

    def __init__(self) -> None:
        super().__init__("objaverse")
        self.gone: set[str] = set()
        self.asked: list[list[str]] = []

    def load_lvis_annotations(self) -> dict[str, list[str]]:
        return LVIS

    def load_annotations(self, uids: list[str] | None = None) -> dict[str, dict]:
        users = {uid: {"username": f"user_{uid}", "displayName": f"Maker of {uid}"} for uid in LICENCES}
        return {
            uid: {"uid": uid, "name": f"Thing\n{uid}", "license": LICENCES[uid], "user": users[uid]} for uid in uids
        }

    def load_objects(self, uids: list[str], download_processes: int = 1) -> dict[str, str]:
        self.asked.append(uids)
        print("Downloaded 1 / 1 objects")
        paths = {}
        for uid in uids:
            path = Path(self._VERSIONED_PATH) / "glbs" / "000-001" / f"{uid}.glb"
            if not path.is_file():
                if uid in self.gone:
                    raise urllib.error.URLError("no route to host")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"glTF")
            paths[uid] = str(path)
        return paths


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("get_objaverse")


@pytest.fixture
def package(monkeypatch) -> FakeObjaverse:
    fake = FakeObjaverse()
    monkeypatch.setitem(sys.modules, "objaverse", fake)
    return fake


def rows(path: Path) -> dict[str, dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_the_stand_in_has_the_functions_of_the_package():
    real = pytest.importorskip("objaverse", reason="the package objaverse is not installed")
    fake = FakeObjaverse()
    for name in ("load_lvis_annotations", "load_annotations", "load_objects"):
        assert list(inspect.signature(getattr(fake, name)).parameters) == list(
            inspect.signature(getattr(real, name)).parameters
        )
    assert real._VERSIONED_PATH.startswith(real.BASE_PATH) and real._VERSIONED_PATH.endswith("hf-objaverse-v1")


def test_assets_and_credits(script, package, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path), "--processes", "2"]) == 0
    assets, credits = rows(tmp_path / "assets.csv"), rows(tmp_path / "attribution.csv")
    assert list(assets) == list(credits) == ["aa", "bb", "cc", "dd", "ee"]  # ff has no licence
    assert assets["cc"]["path"] == "hf-objaverse-v1/glbs/000-001/cc.glb" and (tmp_path / assets["cc"]["path"]).is_file()
    assert credits["cc"] == {
        "id": "cc",
        "name": "Thing cc",
        "creator": "Maker of cc",
        "licence": "CC-BY-NC 4.0",
        "licence_url": "https://creativecommons.org/licenses/by-nc/4.0/",
        "source": "https://sketchfab.com/3d-models/cc",
        "categories": "chair mug",
    }
    assert "5 objects" in capsys.readouterr().out and not (tmp_path / "failures.txt").exists()


def test_render_orbits_reads_the_list(load_script, script, package, tmp_path):
    assets = pytest.importorskip("ouroboros3d.data.assets")
    script.main(["--out", str(tmp_path), "--processes", "1"])
    with assets.open_assets(tmp_path / "assets.csv") as found:
        assert [asset.id for asset in found] == ["aa", "bb", "cc", "dd", "ee"]
        assert all(asset.path.is_file() for asset in found)


def test_categories_licences_and_limits(script, package, tmp_path):
    arguments = ["--out", str(tmp_path), "--processes", "1"]
    assert script.main([*arguments, "--categories", "chair", "--licences", "by", "cc0"]) == 0
    assert list(rows(tmp_path / "assets.csv")) == ["aa", "bb"]
    chosen = []
    for limit in (1, 2, 3):  # a larger limit adds to a smaller one
        script.main([*arguments, "--limit", str(limit)])
        chosen.append(set(rows(tmp_path / "assets.csv")))
        assert len(chosen[-1]) == limit
    assert chosen[0] < chosen[1] < chosen[2]


def test_splits_are_by_creator_and_near_their_shares(script):
    splits = [script.split_of(f"user {k}") for k in range(20000)]
    assert 160 < splits.count("test") < 240 and 70 < splits.count("val") < 130
    assert script.split_of("user 7") == script.split_of("user 7")
    test = next(f"user {k}" for k in range(20000) if splits[k] == "test")
    made = [script._row(uid, {"license": "by", "user": {"username": test}}, []) for uid in ("aa", "bb")]
    assert [row["split"] for row in made] == ["test", "test"]


def test_what_fails_is_listed_and_tried_again(script, package, tmp_path, capsys):
    package.gone = {"bb"}
    assert script.main(["--out", str(tmp_path), "--processes", "1"]) == 1
    assert list(rows(tmp_path / "assets.csv")) == ["aa", "cc", "dd", "ee"]
    assert (tmp_path / "failures.txt").read_text() == "bb\t<urlopen error no route to host>\n"
    assert "1 could not be downloaded" in capsys.readouterr().out
    package.gone = {"aa"}  # is there already
    assert script.main(["--out", str(tmp_path), "--processes", "1"]) == 0
    assert len(rows(tmp_path / "assets.csv")) == 5 and not (tmp_path / "failures.txt").exists()


def test_what_cannot_run(script, package, tmp_path, monkeypatch):
    with pytest.raises(script.UserError, match="no category 'chairs'; near: chair"):
        script.main(["--out", str(tmp_path), "--categories", "chairs"])
    package.gone = set(LICENCES)
    with pytest.raises(script.UserError, match=r"none of 5 objects in a row came: .*no route to host"):
        script.main(["--out", str(tmp_path), "--processes", "1"])
    assert not (tmp_path / "assets.csv").exists()

    def offline(uids=None):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(package, "load_annotations", offline)
    with pytest.raises(script.UserError, match=r"annotations: .*no route to host.*internet"):
        script.main(["--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "objaverse", None)
    with pytest.raises(script.UserError, match="pip install objaverse"):
        script.main(["--out", str(tmp_path)])
