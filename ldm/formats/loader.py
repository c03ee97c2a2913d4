"""LoRA files, and new words of textual inversion, into the networks of a pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import (
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

from ldm.formats import lora, textual_inversion
from ldm.formats.lora_names import FIRST, NETWORKS, SECOND, TRANSFORMER, UNET, as_in
from ldm.models import lycoris
from ldm.models.lora import check_fit
from ldm.models.tokenizer import folded
from ldm.models.wrapped import bare
from ldm.storage.tensors import write_tensors

_NO_TEXT = "this model reads no text"
_BOTH = " and ".join(textual_inversion.TOWERS)
_ARE = ("is one", "are two")


def _inside(name: str) -> Callable[..., Any]:
    """Diffusers' method ``name`` on the networks that ``torch.compile`` and peft have wrapped:
    diffusers passes those over without a word. ``components`` are by default all that there are.
    """

    def method(self: LoraLoader, *arguments: Any, **named: Any) -> Any:
        view, parts = self._seen_through()
        if name in ("fuse_lora", "unfuse_lora") and not arguments:
            named.setdefault("components", parts)
        found = getattr(LoraBaseMixin, name)(view, *arguments, **named)
        self._merged_adapters = view._merged_adapters
        return found

    method.__name__ = name
    method.__doc__ = getattr(StableDiffusionLoraLoaderMixin, name).__doc__
    return method


class LoraLoader(
    StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin, SD3LoraLoaderMixin
):
    """diffusers' loader on this library's reader of files.

    ``unload_lora_weights``, ``fuse_lora``, ``unfuse_lora``, ``set_adapters`` and the rest are
    diffusers' own, and see through ``torch.compile``.
    """

    family: Any

    @property
    def _lora_loadable_modules(self) -> list[str]:
        """The parts that may be adapted."""
        return self.family.adaptable

    def _seen_through(self) -> tuple[Any, list[str]]:
        """The pipeline over the networks inside of wrappers, and names of those that may be
        adapted.
        """
        view, parts = copy.copy(self), self._lora_loadable_modules
        for part in parts:
            vars(view)[part] = bare(getattr(self, part))
        return view, parts

    unload_lora_weights = _inside("unload_lora_weights")
    fuse_lora = _inside("fuse_lora")
    unfuse_lora = _inside("unfuse_lora")
    set_adapters = _inside("set_adapters")
    disable_lora = _inside("disable_lora")
    enable_lora = _inside("enable_lora")
    delete_adapters = _inside("delete_adapters")
    get_active_adapters = _inside("get_active_adapters")
    get_list_adapters = _inside("get_list_adapters")
    set_lora_device = _inside("set_lora_device")

    def _load_from_hub(
        self, source: Any, adapter_name: str | None, hotswap: bool, **asked: Any
    ) -> None:
        view, parts = self._seen_through()
        behind = StableDiffusionLoraLoaderMixin if SECOND in parts else LoraLoader
        super(behind, view).load_lora_weights(source, adapter_name, hotswap, **asked)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> None:
        """Puts a LoRA into U-Net or transformer, and text encoders.

        Files of this machine are read by ``ldm.formats.lora``: diffusers' and kohya's format, with
        the rank and the alpha of every module, and with DoRA, which diffusers leaves out of kohya's
        files; LoHa and LoKr of LyCORIS as well, for a U-Net and its text encoders. Of a
        transformer, what is not in diffusers' format is read for Stable Diffusion 3
        (``ldm.formats.lora_mmdit``), else as far as its stock pipeline does (kohya's and ComfyUI's
        files of Flux.1). What is not on this machine is a repository of the Hub and is left to
        diffusers.

        Args:
            pretrained_model_name_or_path_or_dict: a file, its folder, or its tensors (then alpha is
                the rank, unless they are kohya's).
            adapter_name: by default the first of ``default_0``, ``default_1``, ... that is free.
            hotswap: replace the adapter of that name in place (not in text encoders).
            weight_name: which file of the folder.
            subfolder: where in the folder.
            kwargs: of diffusers.

        Raises:
            ValueError: the file is no LoRA, or one for other networks; the message is one line.
        """
        source = pretrained_model_name_or_path_or_dict
        unet = bare(self.unet)
        config = None if unet is None else unet.config
        stock = None if unet is not None else getattr(diffusers, self.family.stock[0])
        convert = None if stock is None else partial(converted, stock)
        if isinstance(source, Mapping):
            read, told = (
                lora.parse(source, unet=config, convert=convert, drawn=True),
                "these weights",
            )
        elif Path(source).exists():
            folder = Path(source) / subfolder
            read, told = lora.read(folder, weight_name, config, convert, drawn=True), str(source)
        else:
            where = {"weight_name": weight_name, "subfolder": subfolder}
            if stock is None:
                self._load_from_hub(source, adapter_name, hotswap, **where, **kwargs)
                return
            found = stock.lora_state_dict(source, return_lora_metadata=True, **where, **kwargs)
            read, told = lora.parse(*found), str(source)
        networks = {part: bare(getattr(self, part)) for part in read}
        read = as_in(networks, read)
        for part, updates in read.items():
            self._check_place(part, networks[part], told)
            try:
                (lycoris.check_fit if _factors(read) else check_fit)(updates, networks[part])
            except ValueError as error:
                raise ValueError(f"{told} is not for this {part}: {error}") from None
        taken = {name for names in self.get_list_adapters().values() for name in names}
        if adapter_name in taken and not hotswap:
            raise ValueError(f"there is an adapter {adapter_name!r} already: choose another name")
        numbered = (f"default_{number}" for number in range(len(taken) + 1))
        name = adapter_name or next(name for name in numbered if name not in taken)
        if _factors(read):
            if hotswap:
                raise ValueError(f"{told}: LoHa and LoKr take no hotswap: unload the other first")
            for part, updates in read.items():
                lycoris.attach(networks[part], updates, name)
            return
        tensors, metadata = lora.to_diffusers(read)
        into = {
            UNET: self.load_lora_into_unet,
            TRANSFORMER: lambda told, _, network, **how: self.load_lora_into_transformer(
                told, network, **how
            ),
        }
        text = self.load_lora_into_text_encoder
        for part in read:  # diffusers would warn of every network that a LoRA leaves alone
            load = into.get(part, partial(text, prefix=part))
            load(
                tensors,
                None,
                networks[part],
                adapter_name=name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=kwargs.get("low_cpu_mem_usage", True),
                hotswap=hotswap,
            )

    def _check_place(self, part: str, network: Any, told: str) -> None:
        """``ValueError`` where there is no ``part``, or one that can have no adapters."""
        if network is None:
            reads = any(getattr(self, tower) is not None for tower in (FIRST, SECOND))
            why = "this model has none" if reads or part in NETWORKS else _NO_TEXT
            raise ValueError(f"{told}: there are updates of a {part}, and {why}")
        if part not in self._lora_loadable_modules:
            raise ValueError(
                f"{told}: there are updates of a {part}, and this model's, a"
                f" {type(network).__name__}, can have none"
            )

    @classmethod
    def save_lora_weights(
        cls,
        *arguments: Any,
        text_encoder_2_lora_layers: Any = None,
        text_encoder_2_lora_adapter_metadata: Any = None,
        **named: Any,
    ) -> None:
        """As in diffusers, for a U-Net or a transformer, and for one text encoder or two."""
        if "transformer_lora_layers" in named:
            super(StableDiffusionXLLoraLoaderMixin, cls).save_lora_weights(
                *arguments,
                text_encoder_2_lora_layers=text_encoder_2_lora_layers,
                text_encoder_2_lora_adapter_metadata=text_encoder_2_lora_adapter_metadata,
                **named,
            )
            return
        one = inspect.signature(super().save_lora_weights).bind(*arguments, **named)
        super(StableDiffusionLoraLoaderMixin, cls).save_lora_weights(
            **one.arguments,
            text_encoder_2_lora_layers=text_encoder_2_lora_layers,
            text_encoder_2_lora_adapter_metadata=text_encoder_2_lora_adapter_metadata,
        )

    @staticmethod
    def write_lora_layers(*arguments: Any, **named: Any) -> None:
        """As in diffusers, of whose ``save_lora_weights`` it is a part, by the library's own writer
        of tensors.
        """
        call = inspect.signature(StableDiffusionLoraLoaderMixin.write_lora_layers)
        given = call.bind(*arguments, **named)
        given.apply_defaults()
        asked = given.arguments
        if asked["save_function"] is None and asked["safe_serialization"]:
            header = lora.header(asked["lora_adapter_metadata"])
            asked["save_function"] = partial(write_tensors, metadata=header)
        StableDiffusionLoraLoaderMixin.write_lora_layers(*given.args, **given.kwargs)


def _factors(read: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether these are updates of LyCORIS."""
    return any(
        isinstance(u, lycoris.Factors) for updates in read.values() for u in updates.values()
    )


def converted(stock: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``tensors`` of a transformer's LoRA in diffusers' format, by the pipeline ``stock`` of it.

    Raises:
        ValueError: it cannot read them all; the message is one line.
    """
    if any("dora_scale" in name for name in tensors):
        raise ValueError("DoRA in kohya's format is not read for a transformer: diffusers has none")
    try:
        return stock.lora_state_dict(dict(tensors))
    except Exception as error:  # whatever it stumbles over in names that it does not know
        line = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{stock.__name__} cannot read this LoRA: {line}") from error


class EmbeddingLoader(TextualInversionLoaderMixin):
    """diffusers' loader of textual inversion on this library's reader of files."""

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **kwargs: Any,
    ) -> None:
        """Teaches tokenizers and text encoders a new word, or several.

        Files of this machine are read by ``ldm.formats.textual_inversion``, from safetensors only;
        what is not on this machine is a repository of the Hub and is left to diffusers. Prompts may
        write a word in any case, and one of several vectors as its first token.

        Args:
            pretrained_model_name_or_path: a file, its folder, its tensor by its word, or a list of
                these. Where there are two text encoders, a file for both, or its tensors
                ``clip_l`` and ``clip_g``.
            token: the word, in place of the file's; of several each is one vector of a file.
            tokenizer: by default the pipeline's, of every text encoder.
            text_encoder: the one that learns; by default the pipeline's, both where there are two.
            kwargs: of diffusers; ``weight_name`` is the file in the folder.

        Raises:
            ValueError: the file is none of textual inversion, is for other text encoders, or its
                word is taken, be it in another case; the message is one line.
        """
        sources = pretrained_model_name_or_path
        sources = sources if isinstance(sources, list) else [sources]
        towers = self._towers(tokenizer, text_encoder)
        one_word = len(sources) > 1 or not isinstance(token, list) or len(token) < 2
        read = [_said(source, towers, one_word, kwargs.get("weight_name")) for source in sources]
        words = token if isinstance(token, list) else [token] * len(read)
        each = read if one_word else read * len(words)
        for number, (known, _) in enumerate(towers):
            taken = {folded(word): word for word in known.get_added_vocab()}
            for said, word in zip(each, words, strict=False):  # diffusers says what does not match
                source = said[number]
                if isinstance(source, Mapping) and len(source) == 1:
                    word = word or next(iter(source))
                if word is None:
                    continue
                if (other := taken.setdefault(folded(word), word)) != word:
                    raise ValueError(
                        f"{word!r} and {other!r} differ in case alone, which the tokenizer does not"
                        " see: load one under another name, token=..."
                    )
                if number and {word, f"{word}_1"} & known.get_vocab().keys():
                    # Diffusers would say so of the first as well, but here it has learnt the word.
                    raise ValueError(
                        f"the second tokenizer has {word!r} already: load it under another name,"
                        " token=..."
                    )
        # Room for the new rows is drawn from the global generator before they are copied there.
        with torch.random.fork_rng(devices=[]):
            for number, (known, encoder) in enumerate(towers):
                mine = [said[number] for said in read]
                super().load_textual_inversion(mine, token, known, encoder, **kwargs)

    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Forgets words that were loaded, by default all, of all text encoders."""
        towers = self._towers(tokenizer, text_encoder)
        if tokens:
            asked = {tokens} if isinstance(tokens, str) else {*tokens}
            having = [pair for pair in towers if asked & pair[0].get_added_vocab().keys()]
            towers = having or towers[:1]  # diffusers says that there is none
        for known, encoder in towers:
            super().unload_textual_inversion(tokens, known, encoder)

    def _towers(self, tokenizer: Any, text_encoder: Any) -> list[tuple[Any, Any]]:
        """Tokenizers and networks that are meant: those that are named, else all of the pipeline's.

        Raises:
            ValueError: there is none.
        """
        own = [
            (self.tokenizer, bare(self.text_encoder)),
            (self.tokenizer_2, bare(self.text_encoder_2)),
        ]
        there = [pair for pair in own if pair[1] is not None]
        named = bare(text_encoder)
        if tokenizer is None and named is None:
            if not there:
                raise ValueError(_NO_TEXT)
            return there
        meant = (pair for pair in there if pair[0] is tokenizer or pair[1] is named)
        words, reader = next(meant, own[0])
        reader = reader if named is None else named
        if reader is None:
            raise ValueError(_NO_TEXT)
        return [(words if tokenizer is None else tokenizer, reader)]


def _said(
    source: Any, towers: list[tuple[Any, Any]], one_word: bool, weight_name: str | None
) -> list[Any]:
    """What diffusers loads for each of ``towers``: tensors by their word, or without one; and, of
    one tower, what only diffusers knows.
    """
    if isinstance(source, (str, PathLike)) and Path(source).exists():
        word, rows = textual_inversion.read_towers(source, weight_name)
        told = str(source)
    elif isinstance(source, Mapping) and set(source) == set(textual_inversion.TOWERS):
        word, rows = None, tuple(source[name] for name in textual_inversion.TOWERS)
        told = "these embeddings"
    elif len(towers) == 1:
        return [source]
    else:
        told = source if isinstance(source, (str, PathLike)) else "this embedding"
        raise ValueError(
            f"{told} is no file for two text encoders: give one of {_BOTH}, or say which"
            " text_encoder and tokenizer this is for"
        )
    if len(rows) != len(towers):
        kinds = ("one text encoder", f"two text encoders ({_BOTH})")
        raise ValueError(f"{told}: for {kinds[len(rows) - 1]}, and here {_ARE[len(towers) - 1]}")
    widths = [encoder.get_input_embeddings().weight.shape[-1] for _, encoder in towers]
    found = [each.shape[-1] for each in rows]
    if found != widths:
        number = next(n for n, width in enumerate(widths) if found[n] != width)
        which = "this text encoder" if len(towers) == 1 else f"text encoder {number + 1} of these"
        raise ValueError(
            f"{told} is not for {which}: its vectors are of width {found[number]}, the encoder's of"
            f" {widths[number]}"
        )
    return [{word: each} if word is not None and one_word else each for each in rows]
