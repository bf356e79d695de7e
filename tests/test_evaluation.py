"""Scores of held-out orbits: on a scene of known Gaussians, and from end to end on a tiny random model."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LEAN, SMALL, TEXTBOOK
from omegaconf import OmegaConf
from orbit_folders import scene_of, write_scene
from PIL import Image

from ouroboros3d.build import build_models
from ouroboros3d.cli import call, make_picture_test
from ouroboros3d.cli.options import ConfigParser
from ouroboros3d.config.loading import load_config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.errors import ConfigError, UserError
from ouroboros3d.evaluation.evaluator import Evaluator, Options, choose_orbits, evaluate, make_batches
from ouroboros3d.evaluation.examples import Baselines, load_example, object_of
from ouroboros3d.evaluation.metrics import psnr
from ouroboros3d.evaluation.score_tables import above_repeat, compare, read_rows
from ouroboros3d.evaluation.scorer import Scorer
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.models.weights import save_checkpoint
from ouroboros3d.rendering import render

TARGETS = ("generated", "between", "other")
BASELINES = ("repeat", "nearest", "mean", "background")

ROOT = Path(__file__).parent.parent
ELEVATIONS = (5.0, 25.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_models) -> Path:
    """A folder with orbits/ (chair, lamp and table held out with two orbits each, tree with one; two to train on),
    tiny.yaml and weights/ of a random model."""
    root = tmp_path_factory.mktemp("evaluation")
    for number, name in enumerate(("chair", "lamp", "table", "tree", "bed", "sofa")):
        for orbit, elevation in enumerate(ELEVATIONS[: 1 if name in ("tree", "bed", "sofa") else 2]):
            write_scene(root / "orbits" / f"{name}_{orbit}", scene_of(number), elevation, 40.0 * number + 10 * orbit)
    held_out = [f"{name}_{k}" for name in ("chair", "lamp", "table") for k in (0, 1)]
    (root / "orbits" / "test.txt").write_text("\n".join([*held_out, "tree_0"]) + "\n")
    (root / "orbits" / "train.txt").write_text("bed_0\nsofa_0\n")
    config = OmegaConf.merge(
        SMALL,
        LEAN,
        {"model": {"conventions": TEXTBOOK, "pretrained": {"checkpoint": str(root / "weights")}}},
        {"sampler": {"steps": 2}, "data": {"root": str(root / "orbits"), "workers": 0}},
    )
    unstarted = OmegaConf.merge(config, {"model": {"pretrained": {"checkpoint": None}}})
    (root / "unstarted.yaml").write_text(OmegaConf.to_yaml(unstarted))
    (root / "tiny.yaml").write_text(OmegaConf.to_yaml(config))
    save_checkpoint(root / "weights", make_models(load_config(root / "unstarted.yaml")), frozen=True)
    return root


@pytest.fixture(scope="module")
def config(root):
    return load_config(root / "tiny.yaml", ["data.val=test.txt"])


@pytest.fixture(scope="module")
def models(config):
    return build_models(config.model)


@pytest.fixture(scope="module")
def dataset(config):
    return build_dataset(config, "val")


@pytest.fixture(scope="module")
def script(root):
    from ouroboros3d.cli import evaluate

    def run(*arguments) -> int:
        fixed = ["--config", root / "tiny.yaml", "--device", "cpu"]
        return call(evaluate.main, [str(a) for a in (*fixed, *arguments)])

    return run


def run(models, config, **options):
    return evaluate(models, config, CPU, Options(baselines=False, **options))


class TestExtraCameras:
    """All true pictures of an example are of one scene, seen from the cameras it says, in the model's frame."""

    @pytest.fixture(scope="class")
    def example(self, dataset, root):
        return load_example(dataset, 1, root / "orbits")  # chair_1

    @pytest.fixture(scope="class")
    def true(self, example):
        """The scene's Gaussians in the model's frame."""
        scene, to_model = scene_of(0), torch.linalg.inv(example.to_world).float()
        return replace(scene, means=scene.means @ to_model[:3, :3].T + to_model[:3, 3])

    def test_the_same_gaussians_make_every_picture(self, example, true):
        assert {n: len(t.images) for n, t in example.targets.items()} == dict.fromkeys(TARGETS, 8)
        for name, target in example.targets.items():
            made = render(true, target.cameras, 32)
            assert psnr(made.rgb[0], target.images).min() > 40, name
            assert (made.alpha[0] - target.alpha).abs().max() < 0.02, name

    def test_which_they_are(self, example, dataset):
        assert dataset[1]["frames"].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
        assert example.elevation == pytest.approx(25, abs=1e-3)
        assert example.other_elevation == pytest.approx(5, abs=1e-3)
        first = example.targets["generated"].cameras.c2w[0, 0]
        torch.testing.assert_close(first[:3, :3], torch.diag(torch.tensor([1.0, -1, -1])), atol=1e-5, rtol=0)

    def test_an_object_with_one_orbit_has_no_other(self, dataset):
        example = load_example(dataset, 6)
        assert set(example.targets) == {"generated", "between"}
        assert math.isnan(example.other_elevation) and example.points is None

    def test_true_gaussians_score_perfectly(self, example, true, models, config, monkeypatch):
        """The whole row, with the networks' Gaussians replaced by the true ones."""
        monkeypatch.setattr(Gaussians, "scene", lambda gaussians, index: true)
        ((row, pictures),) = Evaluator(models, config, CPU)([example], seed=0)
        for where in ("all", "novel", "between", "other"):
            assert row[f"render_{where}_psnr"] > 38 and row[f"render_{where}_iou"] > 0.97, where
            assert where == "all" or row[f"clean_{where}_psnr"] == row[f"render_{where}_psnr"]
        assert row["chamfer"] < 1e-5 and row["fscore_0.02"] == 1
        assert row["views_novel_psnr"] < 20  # the views are a random network's
        assert row["delta_psnr"] == pytest.approx(row["views_novel_psnr"] - row["render_novel_psnr"], abs=1e-3)
        assert [p.shape for p in pictures.values()] == [(8, 3, 32, 32)] * 3

    def test_damaged_points_are_one_line(self, dataset, root, tmp_path):
        (tmp_path / "chair_0").mkdir()
        for content in ({"points": np.zeros((0, 3))}, {"points": np.zeros((5, 2))}, {"other": np.zeros(3)}):
            np.savez(tmp_path / "chair_0" / "points.npz", **content)
            with pytest.raises(UserError, match=r"points\.npz: cannot be used") as caught:
                load_example(dataset, 0, tmp_path)
            assert "\n" not in str(caught.value)


