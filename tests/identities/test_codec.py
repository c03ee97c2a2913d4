"""Latents of mean 0 and std 1 by folding, and the measures of a picture against the true one."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import tiny
from ldm.config.schema import VaeShape
from ldm.diffusion import stream
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.evaluation.similarity import psnr, ssim
from ldm.families.vae import make_vae
from ldm.models.codec import Moments, VaeCodec, fold_statistics


def pictures(count: int = 64, size: int = 16) -> torch.Tensor:
    """Pictures ``b 3 h w`` in [-1, 1] with different colours and contrasts."""
    torch.manual_seed(3)
    flat = torch.rand(count, 3, 1, 1) * 2 - 1
    return (flat + 0.4 * torch.randn(count, 3, size, size)).clamp(-1, 1)


# -- folding --


@pytest.fixture
def vae() -> AutoencoderKL:
    shape = VaeShape(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    made = make_vae(shape, seed=1).eval().requires_grad_(False)
    # A fresh encoder hardly varies: spread and shift the channels as training would.
    made.quant_conv.weight[:4] *= torch.tensor([9.0, 40.0, 3.0, 17.0])[:, None, None, None]
    made.quant_conv.bias[:4] = torch.tensor([3.0, -8.0, 0.5, 0.0])
    return made


def statistics(codec: VaeCodec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std per channel of posterior samples over ``x``, in closed form."""
    mean, logvar = (m.double() for m in codec.encode(x))
    overall = mean.mean((0, 2, 3))
    square = (mean**2 + logvar.exp()).mean((0, 2, 3))
    return overall, (square - overall**2).sqrt()


def test_an_offloaded_autoencoder_gets_the_latent_where_the_latent_is(vae, monkeypatch):
    """It comes to the device only when it is called: until then its weights lie elsewhere."""
    seen = []

    def decode(z):
        seen.append(z.device.type)
        raise KeyboardInterrupt

    monkeypatch.setattr(vae, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        VaeCodec(vae).decode(torch.zeros(1, 4, 8, 8, device="meta"))
    assert seen == ["meta"]


def test_folding_leaves_the_reconstruction(vae):
    codec, x = VaeCodec(vae), pictures()
    before = codec.encode(x)
    plain = vae.decode(before.mean).sample
    noise = torch.randn_like(before.mean)
    noisy = vae.decode(before.mean + (0.5 * before.logvar).exp() * noise).sample
    fold_statistics(vae, *statistics(codec, x))
    after = codec.encode(x)
    assert (vae.decode(after.mean).sample - plain).abs().max() < 1e-5 * plain.abs().max()
    # The posterior scales with its mean: the same noise gives the same picture.
    again = codec.decode(codec.sample(after, noise))
    assert (again - noisy).abs().max() < 1e-5 * noisy.abs().max()
    assert (after.mean - before.mean).abs().max() > 1


def test_folded_latents_have_mean_0_and_std_1(vae):
    codec, x = VaeCodec(vae), pictures()
    mean, std = statistics(codec, x)
    assert mean.abs().max() > 1 and (std - 1).abs().max() > 0.5
    fold_statistics(vae, mean, std)
    mean, std = statistics(codec, x)
    assert mean.abs().max() < 1e-5 and (std - 1).abs().max() < 1e-5
    # And so it is for what the denoiser sees: draws through VaeCodec.sample.
    moments = codec.encode(x)
    drawn = torch.stack([codec.sample(moments, torch.randn_like(moments.mean)) for _ in range(50)])
    assert drawn.mean((0, 1, 3, 4)).abs().max() < 0.02
    assert (drawn.std((0, 1, 3, 4)) - 1).abs().max() < 0.02


def test_folding_makes_the_factors_neutral(vae, tmp_path):
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    codec, x = VaeCodec(vae), pictures()
    mean, std = statistics(codec, x)
    fold_statistics(vae, mean, std)
    moments = codec.encode(x)
    eps = torch.zeros_like(moments.mean)
    assert torch.equal(codec.sample(moments, eps), moments.mean)
    vae.save_pretrained(tmp_path)
    read = AutoencoderKL.from_pretrained(tmp_path)
    assert read.config.scaling_factor == 1.0 and not read.config.shift_factor
    assert torch.equal(VaeCodec(read).encode(x).mean, moments.mean)


def test_folding_needs_the_two_convolutions():
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False
    )
    with pytest.raises(ValueError, match="no quant convolutions"):
        fold_statistics(vae, torch.zeros(4), torch.ones(4))


# -- factors of a pretrained autoencoder --


@pytest.mark.parametrize("shift", [None, 0.0609])
def test_a_pretrained_factor_is_kept(tmp_path, shift):
    made = tiny.vae()
    made.register_to_config(scaling_factor=0.18215, shift_factor=shift)
    made.save_pretrained(tmp_path)
    codec = VaeCodec(AutoencoderKL.from_pretrained(tmp_path))
    moments = Moments(torch.full((2, 4, 8, 8), 3.0), torch.full((2, 4, 8, 8), math.log(4.0)))
    # (mean + std * eps - shift) * factor
    z = codec.sample(moments, torch.full((2, 4, 8, 8), 0.5))
    expected = torch.full_like(z, (3.0 + 2.0 * 0.5 - (shift or 0)) * 0.18215)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        stock = codec.vae.decode(z / 0.18215 + (shift or 0)).sample
        assert torch.equal(codec.decode(z), stock)


