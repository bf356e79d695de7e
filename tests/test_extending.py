"""A reconstructor and a feedback map of one's own, as docs/extending.md has them, through everything that is run."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_train import TINY, write_orbits
from torch import Tensor, nn

from ouroboros3d import build, feedback
from ouroboros3d.build import build_models
from ouroboros3d.cameras import Cameras
from ouroboros3d.config import schema
from ouroboros3d.config.loading import load_config
from ouroboros3d.evaluation.evaluator import Options, evaluate
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.geometry import plucker_maps
from ouroboros3d.interfaces import Reconstructor, Rendering
from ouroboros3d.models.weights import load_unet, save_checkpoint


class Billboards(nn.Module, Reconstructor):
    """A flat Gaussian per pixel of 8 x 8, on its ray, at a depth and with a size that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 14, 1)

    def forward(self, images: Tensor, cameras: Cameras, c_noise: Tensor, encoded: Tensor | None = None) -> Gaussians:
        views = nn.functional.interpolate(images.flatten(0, 1), (8, 8), mode="area")
        moment, ray = plucker_maps(cameras, 8).flatten(0, 1).chunk(2, dim=1)
        raw = self.net(views.to(self.net.weight.dtype)).float()
        means = torch.linalg.cross(ray, moment, dim=1) + 0.1 * raw[:, :3]
        opacities, scales, colours = raw[:, 3:4].sigmoid(), 0.1 * raw[:, 4:7].sigmoid(), raw[:, 11:].sigmoid()
        rows = torch.cat([means, opacities, scales, nn.functional.normalize(raw[:, 7:11], dim=1), colours], dim=1)
        return Gaussians.from_tensor(rows.unflatten(0, images.shape[:2]).movedim(2, -1).flatten(1, 3))


def depth_map(rendering: Rendering, cameras: Cameras, convention: str) -> Tensor:
    """Depth of the surface, 0 at the camera and 1 from twice the object's distance on."""
    distance = cameras.c2w[..., :3, 3].norm(dim=-1)[..., None, None, None]
    depth = rendering.depth / rendering.alpha.clamp(min=1e-6) * (rendering.alpha > 0.5)
    return (depth / (2 * distance)).clamp(0, 1).expand(-1, -1, 3, -1, -1)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The two swapped in; returns a folder with orbits and a configuration that uses them."""
    root = tmp_path_factory.mktemp("extending")
    write_orbits(root / "orbits")
    maps = ["rgb", "ccm", "depth"]
    changes = {
        "model": {"multiview": {"feedback": maps}},
        "sampler": {"feedback": maps},
        "data": {"root": str(root / "orbits")},
        "train": {"output_dir": str(root / "run"), "tracker": "none", "ema_decay": 0.0},
    }
    (root / "mine.yaml").write_text(OmegaConf.to_yaml(OmegaConf.merge(TINY, changes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_reconstructor", lambda config: Billboards())
        patch.setitem(feedback.MAPS, "depth", depth_map)
        patch.setattr(schema, "MAPS", schema.MAPS)
        schema.MAPS.append("depth")
        yield root
        schema.MAPS.remove("depth")


def train(root, *overrides: str) -> None:
    from ouroboros3d.cli.train import main

    assert main(["--config", str(root / "mine.yaml"), "--device", "cpu", *overrides]) == 0


def weights(root, step: int) -> dict[str, Tensor]:
    return load_file(root / "run" / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(extended):
    """Two steps, then two more of the same run, both with feedback."""
    train(extended, "train.steps=2", "objective.feedback_probability=1")
    train(extended, "objective.feedback_probability=1")
    return extended


def test_training_resumes_and_trains_both(trained):
    before, after = weights(trained, 2), weights(trained, 4)
    for name in ("trained.lgm.net.weight", "trained.unet.cond_encoder.2.conv_in.weight"):
        assert not torch.equal(before[name], after[name]), name
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    (scores,) = (row for row in rows if row["kind"] == "validation")
    assert {"render_psnr", "views_psnr", "lgm_input_psnr"} <= set(scores)  # it reads every view: none is unseen
    assert "lgm_unseen_psnr" not in scores


def test_evaluation(trained):
    config = load_config(trained / "mine.yaml", [f"model.pretrained.checkpoint={trained / 'run' / 'export'}"])
    models = build_models(config.model)
    exported = load_file(trained / "run" / "export" / "recon_model.safetensors")
    assert torch.equal(models.lgm.net.weight.half(), exported["net.weight"].half())
    rows, _ = evaluate(models, config, torch.device("cpu"), Options(baselines=False))
    assert len(rows) == 1 and rows[0]["render_novel_psnr"] > 0 and rows[0]["clean_novel_psnr"] > 0


def test_inference(trained, tmp_path):
    from ouroboros3d.cli.inference import main

    picture = trained / "orbits" / "object_0" / "render_0000.webp"
    arguments = ["--config", str(trained / "mine.yaml"), "--ckpt", str(trained / "run" / "export"), "--device", "cpu"]
    arguments += ["--input_img", str(picture), "--output_dir", str(tmp_path), "turntable.size=32", "turntable.step=90"]
    main(arguments)
    assert {".png", ".ply", ".mp4"} <= {path.suffix for path in tmp_path.iterdir()}


def test_weights_with_fewer_maps_load_and_change_nothing(extended, make_config, make_models, tmp_path, caplog):
    few = make_config(textbook=True, lean=True)
    old = make_models(few)
    save_checkpoint(tmp_path, old)
    more = make_config({"model": {"multiview": {"feedback": ["rgb", "ccm", "depth"]}}}, textbook=True, lean=True)
    unet = build_models(more.model).unet
    load_unet(tmp_path / "mv_model_unet.safetensors", unet)
    assert "no adapter for the feedback map depth: a new one starts at zero effect" in caplog.text
    maps = {name: torch.rand(1, 8, 3, 32, 32) for name in ("rgb", "ccm", "depth")}
    one, two = unet.encode_feedback(maps), old.unet.encode_feedback({name: maps[name] for name in ("rgb", "ccm")})
    for ours, theirs in zip([*one.down[:-1], one.mid], [*two.down[:-1], two.mid], strict=True):
        assert torch.equal(ours, theirs)
    one.mid.sum().backward()
    assert unet.cond_encoder[2].conv_in.weight.grad.any()  # and yet it learns
