"""Model and objective of a run: networks from folders or from random init, and what they fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from diffusers import AutoencoderKL
from torch import nn

from ldm.config.loader import plain
from ldm.config.schema import TrainConfig, VaeShape
from ldm.data.cached import CachedData
from ldm.errors import ConfigError
from ldm.families import Family, reads
from ldm.families.adapt import adapt, trained
from ldm.families.model import Model, given
from ldm.families.networks import described, digest, in_model, initialised, on_meta, read
from ldm.families.noise import process_and_objective, saved
from ldm.families.picture_tower import PROCESSOR, make_picture_tower
from ldm.families.teacher import student, teacher_of
from ldm.families.text import make_tower, read_tokenizer, text_key
from ldm.families.unclip import NORMALISER
from ldm.families.vae import latent_side, make_vae, read_vae
from ldm.models import lora, quantised
from ldm.models.embedding import PICTURE_TOWER, PictureTower
from ldm.models.half_storage import halve
from ldm.models.quantised import Bits
from ldm.models.tokenizer import settings_of
from ldm.sampling import sampler
from ldm.sampling.defaults import stated_by


def build(
    config: TrainConfig,
    captions: Sequence[str],
    *,
    meta: bool = False,
    held: CachedData | None = None,
) -> Model:
    """The model that ``config`` describes or names.

    Args:
        config: the run.
        captions: what a tokenizer is trained on where the config describes one.
        meta: shapes only, on the meta device: no memory, and folders are read for configs alone.
        held: a cached set that all networks but one are taken from, as shapes only.

    Raises:
        ConfigError: a part is described nowhere, cannot be read, or does not fit another.
    """
    reads.refuse(config)
    family = reads.family(config)
    if config.model and config.network is None:
        in_model(config.model, family.network, family.network)  # before its scheduler is read
    process, objective = process_and_objective(config)
    networks, tokenizers = frozen_parts(config, captions, meta=meta, held=held)
    classes = reads.classes(config)
    model = Model(
        family, networks, tokenizers, process, objective.target, objective.learned_variance, classes
    )
    model.zeros, model.measures = reads.zeros(config, family), family.measures(config)
    with described("text" if classes is None else "condition"):
        _ = model.conditioner  # whether tokenizers and text encoders belong together
    latent_side(model.codec, config.images)  # whether it is whole
    with described("aside"):
        model.aside = family.aside(config, model)
    _refuse_drawing(config, model)
    network = _network(config, model, meta)
    towers = {tower.part: networks[tower.part] for tower in family.present(networks)}
    networks = model.networks = {family.network: network, **towers, **networks}
    if not meta:
        frozen = held.made_with["origin"] if held else frozen_origin(family, networks, tokenizers)
        model.origin = _origin(config, {**frozen, family.network: digest(network)})
    family.state_side(network, latent_side(model.codec, config.images))
    model.stored = held and held.folder
    if config.distil is not None:
        check = partial(_same_parts, {} if meta else frozen)
        model.teacher = teacher_of(config, model, check, meta=meta)
    with described("model"):
        model.stated = stated_by(config.model) if config.model and config.network is None else {}
    if config.distil is not None:
        student(config.distil, model)
    if not _runs(model.stated.get("sampler"), model):  # the run has another process
        del model.stated["sampler"]
    model.sampling = model.stated.copy()
    for drawing in (config.score, config.validation):  # the latter, where both say something
        model.sampling |= given(drawing) if drawing else {}
    for key in ("validation", "score"):
        drawing = getattr(config, key)
        # A validation without prompts, captions or suites draws nothing.
        asked = (getattr(drawing, what, True) for what in ("prompts", "captions", "suites"))
        if drawing is not None and any(asked):
            with described(key):
                how = model.drawn_with(drawing)
                sampler(how.sampler, model.scheduler_config()).evaluations(how.num_inference_steps)
    if classes is not None and config.validation:
        with described("validation.prompts"):
            model.conditioner.tokenize(config.validation.prompts)
            if not classes and any(config.validation.prompts):
                raise ValueError("this model is unconditional: it reads no prompt but ''")
    adapt(model, config, meta=meta)
    if config.frozen != "float32":
        _halve(model, config)
    if config.weights == "bfloat16":
        _halve_learning(model, config)
    return model


def _refuse_drawing(config: TrainConfig, model: Model) -> None:
    """``ConfigError`` for what a run would draw from a text alone, where that is not enough."""
    asked = config.validation
    if model.family.embeds and asked and asked.captions:
        raise ConfigError("validation.captions: a prior draws no pictures: leave it out")
    if model.aside is None and not model.family.embeds:
        return
    told = "this model is also told something of the picture itself, which a text does not say"
    told = f"{told}: leave it out, and use validation.captions"
    if model.family.embeds:
        told = "a prior draws embeddings, and no pictures: leave it out"
    for key, wrong in (
        ("score", config.score),
        ("validation.prompts", asked and asked.prompts),
        ("validation.suites", asked and asked.suites),
    ):
        if wrong:
            raise ConfigError(f"{key}: {told}")


def _halve(model: Model, config: TrainConfig) -> None:
    """Lets what does not learn be held in bfloat16; ``ConfigError`` where that cannot be."""
    if config.adds and config.precision != "bfloat16":
        raise ConfigError(
            f"frozen: {config.frozen}: in precision {config.precision} every weight would be turned"
            " back for the gradient: leave it out, or set precision to bfloat16"
        )
    if config.frozen in get_args(Bits):
        _quantise(model, config)
    whole = {"vae", PICTURE_TOWER, NORMALISER, *(() if config.lora else config.learns)}
    whole |= set() if config.adds else {model.family.network}
    for name, network in model.networks.items():
        if name not in whole:
            halve(network)


def _quantise(model: Model, config: TrainConfig) -> None:
    """Lets the network that predicts be held in few bits; ``ConfigError`` where that cannot be."""
    told = f"frozen: {config.frozen}: "
    if config.lora is None:
        raise ConfigError(
            f"{told}only what lies below a LoRA is held so: give lora, or leave it out"
        )
    if lora.normed(model.networks[model.family.network]):
        raise ConfigError(f"{told}DoRA takes the norm of whole weights: leave out lora.dora")
    if not quantised.installed():
        raise ConfigError(
            f"{told}it needs {quantised.PACKAGE}, which is not installed: pip install"
            f" {quantised.PACKAGE}, or set frozen to bfloat16"
        )
    if not quantised.quantise(model.networks[model.family.network], config.frozen):
        raise ConfigError(f"{told}no linear layer is of a multiple of 64: set frozen to int8")


def _halve_learning(model: Model, config: TrainConfig) -> None:
    """Lets what learns be held in bfloat16; ``ConfigError`` where that cannot be."""
    if config.precision != "bfloat16":
        raise ConfigError(
            f"weights: bfloat16: in precision {config.precision} every weight would be turned back"
            " for the gradient: leave it out, or set precision to bfloat16"
        )
    learning = {id(p) for p in trained(model, config).values()}
    for part in reads.learns(config, model):
        halve(model.networks[part], learning)


def _runs(name: str | None, model: Model) -> bool:
    """Whether the named sampler, if there is one, runs the process of ``model``."""
    try:
        if name is not None:
            sampler(name, model.scheduler_config())
    except ValueError:
        return False
    return True


def frozen_parts(
    config: TrainConfig,
    captions: Sequence[str],
    *,
    meta: bool = False,
    held: CachedData | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All networks but the one that predicts, and tokenizers, as far as there are any; see
    ``build``.
    """
    family, networks, tokenizers = reads.family(config), dict[str, Any](), dict[str, Any]()
    if held is not None:
        networks["vae"] = read_vae(str(held.folder / "vae"), meta=True)
        for tower in (t for t in family.towers if (held.folder / t.part).is_dir()):
            networks[tower.part] = read(tower.network, held.folder / tower.part, "data", True)
            tokenizers[tower.words] = read_tokenizer(held.folder / tower.words, tower.reader)
        return networks, tokenizers
    if not (family.embeds or reads.pixels(config)):
        networks["vae"] = _vae(config, meta)
    for tower, entry in reads.texts(config, family):
        made = make_tower(config, tower, entry, captions, meta=meta)
        tokenizers[tower.words], networks[tower.part] = made
    if family.picture_tower:
        eye = make_picture_tower(config, meta=meta)
        networks[PICTURE_TOWER], tokenizers[PROCESSOR] = eye.network, eye.processor
    return networks | family.further(config, networks, meta=meta), tokenizers


