"""Networks made ready to learn: adapters and new words put in, and what learns picked out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.config.learning import CONTROLNET, PARTS, part_of
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families import continued, controlnet
from ldm.families.model import Model
from ldm.families.networks import described, initialised, on_meta
from ldm.families.reads import learns
from ldm.models import lora, textual_inversion


def adapt(model: Model, config: TrainConfig, *, meta: bool = False) -> None:
    """Puts in what a run adds to ``model``, each part's from its own seed.

    Raises:
        ConfigError: there is no place for it, or nothing would learn.
    """
    if config.lora is not None:
        _adapters(model, config, meta)
    if CONTROLNET in config.learns:
        controlnet.put_in(model, config, meta=meta)
    word = config.textual_inversion
    if word is not None:
        for tower in model.family.present(model.networks):
            if not tower.clip:
                raise ConfigError(
                    f"textual_inversion: {tower.part} is no CLIP, and files of new words hold those"
                    " of CLIPs alone: train a LoRA instead"
                )
            network = model.networks[tower.part]
            if meta:
                width = network.get_input_embeddings().embedding_dim
                rows = torch.empty(word.vectors, width, device="meta")
                textual_inversion.add_rows(network, rows)
                continue
            with described("textual_inversion"):
                textual_inversion.add_word(
                    model.tokenizers[tower.words],
                    network,
                    word.token,
                    word.initializer,
                    word.vectors,
                )
    if word is None:
        trained(model, config)


def _adapters(model: Model, config: TrainConfig, meta: bool) -> None:
    settings = config.lora
    assert settings is not None
    parts = learns(config, model)
    for part in parts:
        network = _network(model, part)
        if part not in model.family.adaptable:
            raise ConfigError(
                f"train: a {type(network).__name__}, {part}, can have no LoRA, which diffusers does"
                f" not read: only {' and '.join(model.family.adaptable)} can"
            )
    if settings.file is not None:
        continued.put_in(model, settings, parts, seed=config.seed, meta=meta)
        return
    rank, dora, text_targets = settings.rank, settings.dora, settings.text_targets
    assert rank is not None and dora is not None and text_targets is not None
    alpha = float(rank) if settings.alpha is None else settings.alpha
    for part in parts:
        network = model.networks[part]
        predicts = part == model.family.network
        key = "targets" if predicts else "text_targets"
        given = settings.targets or model.family.targets if predicts else text_targets

        def make(network: nn.Module = network, targets: Sequence[str] = given) -> None:
            lora.attach(network, targets, rank=rank, alpha=alpha, dora=dora)

        with described(f"lora.{key}"):
            if meta:
                on_meta(make)
            else:
                with initialised(config.seed, f"lora {part}"):
                    make()


def trained(model: Model, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The parameters that learn, as ``PART.NAME``.

    Raises:
        ConfigError: a pattern of ``train`` fits no parameter.
    """
    found: dict[str, nn.Parameter] = {}
    for part in learns(config, model):
        network = _network(model, part)
        if config.textual_inversion is not None:
            mine = textual_inversion.rows(network)
        elif config.lora is not None:
            mine = lora.weights(network)
        else:
            mine = dict(network.named_parameters())
            for name in model.family.unlearnt if part == model.family.network else ():
                mine.pop(name, None)
        unheard = _unheard(model, part)
        named = {
            f"{part}.{name}": value
            for name, value in mine.items()
            if not any(mark in f".{name}" for mark in unheard)
        }
        alias = ("unet",) if part == model.family.network else ()
        if config.textual_inversion is None:
            entries = [entry for entry in config.train if part_of(entry) in (part, *alias)]
            chosen = {name for entry in entries for name in _fitting(entry, part, named)}
            named = {name: parameter for name, parameter in named.items() if name in chosen}
        found |= named
    return found


def learn(model: Model, config: TrainConfig) -> None:
    """Lets gradients flow into what learns, and there alone, checkpointed if ``config`` says so."""
    for network in model.networks.values():
        network.requires_grad_(False)
    for parameter in trained(model, config).values():
        parameter.requires_grad_(True)
    frozen = {tower.part for tower in model.family.present(model.networks)}
    for part in frozen - set(learns(config, model)):
        model.networks[part].eval()  # a T5 has dropout
    if model.codec.network is not None:
        model.codec.network.eval()
    if config.gradient_checkpointing:
        for network in (model.network, model.networks.get(CONTROLNET)):
            if network is not None:
                network.enable_gradient_checkpointing(_one_in(int(config.gradient_checkpointing)))
        for part in set(learns(config, model)) - {model.family.network, CONTROLNET}:
            # transformers calls it by the second name, and later by the first.
            for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
                if enable := getattr(model.networks[part], name, None):
                    enable({"use_reentrant": False})
                    break


def _one_in(every: int) -> Callable[..., Any]:
    """What a network of diffusers calls its blocks by: the first of ``every`` so many computes its
    activations again in the backward pass, the others keep them.
    """
    order: dict[int, int] = {}

    def call(block: Callable[..., Any], *inputs: Any) -> Any:
        if order.setdefault(id(block), len(order)) % every:
            return block(*inputs)
        return checkpoint(block.__call__, *inputs, use_reentrant=False)

    return call


def _unheard(model: Model, part: str) -> tuple[str, ...]:
    """What stands in the names of parameters of a text tower behind the layer that is read, where
    nothing pools what they say: no gradient reaches them.
    """
    for tower in model.family.towers:
        if tower.part == part and tower.layer is not None and tower.pooled is None:
            layers = range(model.networks[part].config.num_hidden_layers)
            last = layers[tower.layer + 1 :] if tower.layer < -1 else ()
            return (".final_layer_norm.", *(f".encoder.layers.{number}." for number in last))
    return ()


def _network(model: Model, part: str) -> nn.Module:
    """The part that ``train`` names."""
    learnable = [model.family.network, *(tower.part for tower in model.family.towers)]
    if part not in model.networks:
        raise ConfigError(
            f"train: a model of the family {model.family.name} has no {part}, but"
            f" {' and '.join(name for name in learnable if name in model.networks)}"
        )
    return model.networks[part]


def _fitting(entry: str, part: str, named: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters of ``part`` that an entry of ``train`` means."""
    pattern = f"{part}.*" if entry in PARTS else part + entry.removeprefix(part_of(entry))
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
