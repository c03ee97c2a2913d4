"""Whether a pipeline folder can be opened, told before anything is imported or allocated.

A folder may be damaged, or made to do harm: a config of a million layers, or of 2^30 channels,
would be built before its weights are found not to fit. So a config may not speak of more than its
weights hold, and what is in no weights has limits of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.formats.recognised import INDEX, header

_SAFE, _PICKLED = ".safetensors", ".bin"
_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # of files of weights
_PREDICTS = ("transformer", "unet", "prior")
_NETWORKS = (*_PREDICTS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
             "prior_text_encoder", "image_normalizer")  # fmt: skip
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "prior_tokenizer")
_SIDE_NETWORKS = ("controlnet", "adapter")
_SCHEDULERS = ("scheduler", "prior_scheduler", "image_noising_scheduler")
_OTHERS = (*_SCHEDULERS, *_TOKENIZERS, "safety_checker", "feature_extractor", "image_encoder")
_UNKNOWN = 2**18  # the widest and the deepest network of pickled weights, which are not looked into
_TOWER = "text_model."
_CONFIG = {"feature_extractor": "preprocessor_config.json",
           **dict.fromkeys(_SCHEDULERS, "scheduler_config.json"),
           **dict.fromkeys(_TOKENIZERS, "tokenizer_config.json")}  # fmt: skip
_JSON = 200_000_000  # bytes; a tokenizer of 250,000 tokens has 17 million
_ANY = 2_048  # a number of a config that its weights need not have
_SIDE = 16_384  # latent cells
_TIMESTEPS = 1_000_000
# Older autoencoders call their attention so.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def may_be_of_the_hub(name: str) -> bool:
    """Whether a name that is no path of this machine can be OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not re.search(
        r"\.(safetensors|ckpt|pt|pth|bin)$", name
    )


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else; the message names the file.
    """
    if not file.is_file():
        raise OSError(f"{file} is missing: copy or download the folder again")
    if file.stat().st_size > _JSON:
        raise ValueError(f"{file} cannot be read: it has more than {_JSON:,} bytes")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:100]
        raise ValueError(f"{file} cannot be read: it is not valid JSON ({line})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} cannot be read: it is no JSON object")
    return found


def check(folder: Path, given: Mapping[str, Any], pickled: bool) -> list[str]:
    """The networks in a pipeline folder.

    Args:
        folder: it has an index.
        given: what comes from elsewhere, by the names of parts; and ``variant``.
        pickled: whether pickled weights may be read.

    Raises:
        OSError: a file is missing.
        ValueError: one is damaged or asks for too much; the message is one line.
    """
    index = json_object(folder / INDEX)
    absent = (None, [None, None])
    predicts = next((name for name in _PREDICTS if index.get(name) not in absent), "unet")
    for name in (predicts, "scheduler"):
        if index.get(name) in absent and given.get(name) is None:
            raise ValueError(f"{folder / INDEX} lists no {name}: it is no text-to-image pipeline")
    networks = []
    for name in (*_NETWORKS, *_SIDE_NETWORKS, *_OTHERS):
        if name in given or index.get(name) in (None, [None, None]):
            continue
        if not is_part(index[name]):
            raise ValueError(f"{folder / INDEX}: {name} must be a library and a class of it")
        where = folder / name
        if not where.is_dir():
            raise OSError(f"{where} is missing, which {INDEX} lists: copy or download it again")
        config = json_object(where / _CONFIG.get(name, "config.json"))
        if name in _SCHEDULERS:
            try:
                check_scheduler(config)
            except ValueError as error:
                raise ValueError(f"{where / _CONFIG[name]}: {error}") from None
        elif name in _TOKENIZERS:
            _check_tokenizer(where)
        elif name in (*_NETWORKS, *_SIDE_NETWORKS):
            check_network(where, config, given.get("variant"), pickled)
            networks.append(name)
    return networks


def is_part(entry: Any) -> bool:
    """Whether an entry of an index is a part that there is: its library and its class."""
    return (
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    )


def check_scheduler(config: Mapping[str, Any]) -> None:
    """``ValueError`` for tables of no sensible length."""
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= _TIMESTEPS:
        shown = repr(steps)[:40]
        raise ValueError(f"num_train_timesteps must lie in 1..{_TIMESTEPS:,}, not {shown}")
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) <= _TIMESTEPS):
        raise ValueError(f"trained_betas must be a list of {_TIMESTEPS:,} at most")


def _check_tokenizer(folder: Path) -> None:
    """Transformers makes a tokenizer of nothing, in which every text is unknown."""
    there = [name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()]
    if not there:
        raise OSError(f"{folder} holds neither tokenizer.json nor vocab.json: copy it again")
    for name in there:
        json_object(folder / name)


def check_network(
    folder: Path, config: Mapping[str, Any], variant: str | None = None, pickled: bool = True
) -> None:
    """Whether the weights of a network are whole, and its config is not larger than they are.

    Raises:
        OSError: there are none, or pickled ones alone where those may not be read.
        ValueError: they are damaged, or the config asks for more; the message is one line.
    """
    tensors = _tensors(folder, variant)
    if tensors is None:
        _others(folder, variant, pickled)
    check_size(folder / "config.json", config, tensors or {})


def check_size(
    file: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether a config is not larger than its weights.

    Args:
        file: of the config, as errors name it.
        config: what it says.
        tensors: shapes of the weights by their names; {}: nobody has looked into them.

    Raises:
        ValueError: it asks for more; the message is one line.
    """
    widest = max((side for shape in tensors.values() for side in shape), default=_UNKNOWN)
    deepest = len(tensors) or _UNKNOWN
    layers, blocks = 1, 1
    for key, value in _entries(config):
        if isinstance(value, list):
            blocks = max(blocks, len(value))
        elif "layers" in key:
            layers = max(layers, value)
        elif "token_id" not in key and value > (
            _SIDE if key == "sample_size" else max(widest, _ANY)
        ):
            raise ValueError(
                f"{file}: {key} {_told(value)} is more than the weights beside it have: they do not"
                " belong together"
            )
    if layers * blocks > deepest:
        raise ValueError(
            f"{file}: {_told(layers)} layers in {blocks:,} blocks are more than the {deepest:,}"
            " tensors of its weights: they do not belong together"
        )