def _vae(config: TrainConfig, meta: bool) -> AutoencoderKL:
    if isinstance(config.vae, VaeShape):
        return make_vae(config.vae, config.seed, meta=meta)
    return read_vae(str(config.vae or in_model(config.model, "vae", "vae")), meta=meta)


def _network(config: TrainConfig, model: Model, meta: bool) -> Any:
    """The network that predicts, read or from random init."""
    family, key = model.family, model.family.network
    if config.network is None:
        folder, cls = in_model(config.model, key, key), family.reads
        kind = reads.settings(folder).get("_class_name", cls.__name__)
        if kind != cls.__name__:
            told = "reads text" if model.classes is not None else "reads no text"
            raise ConfigError(
                f"condition: the U-Net of {config.model} {told} ({kind}): leave condition out, or"
                " describe another unet"
            )
        network = read(cls, folder, key, meta)
        with described("model"), initialised(config.seed, key):
            if meta:
                on_meta(lambda: family.grow(config, model, network))
            else:
                family.grow(config, model, network)
        family.check(config, model, network)
        return network
    with described(key):
        if meta:
            return on_meta(lambda: family.make(config, model))
        with initialised(config.seed, key):
            return family.make(config, model)


def frozen_origin(
    family: Family, networks: dict[str, Any], tokenizers: dict[str, Any]
) -> dict[str, str]:
    """Fingerprints of ``vae``, of ``text``, every text encoder with its tokenizer, and of the
    picture tower.
    """
    vae = networks.get("vae")
    found = {} if vae is None else {"vae": digest(vae)}
    for tower in family.present(networks):
        words = tokenizers.get(tower.words)
        beside = settings_of(words) if words else ""
        found[text_key(tower.part)] = digest(networks[tower.part], beside)
    if PICTURE_TOWER in networks:
        eye = PictureTower(networks[PICTURE_TOWER], tokenizers[PROCESSOR])
        found[PICTURE_TOWER] = digest(eye.network, repr(eye.printed))
    return found


