"""Networks made ready to learn: adapters and new words put in, and what learns picked out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from ldm.config.learning import PARTS, part_of
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.model import Parts
from ldm.families.networks import described, initialised, on_meta
from ldm.models import lora, textual_inversion


def adapt(networks: Parts, config: TrainConfig, *, meta: bool = False) -> None:
    """Puts in what a run adds to ``networks``, each part's from its own seed.

    Raises:
        ConfigError: there is no place for it, or nothing would learn.
    """
    if config.lora is not None:
        _adapters(networks, config, meta)
    word = config.textual_inversion
    if word is not None and networks.tokenizer is not None:  # there is none on the meta device
        with described("textual_inversion"):
            textual_inversion.add_word(
                networks.tokenizer,
                networks.text_encoder,
                word.token,
                word.initializer,
                word.vectors,
            )
    if word is None:
        trained(networks, config)


def _adapters(networks: Parts, config: TrainConfig, meta: bool) -> None:
    settings = config.lora
    assert settings is not None
    for part, key in (("unet", "targets"), ("text_encoder", "text_targets")):
        if part not in config.learns:
            continue

        def make(part: str = part, key: str = key) -> None:
            alpha = float(settings.rank) if settings.alpha is None else settings.alpha
            lora.attach(
                getattr(networks, part),
                getattr(settings, key),
                rank=settings.rank,
                alpha=alpha,
                dora=settings.dora,
            )

        with described(f"lora.{key}"):
            if meta:
                on_meta(make)
            else:
                with initialised(config.seed, f"lora {part}"):
                    make()


def trained(networks: Parts, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The parameters that learn, as ``unet.NAME`` and ``text_encoder.NAME``.

    Raises:
        ConfigError: a pattern of ``train`` fits no parameter.
    """
    found: dict[str, nn.Parameter] = {}
    for part in config.learns:
        network: nn.Module = getattr(networks, part)
        if config.textual_inversion is not None:
            mine = textual_inversion.rows(networks.text_encoder)
        elif config.lora is not None:
            mine = lora.weights(network)
        else:
            mine = dict(network.named_parameters())
            mine.pop("time_proj.weight", None)  # random Fourier features are drawn, not learnt
        named = {f"{part}.{name}": parameter for name, parameter in mine.items()}
        if config.textual_inversion is None:
            entries = [entry for entry in config.train if part_of(entry) == part]
            chosen = {name for entry in entries for name in _fitting(entry, named)}
            named = {name: parameter for name, parameter in named.items() if name in chosen}
        found |= named
    return found


def learn(networks: Parts, config: TrainConfig) -> None:
    """Lets gradients flow into what learns, and there alone, checkpointed if ``config`` says so."""
    for network in networks.all().values():
        network.requires_grad_(False)
    for parameter in trained(networks, config).values():
        parameter.requires_grad_(True)
    if networks.vae is not None:
        networks.vae.eval()
    if config.gradient_checkpointing:
        networks.unet.enable_gradient_checkpointing()
        if "text_encoder" in config.learns:
            # transformers calls it by the second name, and later by the first.
            for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
                if enable := getattr(networks.text_encoder, name, None):
                    enable({"use_reentrant": False})
                    break


def _fitting(entry: str, named: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that an entry of ``train`` means."""
    pattern = f"{entry}.*" if entry in PARTS else entry
    found = [name for name in named if fnmatchcase(name, pattern)]
    if found:
        return found
    pieces = {piece for name in named for piece in name.split(".") if not piece.isdecimal()}
    written = [piece for piece in re.split(r"[^\w]+", entry) if not piece.isdecimal()]
    unknown = [p for p in written if p and not any(p in piece for piece in pieces | set(PARTS))]
    near = {p: match for p in unknown for match in difflib.get_close_matches(p, pieces, 1)}
    hint = f"names look like {next(iter(named))} (a pattern spans dots and fits whole names)"
    if near:
        hint = ", ".join(f"did you mean {match!r} for {p!r}" for p, match in near.items()) + "?"
    raise ConfigError(
        f"train: {entry!r} fits none of the {len(named)} parameters of the {part_of(entry)}; {hint}"
    )
