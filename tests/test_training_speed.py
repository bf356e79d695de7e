"""Options that make training faster change nothing else."""

import torch

from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.training.setup import build_objective, compile_networks


def make_objective(make_config, models, train):
    quick = {"reconstruction": "none", "feedback_probability": 0.0}
    return build_objective(models, make_config({"objective": quick, "train": train}, textbook=True, lean=True))


def make_batch(make_cameras) -> OrbitBatch:
    images = torch.rand(1, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return OrbitBatch(images, make_cameras(1), ["an object"])


def test_cached_encodings_leave_the_losses_as_they_are_bit_for_bit(make_config, make_models, make_cameras):
    models = make_models(make_config(textbook=True, lean=True))
    batch, losses = make_batch(make_cameras), {}
    for gib in (0.0, 0.1):
        objective = make_objective(make_config, models, {"cache_encodings": gib})
        encoded = []
        hook = models.svd.vae.encoder.register_forward_hook(lambda *_, seen=encoded: seen.append(1))
        losses[gib] = [objective(batch, objective.draw(0, step, [step], batch))["total"] for step in (0, 1)]
        hook.remove()
        assert len(encoded) == (4 if gib == 0 else 3)  # the views once instead of twice, the noised condition twice
    assert losses[0.0] == losses[0.1] and losses[0.0][0] != losses[0.0][1]


def test_unread_attention_is_frozen_and_the_loss_is_the_same(make_config, make_models, make_cameras):
    models = make_models(make_config(textbook=True, lean=True))
    batch, totals, trained = make_batch(make_cameras), [], []
    for freeze in (False, True):
        objective = make_objective(make_config, models, {"freeze_unread": freeze})
        totals.append(objective(batch, objective.draw(0, 0, [0], batch))["total"])
        trained.append({name for name, p in objective.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*totals)
    frozen = trained[0] - trained[1]
    assert frozen and all("norm2" in name or "attn2.to_q" in name or "attn2.to_k" in name for name in frozen)
    totals[1].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_compiled_training_asks_for_graphs_and_marks_its_steps(make_config, make_models, make_cameras, monkeypatch):
    asked, marks = [], []
    objective = make_objective(make_config, make_models(make_config(textbook=True, lean=True)), {})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _module, **options: asked.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    compile_networks(objective, 1)
    batch = make_batch(make_cameras)
    objective(batch, objective.draw(0, 0, [0], batch))
    plain = {"backend": "inductor", "dynamic": False}
    assert asked == [plain | {"mode": "reduce-overhead"}] and marks == [1]
    compile_networks(objective, 2)  # a graph's replay would write over gradients that a batch before it left
    assert asked[1:] == [plain]


def test_a_batch_is_pinned_with_its_cameras_and_extra_views(make_cameras, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x.clone())
    batch = make_batch(make_cameras)
    batch = OrbitBatch(batch.images, batch.cameras, batch.ids, extra=batch, background=torch.ones(1, 3))
    again = batch.pin_memory()
    assert torch.equal(again.images, batch.images) and again.ids == batch.ids and again.alpha is None
    assert len(pinned) == 2 * 3 + 1  # images, poses and intrinsics, twice; the background
