"""What is drawn for a batch, and how items become one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.objective import Draws


class TestDraws:
    def test_a_samples_draws_depend_on_seed_and_sample_alone(self):
        both, alone = Draws.draw(3, 5, [7, 8], 2, 4, (4, 2)), Draws.draw(3, 99, [8], 2, 4, (4, 2))
        for field in dataclasses.fields(Draws):
            if field.name not in ("feedback", "step"):
                assert torch.equal(getattr(both, field.name)[1:], getattr(alone, field.name)), field.name

    @pytest.mark.parametrize("other", [(4, 5, [7]), (3, 5, [8])])
    def test_another_seed_or_sample_gives_others(self, other):
        one, two = Draws.draw(3, 5, [7], 2, 4, (4, 2)), Draws.draw(*other, 2, 4, (4, 2))
        for field in dataclasses.fields(Draws):
            if field.name not in ("feedback", "step"):
                assert not torch.equal(getattr(one, field.name), getattr(two, field.name)), field.name

    def test_the_coin_depends_on_seed_and_step_alone(self):
        coins = {}
        for seed in range(2):
            for step in range(50):
                coin, same = (Draws.draw(seed, step, samples, 1, 2, (1, 1)).feedback for samples in ([0], [3, 4]))
                assert torch.equal(coin, same) and coin.shape == ()
                coins[seed, step] = coin.item()
        assert len(set(coins.values())) == 100
        assert 0.35 < sum(c > 0.5 for c in coins.values()) / 100 < 0.65

    def test_distributions(self):
        draws = Draws.draw(0, 0, list(range(200)), 2, 4, (4, 4))
        for name in ("sigma", "condition_sigma", "dropout"):
            uniform = getattr(draws, name)
            assert uniform.shape == (200,) and uniform.min() >= 0 and uniform.max() < 1
            assert uniform.mean().item() == pytest.approx(0.5, abs=0.07)
        for name in ("latents", "vae_images", "condition_image", "vae_condition"):
            normal = getattr(draws, name)
            assert normal.mean().item() == pytest.approx(0, abs=0.05)
            assert normal.std().item() == pytest.approx(1, abs=0.05)
        assert not torch.equal(draws.latents, draws.vae_images)

    def test_the_objective_draws_for_its_batch(self, make_objective, make_batch):
        draws = make_objective().draw(1, 2, [5, 6], make_batch(2))
        assert draws.latents.shape == (2, 8, 4, 8, 8) and draws.condition_image.shape == (2, 3, 32, 32)
        assert draws.step == 2


def test_a_batch_is_collated_from_items(make_batch):
    batch = make_batch(2)
    items = [
        {"images": batch.images[i], "c2w": batch.cameras.c2w[i].double(), "K": batch.cameras.K[i], "id": batch.ids[i]}
        for i in range(2)
    ]
    collated = OrbitBatch.collate(items)
    assert torch.equal(collated.images, batch.images) and collated.ids == batch.ids
    assert collated.cameras.c2w.dtype == torch.float32 and collated.alpha is None and collated.depth is None
    items = [item | {"alpha": batch.alpha[i], "depth": batch.depth[i]} for i, item in enumerate(items)]
    assert torch.equal(OrbitBatch.collate(items).depth, batch.depth)
