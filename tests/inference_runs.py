"""inference.py on a tiny random model."""

from __future__ import annotations

from pathlib import Path

from photos import toy

from ouroboros3d.cli import call
from ouroboros3d.cli.inference import main
from ouroboros3d.config.loading import save_config
from ouroboros3d.models.weights import save_checkpoint

RESULTS = {"toy_input.png", "toy.png", "toy.ply", "toy.mp4", "toy.json"}


def model_folder(folder: Path, make_config, make_models) -> Path:
    """The folder, with ckpt/ (random weights), tiny.yaml and toy.png (a cut-out)."""
    changes = {"sampler": {"steps": 2}, "turntable": {"size": 16, "step": 90}}
    config = make_config(changes | {"model": {"pretrained": {"checkpoint": str(folder / "ckpt")}}})
    save_checkpoint(folder / "ckpt", make_models(), frozen=True)
    save_config(config, folder / "tiny.yaml")
    toy().save(folder / "toy.png")
    return folder


def infer(model: Path, out: Path, *arguments: str | Path) -> int:
    """main() on the tiny model; on toy.png unless the arguments name pictures."""
    arguments = [str(a) for a in arguments]
    if "--input_img" not in arguments:
        arguments = ["--input_img", str(model / "toy.png"), *arguments]
    return call(main, [*arguments, "--config", str(model / "tiny.yaml"), "--output_dir", str(out)])


def refused(status: int, capsys, *words: str, lines: int = 1) -> None:
    """The status is 2 and stderr is one line with these words (after the bar of the loop, if it ran)."""
    stderr = capsys.readouterr().err.replace("loading libraries\n", "")
    message = stderr.splitlines()[-1]
    assert status == 2 and message.startswith("error: "), stderr
    assert "Traceback" not in stderr and (lines > 1 or stderr.count("\n") == 1), stderr
    for word in words:
        assert word in message, message


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