def _same_parts(frozen: dict[str, str], there: TrainConfig) -> None:
    """``ConfigError`` where the parts ``there`` have other fingerprints than ``frozen``."""
    theirs = frozen_origin(reads.family(there), *frozen_parts(there, ()))
    for name in sorted(theirs.keys() | frozen.keys()):
        if theirs.get(name) != frozen.get(name):
            what = "autoencoder" if name == "vae" else "text encoder or tokenizer"
            raise ConfigError(f"it has another {what} than this run ({name})")


def _origin(config: TrainConfig, prints: dict[str, str]) -> dict[str, Any]:
    """Those ``prints`` whose parts are read from folders, under ``model`` or the key that names
    the other folder.
    """
    found: dict[str, Any] = {}
    for name, fingerprint in prints.items():
        key, _, number = (name, "", "") if hasattr(config, name) else name.partition("_")
        given = getattr(config, key)
        if isinstance(given, tuple):
            given = given[int(number or 1) - 1]
        if given is None or isinstance(given, str):
            found[f"model.{name}" if given is None else f"{name}.folder"] = fingerprint
    if config.model and config.network is None:
        process, target, learned = saved(config.model)
        noise = {"kind": process.kind, **plain(process)}
        found["model.scheduler"] = noise | {"target": plain(target), "learned_variance": learned}
    if config.model and config.condition is None and (classes := reads.classes(config)):
        found["model.classes"] = list(classes)
    return found


def is_model(config: TrainConfig, model: Model) -> bool:
    """Whether the folder ``config.model`` is what a run starts from: every part of it, its noise
    and its target. A LoRA then needs no other base.
    """
    described = config.vae or config.text or config.network or config.image_encoder
    if config.model is None or described or config.text_layers:
        return False
    return saved(config.model) == (model.process, model.target, model.learned_variance)


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
