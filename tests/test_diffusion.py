"""The equations of the diffusion process against textbook numbers."""

import math

import pytest
import torch

from ouroboros3d import diffusion
from ouroboros3d.config.schema import SchedulerConfig

SIGMAS = torch.tensor([0.002, 0.5, 1.0, 20.0, 700.0], dtype=torch.float64)


class TestPreconditioning:
    def test_numbers(self):
        s = torch.tensor(2.0)
        assert diffusion.c_in(s).item() == pytest.approx(1 / math.sqrt(5))
        assert diffusion.c_skip(s).item() == pytest.approx(0.2)
        assert diffusion.c_out(s).item() == pytest.approx(-2 / math.sqrt(5))
        assert diffusion.c_noise(s).item() == pytest.approx(math.log(2) / 4)
        assert diffusion.loss_weight(s).item() == pytest.approx(1.25)

    def test_the_networks_input_and_target_have_unit_variance(self):
        """EDM's two requirements, for data of variance 1."""
        x_variance = 1 + SIGMAS**2
        torch.testing.assert_close(diffusion.c_in(SIGMAS) ** 2 * x_variance, torch.ones(5).double())
        c_skip, c_out = diffusion.c_skip(SIGMAS), diffusion.c_out(SIGMAS)
        target = ((1 - c_skip) ** 2 + (c_skip * SIGMAS) ** 2) / c_out**2
        torch.testing.assert_close(target, torch.ones(5).double())

    def test_the_true_v_gives_the_true_x0(self):
        """v = alpha eps - sigma' x0 with alpha = 1 / sqrt(s^2 + 1), sigma' = s alpha."""
        g = torch.Generator().manual_seed(0)
        x0, noise = (torch.randn(5, 100, generator=g, dtype=torch.float64) for _ in range(2))
        s = SIGMAS[:, None]
        alpha = (s**2 + 1) ** -0.5
        v = alpha * noise - s * alpha * x0
        torch.testing.assert_close(diffusion.denoised(x0 + s * noise, v, s), x0)

    def test_the_weight_makes_the_loss_the_squared_error_of_v(self):
        torch.testing.assert_close(diffusion.loss_weight(SIGMAS) * diffusion.c_out(SIGMAS) ** 2, torch.ones(5).double())


class TestNoiseLevels:
    def test_moments_of_the_logarithm(self):
        uniform = (torch.arange(100_000) + 0.5) / 100_000
        log = diffusion.lognormal_sigma(uniform, 1.0, 1.6).log()
        assert log.mean().item() == pytest.approx(1.0, abs=1e-3)
        assert log.std().item() == pytest.approx(1.6, abs=2e-3)

    def test_quantiles(self):
        """Phi(1) = 0.8413: one standard deviation above the mean."""
        sigma = diffusion.lognormal_sigma(torch.tensor([0.5, 0.841345]), -3.0, 0.5)
        torch.testing.assert_close(sigma.log(), torch.tensor([-3.0, -2.5]), atol=1e-4, rtol=0)

    def test_the_ends_of_the_interval_are_finite(self):
        ends = diffusion.lognormal_sigma(torch.tensor([0.0, 1 - 2**-24]), 1.0, 1.6)
        assert ends.isfinite().all() and (ends > 0).all()

    def test_a_mixture_without_shares_is_the_lognormal(self):
        uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        mixture = diffusion.mixture_sigma(uniform, [80.0, 17.5], [], 0.3, 1.0, 1.6)
        assert torch.equal(mixture, diffusion.lognormal_sigma(uniform, 1.0, 1.6))

    def test_a_mixture_has_its_shares_and_its_widths(self):
        uniform = (torch.arange(100_000) + 0.5) / 100_000
        log = diffusion.mixture_sigma(uniform, [80.0, 0.17, 1e-9], [0.3, 0.5], 0.1, -9.0, 1.6).log()
        for share, mean, std in ((0.3, math.log(80), 0.1), (0.5, math.log(0.17), 0.1), (0.2, -9.0, 1.6)):
            near = log[(log - mean).abs() < max(5 * std, 1)]
            near = near[near < -4] if mean < -4 else near[near > -4]
            assert len(near) / len(log) == pytest.approx(share, abs=1e-3)
            assert near.mean().item() == pytest.approx(mean, abs=5e-3)
            assert near.std().item() == pytest.approx(std, rel=1e-2)

    def test_shares_of_one_leave_nothing_to_the_lognormal(self):
        ends = torch.tensor([0.0, 0.5, 1 - 2**-24])
        log = diffusion.mixture_sigma(ends, [80.0, 2.5], [0.5, 0.5], 0.1, 50.0, 0.0).log()
        assert log.isfinite().all() and (log < 6).all()