def _told(number: int) -> str:
    text = f"{number:,}"
    return text if len(text) < 40 else f"of {len(text):,} characters"


def _others(folder: Path, variant: str | None, pickled: bool) -> None:
    """``OSError`` unless there are pickled weights, and they may be read."""
    if any(folder.glob(f"*{_PICKLED}")):
        if pickled:
            return
        raise OSError(
            f"{folder} holds pickled weights alone, which may run code when they are read: if you"
            " trust where they come from, open the pipeline with from_pretrained(...,"
            " use_safetensors=False), and save it"
        )
    shaped = re.compile(rf"(?:{'|'.join(_NAMES)})\.([\w-]+?)(?:-\d+-of-\d+)?{_SAFE}")
    for file in sorted(folder.glob(f"*{_SAFE}")):
        if match := shaped.fullmatch(file.name):
            instead = f" in place of {variant!r}" if variant else ""
            raise OSError(
                f"{folder} holds the weights of another variant: pass variant={match[1]!r}{instead}"
            )
    raise OSError(f"{folder} holds no weights: copy or download it again")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whole numbers and lists in ``config``, at any depth, by the key that holds them."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            yield key, value
            left += [(key, entry) for entry in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _tensors(folder: Path, variant: str | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all tensors in the safetensors of ``folder`` by their names, or None if there are
    none.
    """
    files = weights(folder, variant)
    if files is None:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= {key: tuple(entry["shape"]) for key, entry in header(file).items()}
    return found


def weights(folder: Path, variant: str | None = None) -> list[Path] | None:
    """The safetensors of a network's folder, of which there are several where an index lists them;
    None: there are none.

    Raises:
        OSError: one of them is missing.
        ValueError: the index is damaged.
    """
    for name in _NAMES:
        for infix in (f".{variant}", "") if variant else ("",):
            file = folder / f"{name}{infix}{_SAFE}"
            index = folder / f"{name}{_SAFE}.index{infix}.json"
            if file.is_file():
                files = [file]
            elif index.is_file():
                listed = json_object(index).get("weight_map")
                if not isinstance(listed, dict) or not all(map(_is_a_name, listed.values())):
                    raise ValueError(f"{index} lists no files of weights")
                files = [folder / shard for shard in sorted({*listed.values()})]
            else:
                continue
            for each in files:
                if not each.is_file():
                    raise OSError(f"{each} is missing: copy or download the folder again")
            return files
    return None


def _is_a_name(shard: Any) -> bool:
    return isinstance(shard, str) and shard == Path(shard).name


def check_all_there(folder: Path, network: Any, variant: str | None) -> None:
    """Whether every tensor of ``network`` was in its files: else it would be a random one.

    Raises:
        ValueError: one was not; the message names it.
    """
    tensors = _tensors(folder, variant)
    if network is None or tensors is None:
        return
    names = {_today(name) for name in tensors}
    for name, _ in network.named_parameters():
        if name.removeprefix(_TOWER) not in names:
            raise ValueError(
                f"the weights in {folder} lack {name}, which its config asks for: copy or download"
                " it again"
            )


def _today(name: str) -> str:
    name = name.removeprefix(_TOWER)
    stem, _, ending = name.rpartition(".")
    block, _, last = stem.rpartition(".")
    return f"{block}.{_ATTENTION[last]}.{ending}" if last in _ATTENTION else name
