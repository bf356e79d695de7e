"""The furniture catalogue: what the rule leaves of a small one, splits, credits, and packages that are not whole."""

import csv
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ouroboros3d.cli import call

pytest.importorskip("trimesh")
pytest.importorskip("embreex")
pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb to build a package with")

BOX = """mtllib box.mtl
v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\nv 0 1 1
usemtl paint
f 1 2 3 4\nf 5 6 7 8\nf 1 2 6 5\nf 4 3 7 8\nf 1 4 8 5\nf 2 3 7 6
"""
# Name, category, creator, size in cm, what of the model; and why it is left out.
OBJECTS = [
    ("Crate 1", "Kitchen", "Ann", (50, 60, 70), {}, None),
    ("Crate 2", "Kitchen", "Ann", (50, 60, 70), {}, None),
    ("Old crate", "Kitchen", "Bob", (50, 60, 70), {}, None),
    ("Red carpet", "Kitchen", "Ann", (50, 60, 70), {}, "name"),
    ("Gate", "Doors and windows", "Ann", (50, 60, 70), {}, "category"),
    ("Slab", "Kitchen", "Ann", (50, 60, 5), {}, "flat"),
    ("Rod", "Kitchen", "Ann", (10, 11, 70), {}, "thin"),
    ("Fallen crate", "Kitchen", "Ann", (50, 60, 70), {"rotation": "1 0 0 0 0 -1 0 1 0"}, "laid down"),
    ("Aquarium", "Kitchen", "Ann", (50, 60, 70), {"opacity": 0.3}, "glass"),
    ("Mist", "Kitchen", "Ann", (50, 60, 70), {"obj": "v 0 0 0\n"}, "unreadable"),
]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("get_furniture")


@pytest.fixture(scope="module")
def package(script, tmp_path_factory) -> Path:
    """A Debian package like the real one: five catalogues, OBJECTS in the first and one object in each other."""
    tree = tmp_path_factory.mktemp("package")
    furniture = tree / "root" / "usr" / "share" / "furniture"
    furniture.mkdir(parents=True)
    (tree / "root" / "DEBIAN").mkdir()
    control = "Package: sweethome3d-furniture\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    (tree / "root" / "DEBIAN" / "control").write_text(control)
    for catalogue in script.LICENCES:
        objects = OBJECTS if catalogue == "BlendSwap-CC-0" else OBJECTS[:1]
        with zipfile.ZipFile(furniture / f"{catalogue}.sh3f", "w") as file:
            lines = []
            for number, (name, category, creator, size, extra, _) in enumerate(objects, 1):
                stem = name.replace(" ", "")
                lines += [f"id#{number}=Eteks#{stem}", f"name#{number}={name}", f"category#{number}={category}"]
                lines += [f"creator#{number}={creator}", f"model#{number}=/things/{stem}/{stem}.obj"]
                lines += [f"{side}#{number}={cm}" for side, cm in zip(("width", "depth", "height"), size, strict=True)]
                if "rotation" in extra:
                    lines.append(f"modelRotation#{number}={extra['rotation']}")
                file.writestr(f"things/{stem}/{stem}.obj", extra.get("obj", BOX))
                file.writestr(f"things/{stem}/box.mtl", f"newmtl paint\nKd 1 0 0\nd {extra.get('opacity', 1)}\n")
            file.writestr(script.PROPERTIES, "\n".join(lines) + "\n")
    subprocess.run(["dpkg-deb", "-b", tree / "root", tree / "furniture.deb"], check=True, capture_output=True)
    return tree / "furniture.deb"


@pytest.fixture(scope="module")
def chosen(script, package, tmp_path_factory) -> tuple[Path, Path]:
    """The folder a run with --choose leaves, and its split file."""
    out = tmp_path_factory.mktemp("furniture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SPLIT_FILE", out / "split.csv")
        patch.setattr(script, "TEST_OBJECTS", 2)
        assert call(script.main, ["--out", str(out), "--deb", str(package), "--choose", "--workers", "1"]) == 0
    return out, out / "split.csv"


def rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_rule_leaves_upright_solid_objects(script, chosen):
    kept = {row["name"] for row in rows(chosen[1]) if row["catalogue"] == "BlendSwap-CC-0"}
    assert kept == {name for name, *_, reason in OBJECTS if reason is None}
    reasons = {}
    for entry in script.read_catalogue(chosen[0] / "models" / "BlendSwap-CC-0"):
        file = chosen[0] / "models" / entry.catalogue / entry.model
        reasons[entry.name] = script.excluded_by_catalogue(entry) or script.excluded_by_shape(file)
    assert reasons == {name: reason for name, *_, reason in OBJECTS}


def test_variants_share_a_split_and_test_is_filled_first(chosen):
    splits = {row["id"]: row["split"] for row in rows(chosen[1])}
    assert len(splits) == 7
    assert splits["blendswap-cc-0_crate1"] == splits["blendswap-cc-0_crate2"]
    assert sorted(splits.values()).count("test") == 2


def test_every_model_has_its_file_creator_and_licence(chosen):
    out, split_file = chosen
    credits = {row["id"]: row for row in rows(out / "attribution.csv")}
    assert [row["id"] for row in rows(out / "assets.csv")] == [row["id"] for row in rows(split_file)] == sorted(credits)
    for row in rows(out / "assets.csv"):
        assert (out / row["path"]).is_file()
    assert credits["blendswap-cc-0_oldcrate"]["creator"] == "Bob"
    assert (
        credits["blendswap-cc-0_oldcrate"]["licence"] == "CC0"
        and "zero/1.0" in credits["blendswap-cc-0_oldcrate"]["licence_url"]
    )
    assert {credits[i]["licence"] for i in credits if not i.startswith("blendswap-cc-0")} == {"CC-BY 3.0"}


def test_a_second_run_uses_what_is_unpacked(script, chosen, monkeypatch, capsys):
    out, split_file = chosen
    monkeypatch.setattr(script, "SPLIT_FILE", split_file)
    before = (out / "assets.csv").read_bytes()
    (out / "assets.csv").unlink()
    assert call(script.main, ["--out", str(out), "--deb", "not-needed.deb"]) == 0
    assert (out / "assets.csv").read_bytes() == before
    assert "7 of the catalogues' 14 models (50%)" in capsys.readouterr().out


def test_bad_packages_end_with_one_line_and_leave_nothing(script, package, chosen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SPLIT_FILE", chosen[1])
    (tmp_path / "cut.deb").write_bytes(package.read_bytes()[:1000])
    for deb, reason in (("nowhere.deb", "no such file"), ("cut.deb", "dpkg-deb cannot unpack it")):
        assert call(script.main, ["--out", str(tmp_path / "out"), "--deb", str(tmp_path / deb)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and reason in said and len(said.strip().splitlines()) == 1, said
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").touch()
    assert call(script.main, ["--out", str(tmp_path / "file")]) == 2
    assert "choose another output folder" in capsys.readouterr().err


def test_a_member_that_leads_out_leaves_no_catalogue(script, package, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    subprocess.run(["dpkg-deb", "-R", package, root], check=True)
    with zipfile.ZipFile(root / "usr/share/furniture/KatorLegaz.sh3f", "a") as file:
        file.writestr("../../outside.txt", "x")
    subprocess.run(["dpkg-deb", "-b", root, tmp_path / "bad.deb"], check=True, capture_output=True)
    assert call(script.main, ["--out", str(tmp_path / "out"), "--deb", str(tmp_path / "bad.deb")]) == 2
    assert "outside.txt' leads out of the folder" in capsys.readouterr().err
    assert not (tmp_path / "out/models/KatorLegaz").exists() and not list(tmp_path.rglob("outside.txt"))


def test_a_missing_model_is_named(script, chosen, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(chosen[0], tmp_path / "out"))
    monkeypatch.setattr(script, "SPLIT_FILE", chosen[1])
    (out / "models/Scopia/things/Crate1/Crate1.obj").unlink()
    assert call(script.main, ["--out", str(out)]) == 2
    assert "Crate1.obj is missing; delete" in capsys.readouterr().err