class TestGuidance:
    def test_the_ramp_starts_at_the_input_view(self):
        ramp = diffusion.guidance_ramp(1.0, 3.0, 8)
        assert ramp.shape == (1, 8, 1, 1, 1)
        torch.testing.assert_close(ramp.flatten(), 1 + 2 * torch.arange(8) / 7)

    def test_the_unconditional_half_comes_first(self):
        v = torch.tensor([1.0, 2.0, 5.0, 7.0])
        assert diffusion.guided(v, torch.tensor(1.0)).tolist() == [5, 7]
        assert diffusion.guided(v, torch.tensor(0.0)).tolist() == [1, 2]
        assert diffusion.guided(v, torch.tensor(3.0)).tolist() == [13, 17]


class TestDropout:
    def test_which_conditions_are_kept(self):
        """As in InstructPix2Pix, p = 0.1: embedding, both, latent, none dropped."""
        uniform = torch.tensor([0.0, 0.0999, 0.1, 0.1999, 0.2, 0.2999, 0.3, 0.9999])
        embedding, latent = diffusion.dropout_masks(uniform, 0.1)
        assert embedding.tolist() == [False] * 4 + [True] * 4
        assert latent.tolist() == [True] * 2 + [False] * 4 + [True] * 2

    def test_rates(self):
        uniform = (torch.arange(10_000) + 0.5) / 10_000
        embedding, latent = diffusion.dropout_masks(uniform, 0.05)
        assert (~embedding).sum() == 1000 and (~latent).sum() == 1000
        assert (~embedding & ~latent).sum() == 500

    def test_without_dropout_everything_is_kept(self):
        embedding, latent = diffusion.dropout_masks(torch.tensor([0.0, 0.5]), 0.0)
        assert embedding.all() and latent.all()


class TestSchedule:
    @pytest.mark.parametrize(("steps", "low", "high"), [(25, 0.002, 700.0), (4, 0.01, 80.0)])
    def test_sigmas_are_karras_and_timesteps_their_logarithm(self, steps, low, high):
        """EDM eq. 5 with rho = 7."""
        schedule = diffusion.euler_schedule(SchedulerConfig(low, high), steps)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        expected = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        torch.testing.assert_close(schedule.sigmas[:-1].double(), expected, rtol=1e-5, atol=0)
        assert schedule.sigmas[-1] == 0
        torch.testing.assert_close(schedule.timesteps.double(), expected.log() / 4, rtol=1e-5, atol=1e-6)
        assert float(schedule.init_noise_sigma) == pytest.approx(math.sqrt(high**2 + 1), rel=1e-6)

    def test_exponential_sigmas_are_a_geometric_series(self):
        schedule = diffusion.euler_schedule(SchedulerConfig(0.002, 80.0, "exponential"), 3)
        expected = torch.tensor([80.0, math.sqrt(80 * 0.002), 0.002, 0.0])
        torch.testing.assert_close(schedule.sigmas, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(schedule.timesteps, expected[:-1].log() / 4, rtol=1e-5, atol=1e-6)

    def test_a_step_is_eulers_with_our_preconditioning(self):
        schedule = diffusion.euler_schedule(SchedulerConfig(), 5)
        g = torch.Generator().manual_seed(0)
        for t, sigma, following in zip(schedule.timesteps, schedule.sigmas, schedule.sigmas[1:], strict=False):
            x, v = (torch.randn(3, 4, generator=g) for _ in range(2))
            x = x * (sigma**2 + 1).sqrt()
            torch.testing.assert_close(schedule.scale_model_input(x, t), diffusion.c_in(sigma) * x)
            step = schedule.step(v, t, x)
            x0 = diffusion.denoised(x, v, sigma)
            torch.testing.assert_close(step.pred_original_sample, x0, rtol=1e-4, atol=1e-4)
            euler = x + (following - sigma) * (x - x0) / sigma
            torch.testing.assert_close(step.prev_sample, euler, rtol=1e-4, atol=1e-4)

    def test_one_step_goes_straight_to_x0(self):
        schedule = diffusion.euler_schedule(SchedulerConfig(), 1)
        x, v = torch.full((2,), 500.0), torch.ones(2)
        schedule.scale_model_input(x, schedule.timesteps[0])
        step = schedule.step(v, schedule.timesteps[0], x)
        torch.testing.assert_close(step.prev_sample, step.pred_original_sample, rtol=1e-4, atol=1e-4)
