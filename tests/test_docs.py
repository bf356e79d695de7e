"""Every command that README.md and docs/*.md print works in a fresh clone, made small where it would take long.

A block of commands that needs what a test machine lacks has a comment before it: <!-- not run: gpu --> (or weights,
network, browser, blender, or that it serves until it is stopped).
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*) -->\s*)?```bash\n(?P<body>.*?)```", re.DOTALL)
REASONS = {"gpu", "weights", "network", "browser", "blender", "serves"}
ORBITS = ["data.root=tests/data/orbits", "data.cache=none"]
PARTS = ("vae", "image_encoder", "lgm", "unet")
START = ["model.pretrained.checkpoint=checkpoints/small", *(f"model.pretrained.{part}=null" for part in PARTS)]
STEP = ["train.steps=1", "train.time_budget=", "train.batch_size=1", "train.mixed_precision=fp32", "train.tracker=none"]
# What is added to commands that match, so that each takes seconds: the last of two equal options counts.
LOOP = ["sampler.steps=1", "turntable.step=120", "turntable.size=32"]
SMALLER: list[tuple[str, list[str]]] = [
    (r"run\.sh test\b", ["-n0", "tests/test_timing.py", "tests/test_statistics.py"]),
    (r"inference\.py|run\.sh inference", LOOP),
    (r"evaluate\.py", [*ORBITS, "--seeds", "0", "--no_baselines", "sampler.steps=1"]),
    (r"ablate\.py", [*ORBITS, *STEP[2:], "--steps", "1", "--seeds", "0", "--rows", "joint", "sampler.steps=1"]),
    (
        r"ablate\.py",
        ["--train_seeds", "0", "--start", "checkpoints/small", "objective.lpips_weight=0", "objective.sigma_levels=[]"],
    ),
    (r"train\.py(?!.*first_run)", [*ORBITS, *STEP, "train.validate_every=9", *START]),
    (r"train\.py.*good_train", ["data.train=train.txt", "data.val=val.txt"]),
    (r"first_run\.yaml", ["train.steps=1", "train.validate_every=9"]),
    (
        r"benchmark_training\.py",
        ["train.batch_size=1", "train.mixed_precision=fp32", "--steps", "1", "--rows", "one pass"],
    ),
    (r"benchmark_data\.py", ["--seconds", "0.2", "--workers", "0", "--size", "32"]),
    (r"render_(orbits|eval)\.py", ["--size", "32", "--workers", "1"]),
    (r"--procedural", ["--procedural", "8"]),
    (r"convert\.py", ["--size", "32", "--frames", "4", "--faces", "500"]),
    (r"make_sharp_object\.py", ["--count", "500"]),
]
RENAMED = {"step_00000020": "step_00000001"}  # of a training that SMALLER shortens


def own_files(clone: Path) -> None:
    """What the pages call the reader's own: photos and a list of them, a folder of meshes."""
    for name in ("photo.png", "photos/a.png", "more/b.jpg"):
        (clone / name).parent.mkdir(exist_ok=True)
        with Image.open(ROOT / "testset" / "photo_car.jpg") as picture:
            picture.resize((128, 128)).save(clone / name)
    (clone / "list.txt").write_text("testset/cup.webp\n")
    pyramid = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv .5 .5 {}\nf 1 2 3 4\nf 1 2 5\nf 2 3 5\nf 3 4 5\nf 4 1 5\n"
    splits = ("train", "val", "test")
    for folder in (clone / "my_folder", clone / "data" / "furniture"):
        folder.mkdir(parents=True)
        for height, split in enumerate(splits, start=1):
            (folder / f"{split}.obj").write_text(pyramid.format(height))
    lists = "".join(f"{split},{split},{split}.obj\n" for split in splits)
    (clone / "data" / "furniture" / "assets.csv").write_text(f"id,split,path\n{lists}")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(reason not to run, commands) of every block."""
    return [(m["reason"] or "", m["body"]) for m in BLOCK.finditer(page.read_text())]


def commands(body: str) -> list[list[str]]:
    """The words of every command of a block, comments left out, continued lines joined."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def smaller(words: list[str], clone: Path) -> list[str]:
    more = [extra for pattern, extra in SMALLER if re.search(pattern, " ".join(words))]
    command = [*words, *(word for extra in more for word in extra)]
    for old, new in {**RENAMED, "$PWD": str(clone)}.items():
        command = [word.replace(old, new) for word in command]
    return command


