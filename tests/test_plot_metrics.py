import json

import pytest
from PIL import Image

from ouroboros3d.cli import call


@pytest.fixture
def script(load_script):
    return load_script("plot_metrics")


@pytest.fixture
def run(tmp_path):
    lines = [{"step": s, "kind": "train", "total": float(s)} for s in (1, 2, 3, 4)]
    lines.append({"step": 4, "kind": "validation", "views_psnr": 20.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_curve_is_the_mean_of_the_lines_that_end_with_it(script, run):
    steps, values = script.curve(script.read_metrics(run), "total", smooth=2)
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [1, 1.5, 2.5, 3.5]


def test_a_panel_a_metric(script, run, tmp_path):
    out = tmp_path / "new" / "curves.png"
    assert call(script.main, [str(run), "--metrics", "total", "views_psnr", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--metrics", "nothing"], "there are total, views_psnr"), (["--smooth", "0"], "--smooth")]
)
def test_bad_input_is_one_line(script, run, capsys, arguments, words):
    assert call(script.main, [str(run), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_run_there(script, tmp_path, capsys):
    assert call(script.main, [str(tmp_path / "nowhere")]) == 2
    assert "metrics.jsonl: cannot be read" in capsys.readouterr().err
