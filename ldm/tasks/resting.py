"""Frozen networks that no step reads, since all that they say is cached.

They leave the device. Where a folder has them that the run does not write, a cached set or what a
LoRA or a new word is learnt on, they leave the memory too, and are read again for a validation,
which draws and looks at held-out pictures. A run that saves them keeps them beside the device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection

from ldm.errors import ConfigError
from ldm.families.model import Model
from ldm.families.networks import read
from ldm.families.vae import read_vae
from ldm.models.embedding import PICTURE_TOWER
from ldm.models.half_storage import halve

log = logging.getLogger(__name__)


class Resting:
    """Networks of a model that are not where it computes, but while something asks for them.

    Args:
        model: its networks rest from now on.
        names: which, by their folders.
        source: folder with all of them; None: they stay in memory.
        half: whether text encoders are held in bfloat16.
    """

    def __init__(
        self, model: Model, names: Sequence[str], source: Path | None, *, half: bool
    ) -> None:
        self.model, self.names, self.source, self.half = model, names, source, half
        self._told = False
        self._leave()

    def _leave(self) -> None:
        where = torch.device("meta" if self.source else "cpu")
        for name in self.names:
            network = self.model.networks[name]
            if network.device != where:  # a cached set's are shapes from the beginning
                network.to(where)

    @contextmanager
    def back(self, device: torch.device, what: str) -> Iterator[None]:
        """Inside, they are on ``device``; ``what`` asks for them.

        Raises:
            ConfigError: the folder does not hold them any more.
        """
        if self.source and self.names and not self._told:
            told = ", ".join(self.names)
            log.info("%s: %s are read from %s for it, every time", what, told, self.source)
            self._told = True
        try:
            for name in self.names:
                network = self.model.networks[name]
                if self.source:
                    _fill(network, self._read(name, self.source), self.source / name)
                network.to(device)
            yield
        finally:
            self._leave()

    def _read(self, name: str, source: Path) -> Any:
        if name == "vae":
            return read_vae(str(source / name))
        if name == PICTURE_TOWER:
            return read(CLIPVisionModelWithProjection, source / name, PICTURE_TOWER, False)
        (tower,) = (tower for tower in self.model.family.towers if tower.part == name)
        network = read(tower.network, source / name, "text", False)
        if self.half:
            halve(network)
        return network


def _fill(network: nn.Module, found: nn.Module, folder: Path) -> None:
    """Gives ``network``, whose tensors are gone, those of ``found``."""
    # Those that were tied are not on the meta device.
    every = (m.named_parameters(remove_duplicate=False) for m in (network, found))
    mine, other = ({name: p.shape for name, p in parameters} for parameters in every)
    if mine != other:
        raise ConfigError(f"{folder} holds another network than when the run began")
    found.requires_grad_(False)
    for empty, full in zip(network.modules(), found.modules(), strict=True):
        empty._parameters, empty._buffers = full._parameters, full._buffers