def test_only_known_reasons_keep_a_command_from_running():
    for page in PAGES:
        for reason, _ in blocks(page):
            assert not reason or set(reason.replace("|", " ").split()) <= REASONS, f"{page.name}: {reason}"
    assert sum(not reason for page in PAGES for reason, _ in blocks(page)) > 5


def test_nothing_is_installed_by_a_name_that_is_on_no_index():
    """The package is installed from its clone: pip install ".[app]"."""
    for path in [*PAGES, *(ROOT / "ouroboros3d").rglob("*.py")]:
        assert not re.search(r"install [\"']?ouroboros3d", path.read_text()), path


MADE = {"meta.json", "train.txt", "zero_to_fp32.py"}  # what a page names as the reader's own or a library's
NAMED = re.compile(r"`(?:python )?([\w./-]+\.(?:py|yaml|sh))(?::[^`]*)?`|\]\((?!http)([^)#]+)\)")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "checkpoints/small/README.md"], ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    for name, link in NAMED.findall(page.read_text()):
        if link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        elif name.startswith(("configs/", "scripts/", "tests/", "docs/", "ouroboros3d/")) or "/" not in name:
            own = name.startswith(("runs/", "data/")) or name in MADE or name in ("row.yaml", "config.yaml")
            assert own or any(f"/{t}".endswith(f"/{name}") for t in tracked), f"{page.name} names {name}"


CODE = re.compile(r"`(?!PIP_|mv_unet\.|lgm\.b)((?:\w+\.)*[A-Za-z_]\w+)`")  # the last two: tensors of the full set


@pytest.fixture(scope="module")
def words() -> dict[str, set[str]]:
    """The words of each file of code, and of the names of all files, by path."""
    folders = (ROOT / name for name in ("ouroboros3d", "tests", "scripts", "configs"))
    files = [
        p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".yaml", ".sh", ".js", ".safetensors")
    ]
    names = {str(p): set(re.findall(r"\w+", p.read_text())) for p in files if p.suffix != ".safetensors"}
    return names | {"names": {part for p in files for part in p.name.split(".")} | {"run", "train", "inference"}}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_of_the_code_that_a_page_uses_exist(page, words):
    """Every word of them; and what is said to be a module's or a class's stands in one file with it."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for name in CODE.findall(text):
        parts = name.removesuffix(".py").split(".")
        unknown = [part for part in parts if not any(part in file for file in words.values())]
        assert not unknown, f"{page.name}: `{name}`"
        if len(parts) > 1:
            homes = [file | {Path(path).stem} for path, file in words.items()]
            assert any(set(parts) <= home for home in homes), f"{page.name}: `{name}` is in no file"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone with the reader's own files. Each page's commands run in it, in their order."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", folder], check=True)
    own_files(folder)
    return folder


@pytest.fixture(scope="module")
def clone_ran() -> list[list[str]]:
    """Commands that ran in the clone: one that several pages print runs once."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_printed_command_runs(page, clone, clone_ran):
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PATH": os.pathsep.join(places), "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    failed = []
    for reason, body in blocks(page):
        for words in commands(body) if not reason else ():
            command = smaller(words, clone)
            if command in clone_ran:
                continue
            clone_ran.append(command)
            before = os.times()
            kept = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
            done = subprocess.run(command, timeout=900, **kept)  # one that hangs must not cost CI its time
            after = os.times()
            seconds = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"{seconds:6.1f} CPU s  {shlex.join(command)}", flush=True)  # seen with -s
            if done.returncode:
                failed.append(f"{shlex.join(command)}\n  status {done.returncode}: {done.stderr.strip()[-400:]}")
    assert not failed, "\n".join(failed)
