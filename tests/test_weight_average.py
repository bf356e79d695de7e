"""The mean of several trainings' weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ouroboros3d.models.weights import CheckpointError


@pytest.fixture
def average(load_script, tmp_path):
    """The command on these state dicts; returns what it wrote."""

    def run(*states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        paths = [tmp_path / f"{i}.safetensors" for i in range(len(states))]
        for state, path in zip(states, paths, strict=True):
            save_file(state, path)
        out = tmp_path / "mean" / "weights.safetensors"
        load_script("average_weights").main([*map(str, paths), "--out", str(out)])
        return load_file(out)

    return run


def test_every_tensor_is_the_mean_in_the_first_ones_precision(average):
    mean = average(
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float16), "count": torch.tensor([3])},
        {"a": torch.tensor([2.0, 4.0]), "count": torch.tensor([5])},
        {"a": torch.tensor([6.0, 0.0]), "count": torch.tensor([7])},
    )
    assert mean["a"].dtype == torch.float16 and mean["a"].tolist() == [3.0, 2.0]
    assert mean["count"].tolist() == [3]


def test_large_halves_do_not_overflow_on_the_way(average):
    large = {"a": torch.full((1,), 60000.0, dtype=torch.float16)}
    assert average(large, large)["a"].tolist() == [60000.0]


@pytest.mark.parametrize("other", [{"b": torch.zeros(2)}, {"a": torch.zeros(3)}])
def test_other_networks_are_refused(average, other):
    with pytest.raises(CheckpointError, match=r"1\.safetensors: [12] tensors differ .* e\.g\. a;"):
        average({"a": torch.zeros(2)}, other)


def test_one_file_has_no_mean(load_script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_script("average_weights").main(["one.safetensors", "--out", str(tmp_path / "x.safetensors")])
    assert "name two or more" in capsys.readouterr().err
