"""Training of a KL autoencoder.

    L = |x - x_hat|_1 + w_g (|dx - dx_hat|_1 + |dy - dy_hat|_1) + w_kl KL(q(z|x) || N(0, 1))

with means over pixels, and the KL in nats per latent number (Rombach et al. 2022, section 3.1,
without the adversarial and perceptual terms: no network to download). dx and dy are differences of
neighbouring pixels: edges of flat-coloured pictures are where an L1 loss alone blurs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.config.autoencoder import AutoencoderConfig
from ldm.data.collection import Collection
from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.data.items import Item, Items, evenly_spaced
from ldm.diffusion import normal, stream
from ldm.engine.sampler_state import Memory
from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.evaluation import sheets
from ldm.evaluation.similarity import psnr, ssim
from ldm.families.build import parameters
from ldm.families.networks import digest
from ldm.families.vae import latent_side, make_vae, read_vae
from ldm.models.codec import VaeCodec, fold_statistics
from ldm.models.on_host import on_host
from ldm.models.strip_paths import strip_paths
from ldm.progress import track
from ldm.tasks.estimate import Step
from ldm.tasks.program import collect


def train(config: AutoencoderConfig, accelerator: Accelerator) -> Path:
    """Builds the autoencoder of ``config``, trains it, and returns the folder of the result."""
    collection = collect(config, accelerator)
    vae = _made(config).to(accelerator.device)
    task = AutoencoderTask(config, vae, collection)
    latent_side(VaeCodec(vae), config.images)  # refuses a size that the network cannot halve
    if config.train == "all" and (vae.quant_conv is None or vae.post_quant_conv is None):
        named = config.vae if isinstance(config.vae, str) else "this shape (quant_conv: false)"
        raise ConfigError(f"vae: {named} has no quant convolutions to fold statistics into")
    draws = PictureDraws(collection, config, task.codec)
    accelerator.print(
        f"{parameters(vae):,} parameters, {len(collection.train):,} pictures,"
        f" {len(collection.held_out):,} held out"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    final = trainer.fit()
    accelerator.print(f"the autoencoder is in {final}")
    return final


def _made(config: AutoencoderConfig, *, meta: bool = False) -> AutoencoderKL:
    """The autoencoder of ``config``, from its folder or from random init."""
    if isinstance(config.vae, str):
        return read_vae(config.vae, meta=meta)
    return make_vae(config.vae, config.seed, meta=meta)


def step(config: AutoencoderConfig) -> Step:
    """What a step of ``config`` computes, on the meta device."""
    vae = _made(config, meta=True)
    return Step({"vae": vae}, AutoencoderTask(config, vae), ("vae",))


class PictureDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th picture of the run, transformed, and the noise of its posterior.

    Args:
        collection: its training pictures.
        config: transform with augmentation drawn per image, batch, seed.
        codec: what makes latents of them.
    """

    def __init__(self, collection: Collection, config: AutoencoderConfig, codec: VaeCodec) -> None:
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)
        self.transform, self.seed = config.images, config.seed
        self.channels, self.factor = codec.channels, codec.factor

    one_reader = False

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``pixels`` 3 h w in [-1, 1], ``posterior`` c h w, ``position``."""
        item = self.item(position)
        view = self.transform.view(stream(self.seed, "transform", position))
        picture = self.transform(item.load(), view, item.shape)
        width, height = (side // self.factor for side in item.shape)
        shape = (self.channels, height, width)
        return {
            "position": position,
            "pixels": to_pixels(picture),
            "posterior": normal(self.seed, "posterior", position, shape),
        }


class AutoencoderTask(nn.Module):
    """Reconstruction of pictures; what is saved is an ``AutoencoderKL`` folder.

    Args:
        config: the run.
        vae: what learns.
        collection: its pictures; None: nothing is trained, for ``example``.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        vae: AutoencoderKL,
        collection: Collection | None = None,
    ) -> None:
        super().__init__()
        self.memory = Memory()
        self.config, self.vae, self.codec = config, vae, VaeCodec(vae)
        self.origin, self.collection = dict[str, Any](), collection
        if collection is not None and isinstance(config.vae, str):
            self.origin = {"vae.folder": digest(vae)}
        if config.train == "decoder":
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the autoencoder, or of its decoder."""
        return {n: p for n, p in self.vae.named_parameters() if p.requires_grad}

    def example(self, n: int) -> dict[str, Tensor]:
        """A micro-batch of ``n`` pictures of ``images.size`` squared, without values."""
        side = self.config.images.size
        posterior = torch.empty(n, *self.codec.shape(side, side))
        return {"pixels": torch.empty(n, 3, side, side), "posterior": posterior}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` per picture, ``b``."""
        x = batch["pixels"]
        moments = self.codec.encode(x)
        mean, logvar = moments.mean.float(), moments.logvar.float()
        z = mean + (0.5 * logvar).exp() * batch["posterior"]
        x_hat = self.vae.decode(z).sample.float()
        loss = (x - x_hat).abs().flatten(1).mean(1)
        if self.config.gradient:
            for axis in (2, 3):
                edges = (x.diff(dim=axis) - x_hat.diff(dim=axis)).abs()
                loss = loss + self.config.gradient * edges.flatten(1).mean(1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
        return {"loss": loss + self.config.kl * kl.flatten(1).mean(1)}

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Decoded posterior means, clipped to [-1, 1]."""
        return self.vae.decode(self.codec.encode(pixels).mean).sample.clamp(-1, 1)

    @torch.no_grad()
    def validate(
        self, accelerator: Accelerator, folder: Path | None, images: int
    ) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM over held-out pictures, and a sheet of some beside the truth."""
        validation = self.config.validation
        assert self.collection is not None
        if validation is None or not validation.images or not self.collection.held_out:
            return {}
        # Spread over the held-out pictures, whose order is that of the sources.
        chosen = evenly_spaced(self.collection.held_out, validation.images)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        shown = []
        for at in track(range(0, len(mine), 32), "measuring held-out pictures", "batches"):
            x = torch.stack(
                [to_pixels(self.config.images(i.load())) for i in mine[at : at + 32]]
            ).to(accelerator.device)
            x_hat = self.reconstruct(x)
            totals += torch.stack(
                [psnr(x, x_hat).sum(), ssim(x, x_hat).sum(), torch.tensor(len(x), device=x.device)]
            )
            if len(shown) < 32:
                shown += [[to_image(a), to_image(b)] for a, b in zip(x_hat, x, strict=True)]
        totals = accelerator.reduce(totals, "sum")
        if folder and accelerator.is_main_process:
            step = max(1, len(shown) // 32)
            page = sheets.sheet(shown[::step][:32], columns=8)
            sheets.save(page, sheets.sheet_name(folder, images))
        return {"psnr": float(totals[0] / totals[2]), "ssim": float(totals[1] / totals[2])}

    def save(self, folder: Path) -> None:
        """An ``AutoencoderKL`` folder."""
        _write(self.vae, folder)

    def snapshot(self) -> Callable[[Path], None]:
        """``save`` of the weights as they are now."""
        return partial(_write, on_host(self.vae))

    def finish(self, folder: Path) -> None:
        """The same with the latent statistics folded in, if the encoder learnt."""
        vae = copy.deepcopy(self.vae)
        if self.config.train == "all":
            assert self.collection is not None
            fold(vae, self.collection.train, self.config.images, self.config.fold_images)
        _write(vae, folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Its weights."""
        return load_file(folder / "diffusion_pytorch_model.safetensors")


def _write(vae: AutoencoderKL, folder: Path) -> None:
    vae.save_pretrained(folder)
    strip_paths(folder)


@torch.no_grad()
def fold(vae: AutoencoderKL, items: Items, transform: ImageTransform, count: int) -> None:
    """Measures mean and std per latent channel over ``count`` of ``items`` and folds them in.

    The std is that of posterior samples: sqrt(var(mean) + mean(var)).
    """
    codec = VaeCodec(vae)
    chosen = evenly_spaced(items, count)
    total = torch.zeros(3, codec.channels, dtype=torch.float64)
    seen = 0
    for at in track(range(0, len(chosen), 64), "measuring latents", "batches"):
        x = torch.stack([to_pixels(transform(i.load())) for i in chosen[at : at + 64]])
        moments = codec.encode(x.to(vae.device))
        mean, var = moments.mean.double().cpu(), moments.logvar.double().exp().cpu()
        total += torch.stack([m.sum((0, 2, 3)) for m in (mean, mean**2, var)])
        seen += mean[:, 0].numel()
    mean, square, var = total / seen
    fold_statistics(vae, mean, (square - mean**2 + var).sqrt())
