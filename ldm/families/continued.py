"""The LoRA of a file that a run goes on from, in the networks that it was learnt for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import diffusers
from torch import nn

from ldm.config.learning import Lora
from ldm.errors import ConfigError
from ldm.families.model import Model
from ldm.families.networks import described, initialised, on_meta
from ldm.formats import lora as files
from ldm.formats.loader import converted
from ldm.formats.lora_names import UNET, as_in
from ldm.models import lora
from ldm.models.lora import Update, Updates

KEY = "lora.file"


def put_in(
    model: Model, settings: Lora, parts: Sequence[str], *, seed: int, meta: bool = False
) -> None:
    """Puts the updates of ``settings.file`` into ``model``, and their fingerprint into its origin.

    Args:
        model: it has no adapters yet.
        settings: what it says of rank, alpha, DoRA and modules must be so in the file.
        parts: folders of the networks that learn.
        seed: of the run.
        meta: shapes only.

    Raises:
        ConfigError: there is no such LoRA, it does not fit the model, or the config says otherwise.
    """
    with described(KEY):
        found = _read(model, str(settings.file))
        for part in parts:
            if part not in found:
                raise ValueError(
                    f"{settings.file} has no updates of {part}, which train names, but of"
                    f" {' and '.join(found)}"
                )
            _check(settings, part, found[part], model)
        for part in found:
            if part not in parts:
                raise ValueError(f"{settings.file} has updates of {part} as well: add it to train")
        for part, updates in found.items():
            put = partial(lora.attach_updates, model.networks[part], updates)
            if meta:
                on_meta(put)
            else:
                with initialised(seed, f"lora {part}"):  # what is drawn is written over
                    put()
    if not meta:
        model.origin[KEY] = lora.fingerprint(found)


def _read(model: Model, file: str) -> Mapping[str, Updates]:
    unet = model.networks.get(UNET)
    convert = None
    if unet is None:
        convert = partial(converted, getattr(diffusers, model.family.stock[0]))
    read = files.read(file, unet=unet and unet.config, convert=convert)
    found = as_in(model.networks, read)
    for part, updates in found.items():
        network = model.networks.get(part)
        if network is None:
            raise ValueError(f"{file} has updates of a {part}, and this model has none")
        try:
            lora.check_fit(updates, network)
        except ValueError as error:
            raise ValueError(f"{file} is not for this {part}: {error}") from None
    return found


def _check(settings: Lora, part: str, updates: Updates, model: Model) -> None:
    """``ConfigError`` where ``settings`` say other than ``updates``, those of ``part``."""

    def same(key: str, asked: object, there: set[object]) -> None:
        if asked is not None and there != {asked}:
            told = " and ".join(sorted(map(str, there)))
            raise ConfigError(
                f"lora.{key} is {asked}, and in {settings.file} it is {told} in {part}: leave it"
                " out, and what the file says goes on"
            )

    every: Sequence[Update] = list(updates.values())
    same("rank", settings.rank, {update.rank for update in every})
    same("alpha", settings.alpha, {update.alpha for update in every})
    same("dora", settings.dora, {update.magnitude is not None for update in every})
    predicts = part == model.family.network
    key = "targets" if predicts else "text_targets"
    asked: Sequence[str] | None = getattr(settings, key)
    if asked is not None and updates.keys() != (meant := _meant(model.networks[part], asked)):
        other = sorted(updates.keys() ^ meant)[0]
        raise ConfigError(
            f"lora.{key} means other modules of {part} than {settings.file} has, {other} for one:"
            " leave it out, and those of the file learn on"
        )


def _meant(network: nn.Module, targets: Sequence[str]) -> set[str]:
    """Names of modules that end in ``targets``."""
    names = (name for name, _ in network.named_modules())
    return {name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)}