# -- PSNR and SSIM --


@pytest.mark.parametrize("offset", [0.01, 0.1, 0.5])
def test_psnr_of_a_constant_offset(offset):
    x = torch.rand(3, 3, 16, 16) - 0.5
    expected = 20 * math.log10(2 / offset)
    assert psnr(x, x + offset).tolist() == pytest.approx([expected] * 3, abs=1e-4)
    assert psnr(x, x + offset, data_range=1.0)[0] == pytest.approx(expected - 6.0206, abs=1e-4)
    assert torch.isinf(psnr(x, x)).all()


def test_psnr_is_per_picture():
    x = torch.zeros(2, 3, 16, 16)
    y = torch.stack([x[0] + 0.2, x[1] + 0.02])
    assert (psnr(x, y)[1] - psnr(x, y)[0]).item() == pytest.approx(20, abs=1e-4)


def test_ssim_of_equal_and_of_flat_pictures():
    x = pictures(4, 24)
    assert (ssim(x, x) - 1).abs().max() < 1e-12
    a, b = 0.5, -0.25
    flat = ssim(torch.full((2, 3, 16, 16), a), torch.full((2, 3, 16, 16), b))
    # Without variance only the luminance term is left (eq. 6 of Wang et al. 2004).
    c1 = (0.01 * 2) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert flat.tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_ssim_falls_with_noise_and_is_symmetric():
    x = pictures(4, 24)
    noise = 0.1 * torch.randn_like(x)
    near, far = ssim(x, x + noise), ssim(x, x + 4 * noise)
    assert (far < near).all() and (near < 1).all() and (far > 0).all()
    assert torch.allclose(ssim(x + noise, x), near, rtol=1e-12, atol=0)


def test_ssim_against_a_window_by_hand():
    x, y = (p.double() for p in (pictures(1, 11), pictures(2, 11)[1:] * 0.5))
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for a, b in zip(x[0].numpy(), y[0].numpy(), strict=True):
        mean_a, mean_b = (w * a).sum(), (w * b).sum()
        var_a, var_b = (w * (a - mean_a) ** 2).sum(), (w * (b - mean_b) ** 2).sum()
        cov = (w * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 0.02**2, 0.06**2
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        values.append(luminance * (2 * cov + c2) / (var_a + var_b + c2))
    assert ssim(x, y).item() == pytest.approx(np.mean(values), rel=1e-9)


# -- retrieval --


def test_ranks_count_what_lies_nearer():
    gallery = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    queries = torch.tensor([[0.1], [0.1], [2.5], [2.5], [100.0]])
    truth = torch.tensor([0, 3, 2, 0, 0])
    assert ranks(queries, gallery, truth).tolist() == [0, 3, 0, 2, 3]


def test_a_tie_counts_against_the_query():
    gallery = torch.tensor([[0.0], [2.0], [0.0]])
    assert ranks(torch.tensor([[1.0]]), gallery, torch.tensor([0])).tolist() == [2]
    assert ranks(torch.tensor([[0.0]]), gallery, torch.tensor([2])).tolist() == [1]


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_ties_hold_in_large_galleries_too(offset):
    # Beyond 25 rows cdist goes through a matrix product, whose rounding must not break ties.
    torch.manual_seed(0)
    pool = torch.randn(40, 50, 3, 4) + offset
    gallery = torch.cat([pool[0], pool[0], pool[1]])
    queries = pool[0] + 0.01 * torch.randn_like(pool[0])
    assert ranks(queries, gallery, torch.arange(50)).tolist() == [1] * 50
    assert ranks(pool[0], gallery[:50], torch.arange(50)).tolist() == [0] * 50


def test_ranks_of_noise_are_uniform():
    torch.manual_seed(0)
    gallery, queries = torch.randn(200, 8), torch.randn(400, 8)
    rank = ranks(queries, gallery, torch.randint(200, (400,))).double()
    # Mean (m - 1) / 2 with standard error about m / sqrt(12 n) = 2.9.
    assert abs(rank.mean().item() - 99.5) < 3 * 2.9
    assert rank.min() >= 0 and rank.max() <= 199


@pytest.mark.parametrize(
    "hits, n, low, high",
    # Known values: Newcombe 1998, table I (method 3, score without continuity correction).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(hits, n, low, high):
    found = Proportion.of(hits, n)
    assert found.value == hits / n and found.n == n
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.77, 0.98])
def test_the_interval_covers_in_95_of_100(p):
    hits = stream(0, "coverage").binomial(256, p, 20_000)
    found = np.array([Proportion.of(int(h), 256)[1:3] for h in np.arange(257)])[hits]
    covered = ((found[:, 0] <= p) & (p <= found[:, 1])).mean()
    assert 0.93 < covered < 0.975


def test_proportion_reads_well():
    assert str(Proportion.of(197, 256)) == "77.0 % (95 % interval 71.4 to 81.7, n = 256)"