class TestBaselines:
    @pytest.fixture(scope="class")
    def baselines(self, config):
        return Baselines(config)

    def test_what_they_show(self, baselines, dataset, config):
        example = load_example(dataset, 0)
        made, truth = baselines(example), example.targets["generated"].images
        assert set(made) == set(BASELINES)
        assert all(torch.equal(view, truth[0]) for view in made["repeat"])
        assert torch.equal(made["background"], torch.ones_like(truth))
        training = build_dataset(replace(config, data=replace(config.data, val="train.txt")), "val")
        views = torch.stack([training[i]["images"] for i in range(2)]) * 0.5 + 0.5
        torch.testing.assert_close(made["mean"][3], views.mean((0, 1)))
        errors = [(v[0] - truth[0]).square().mean() for v in views]  # at 32 pixels, as the thumbnails
        torch.testing.assert_close(made["nearest"], views[int(np.argmin(errors))])

    def test_a_training_set_elsewhere(self, config, dataset, root, tmp_path):
        elsewhere = replace(config.data, root=str(tmp_path), train=str(root / "orbits" / "train.txt"))
        example = load_example(dataset, 0)
        own, other = Baselines(config)(example), Baselines(replace(config, data=elsewhere))(example)
        assert all(torch.equal(own[name], other[name]) for name in own)

    def test_a_training_object_is_its_own_nearest_only_from_another_object_s_view(self, baselines, config):
        training = build_dataset(replace(config, data=replace(config.data, val="train.txt")), "val")
        made = baselines(load_example(training, 0))
        torch.testing.assert_close(made["nearest"], training[1]["images"] * 0.5 + 0.5)


