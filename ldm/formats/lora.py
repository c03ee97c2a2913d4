"""LoRA files: the low-rank updates of a pipeline's networks, in the two formats people use.

diffusers, a folder with ``pytorch_lora_weights.safetensors``:

    unet.MODULE.lora_A.weight   .lora_B.weight   .lora_magnitude_vector
    transformer.MODULE. ...   in place of a U-Net
    text_encoder.text_model.MODULE.lora_linear_layer.down.weight   .up.weight

with peft's config of each network as JSON in the header, key ``lora_adapter_metadata``; where it is
missing, alpha is the rank. kohya (A1111, ComfyUI, sd-scripts), one file:

    lora_unet_MODULE.lora_down.weight   .lora_up.weight   .alpha   .dora_scale
    lora_te_text_model_MODULE...

with every ``.`` of MODULE an ``_``; where alpha is missing it is the rank. What a second text
encoder and SDXL's U-Net are called in either is in ``ldm.formats.lora_names``. diffusers' oldest
files are of a U-Net alone and lack ``unet.``. All scale by alpha / r (Hu et al. 2021, eq. 3) and
put DoRA's magnitudes (Liu et al. 2024, eq. 5) on outputs, so nothing is lost from one to the other.
Only safetensors are read: pickled weights run code.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.formats import lora_mmdit, lora_names, lycoris, pickled, recognised
from ldm.formats.lora_names import NETWORKS, PARTS, TRANSFORMER, in_file, in_network
from ldm.models.lora import Update, Updates
from ldm.storage.tensors import write_tensors

Lora = Mapping[str, Updates]
"""Updates of ``unet`` or ``transformer``, ``text_encoder`` and ``text_encoder_2``, by the names
that modules have in these networks."""

Format = Literal["diffusers", "kohya"]

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Tensors in another format -> the same in diffusers'."""

FILE = recognised.LORA
_METADATA = "lora_adapter_metadata"
_LARGEST = 1e30  # an alpha
_BASE = "base"
_TOWER = "text_model."
_OURS = tuple(f"{part}." for part in PARTS)
_BARE = re.compile(r"(?:down_blocks|mid_block|up_blocks)\.")
# peft's patterns are regular expressions, and what is written are names. A name leaves matching no
# choice; alternations and repetitions, a few of which take for ever, are not read.
_NAME = re.compile(r"(?:[\w.^$-]|\\\.){1,500}")
_TOLD = re.compile(r"(ss_|modelspec\.)(?!hash).*")
_PATTERNS = 10_000  # of a network


