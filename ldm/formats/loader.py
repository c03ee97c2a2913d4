"""LoRA files, and new words of textual inversion, into the networks of a pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from torch import Tensor

from ldm.formats import lora, textual_inversion
from ldm.models.lora import check_fit
from ldm.models.tokenizer import folded
from ldm.models.wrapped import bare
from ldm.storage.tensors import write_tensors

_NO_TEXT = "this model reads no text"


def _inside(name: str) -> Callable[..., Any]:
    """Diffusers' method ``name``, on the networks that ``torch.compile`` and peft have wrapped:
    diffusers passes those over without a word.
    """

    def method(self: LoraLoader, *arguments: Any, **named: Any) -> Any:
        view = copy.copy(self)
        for part in self._lora_loadable_modules:
            vars(view)[part] = bare(getattr(self, part))
        found = getattr(super(LoraLoader, view), name)(*arguments, **named)
        self._merged_adapters = view._merged_adapters
        return found

    method.__name__ = name
    method.__doc__ = getattr(StableDiffusionLoraLoaderMixin, name).__doc__
    return method


class LoraLoader(StableDiffusionLoraLoaderMixin):
    """diffusers' loader on this library's reader of files.

    ``unload_lora_weights``, ``fuse_lora``, ``unfuse_lora``, ``set_adapters`` and the rest are
    diffusers' own, and see through ``torch.compile``.
    """

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
    _load_from_hub = _inside("load_lora_weights")

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
        """Puts a LoRA into U-Net and text encoder.

        Files of this machine are read by ``ldm.formats.lora``: diffusers' and kohya's format, with
        the rank and the alpha of every module, and with DoRA, which diffusers leaves out of kohya's
        files. What is not on this machine is a repository of the Hub and is left to diffusers.

        Args:
            pretrained_model_name_or_path_or_dict: a file, its folder, or its tensors (then alpha is
                the rank, unless they are kohya's).
            adapter_name: by default the first of ``default_0``, ``default_1``, ... that is free.
            hotswap: replace the adapter of that name in place (U-Net only).
            weight_name: which file of the folder.
            subfolder: where in the folder.
            kwargs: of diffusers.

        Raises:
            ValueError: the file is no LoRA, or one for other networks; the message is one line.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            read, told = lora.parse(source), "these weights"
        elif Path(source).exists():
            read, told = lora.read(Path(source) / subfolder, weight_name), str(source)
        else:
            self._load_from_hub(
                source,
                adapter_name,
                hotswap,
                weight_name=weight_name,
                subfolder=subfolder,
                **kwargs,
            )
            return
        for part, updates in read.items():
            network = bare(getattr(self, part))
            if network is None:
                raise ValueError(f"{told}: there are updates of a {part}, and {_NO_TEXT}")
            try:
                check_fit(updates, network)
            except ValueError as error:
                raise ValueError(f"{told} is not for this {part}: {error}") from None
        taken = {name for names in self.get_list_adapters().values() for name in names}
        if adapter_name in taken and not hotswap:
            raise ValueError(f"there is an adapter {adapter_name!r} already: choose another name")
        numbered = (f"default_{number}" for number in range(len(taken) + 1))
        name = adapter_name or next(name for name in numbered if name not in taken)
        tensors, metadata = lora.to_diffusers(read)
        load = {"unet": self.load_lora_into_unet, "text_encoder": self.load_lora_into_text_encoder}
        for part in read:  # diffusers would warn of every network that a LoRA leaves alone
            load[part](
                tensors,
                None,
                bare(getattr(self, part)),
                adapter_name=name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=kwargs.get("low_cpu_mem_usage", True),
                hotswap=hotswap,
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
        """Teaches tokenizer and text encoder a new word, or several.

        Files of this machine are read by ``ldm.formats.textual_inversion``, from safetensors only;
        what is not on this machine is a repository of the Hub and is left to diffusers. Prompts may
        write a word in any case, and one of several vectors as its first token.

        Args:
            pretrained_model_name_or_path: a file, its folder, its tensor by its word, or a list of
                these.
            token: the word, in place of the file's.
            tokenizer: by default the pipeline's.
            text_encoder: by default the pipeline's.
            kwargs: of diffusers; ``weight_name`` is the file in the folder.

        Raises:
            ValueError: the file is none of textual inversion, is for another text encoder, or its
                word is taken, be it in another case; the message is one line.
        """
        sources = pretrained_model_name_or_path
        encoder = self._reader(text_encoder)
        width = encoder.get_input_embeddings().weight.shape[-1]
        loaded = []
        for source in sources if isinstance(sources, list) else [sources]:
            if isinstance(source, (str, PathLike)) and Path(source).exists():
                name, rows = textual_inversion.read(source, kwargs.get("weight_name"))
                if rows.shape[-1] != width:
                    raise ValueError(
                        f"{source} is not for this text encoder: its vectors are of width"
                        f" {rows.shape[-1]}, the encoder's of {width}"
                    )
                source = {name: rows}
            loaded.append(source)
        words = token if isinstance(token, list) else [token] * len(loaded)
        taken = {folded(word): word for word in (tokenizer or self.tokenizer).get_added_vocab()}
        for source, word in zip(loaded, words, strict=False):  # diffusers says what does not match
            if isinstance(source, Mapping) and len(source) == 1:
                word = word or next(iter(source))
                if (other := taken.setdefault(folded(word), word)) != word:
                    raise ValueError(
                        f"{word!r} and {other!r} differ in case alone, which the tokenizer does not"
                        " see: load one under another name, token=..."
                    )
        # Room for the new rows is drawn from the global generator before they are copied there.
        with torch.random.fork_rng(devices=[]):
            super().load_textual_inversion(loaded, token, tokenizer, encoder, **kwargs)

    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Forgets words that were loaded, by default all."""
        super().unload_textual_inversion(tokens, tokenizer, self._reader(text_encoder))

    def _reader(self, text_encoder: Any) -> Any:
        """The network whose words they are."""
        found = bare(self.text_encoder if text_encoder is None else text_encoder)
        if found is None:
            raise ValueError(_NO_TEXT)
        return found