class TestBatches:
    def test_a_batch_equals_its_single_items(self, dataset, models, config):
        examples = [load_example(dataset, i) for i in (0, 2)]
        evaluator = Evaluator(models, config, CPU)
        together = [row for row, _ in evaluator(examples, seed=3)]
        apart = [evaluator([example], seed=3)[0][0] for example in examples]
        for one, other in zip(together, apart, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                close = value if isinstance(value, str) else pytest.approx(value, abs=2e-3, nan_ok=True)
                assert other[name] == close

    def test_conventions_that_mix_samples_are_evaluated_one_by_one(self, make_config):
        assert make_batches(make_config(textbook=True), [1, 2, 3], 2) == [[1, 2], [3]]
        assert make_batches(make_config(), [1, 2], 4) == [[1], [2]]
        another = {"sampler": {"feedback_of": "another"}}
        assert make_batches(make_config(another, textbook=True), [1, 2, 3, 4], 1) == [[1, 2], [3, 4]]
        with pytest.raises(ConfigError, match=r"sampler\.feedback_of = another"):
            make_batches(make_config(another), [0, 1], 4)

    def test_objects_and_their_orbits(self):
        objects = [object_of(Path("orbits"), name) for name in ("x/a_0", "x/a_1", "b_0", "b_1", "c", "d_0")]
        assert objects == ["a", "a", "b", "b", "c", "d"]
        assert choose_orbits(objects) == [0, 2, 4, 5]
        assert choose_orbits(objects, 2) == [0, 4]
        assert choose_orbits(objects, 2, every_orbit=True) == [0, 1, 4]

    def test_in_an_evaluation_set_every_id_is_an_object(self, dataset):
        assert load_example(dataset, 0).object == "chair" and "other" in load_example(dataset, 0).targets
        protocol = dataset.root / "protocol.json"
        protocol.write_text("{}")
        try:
            example = load_example(dataset, 0)
        finally:
            protocol.unlink()
        assert example.object == "chair_0" and "other" not in example.targets


class TestControls:
    def test_their_batches_are_fixed_and_never_single(self, models, config, tmp_path):
        another = replace(config, sampler=replace(config.sampler, feedback_of="another"))
        rows, _ = run(models, another, batch=3, out=tmp_path)  # 4 objects: a batch of 4, not 3 + 1
        assert len(rows) == 4
        with pytest.raises(UserError, match="no second object"):
            run(models, another, objects=1)

    def test_of_the_truth_the_loop_is_fed_what_the_true_views_give(self, models, config, dataset, monkeypatch):
        truth = replace(config, sampler=replace(config.sampler, feedback_of="truth"))
        batch, scorer = OrbitBatch.collate([dataset[0], dataset[2]]), Scorer(models, truth)
        encoded, encode = [], models.unet.encode_feedback
        monkeypatch.setattr(models.unet, "encode_feedback", lambda maps: encoded.append(maps) or encode(maps))
        with torch.no_grad():
            scorer.loop(batch, seed=0)
            rgb, _ = scorer.render(scorer.clean(batch), batch.cameras)
        assert torch.equal(encoded[1]["rgb"], rgb) and encoded[0]["rgb"].abs().max() == 0


def test_the_naming_test_shows_each_drawn_object_once_and_keeps_the_answers_apart(root, tmp_path):
    options = ["--config", str(root / "tiny.yaml"), "--out", str(tmp_path), "turntable.size=16"]
    assert call(make_picture_test.main, [*options, "--objects", "3"]) == 0
    names = [line.split() for line in (tmp_path / "answers.txt").read_text().splitlines()]
    assert [number for number, _ in names] == ["01", "02", "03"] and len({name for _, name in names}) == 3
    assert {name for _, name in names} <= {"chair_0", "lamp_0", "table_0", "tree_0"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01.png", "02.png", "03.png", "answers.txt"]
    assert Image.open(tmp_path / "01.png").size == (4 * 16, 2 * 16)


class TestTable:
    def test_it_resumes_and_grows(self, models, config, tmp_path, monkeypatch):
        whole, _ = run(models, config, out=tmp_path / "whole", seeds=(0, 1))
        parts = tmp_path / "parts"
        run(models, config, out=parts, objects=2)
        made = []
        original = Evaluator.__call__

        def spy(self, examples, seed):
            made.extend((e.item["id"], seed) for e in examples)
            return original(self, examples, seed)

        monkeypatch.setattr(Evaluator, "__call__", spy)
        rows, _ = run(models, config, out=parts, seeds=(0, 1), batch=3)
        assert len(rows) == 8 and len(made) == 6
        assert ("chair_0", 0) not in made and ("chair_0", 1) in made
        assert [r["id"] for r in rows] == [r["id"] for r in whole]
        for one, other in zip(rows, whole, strict=True):
            assert one["render_novel_psnr"] == pytest.approx(other["render_novel_psnr"], abs=2e-3)
        made.clear()
        again, _ = run(models, config, out=parts, seeds=(0, 1))
        assert not made
        assert [r["delta_psnr"] for r in again] == [r["delta_psnr"] for r in rows]

    def test_an_interrupted_run_keeps_what_was_finished(self, models, config, tmp_path, monkeypatch):
        original = Evaluator.__call__

        def fail_later(self, examples, seed):
            if examples[0].item["id"] == "table_0":
                raise KeyboardInterrupt
            return original(self, examples, seed)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Evaluator, "__call__", fail_later)
            run(models, config, out=tmp_path, batch=1)
        assert [row["id"] for row in read_rows(tmp_path / "objects.csv")] == ["chair_0", "lamp_0"]
        rows, _ = run(models, config, out=tmp_path, batch=1)
        assert len(rows) == 4

    def test_rows_of_other_settings_are_refused(self, models, config, tmp_path):
        run(models, config, out=tmp_path, objects=1)
        other = replace(config, sampler=replace(config.sampler, steps=3))
        with pytest.raises(UserError, match=r"other settings \(sampler\.steps is 2 there, 3 here\)"):
            run(models, other, out=tmp_path, objects=1)
        weights = build_models(config.model)
        weights.lgm.conv.bias.data[0] += 1e-3
        with pytest.raises(UserError, match="weights is"):
            run(weights, config, out=tmp_path, objects=1)
        assert len(run(models, config, out=tmp_path, objects=2)[0]) == 2

    @pytest.mark.slow
    def test_several_processes_share_the_work(self, models, config, root, tmp_path):
        single, _ = run(models, config, seeds=(0, 1))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(ROOT / "scripts" / "evaluate.py"), "--config", str(root / "tiny.yaml"), "--device", "cpu"]
        command += ["--seeds", "0", "1", "--batch", "3", "--no_baselines", "--out", str(tmp_path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.count("4 objects of test.txt, 8 samples") == 1
        rows = {(r["id"], r["seed"]): r for r in read_rows(tmp_path / "objects.csv")}
        assert not list(tmp_path.glob("part*"))
        assert len(rows) == len(single) == 8
        for row in single:
            other = rows[row["id"], row["seed"]]
            assert row["render_novel_psnr"] == pytest.approx(other["render_novel_psnr"], abs=2e-3)


def test_exported_weights_leave_the_data_as_they_were():
    """Their config.yaml is of the model alone."""
    parser = ConfigParser("", "configs/small.yaml")
    parser.add_checkpoint()
    options = parser.parse_args(["--ckpt", "checkpoints/small", "sampler.steps=1"])
    config = load_config(options.config, options.overrides)
    assert config.data.root == load_config("configs/small.yaml").data.root and config.sampler.steps == 1
    given = parser.parse_args(["model.pretrained.checkpoint=checkpoints/small", "data.root=elsewhere"])
    assert load_config(given.config, given.overrides).data.root == "elsewhere"


class TestScript:
    @pytest.fixture(scope="class")
    def out(self, script, root, tmp_path_factory):
        out = tmp_path_factory.mktemp("script") / "out"
        assert script("--out", out, "--points", root / "orbits") == 0
        return out

    def test_the_table_of_objects(self, out):
        with open(out / "objects.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == ["chair_0", "lamp_0", "table_0", "tree_0"]
        header = list(rows[0])
        assert header[:5] == ["object", "id", "seed", "elevation", "other_elevation"]
        for subject in ("views_all", "views_novel", "render_all", "render_novel", "render_between", "render_other",
                        "clean_novel", "clean_between", "clean_other", "delta", *BASELINES):  # fmt: skip
            for metric in ("psnr", "psnr_foreground", "ssim", "gradient_distance", "iou"):
                assert f"{subject}_{metric}" in header
        assert {"agreement_psnr", "chamfer", "fscore_0.02", "fscore_0.05"} <= set(header)
        assert not any("lpips" in name for name in header) or "torchvision" in sys.modules
        assert rows[3]["render_other_psnr"] == "" and float(rows[0]["render_other_psnr"]) > 0
        assert float(rows[0]["repeat_psnr"]) > float(rows[0]["background_psnr"])

    def test_the_summary_and_the_grid(self, out):
        summary = json.loads((out / "summary.json").read_text())
        scores = summary["scores"]["render_novel_psnr"]
        rows = read_rows(out / "objects.csv")
        values = [row["render_novel_psnr"] for row in rows]
        assert scores["count"] == 4 and scores["mean"] == pytest.approx(np.mean(values))
        assert min(values) <= scores["low"] <= scores["mean"] <= scores["high"] <= max(values)
        assert summary["scores"]["render_other_psnr"]["count"] == 3
        assert {p.name for p in (out / "pictures").iterdir()} == {f"{r['id']}_0.png" for r in rows}
        row_picture = Image.open(out / "pictures" / "chair_0_0.png")
        grid = Image.open(out / "grid.png")  # of four objects: one best, one median, one worst
        assert grid.size == (row_picture.width, 3 * (row_picture.height + 22))
        best = max(rows, key=lambda row: row["render_novel_psnr"])
        top = grid.crop((0, 22, grid.width, 22 + row_picture.height))
        assert np.array_equal(top, Image.open(out / "pictures" / f"{best['id']}_0.png"))

    def test_what_it_is_above_repeating_the_input(self, script, out, root, capsys):
        assert script("--out", out, "--points", root / "orbits") == 0
        rows = read_rows(out / "objects.csv")
        expected = np.mean([row["render_novel_psnr"] - row["repeat_psnr"] for row in rows])
        assert above_repeat(rows)["3D"].mean == pytest.approx(expected)
        assert f"3D {expected:+.2f} [" in capsys.readouterr().out
        assert above_repeat([{k: v for k, v in row.items() if k != "repeat_psnr"} for row in rows]) == {}

    def test_comparison_of_two_tables(self, script, out, root, tmp_path, capsys):
        assert script("--out", tmp_path / "b", "--no_baselines", "--compare", out / "objects.csv",
                      "sampler.feedback=[]") == 0  # fmt: skip
        printed = capsys.readouterr().out
        assert f"minus {out / 'objects.csv'}, paired by object, 4 objects" in printed
        ours, theirs = read_rows(tmp_path / "b" / "objects.csv"), read_rows(out / "objects.csv")
        difference = compare(ours, theirs)["views_novel_psnr"]
        expected = np.mean([a["views_novel_psnr"] - b["views_novel_psnr"] for a, b in zip(ours, theirs, strict=True)])
        assert difference.mean == pytest.approx(expected)
        minus = json.loads((tmp_path / "b" / "summary.json").read_text())["minus"]
        assert minus["views_novel_psnr"]["mean"] == pytest.approx(expected)
        assert "repeat_psnr" not in minus

    def test_without_a_folder_it_prints_alone(self, script, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert script("--objects", 1, "--no_baselines", "--dtype", "bf16") == 0
        printed = capsys.readouterr().out
        assert "1 objects of test.txt" in printed and "3D, novel" in printed and "LPIPS is absent" in printed
        assert not list(tmp_path.iterdir())

    def test_training_objects_are_pointed_out(self, script, capsys):
        assert script("--list", "train.txt", "--no_baselines") == 0
        assert "WARNING: 2 of 2 objects are in" in capsys.readouterr().out

    def test_an_empty_training_list_costs_the_baselines_alone(self, script, root, capsys):
        (root / "orbits" / "empty.txt").write_text("")
        assert script("--objects", 1, "data.train=empty.txt", "sampler.steps=1") == 0
        printed = capsys.readouterr().out
        assert "the baselines are absent" in printed and "WARNING" not in printed and "3D, novel" in printed

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--list", "none.txt"], ["none.txt", "no such file"]),
            (["--objects", "-1"], ["--objects"]),
            (["--batch", "0"], ["--batch"]),
            (["--compare", "MISSING.csv"], ["MISSING.csv", "not a table of scores"]),
            (["--compare", "OTHER.csv"], ["OTHER.csv", "needs the columns object, id, seed"]),
            (["--config", "MISSING.yaml"], ["MISSING.yaml"]),
            (["--ckpt", "MISSING"], ["MISSING", "no such checkpoint folder"]),
            (["--device", "tpu"], ["--device tpu"]),
            (["sampler.step=3"], ["sampler.step"]),
            (["sampler.seed=3"], ["sampler.seed=3", "use --seeds"]),
            (["data.val=none.txt"], ["none.txt", "no such file"]),
            (["--out", "/proc/nothing"], ["/proc/nothing", "choose another output folder"]),
        ],
    )
    def test_bad_input_is_one_line_and_status_2(self, script, capsys, monkeypatch, tmp_path, arguments, words):
        (tmp_path / "OTHER.csv").write_text("name,value\nx,1\n")
        monkeypatch.chdir(tmp_path)
        assert script(*arguments) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), last
