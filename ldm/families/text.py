"""The text encoder of a run and its tokenizer: from a pipeline's folder, from open_clip, or new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ldm.config.schema import T5Shape, Text, TextShape, TrainConfig
from ldm.errors import ConfigError
from ldm.families.model import Tower
from ldm.families.networks import described, in_model, initialised, on_meta, read
from ldm.families.reads import settings
from ldm.formats import open_clip
from ldm.models.clip import Clip, is_beside
from ldm.models.embedding import PICTURE_TOWER
from ldm.models.tokenizer import TokenizerShape, train_tokenizer
from ldm.models.unigram import train_unigram
from ldm.storage import checkpoint


def make_tower(
    config: TrainConfig, tower: Tower, entry: Text, captions: Sequence[str], *, meta: bool = False
) -> tuple[PreTrainedTokenizerFast | TokenizerShape, Any]:
    """Tokenizer (on the meta device its shape) and network of a text tower.

    Args:
        config: the run.
        tower: of its family.
        entry: what ``config.text`` says of it; None: it is that of ``config.model``.
        captions: what a tokenizer is trained on where the config describes one and the run has
            none yet.
        meta: shapes only.

    Raises:
        ConfigError: they are described nowhere or cannot be read.
    """
    if isinstance(entry, (TextShape, T5Shape)):
        if isinstance(entry, T5Shape) != issubclass(tower.network, T5EncoderModel):
            kind = "t5" if isinstance(entry, TextShape) else "clip"
            raise ConfigError(
                f"text: {tower.part} of the family {config.family} is another kind of text encoder:"
                f" describe it with kind: {kind}"
            )
        return _described(config, tower, entry, captions, meta)
    if entry is not None and open_clip.is_one(entry):
        with described("text"):
            make = open_clip.Tower(entry)
            network = on_meta(make.shape) if meta else make.text_encoder()
            tokenizer = _shape(tower, network) if meta else make.tokenizer()
    else:
        root = Path(entry) if entry else in_model(config.model, "text", "")
        network = _with_projection(root, tower, meta)
        if network is None:
            network = read(tower.network, root / tower.part, "text", meta)
        tokenizer = _shape(tower, network)
        if not meta:
            tokenizer = read_tokenizer(root / tower.words, tower.reader)
    if config.text_layers is not None:
        _cut(network, config.text_layers)
    return tokenizer, network


def _with_projection(root: Path, tower: Tower, meta: bool) -> Any:
    """The text tower of the CLIP in ``root`` whose projection lies beside its picture tower; None:
    the tower has its own, or none is asked for.
    """
    folder, vision = root / tower.part, root / PICTURE_TOWER
    bare = settings(folder).get("architectures") == [CLIPTextModel.__name__]
    if not (bare and issubclass(tower.network, CLIPTextModelWithProjection) and is_beside(root)):
        return None
    with described("text"):
        if meta:
            shape = CLIPTextConfig.from_pretrained(folder)
            shape.projection_dim = settings(vision)["projection_dim"]
            return on_meta(lambda: tower.network(shape))
        return Clip.load(folder, vision).text_with_projection()


def _shape(tower: Tower, network: Any) -> TokenizerShape:
    return TokenizerShape.of(network, tower.tokens(network))


def _cut(text_encoder: CLIPTextModel, layers: int) -> None:
    if isinstance(text_encoder, T5EncoderModel):
        raise ConfigError("text_layers: it is CLIP text encoders that can be cut: leave it out")
    there = text_encoder.config.num_hidden_layers
    if layers > there:
        raise ConfigError(f"text_layers {layers}: the text encoder has {there}")
    text_encoder.encoder.layers = nn.ModuleList(text_encoder.encoder.layers[:layers])
    text_encoder.config.num_hidden_layers = layers


def _described(
    config: TrainConfig,
    tower: Tower,
    shape: TextShape | T5Shape,
    captions: Sequence[str],
    meta: bool,
) -> tuple[PreTrainedTokenizerFast | TokenizerShape, Any]:
    with described("text"):
        text_config = _t5(shape) if isinstance(shape, T5Shape) else _clip(shape, tower)
    if meta:
        network = on_meta(lambda: tower.network(text_config))
        return _shape(tower, network), network
    tokenizer = (
        read_tokenizer(Path(shape.tokenizer), tower.reader)
        if shape.tokenizer
        else own_tokenizer(
            config.run, tower.words, captions, shape.vocab_size, shape.max_length, tower.reader
        )
    )
    # A tokenizer trained on few captions has fewer tokens than asked for.
    text_config.vocab_size = len(tokenizer)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, token, getattr(tokenizer, token))
    with initialised(config.seed, tower.part):
        return tokenizer, tower.network(text_config)


def _t5(shape: T5Shape) -> T5Config:
    return T5Config(
        vocab_size=shape.vocab_size,
        d_model=shape.hidden_size,
        d_ff=shape.intermediate_size,
        d_kv=shape.head_dim,
        num_layers=shape.layers,
        num_heads=shape.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,  # as T5 v1.1 was trained
        n_positions=shape.max_length,  # which limits nothing, its positions being relative
    )


def _clip(shape: TextShape, tower: Tower) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.max_length,
        hidden_act=shape.activation,
        # The tokenizer's own take their place; transformers' defaults are of one with 49,408.
        bos_token_id=shape.vocab_size - 2,
        eos_token_id=shape.vocab_size - 1,
        **(
            {"projection_dim": shape.projection or shape.hidden_size}
            if tower.pooled == "text_embeds"
            else {}
        ),
    )


def text_key(part: str) -> str:
    """What a text encoder in the folder ``part`` is called where it is no folder: ``text``,
    ``text_2``, ...
    """
    return f"text{part.removeprefix('text_encoder')}"


def own_tokenizer(
    run: str,
    words: str,
    captions: Sequence[str],
    vocab_size: int,
    max_length: int,
    reader: type = CLIPTokenizer,
) -> PreTrainedTokenizerFast:
    """The tokenizer that the run in the folder ``run`` has already below the name ``words``, else a
    new one.

    A run that goes on with other captions keeps the words that its weights know.
    """
    checkpoints = checkpoint.folders(Path(run) / "checkpoints")
    # A LoRA's checkpoints hold no tokenizer, and its base does.
    for folder in [*reversed(checkpoints), Path(run) / "base"] if checkpoints else []:
        kept = folder / words
        if kept.is_dir() and checkpoint.problem(folder, f"{words}/") is None:
            return read_tokenizer(kept, reader)
    train = train_unigram if reader is T5Tokenizer else train_tokenizer
    return train(captions, vocab_size, max_length)


def read_tokenizer(folder: Path, reader: type = CLIPTokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder``; ``ConfigError`` if there is none."""
    there = [name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()]
    if not there or not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"text: {folder} is no folder of a tokenizer")
    try:
        return reader.from_pretrained(folder)
    except Exception as error:  # tokenizers raises no class of its own
        line = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"text: {folder} cannot be read: {line}") from None
