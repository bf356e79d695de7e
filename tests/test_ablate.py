"""The ablation from end to end on a tiny random model, and its tables on scores made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import LEAN, SMALL, TEXTBOOK
from omegaconf import OmegaConf
from orbit_folders import scene_of, write_scene
from PIL import Image

from ouroboros3d.cli import call
from ouroboros3d.config.loading import load_config
from ouroboros3d.errors import UserError
from ouroboros3d.evaluation import ablation, ablation_rows
from ouroboros3d.evaluation.score_tables import read_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ablate(load_script):
    return load_script("ablate")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """tiny.yaml beside orbits of three objects to train on and two to test."""
    root = tmp_path_factory.mktemp("ablate")
    for number, name in enumerate(("bed", "sofa", "chair", "lamp")):
        write_scene(root / "orbits" / f"{name}_0", scene_of(number), 10.0, 40.0 * number)
    (root / "orbits" / "train.txt").write_text("bed_0\nsofa_0\n")
    (root / "orbits" / "test.txt").write_text("chair_0\nlamp_0\n")
    (root / "orbits" / "val.txt").write_text("chair_0\n")
    config = OmegaConf.merge(
        SMALL,
        LEAN,
        {"model": {"conventions": TEXTBOOK}, "data": {"root": str(root / "orbits"), "workers": 0}},
        {"sampler": {"steps": 3}, "train": {"batch_size": 1, "learning_rate": 1e-3, "tracker": "none"}},
        {"objective": {"detach_feedback": True}},
    )
    (root / "tiny.yaml").write_text(OmegaConf.to_yaml(config))
    return root / "tiny.yaml"


@pytest.fixture(scope="module")
def make_run(load_script):
    """make_run(calls): scripts in this process, noted; the real ones are processes."""
    scripts = {name: load_script(name).main for name in ("train", "evaluate")}

    def make(calls: list[tuple[str, str]], fail: str = ""):
        def run(script: str, arguments: list[str]) -> None:
            row = Path(arguments[arguments.index("--config") + 1]).parent.name
            if fail == row:
                raise UserError(f"{row}: as asked")
            calls.append((script, row))
            if call(scripts[script], arguments):
                raise UserError(f"{script} failed")

        return run

    return make


def arguments(base: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--base", str(base), "--out", str(out), "--device", "cpu", "--steps", "2", "--seeds", "0"]
    return [*fixed, "--rows", "separate", "full", "from_10", "shuffled", *more]


@pytest.fixture(scope="module")
def done(ablate, base, make_run, tmp_path_factory):
    """An ablation that failed before `shuffled` and was repeated: (folder, calls of the first run, of the second)."""
    out, first, second = tmp_path_factory.mktemp("out") / "ablation", [], []
    assert call(ablate.main, arguments(base, out), make_run(first, fail="shuffled")) == 2
    assert call(ablate.main, arguments(base, out), make_run(second)) == 0
    return out, first, second


def test_each_row_is_trained_once_and_the_schedule_shares_the_full_one(done):
    _, first, second = done
    assert first == [
        ("train", "separate"), ("evaluate", "separate"),
        ("train", "full"), ("evaluate", "full"), ("evaluate", "from_10"),
    ]  # fmt: skip
    assert [call for call in second if call[0] == "train"] == []
    assert ("evaluate", "shuffled") in second


def test_report_runs_nothing_and_says_what_is_missing(done, ablate, base, capsys):
    def never(script: str, arguments: list[str]) -> None:
        raise AssertionError(script)

    out = done[0]
    table = (out / "table.md").read_text()
    (out / "table.md").unlink()
    assert call(ablate.main, [*arguments(base, out), "--report"], never) == 0
    assert (out / "table.md").read_text() == table
    assert call(ablate.main, [*arguments(base, out, "joint"), "--report"], never) == 2
    assert "joint/scores_0/objects.csv" in capsys.readouterr().err


def test_what_it_leaves(done):
    out = done[0]
    assert {p.name for p in out.iterdir()} == {
        *("separate", "full", "from_10", "shuffled"),
        *("table.md", "table.csv", "table.json", "plot.png", "grid.png", "settings.json"),
    }
    assert not (out / "from_10" / "train_0").exists()
    rows = {name: read_rows(out / name / "scores_0" / "objects.csv") for name in ("full", "from_10", "separate")}
    assert [row["id"] for row in rows["full"]] == ["chair_0", "lamp_0"]
    report = json.loads((out / "table.json").read_text())["rows"]
    mean = sum(row["render_novel_psnr"] for row in rows["full"]) / 2
    assert report["full"]["scores"]["render_novel_psnr"]["mean"] == pytest.approx(mean)
    pairs = zip(rows["separate"], rows["full"], strict=True)
    difference = [one["render_novel_psnr"] - other["render_novel_psnr"] for one, other in pairs]
    assert report["separate"]["minus_full"]["render_novel_psnr"]["mean"] == pytest.approx(sum(difference) / 2)
    assert difference[0] != 0
    with open(out / "table.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["row"] for line in lines} == {"separate", "full", "from_10", "shuffled"}
    assert Image.open(out / "plot.png").width > 500
    text = (out / "table.md").read_text()
    assert "## Feedback\n" in text and "## Feedback schedule" in text and "## Controls" in text
    assert "| separate training |" in text and "20.012" in text and "21.633" in text


def test_another_budget_in_the_same_folder_is_refused(done, ablate, base, make_run, capsys):
    assert call(ablate.main, [*arguments(base, done[0]), "train.learning_rate=1e-4"], make_run([])) == 2
    assert "holds results of other settings (overrides is" in capsys.readouterr().err


def test_a_setting_that_failed_before_any_result_may_be_corrected(ablate, base, make_run, tmp_path, capsys):
    """The first run refuses its own precision; nothing is trained by then, so that the settings may change."""
    command = [*arguments(base, tmp_path), "--rows", "full"]
    assert call(ablate.main, [*command, "train.mixed_precision=fp16"], make_run([])) == 2
    assert call(ablate.main, command, make_run([], fail="full")) == 2
    assert "full: as asked" in capsys.readouterr().err


def test_the_rows_over_the_small_model(ablate, tmp_path):
    base = ROOT / "configs" / "small" / "joint.yaml"
    out = tmp_path / "out"
    options = ablate.parse(["--base", str(base), "--out", str(out), "--steps", "3", "--rows", *ablation_rows.TABLES])
    made = ablation.Ablation(options, run=None)
    own = load_config(base)
    configs = {name: load_config(made.config_file(name)) for name in options.rows}
    assert list(configs) == list(ablation_rows.ROWS)

    def fed(name: str) -> tuple:
        config = configs[name]
        return config.objective.feedback_probability, config.objective.feedback, config.sampler.feedback

    assert fed("separate") == fed("joint") == (0, None, [])
    assert (fed("ccm"), fed("rgb")) == ((0.5, ["ccm"], ["ccm"]), (0.5, ["rgb"], ["rgb"]))
    assert fed("full") == (0.5, ["rgb", "ccm"], ["rgb", "ccm"])
    assert configs["separate"].objective.reconstruction == "clean" and not configs["separate"].model.lgm.noise_level
    assert all(c.model.lgm.noise_level for name, c in configs.items() if name != "separate")
    steps = own.sampler.steps
    starts = [configs[name].sampler.feedback_from for name in ("full", "from_10", "from_20")]
    assert starts == [0, 10 * steps // 25, 20 * steps // 25]
    assert configs["zero"].sampler.feedback == []
    assert [configs[name].sampler.feedback_of for name in ("full", "shuffled", "truth")] == ["own", "another", "truth"]
    for config in configs.values():  # the rest is the base's
        assert (config.train, config.data, config.cameras) == (own.train, own.data, own.cameras)
        assert config.model.pretrained == own.model.pretrained and config.model.multiview == own.model.multiview


def test_the_rows_over_the_full_model(ablate, tmp_path, capsys):
    base = ROOT / "configs" / "mv" / "svd_lgm_rgb_ccm_lvis.yaml"
    arguments = ["--base", str(base), "--out", str(tmp_path), "--steps", "3"]
    options = ablate.parse([*arguments, "--rows", "ccm", "from_20"])
    made = ablation.Ablation(options, run=None)
    ccm, late = (load_config(made.config_file(name)) for name in ("ccm", "from_20"))
    assert ccm.objective.feedback == ["ccm"] and (late.sampler.steps, late.sampler.feedback_from) == (25, 20)
    # Its conventions mix the samples of a batch, which the shuffled control needs: said before anything is trained.
    assert call(ablate.main, [*arguments, "--rows", "controls"], run=None) == 2
    assert "sampler.feedback_of = another: needs a batch" in capsys.readouterr().err


def score(name: str, seed: int, psnr: float, delta: float) -> dict:
    row = {"object": name, "id": f"{name}_0", "seed": seed}
    return row | {"render_novel_psnr": psnr, "delta_psnr": delta, "render_novel_ssim": 0.5, "delta_ssim": -0.01}


def test_the_table_of_known_scores(ablate, tmp_path):
    def scores(level: float, delta: float) -> list[dict]:
        return [score(name, 0, level + i, delta) for i, name in enumerate("abc")]

    full, joint = {0: scores(20, 0.1), 1: scores(22, 0.3)}, {0: scores(20, -0.5), 1: scores(20, -0.7)}
    made = ablation.results({"joint": joint, "full": full})
    assert made["full"].scores["render_novel_psnr"].mean == pytest.approx(22)
    assert made["full"].by_train_seed[1]["render_novel_psnr"] == pytest.approx(23)
    assert made["joint"].minus_full["render_novel_psnr"].text() == "-1.00 [-1.00, -1.00]"  # paired: no spread is left
    lines = ablation.table_lines(["joint", "full"], made)
    assert lines[0][:6] == ["row", "PSNR", "SSIM", "d PSNR", "d SSIM", "PSNR - full's [95 %]"]
    assert lines[1] == [
        *("joint", "21.000", "0.5000", "0.600", "0.0100", "-1.00 [-1.00, -1.00]"),
        *("20.549", "0.8651", "0.1183", "0.511", "0.0094", "0.0070"),
    ]
    assert lines[2][:6] == ["joint + ccm + rgb", "22.000", "0.5000", "0.200", "0.0100", ""]
    text = ablation.report(tmp_path, made, "protocol")
    assert "Feedback schedule" not in text and text.startswith("Feedback\n")


def test_a_start_is_taken_whole(ablate, tmp_path):
    (tmp_path / "vae.safetensors").touch()
    assert ablation.weights_from(tmp_path) == {"checkpoint": str(tmp_path), "vae": None, "lgm": None, "unet": None}


def test_training_is_finished_by_its_steps_or_its_time(ablate, tmp_path):
    assert not ablation.finished(tmp_path, 5, None)
    for step, seconds in ((4, 50.0), (6, 70.0)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"step": step, "seconds": seconds}))
    assert not ablation.finished(tmp_path, 6, None)  # nothing is exported
    (tmp_path / "export").mkdir()
    assert ablation.finished(tmp_path, 6, None) and not ablation.finished(tmp_path, 7, None)
    assert ablation.finished(tmp_path, None, "1m") and not ablation.finished(tmp_path, None, "2m")


def test_processes_that_fail_or_are_stopped(ablate):
    ablation.launcher("true")("train", [])
    with pytest.raises(UserError, match=r"train ended with status 1"):
        ablation.launcher("false")("train", [])
    with pytest.raises(UserError, match="stopped by SIGTERM; the same command goes on"):
        ablation.launcher("sh -c 'kill -TERM $PPID; sleep 0.1'")("train", [])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "either --steps (equal samples) or --budget"),
        (["--steps", "2", "--budget", "1m"], "either --steps"),
        (["--budget", "soon"], "soon"),
        (["--steps", "2", "--rows", "everything"], "--rows everything: must be of feedback, schedule, controls"),
        (["--steps", "2", "--start", "MISSING"], "--start MISSING: no such checkpoint folder"),
        (["--steps", "2", "--base", "MISSING.yaml"], "MISSING.yaml: no such config file"),
        (["--steps", "2", "objective.feedbak=[]"], "objective.feedbak"),
        (
            ["--steps", "2", "objective.feedback_probability=0.7"],
            "the row separate is objective.feedback_probability = 0.0",
        ),
        (["--steps", "2", "sampler.dtype=bf16"], "sampler.dtype=bf16: this command sets it; use --dtype"),
        (["--steps", "2", "train.seed=3"], "train.seed=3: this command sets it; use --train_seeds"),
    ],
)
def test_bad_input_is_one_line_and_status_2(ablate, base, tmp_path, capsys, more, words):
    *more, words = (text.replace("MISSING", str(tmp_path / "missing")) for text in (*more, words))
    assert call(ablate.main, ["--base", str(base), "--out", str(tmp_path / "out"), *more], run=None) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last, last


@pytest.mark.parametrize("more", [["sampler.steps=2"], ["sampler.steps=25", "sampler.step_share=0.5"]])
def test_the_schedule_s_rows_feed_the_last_step_at_the_latest(ablate, tmp_path, more):
    base = ["--base", str(ROOT / "configs" / "small" / "joint.yaml"), "--out", str(tmp_path / "out"), "--steps", "1"]
    made = ablation.Ablation(ablate.parse([*base, *more]), run=None)
    for name in ("from_10", "from_20"):
        sampler = load_config(made.config_file(name), more).sampler
        assert 1 <= sampler.feedback_from < sampler.taken_steps


def test_a_start_of_the_command_and_one_of_the_keys_are_refused(ablate, base, tmp_path):
    arguments = ["--base", str(base), "--steps", "1", "--start", str(tmp_path)]
    with pytest.raises(UserError, match="name it by --start alone"):
        ablate.parse([*arguments, "model.pretrained.checkpoint=elsewhere"])
    assert ablate.parse([*arguments, "data.val=mine.txt"]).overrides == ["data.val=mine.txt"]  # training checks it
    assert ablate.parse([*arguments, "train.seed=3", "--report"]).report