def read(
    path: str | PathLike[str],
    file: str | None = None,
    unet: Mapping[str, Any] | None = None,
    convert: Convert | None = None,
    drawn: bool = False,
) -> Any:
    """The updates of a LoRA file in either format, a ``Lora``.

    Args:
        path: the file, or its folder.
        file: which one of the folder; by default ``FILE``, else its only safetensors.
        unet: config of the U-Net that it is for, which says what kohya's names of SDXL mean; by
            default they are those of SDXL's base or refiner.
        convert: what reads the formats of others for a transformer.
        drawn: whether they are drawn with and no more: then those of LoHa and LoKr are read too, as
            ``ldm.formats.lycoris`` has them.

    Raises:
        ValueError: there is no such file, or it holds something else; the message is one line.
    """
    chosen = _choose(Path(path), file)
    try:
        with safe_open(chosen, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = (opened.metadata() or {}).get(_METADATA)
        metadata = json.loads(header) if header else {}
        if not isinstance(metadata, dict):
            raise ValueError(f"{_METADATA} is no JSON object")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{chosen} cannot be read as safetensors: {line}") from None
    try:
        _check_numbers(tensors)
        return parse(tensors, metadata, unet, convert, drawn)
    except ValueError as error:
        raise ValueError(f"{chosen}: {error}") from None


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not (value.is_floating_point() or name.endswith("alpha")):
            raise ValueError(f"{name} holds {value.dtype}, which is no number that learns")
        if not value.float().isfinite().all():
            raise ValueError(f"{name} holds nan or inf")


def _choose(path: Path, file: str | None) -> Path:
    if path.is_file():
        chosen = path
    elif not path.is_dir():
        raise ValueError(f"{path}: there is no such file or folder")
    elif file is not None or (path / FILE).is_file():
        chosen = path / (file or FILE)
    else:
        every = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_lora_weights.bin"))
        if len(every) != 1:
            names = ", ".join(one.name for one in every) or "none"
            raise ValueError(f"{path} holds no {FILE}, and not one other safetensors ({names})")
        chosen = every[0]
    pickled.refuse(chosen, "LoRA")
    return chosen


def parse(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    unet: Mapping[str, Any] | None = None,
    convert: Convert | None = None,
    drawn: bool = False,
) -> Any:
    """The updates in the tensors of a file; ``metadata`` as in its header (diffusers only), and
    ``unet``, ``convert`` and ``drawn`` as for ``read``.

    Raises:
        ValueError: a tensor is not one of a LoRA for a U-Net or a transformer and CLIP text
            encoders.
    """
    if kind := lora_names.kind_of(tensors):
        if convert is not None:
            raise ValueError(f"this is {kind} of LyCORIS, which is read for a U-Net alone")
        if drawn or kind not in lycoris.KINDS:
            return lycoris.parse(tensors, unet)
        raise ValueError(f"this is {kind}, no LoRA: --lora and load_lora_weights alone read it")
    if lora_mmdit.is_one(tensors):
        layers, others = lora_mmdit.layers(tensors)
        text = parse(others, metadata) if others else {}
        return {TRANSFORMER: _updates(TRANSFORMER, layers), **text}
    if convert is not None and not all(key.startswith(_OURS) for key in tensors):
        tensors = convert(tensors)
    if tensors and all(key.startswith("lora_") for key in tensors):
        return _from_kohya(tensors, unet)
    return _from_diffusers(tensors, metadata or {})


def _updates(part: str, pieces: Mapping[str, dict[str, Any]]) -> dict[str, Update]:
    """``pieces`` holds by module: ``down``, ``up``, ``alpha`` and perhaps ``magnitude``."""
    found = {}
    for name, piece in pieces.items():
        if missing := [k for k in ("down", "up") if k not in piece]:
            raise ValueError(f"{part}.{name} lacks its {missing[0]} weight")
        try:
            found[name] = Update(**{"alpha": float(len(piece["down"])), **piece})
        except ValueError as error:
            raise ValueError(f"{part}.{name}: {error}") from None
    return found


# -- diffusers --


def _from_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Lora:
    lora: dict[str, Updates] = {}
    if tensors and all(_BARE.match(name) for name in tensors):
        tensors = {f"unet.{name}": value for name, value in tensors.items()}
    for part in PARTS:
        mine = {
            k.removeprefix(part + "."): v for k, v in tensors.items() if k.startswith(part + ".")
        }
        # Names of earlier versions of diffusers; those of today stay as they are.
        if part in NETWORKS:
            mine = convert_unet_state_dict_to_peft(mine)
        else:
            mine = convert_state_dict_to_peft(mine, StateDictType.DIFFUSERS_OLD)
            mine = {in_network(part, name): value for name, value in mine.items()}
        pieces: dict[str, dict[str, Any]] = {}
        for key, value in mine.items():
            match = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(\.weight)?", key)
            if match is None:
                raise ValueError(f"{part}.{key} is no tensor of a LoRA that is known here")
            kind = {"A": "down", "B": "up"}.get(match[2], "magnitude")
            pieces.setdefault(match[1], {})[kind] = value
        config = {k[len(part) + 1 :]: v for k, v in metadata.items() if k.startswith(part + ".")}
        if config:
            alpha = _alpha_of(config)
            for name, piece in pieces.items():
                piece["alpha"] = alpha(name, len(piece.get("down", ())))
        if pieces:
            lora[part] = _updates(part, pieces)
    known = tuple(f"{part}." for part in lora)
    if not lora or not all(key.startswith(known) for key in tensors):
        other = next((key for key in tensors if not known or not key.startswith(known)), "nothing")
        raise ValueError(f"this is no LoRA of a U-Net, a transformer or CLIP: it holds {other}")
    return lora


def _alpha_of(config: Mapping[str, Any]) -> Callable[[str, int], float]:
    """Alpha of a module, by its name and rank, as peft's ``config`` says."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _PATTERNS:
        raise ValueError(f"{_METADATA}: alpha_pattern must be an object of {_PATTERNS:,} at most")
    found = [(_pattern(key.removeprefix(_TOWER)), value) for key, value in patterns.items()]

    def alpha(name: str, rank: int) -> float:
        value = next((v for p, v in found if p.match(name)), config.get("lora_alpha", rank))
        if not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
            raise ValueError(f"{_METADATA}: alpha {str(value)[:40]!r} of {name} is no number")
        return value * rank**0.5 if config.get("use_rslora") else float(value)  # alpha / sqrt(r)

    return alpha


def _pattern(key: str) -> re.Pattern[str]:
    """As peft has it: a regular expression for the end of a name."""
    if not _NAME.fullmatch(key):
        raise ValueError(
            f"{_METADATA}: the pattern {key[:60]!r} is no name, and others may take for ever to"
            " match: write the names of modules"
        )
    return re.compile(rf"(.*\.)?({key})$")


def to_diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and ``lora_adapter_metadata`` of a file in diffusers' format.

    Raises:
        ValueError: some modules of a network have magnitudes and some have not; peft's config knows
            only all or none.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part, updates in lora.items():
        text = part not in NETWORKS
        # The text encoders' under the names of diffusers' own scripts: of peft's names diffusers
        # knows only attention (a LoRA on fc1 alone would not load), and of a magnitude without
        # ".weight" transformers finds no parameter and draws a new one.
        down, up = ("linear_layer.down", "linear_layer.up") if text else ("A", "B")
        for name, update in updates.items():
            stem = f"{part}.{in_file(part, name)}.lora_"
            tensors[f"{stem}{down}.weight"] = update.down
            tensors[f"{stem}{up}.weight"] = update.up
            if update.magnitude is not None:
                ending = "magnitude_vector" + (".weight" if text else "")
                tensors[stem + ending] = update.magnitude
        dora = [update.magnitude is not None for update in updates.values()]
        if any(dora) and not all(dora):
            raise ValueError(f"{part} has DoRA in {sum(dora)} of {len(dora)} modules: not in all")
        ranks = {name: update.rank for name, update in updates.items()}
        alphas = {name: update.alpha for name, update in updates.items()}
        rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
            "target_modules": list(updates),
            "use_dora": any(dora),
        }
        metadata |= {f"{part}.{key}": value for key, value in config.items()}
    return tensors, metadata


# -- kohya --


def _from_kohya(tensors: Mapping[str, Tensor], unet: Mapping[str, Any] | None) -> Lora:
    pieces: dict[str, dict[str, dict[str, Any]]] = {}
    kinds = lora_mmdit.KINDS
    modules_of = lora_names.from_kohya((key.partition(".")[0] for key in tensors), unet)
    for key, value in tensors.items():
        stem, _, kind = key.partition(".")
        if stem not in modules_of or kind not in kinds:
            raise ValueError(
                f"{key} is of no LoRA for a U-Net and text encoders of Stable Diffusion 1, 2 or XL"
            )
        part, name = modules_of[stem]
        if (kind == "alpha" and value.numel() != 1) or (kind != "alpha" and value.ndim == 0):
            raise ValueError(f"{key} has the shape {tuple(value.shape)}, which no {kind} has")
        piece = pieces.setdefault(part, {}).setdefault(name, {})
        if kinds[kind] in piece:
            raise ValueError(f"{key}: {part}.{name} is there under another name as well")
        piece[kinds[kind]] = float(value) if kind == "alpha" else value
    for part, modules in pieces.items():
        for name, piece in modules.items():
            if "magnitude" in piece and "up" in piece:
                m, up = piece["magnitude"], piece["up"]
                if len(m) != len(up):
                    raise ValueError(
                        f"{part}.{name}: DoRA along inputs (dora_scale is {tuple(m.shape)} for"
                        f" {len(up)} outputs), and peft knows outputs alone"
                    )
                piece["magnitude"] = m.reshape(-1) if up.ndim == 2 else m.reshape(1, -1, 1, 1)
    return {part: _updates(part, modules) for part, modules in pieces.items()}


def to_kohya(
    lora: Lora, unet: Mapping[str, Any] | None = None, family: str | None = None
) -> dict[str, Tensor]:
    """Tensors of a file in kohya's format, with the true alpha of every module.

    Stock diffusers reads these right except for DoRA, whose ``dora_scale`` it leaves out with a
    warning, and for alphas that differ within a network: it takes the most frequent one. Of SDXL's
    refiner it takes ``input_blocks_10`` for ``input_blocks_1`` and fails if there are both.

    Args:
        lora: the updates.
        unet: config of the U-Net that they are for. Without it they are of SDXL, base or refiner,
            if there are some of a second text encoder, or of layers that only SDXL has.
        family: of a transformer, which no name of a layer tells: ``sd3``.

    Raises:
        ValueError: a module has no name in kohya's files, or not one that is its own.
    """
    tensors = dict[str, Tensor]()
    called = lora_names.to_kohya(lora, unet, family)
    every = {called[p, n]: u for p, us in lora.items() if p != TRANSFORMER for n, u in us.items()}
    for stem, update in (every | lora_mmdit.stems(lora.get(TRANSFORMER, {}))).items():
        tensors[f"{stem}.lora_down.weight"] = update.down
        tensors[f"{stem}.lora_up.weight"] = update.up
        exact = torch.tensor(update.alpha, dtype=torch.float64)
        # Everybody writes float32; an alpha of 0.1 would not be the same number.
        tensors[f"{stem}.alpha"] = exact.float() if exact.float() == exact else exact
        if update.magnitude is not None:
            column = update.magnitude.reshape(-1, *(1,) * (update.down.ndim - 1))
            tensors[f"{stem}.dora_scale"] = column
    return tensors


# -- files --


def header(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """What a file says beside its tensors, peft's config of each network for one."""
    if not metadata:
        return {"format": "pt"}
    text = json.dumps(metadata, indent=1, sort_keys=True, default=sorted)  # peft has sets
    return {"format": "pt", _METADATA: text}


def told(path: str | PathLike[str]) -> dict[str, str]:
    """What the header of a LoRA says of its training: ``ss_*`` and ``modelspec.*``, without the
    hash, which is another in another format.

    Raises:
        ValueError: as ``read``.
    """
    every = recognised.metadata(_choose(Path(path), None))
    return {key: text for key, text in every.items() if _TOLD.fullmatch(key)}


def write(
    lora: Lora,
    path: str | PathLike[str],
    to: Format = "diffusers",
    base: Mapping[str, Any] | None = None,
    unet: Mapping[str, Any] | None = None,
    told: Mapping[str, str] | None = None,
    family: str | None = None,
) -> Path:
    """Writes a LoRA and returns its file.

    Args:
        lora: what to write, in the dtype that it has.
        path: the file if it ends in ``.safetensors``, else a folder for ``FILE``.
        to: the format.
        base: fingerprints (and settings) of the networks that it was trained on, for the header.
        unet: config of the U-Net that it is for, as ``to_kohya`` takes it.
        told: what the header says of its training (``told``).
        family: as ``to_kohya`` takes it.

    Raises:
        ValueError: the format cannot express it (``to_diffusers``, ``to_kohya``).
    """
    path = Path(path)
    kohya = to == "kohya"
    tensors, metadata = (to_kohya(lora, unet, family), None) if kohya else to_diffusers(lora)
    known = header(metadata) | ({_BASE: json.dumps(dict(base), sort_keys=True)} if base else {})
    file = path if path.suffix == ".safetensors" else path / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, file, {**known, **(told or {})})
    return file
