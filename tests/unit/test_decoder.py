"""Layers that take the place of a decoder's compute what the decoder did."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from progrpo.policies.decoder import Fours, optimize_for_cpu, upsampled


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


def _filled(module):
    """Norms and biases are random as well, so that none can be forgotten."""
    for p in module.parameters():
        p.normal_(std=0.3)
    return module.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 2)])
def test_one_transposed_convolution_is_doubling_and_convolving(bias, size):
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    state = torch.get_rng_state()
    layer = upsampled(convolution)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in layer.parameters())
    # its weights are summed in float32, since the dtype that they come in is narrower
    torch.testing.assert_close(layer(x), expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 8), (5, 12), (1, 4)])
def test_four_places_at_once_are_those_one_by_one(memory_format, bias, size):
    convolution = nn.Conv2d(6, 3, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=memory_format)
    layer = Fours(convolution)
    assert not any(p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(layer(x), convolution(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("blocks", [2, 3])
def test_four_at_once_where_rows_are_multiples_of_four(blocks):
    plain = _autoencoder(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )
    quick = copy.deepcopy(plain)
    optimize_for_cpu(quick)
    assert isinstance(quick.decoder.conv_out, Fours) == (blocks == 3)
    z = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(quick.decode(z).sample, plain.decode(z).sample, atol=1e-3, rtol=1e-3)


def _autoencoder(**changes):
    settings = {
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
    }
    return _filled(AutoencoderKL(**{**settings, **changes}))


@pytest.mark.parametrize(
    "changes", [{}, {"mid_block_add_attention": False}, {"act_fn": "mish"}, {"norm_num_groups": 2}]
)
def test_a_decoder_decodes_as_before(changes):
    plain = _autoencoder(**changes)
    quick = copy.deepcopy(plain)
    optimize_for_cpu(quick)
    left = [type(m) for m in quick.decoder.modules()]
    assert ResnetBlock2D not in left and Upsample2D not in left
    z = torch.randn(2, 4, 6, 10)
    before = z.clone()
    expected = plain.decode(z).sample
    torch.testing.assert_close(quick.decode(z).sample, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert torch.equal(z, before)  # nothing is written over that belongs to the caller


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_low_precision_is_as_near_to_the_truth_as_before(memory_format):
    true = _autoencoder()
    plain = copy.deepcopy(true).to(torch.bfloat16)
    quick = copy.deepcopy(plain)
    optimize_for_cpu(quick)
    z = torch.randn(4, 4, 8, 8)
    expected = true.decode(z).sample
    error, before = (
        (m.to(memory_format=memory_format).decode(z.bfloat16()).sample.float() - expected).square().mean().sqrt()
        for m in (quick, plain)
    )
    assert error <= 1.1 * before


def test_what_does_more_is_left_as_it_is():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.timed = ResnetBlock2D(in_channels=8, groups=2, temb_channels=4)
            self.scaled = ResnetBlock2D(in_channels=8, groups=2, temb_channels=None, output_scale_factor=2.0)
            self.shrinking = ResnetBlock2D(in_channels=8, groups=2, temb_channels=None, down=True)
            self.unlearnt = Upsample2D(8)
            self.transposed = Upsample2D(8, use_conv_transpose=True)
            self.wide = Upsample2D(8, use_conv=True, kernel_size=5, padding=2)

    parts = Parts()
    before = [type(m) for m in parts.modules()]
    optimize_for_cpu(parts)
    assert [type(m) for m in parts.modules()] == before
