import pytest
import torch
from torch.distributions import Normal, kl_divergence

from progrpo.diffusion.gaussian import kl, log_prob


def draws(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 2, 4, 4, generator=generator, dtype=dtype) for _ in range(2))


STDS = [torch.tensor(0.37, dtype=torch.float64), torch.tensor([0.0063, 0.3, 2.0], dtype=torch.float64).view(3, 1, 1, 1)]


@pytest.mark.parametrize("std", STDS, ids=["one", "rows"])
def test_log_prob_is_the_mean_density_of_torch_distributions(std):
    x, mean = draws()
    torch.testing.assert_close(
        log_prob(x, mean, std), Normal(mean, std).log_prob(x).mean((1, 2, 3)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("std", STDS, ids=["one", "rows"])
def test_kl_with_the_std_is_the_gaussian_kl(std):
    mean, mean_ref = draws()
    exact = kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean((1, 2, 3))
    torch.testing.assert_close(kl(mean, mean_ref, std), exact, rtol=1e-12, atol=1e-12)


def test_kl_with_the_rate_is_smaller_by_h():
    mean, mean_ref = draws()
    rate, h = torch.tensor(1.3, dtype=torch.float64), 0.1
    torch.testing.assert_close(kl(mean, mean_ref, rate), h * kl(mean, mean_ref, rate * h**0.5))


def test_mean_over_dims_does_not_depend_on_their_number():
    x, mean, std = torch.ones(2, 8), torch.zeros(2, 8), torch.tensor(0.5)
    torch.testing.assert_close(log_prob(x, mean, std), log_prob(x[:, :1], mean[:, :1], std))
    torch.testing.assert_close(kl(x, mean, std), kl(x[:, :1], mean[:, :1], std))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    x, mean = (value.to(dtype) for value in draws())
    std = torch.tensor(0.01, dtype=dtype)  # squared distances overflow float16
    assert log_prob(x, mean, std).dtype == torch.float32
    assert kl(x, mean, std).dtype == torch.float32
    torch.testing.assert_close(log_prob(x, mean, std), log_prob(x.float(), mean.float(), std.float()))
    torch.testing.assert_close(kl(x, mean, std), kl(x.float(), mean.float(), std.float()))


def test_gradient_of_the_mean_is_the_scaled_residual():
    x, mean = draws()
    mean.requires_grad_()
    std = torch.tensor(0.4, dtype=torch.float64)
    log_prob(x, mean, std).sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / std**2 / x[0].numel())
