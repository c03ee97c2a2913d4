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
from torch.utils.data import Dataset, default_collate

from ldm.config.classifier import ClassifierConfig
from ldm.data.collection import Collection
from ldm.data.images import to_pixels
from ldm.data.items import Item, Items, evenly_spaced
from ldm.diffusion import stream
from ldm.engine.sampler_state import Memory
from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError, DataError
from ldm.families.build import parameters
from ldm.families.networks import described, initialised, on_meta
from ldm.models.classifier import NoisyClassifier
from ldm.models.strip_paths import strip_paths
from ldm.progress import track
from ldm.tasks.estimate import Step
from ldm.tasks.noisy_input import NoisyInput
from ldm.tasks.program import collect


def train(config: ClassifierConfig, accelerator: Accelerator) -> Path:
    """Builds the classifier of ``config``, trains it, and returns the folder of the result."""
    if config.images.buckets:
        raise ConfigError("images.buckets: a classifier's pictures are squares: leave it out")
    noised = NoisyInput.of(config.model, config.images, config.process)
    if noised.codec is not None:
        noised.codec.vae.to(accelerator.device)
    collection, labels = collect(config, accelerator), Labels(config.labels)
    if collection.epoch is None:
        raise ConfigError("data: a stream's labels are not known ahead: train on files or tables")
    without = labels.restrict(collection)
    classifier = _made(config, noised.shape[0]).to(accelerator.device)
    task = ClassificationTask(config, classifier, noised, labels, collection.held_out)
    draws = LabelledDraws(collection, config, labels, noised)
    accelerator.print(
        f"{parameters(classifier):,} parameters, {len(labels.names)} labels,"
        f" {len(collection.train):,} pictures, {len(collection.held_out):,} held out,"
        f" {without:,} left out that none or several of the labels fit"
    )
    final = Trainer(config, task, draws, collection, accelerator).fit()
    accelerator.print(f"the classifier is in {final}")
    return final


def _made(config: ClassifierConfig, channels: int) -> NoisyClassifier:
    """The classifier of ``config`` from random init, for ``channels``."""
    with initialised(config.seed, "classifier"), described("classifier"):
        return NoisyClassifier(list(config.labels), channels, **vars(config.classifier))


def step(config: ClassifierConfig) -> Step:
    """What a step of ``config`` computes, on the meta device."""
    noised = NoisyInput.of(config.model, config.images, config.process, meta=True)
    classifier = on_meta(lambda: _made(config, noised.shape[0]))
    task = ClassificationTask(config, classifier, noised)
    return Step({"classifier": classifier, **noised.networks}, task, ("classifier",))


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

    def restrict(self, collection: Collection) -> int:
        """Leaves only pictures that have a label in ``collection``, and tells how many had none.

        Raises:
            DataError: some label has no picture to train on.
        """
        here = [self.of(item) for item in collection.train]
        for number, name in enumerate(self.names):
            if number not in here:
                raise DataError(f"labels.{name}: no picture to train on has this label alone")
        before = len(collection.train) + len(collection.held_out)
        collection.train = collection.train.where(np.array([n is not None for n in here]))
        held = np.array([self.of(item) is not None for item in collection.held_out], bool)
        collection.held_out = collection.held_out.where(held)
        return before - len(collection.train) - len(collection.held_out)


class LabelledDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th picture of the run, its label, noise and time.

    Args:
        collection: its training pictures, all of which have labels.
        config: transform with augmentation drawn per image, batch, seed.
        labels: the rules.
        noised: what the classifier sees.
    """

    def __init__(
        self, collection: Collection, config: ClassifierConfig, labels: Labels, noised: NoisyInput
    ) -> None:
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)
        self.config, self.labels, self.noised = config, labels, noised

    one_reader = False

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``pixels`` 3 h w in [-1, 1], ``label``, the draws of ``NoisyInput``, ``position``."""
        item, seed = self.item(position), self.config.seed
        view = self.config.images.view(stream(seed, "transform", position))
        return {
            "position": position,
            "pixels": to_pixels(self.config.images(item.load(), view)),
            "label": self.labels.of(item),
            **self.noised.draws(seed, position, self.config.batch_size),
        }


class ClassificationTask(nn.Module):
    """A classifier that learns; saved as a folder of ``NoisyClassifier``.

    Args:
        config: the run.
        classifier: what learns.
        noised: what it sees.
        labels: the rules; None: nothing is trained, for ``example``.
        held_out: pictures that all have labels.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        classifier: NoisyClassifier,
        noised: NoisyInput,
        labels: Labels | None = None,
        held_out: Items | None = None,
    ) -> None:
        super().__init__()
        self.config, self.classifier, self.noised = config, classifier, noised
        self.labels, self.held_out, self.origin = labels, held_out, dict[str, Any]()
        if labels is not None:
            # Of a mapping a run's identity knows the keys, and not their order, which logits have.
            self.origin = {**noised.origin(), "labels.order": labels.names}
        self.memory = Memory()

    def trained(self) -> dict[str, nn.Parameter]:
        """The classifier's parameters."""
        return dict(self.classifier.named_parameters())

    def example(self, n: int) -> dict[str, Tensor]:
        """A micro-batch of ``n`` pictures without values."""
        side = self.config.images.size
        label = torch.empty(n, dtype=torch.int64)
        return {"pixels": torch.empty(n, 3, side, side), "label": label} | self.noised.example(n)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` in nats and ``accuracy``, per sample, ``b``."""
        logits = self.classifier(*self.noised(batch["pixels"], batch)).float()
        hit = logits.argmax(1) == batch["label"]
        loss = cross_entropy(logits, batch["label"], reduction="none")
        return {"loss": loss, "accuracy": hit.float()}

    @torch.no_grad()
    def validate(
        self, accelerator: Accelerator, folder: Path | None, images: int
    ) -> dict[str, float]:
        """Held-out accuracy, and at every noise level, with the same noise every time."""
        validation, device = self.config.validation, accelerator.device
        assert self.labels is not None
        if validation is None or not validation.images or not self.held_out:
            return {}
        chosen = evenly_spaced(self.held_out, validation.images)
        levels = validation.levels
        hits = torch.zeros(levels + 1, dtype=torch.float64, device=device)
        mine = range(accelerator.process_index, len(chosen), accelerator.num_processes)
        for n in track(mine, "measuring held-out accuracy"):
            x = to_pixels(self.config.images(chosen[n].load())).to(device)
            draws = default_collate(
                [self.noised.held_out(validation.seed, n, k, levels) for k in range(levels)]
            )
            draws = {name: value.to(device) for name, value in draws.items()}
            logits = self.classifier(*self.noised(x.expand(levels, -1, -1, -1), draws))
            hits[:-1] += logits.argmax(1) == self.labels.of(chosen[n])
            hits[-1] += 1
        hits = accelerator.reduce(hits, "sum")
        share = (hits[:-1] / hits[-1]).tolist()
        name = "held_out_accuracy"
        per_level = {f"{name}/{(k + 0.5) / levels:.2f}": v for k, v in enumerate(share)}
        return {name: sum(share) / levels, **per_level}

    def save(self, folder: Path) -> None:
        """The classifier's folder."""
        self.classifier.save_pretrained(folder)
        strip_paths(folder)

    def snapshot(self) -> None:
        """There is only ``save``: it is small."""

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Its weights."""
        return load_file(folder / "diffusion_pytorch_model.safetensors")
