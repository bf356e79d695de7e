"""Muon against its definition and against torch's own, which takes matrices alone."""

import pytest
import torch
from torch import nn

from ouroboros3d.training.muon import ADAMW_RMS, Muon, orthogonal


def stepped(optimizer_class, shape: tuple[int, ...], steps: int = 4, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = optimizer_class([parameter], **settings)
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_an_update_is_nearly_orthogonal_and_keeps_its_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = torch.diagonal(u.T @ orthogonal(u @ torch.diag(torch.linspace(20, 1, len(vt))) @ vt) @ vt.T)
    assert found.min() > 0.6 and found.max() < 1.3
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch is older than its Muon")
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_matrices_are_stepped_as_by_torch(shape):
    """Theirs runs the Newton-Schulz iterations in bf16."""
    settings = {"lr": 0.1, "weight_decay": 0.01}
    theirs = stepped(torch.optim.Muon, shape, **settings, adjust_lr_fn="match_rms_adamw")
    torch.testing.assert_close(stepped(Muon, shape, **settings), theirs, rtol=0, atol=0.01)


def test_a_convolution_is_the_matrix_of_its_outputs():
    settings = {"lr": 0.1, "weight_decay": 0.01}
    torch.testing.assert_close(stepped(Muon, (6, 5, 2, 2), **settings).flatten(1), stepped(Muon, (6, 20), **settings))


@pytest.mark.parametrize("shape", [(7,), ()])
def test_vectors_are_stepped_by_adamw(shape):
    settings = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    torch.testing.assert_close(stepped(Muon, shape, **settings), stepped(torch.optim.AdamW, shape, **settings))


def test_updates_are_as_large_as_adamws():
    moved = stepped(Muon, (32, 48), steps=1, lr=1.0) - stepped(Muon, (32, 48), steps=0, lr=1.0)
    assert moved.square().mean().sqrt() == pytest.approx(ADAMW_RMS, rel=0.2)


def test_goes_on_from_its_state():
    def run(restart: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        net = nn.Conv2d(3, 4, 3)
        net.load_state_dict({k: torch.randn(v.shape, generator=generator) for k, v in net.state_dict().items()})
        optimizer = Muon(net.parameters(), lr=0.1)
        for step in range(4):
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if restart and step == 2:
                state = optimizer.state_dict()
                optimizer = Muon(net.parameters(), lr=0.5)
                optimizer.load_state_dict(state)
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))
