"""sd-scripts' dataset config (TOML or JSON) -> one ``Subset`` for every folder that it names.

    [general]  <  [[datasets]]  <  [[datasets.subsets]]        the more special value counts

Options about captions and about how often a picture counts are taken over. Those that belong to
other parts of a run (size, buckets, flips, batch) are not: one log line names the keys that mean
the same. An unknown key is an error, as it is in every config. The options and the places where
they may stand are those that sd-scripts documents (docs/config_README-en.md).
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.captions import Grammar
from ldm.data.folder import natural
from ldm.data.metadata import read_text
from ldm.data.names import of_windows
from ldm.errors import DataError

log = logging.getLogger(__name__)


class Subset(NamedTuple):
    """One folder of pictures, or one metadata file, and what is said about it.

    Args:
        dataset: number of its ``[[datasets]]``.
        image_dir: None where the metadata file has whole paths.
        metadata_file: None where captions lie beside the pictures.
        extensions: of caption files.
        class_tokens: caption of a picture that has no caption file.
        repeats: how often a picture counts.
        is_reg: regularisation pictures (DreamBooth's prior preservation).
        grammar: of its captions.
    """

    dataset: int
    image_dir: Path | None
    metadata_file: Path | None
    extensions: tuple[str, ...]
    class_tokens: str | None
    repeats: int
    is_reg: bool
    grammar: Grammar | None


GENERAL, DATASETS, SUBSETS = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_ALL = (GENERAL, DATASETS, SUBSETS)

# Options that mean the same here: type, default, where they may stand.
_OURS: dict[str, tuple[type, Any, tuple[str, ...]]] = {
    "image_dir": (str, None, (SUBSETS,)),
    "metadata_file": (str, None, (SUBSETS,)),
    "class_tokens": (str, None, (SUBSETS,)),
    "is_reg": (bool, False, (SUBSETS,)),
    "caption_extension": (str, ".caption", _ALL),
    "num_repeats": (int, 1, _ALL),
    "shuffle_caption": (bool, False, _ALL),
    "caption_separator": (str, ",", _ALL),
    "secondary_separator": (str, "", _ALL),
    "keep_tokens": (int, 0, _ALL),
    "keep_tokens_separator": (str, "", _ALL),
    "caption_tag_dropout_rate": (float, 0.0, _ALL),
    "caption_prefix": (str, "", _ALL),
    "caption_suffix": (str, "", _ALL),
    "enable_wildcard": (bool, False, _ALL),
}  # fmt: skip
_GRAMMAR = {
    "shuffle": "shuffle_caption",
    "separator": "caption_separator",
    "secondary_separator": "secondary_separator",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "tag_dropout": "caption_tag_dropout_rate",
    "prefix": "caption_prefix",
    "suffix": "caption_suffix",
    "wildcards": "enable_wildcard",
}
# Options that other keys of a run's config decide, or ("") none does.
_OTHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "batch_size": ("batch_size", _ALL[:2]),
    "resolution": ("images.size", _ALL[:2]),
    "enable_bucket": ("images.buckets", _ALL[:2]),
    "bucket_reso_steps": ("images.buckets.step", _ALL[:2]),
    "bucket_no_upscale": ("images.buckets.upscale", _ALL[:2]),
    "min_bucket_reso": ("images.buckets.max_aspect", _ALL[:2]),
    "max_bucket_reso": ("images.buckets.max_aspect", _ALL[:2]),
    "skip_image_resolution": ("", _ALL[:2]),
    "network_multiplier": ("", _ALL[:2]),
    "validation_split": ("data.held_out_fraction", _ALL),
    "validation_seed": ("", _ALL),
    "flip_aug": ("images.flip", _ALL),
    "random_crop": ("images.crop", _ALL),
    "caption_dropout_rate": ("text_dropout", _ALL),
    "caption_dropout_every_n_epochs": ("text_dropout", _ALL),
    "color_aug": ("", _ALL),
    "face_crop_aug_range": ("", _ALL),
    "resize_interpolation": ("", _ALL),
    "alpha_mask": ("", _ALL),
    "token_warmup_min": ("", _ALL),
    "token_warmup_step": ("", _ALL),
    "custom_attributes": ("", _ALL),
    "cache_info": ("", _ALL),
}
_PLACES = {
    **{name: places for name, (_, _, places) in _OURS.items()},
    **{name: places for name, (_, places) in _OTHERS.items()},
}
_TYPES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def read_config(file: Path) -> list[Subset]:
    """Every subset of the dataset config ``file``, in order.

    Relative paths are those of the working folder, as in sd-scripts, or else of the config's own.

    Raises:
        DataError: it is no such config, or has a key or a value that cannot be.
    """
    tree = _tree(file)
    for name in tree:
        if name not in ("general", "datasets"):
            raise DataError(f"{file}: {_unknown(name, GENERAL)}")
    general = _checked(file, tree.get("general", {}), "general", GENERAL)
    found: list[Subset] = []
    others: dict[str, list[Any]] = {}
    for number, dataset in enumerate(_list(file, tree, "datasets", "datasets")):
        here = f"datasets[{number}]"
        own = dataset if isinstance(dataset, Mapping) else {}
        listed = _list(file, own, "subsets", f"{here}.subsets")
        shared = _checked(file, {k: v for k, v in own.items() if k != "subsets"}, here, DATASETS)
        seen: set[Any] = set()
        for place, subset in enumerate(listed):
            where = f"{here}.subsets[{place}]"
            options = {**general, **shared, **_checked(file, subset, where, SUBSETS)}
            made = _subset(file, where, number, options)
            identity = made.metadata_file or made.image_dir
            if identity in seen:
                raise DataError(
                    f"{file}: {where}: {identity} stands twice in one dataset, of which sd-scripts"
                    " would ignore the second; remove one, or raise num_repeats"
                )
            seen.add(identity)
            found.append(made)
            for name in options.keys() & _OTHERS.keys():
                values = others.setdefault(name, [])
                if options[name] not in values:
                    values.append(options[name])
    _tell(file, others)
    return found


def subsets(
    path: str, grammar: Grammar | None, variants: int, reg_path: str | None
) -> list[Subset]:
    """Those that a dataset config, or a folder of ``SdScriptsData``, stands for.

    Raises:
        DataError: the config cannot be used, or no folder is named by repeats.
    """
    here = Path(path).expanduser()
    if not here.exists():
        raise DataError(f"{here}: this does not exist, check data.path")
    if here.is_dir():
        found = named_folders(here, grammar)
        if reg_path:
            found += named_folders(Path(reg_path).expanduser(), grammar, is_reg=True)
    elif reg_path:
        raise DataError(f"{here}: data.reg_path is for folders, set is_reg = true in the config")
    else:
        found = read_config(here)
        found = [subset._replace(grammar=grammar) for subset in found] if grammar else found
    if not variants:
        return found
    # Of a subset without a grammar there is nothing to vary.
    varied = (s.grammar and replace(s.grammar, variants=variants) for s in found)
    return [s._replace(grammar=grammar) for s, grammar in zip(found, varied, strict=True)]


def named_folders(root: Path, grammar: Grammar | None, is_reg: bool = False) -> list[Subset]:
    """The folders in ``root`` that are named like ``10_sks dog``: repeats and class tokens.

    Raises:
        DataError: there is none.
    """
    try:
        entries = sorted(root.iterdir(), key=lambda entry: natural(entry.name))
    except OSError as error:
        raise DataError(f"{root}: the folder cannot be read ({error.strerror})") from None
    found, ignored = [], []
    for entry in entries:
        if not entry.is_dir() or entry.name.startswith((".", "__MACOSX")):
            continue
        name = re.fullmatch(r"([0-9]{1,6})_(.*)", entry.name)
        if name is None:
            ignored.append(entry.name)
        elif not int(name[1]):
            raise DataError(f"{entry}: its name says 0 repeats, give at least 1 or move it away")
        else:
            tokens = " ".join(name[2].split()) or None
            found.append(
                Subset(0, entry, None, (".txt", ".caption"), tokens, int(name[1]), is_reg, grammar)
            )
    if not found:
        inner = next((name for name in ("img", "image", "images") if name in ignored), None)
        raise DataError(
            f"{root}: no folder in it is named like 10_sks dog (repeats, class tokens), "
            + (f"set data.path to {root / inner}" if inner else "name them so, or write a TOML")
        )
    if ignored:
        log.warning(
            "%s: folders that are not read, since their names do not begin with repeats: %s",
            root, ", ".join(ignored),
        )  # fmt: skip
    return found


def read_metadata(file: Path) -> dict[str, Any]:
    """The entries of sd-scripts' metadata JSON, by picture. Raises ``DataError`` in one line."""
    entries = _json(file, read_text(file))
    if not isinstance(entries, dict) or not entries:
        raise DataError(
            f"{file}: no entry in this metadata file, it must hold"
            ' {"picture": {"caption": ..., "tags": ...}, ...}'
        )
    return entries


def _tree(file: Path) -> dict[str, Any]:
    text = read_text(file)
    if file.suffix.lower() == ".json":
        tree = _json(file, text)
    else:
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            cure = ", write paths in 'single quotes'" if "\\" in str(error) else ""
            raise DataError(f"{file}: not valid TOML ({error}){cure}") from None
        except ValueError:
            raise DataError(f"{file}: not valid TOML (a number of too many digits)") from None
        except RecursionError:
            raise DataError(f"{file}: not valid TOML (nested too deep)") from None
    if not isinstance(tree, dict):
        raise DataError(f"{file}: a dataset config must hold [general] and [[datasets]]")
    return tree


def _json(file: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # the first of the two would be lost
            double = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{file}: key {double!r} stands twice, remove one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise DataError(f"{file}: not valid JSON (nested too deep)") from None


def _list(file: Path, tree: Mapping[str, Any], name: str, where: str) -> list[Any]:
    found = tree.get(name)
    if not isinstance(found, list) or not found:
        table = DATASETS if name == "datasets" else SUBSETS
        raise DataError(f"{file}: {where} is missing or no list, write it as {table}")
    return found


def _checked(file: Path, given: Any, where: str, place: str) -> dict[str, Any]:
    """The options of one table, each known, allowed there and of its type."""
    if not isinstance(given, Mapping):
        raise DataError(f"{file}: {where} must hold keys and values, write it as {place}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _PLACES:
            raise DataError(f"{file}: {where}: {_unknown(name, place)}")
        if place not in _PLACES[name]:
            allowed = " or ".join(_PLACES[name])
            raise DataError(f"{file}: {where}: {name} belongs into {allowed}, move it there")
        if value is None:  # JSON's way to leave something out
            continue
        if name in _OURS:
            kind = _OURS[name][0]
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise DataError(f"{file}: {where}.{name} = {_short(value)} is not {_TYPES[kind]}")
        found[name] = value
    return found


def _unknown(name: str, place: str) -> str:
    if name == "conditioning_data_dir":
        return "conditioning_data_dir: pictures that steer (ControlNet) are not read, remove it"
    near = difflib.get_close_matches(name, ["general", "datasets", "subsets", *_PLACES], 1)
    hint = f"did you mean {near[0]!r}?" if near else "remove it"
    if name == "subsets":
        hint = f"write it as {SUBSETS}"
    elif name in _PLACES:
        hint = f"put it below {GENERAL}" if place in _PLACES[name] else f"put it below {SUBSETS}"
    return f"unknown key {name!r}; {hint}"


def _subset(file: Path, where: str, dataset: int, options: Mapping[str, Any]) -> Subset:
    value = {name: options.get(name, default) for name, (_, default, _) in _OURS.items()}
    if value["num_repeats"] < 1:
        raise DataError(
            f"{file}: {where}.num_repeats = {value['num_repeats']} is less than 1,"
            " remove the subset if it is not wanted"
        )
    if not value["image_dir"] and not value["metadata_file"]:
        raise DataError(f"{file}: {where} has no image_dir, name the folder of its pictures")
    extension = value["caption_extension"].strip()
    if not re.fullmatch(r"\.?\w[\w.-]*", extension):
        raise DataError(
            f"{file}: {where}.caption_extension = {_short(extension)} is no file ending"
        )
    try:
        grammar = Grammar(**{ours: value[theirs] for ours, theirs in _GRAMMAR.items()})
    except ValueError as error:
        message = re.sub(r"\b(\w+)=", lambda m: f"{_GRAMMAR.get(m[1], m[1])} = ", str(error))
        raise DataError(f"{file}: {where}: {message}") from None
    folder, metadata = (
        _existing(file, where, name, value[name]) for name in ("image_dir", "metadata_file")
    )
    if folder is not None and not folder.is_dir():
        raise DataError(f"{file}: {where}.image_dir: {folder} is a file, name its folder")
    if metadata is not None and not metadata.is_file():
        raise DataError(f"{file}: {where}.metadata_file: {metadata} is no file")
    return Subset(
        dataset,
        folder,
        metadata,
        (f".{extension.removeprefix('.')}",),
        " ".join((value["class_tokens"] or "").split()) or None,
        value["num_repeats"],
        value["is_reg"],
        grammar,
    )


def _existing(file: Path, where: str, name: str, value: str | None) -> Path | None:
    if not value:
        return None
    path = Path(value).expanduser()
    for candidate in (path, file.parent / path):
        if candidate.exists():
            return candidate
    tried = "" if path.is_absolute() else f", neither here nor in {file.parent}"
    if of_windows(value):
        tried = ": a path of Windows, write where it is on this machine, with / between folders"
    raise DataError(f"{file}: {where}.{name} = {_short(value)} does not exist{tried}")


def _short(value: Any) -> str:
    """A value as one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _tell(file: Path, others: Mapping[str, Iterable[Any]]) -> None:
    """One log line about the options that nothing is done with here."""
    moved, lost = [], []
    for name, (ours, _) in _OTHERS.items():
        values = list(others.get(name, ()))
        shown = f"{name} = {' and '.join(map(_short, values))}"
        if values and ours:
            moved.append(f"{shown} as {ours}")
        elif any(values) and name != "cache_info":  # what is off is not missed, an index always is
            lost.append(shown)
    parts = []
    if moved:
        parts.append(f"left to this run's own config: {', '.join(moved)}")
    if lost:
        parts.append(f"without a counterpart here: {', '.join(lost)}")
    if parts:
        log.warning("%s: %s", file, "; ".join(parts))
