"""Training of a classifier of noised pictures, for classifier guidance.

    L = E_{t, eps} [ -log p(label | alpha z + sigma eps, t) ]

(Dhariwal & Nichol 2021, section 4.1). The label of a picture is a rule on its first caption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ldm.data.collection import Collection, Item, Items, spread
from ldm.data.images import to_pixels
from ldm.data.source import DataError
from ldm.diffusion import NoiseProcess, normal, stream
from ldm.engine.encoded import times
from ldm.engine.memory import Memory
from ldm.engine.schema import ClassifierConfig
from ldm.guidance import unit
from ldm.models.classifier import NoisyClassifier
from ldm.models.codec import Codec
from ldm.models.origin import forget_origin


class Labels:
    """Names, and of each a regular expression that its pictures' first captions contain.

    Args:
        rules: expression by name; a picture that none or several fit has no label.
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self.names = list(rules)
        self._rules = [re.compile(rule) for rule in rules.values()]

    def of(self, item: Item) -> int | None:
        """Number of its label."""
        caption = item.caption(None)
        found = [n for n, rule in enumerate(self._rules) if rule.search(caption)]
        return found[0] if len(found) == 1 else None

    def restrict(self, collection: Collection) -> None:
        """Leaves only pictures that have a label in ``collection``.

        Raises:
            DataError: some label has no picture to train on.
        """
        here = [self.of(item) for item in collection.train]
        for number, name in enumerate(self.names):
            if number not in here:
                raise DataError(f"labels.{name}: no picture to train on has this label alone")
        collection.train = collection.train.where(np.array([n is not None for n in here]))
        held = np.array([self.of(item) is not None for item in collection.held_out], bool)
        collection.held_out = collection.held_out.where(held)


class LabelledDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th picture of the run, its label, noise and time.

    Args:
        collection: its training pictures, all of which have labels.
        config: transform with augmentation drawn per image, batch, seed.
        labels: the rules.
        shape: of what is noised, ``c h w``.
    """

    def __init__(
        self,
        collection: Collection,
        config: ClassifierConfig,
        labels: Labels,
        shape: tuple[int, ...],
    ) -> None:
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)
        self.config, self.labels, self.shape = config, labels, shape

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``pixels`` 3 h w in [-1, 1], ``label``, ``posterior``, ``noise``, ``u``, ``position``."""
        item, seed, batch = self.item(position), self.config.seed, self.config.batch_size
        view = self.config.images.view(stream(seed, "transform", position))
        return {
            "position": position,
            "pixels": to_pixels(self.config.images(item.load(), view)),
            "label": self.labels.of(item),
            "posterior": normal(seed, "posterior", position, self.shape),
            "noise": normal(seed, "noise", position, self.shape),
            "u": times(seed, position // batch, batch)[position % batch],
        }


class ClassificationTask(nn.Module):
    """A classifier that learns; saved as a folder of ``NoisyClassifier``.

    Args:
        config: the run.
        classifier: what learns.
        process: the noise.
        codec: frozen, whose latents are noised; None: pixels are.
        labels: the rules.
        held_out: pictures that all have labels.
        origin: what was read from folders.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        classifier: NoisyClassifier,
        process: NoiseProcess,
        codec: Codec | None,
        labels: Labels,
        held_out: Items,
        origin: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.config, self.classifier, self.process = config, classifier, process
        self.codec, self.labels, self.held_out = codec, labels, held_out
        self.origin, self.memory = dict(origin), Memory()

    def trained(self) -> dict[str, nn.Parameter]:
        """The classifier's parameters."""
        return dict(self.classifier.named_parameters())

    def _logits(self, pixels: Tensor, posterior: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        z = pixels
        if self.codec is not None:
            with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
                z = self.codec.sample(self.codec.encode(pixels), posterior)
        t = self.process.time(u)
        x = unit(self.process.perturb(z, noise, t), self.process.level(t))
        return self.classifier(x, self.process.timestep(t).to(x)).float()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` in nats and ``accuracy``, per sample, ``b``."""
        names = ("pixels", "posterior", "noise", "u")
        logits = self._logits(*(batch[name] for name in names))
        hit = logits.argmax(1) == batch["label"]
        loss = cross_entropy(logits, batch["label"], reduction="none")
        return {"loss": loss, "accuracy": hit.float()}

    @torch.no_grad()
    def validate(self, accelerator: Accelerator, folder: Path, images: int) -> dict[str, float]:
        """Held-out accuracy, and at every noise level, with the same noise every time."""
        validation, device = self.config.validation, accelerator.device
        if validation is None or not validation.images or not self.held_out:
            return {}
        chosen = spread(self.held_out, validation.images)
        mine = range(accelerator.process_index, len(chosen), accelerator.num_processes)
        hits = torch.zeros(validation.levels + 1, dtype=torch.float64, device=device)
        for n in mine:
            x = to_pixels(self.config.images(chosen[n].load()))[None].to(device)
            shape = tuple(x.shape[1:])
            if self.codec is not None:
                shape = (self.codec.channels, *(side // self.codec.factor for side in shape[1:]))
            eps = [normal(validation.seed, f"validation {k}", n, shape)
                   for k in range(validation.levels)]  # fmt: skip
            u = (torch.arange(validation.levels, device=device).double() + 0.5) / validation.levels
            noise = torch.stack(eps).to(device)
            logits = self._logits(x.expand(len(u), -1, -1, -1), torch.zeros_like(noise), noise, u)
            hits[:-1] += logits.argmax(1) == self.labels.of(chosen[n])
            hits[-1] += 1
        hits = accelerator.reduce(hits, "sum")
        share = (hits[:-1] / hits[-1]).tolist()
        return {
            "held_out_accuracy": sum(share) / len(share),
            **{
                f"held_out_accuracy/{(k + 0.5) / len(share):.2f}": value
                for k, value in enumerate(share)
            },
        }

    def save(self, folder: Path) -> None:
        """The classifier's folder."""
        self.classifier.save_pretrained(folder)
        forget_origin(folder)

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Its weights."""
        return load_file(folder / "diffusion_pytorch_model.safetensors")
