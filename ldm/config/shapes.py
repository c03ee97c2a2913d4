"""The fields of a run's YAML that describe networks of random init, and what a U-Net is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WithJsonSchema

from ldm.config.loader import config_class

Width = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=1000)]
Depths = Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(min_length=1)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
# 512 byte tokens and two specials are always there.
Vocabulary = Annotated[int, Field(ge=514, le=2**20)]
TextLength = Annotated[int, Field(ge=3, le=2**14)]  # a word between two specials


@config_class
class VaeShape:
    """An ``AutoencoderKL`` from random init.

    Args:
        block_out_channels: channels per resolution, each half the one before.
        layers_per_block: residual layers of the encoder at each (the decoder has one more).
        latent_channels: channels of the latent.
        norm_num_groups: groups of every GroupNorm.
        mid_attention: self-attention at the lowest resolution.
        quant_conv: 1x1 convolutions around the latent (not in SD3).
    """

    block_out_channels: Widths = (128, 256, 512, 512)
    layers_per_block: Depth = 2
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    mid_attention: bool = True
    quant_conv: bool = True


@config_class
class TextShape:
    """A ``CLIPTextModel`` from random init, with a tokenizer from ``tokenizer`` or from the
    captions.

    Args:
        tokenizer: folder of a CLIP tokenizer; None trains one of ``vocab_size`` on the captions.
        vocab_size: tokens.
        max_length: tokens of a prompt, start and end included.
        hidden_size: width.
        intermediate_size: width of the feed-forward layers.
        layers: transformer layers.
        heads: attention heads.
        activation: of the feed-forward layers.
        projection: width of the projection of a tower that has one (SDXL's second); None: the
            hidden size.
    """

    kind: Literal["clip"] | None = None
    tokenizer: str | None = None
    vocab_size: Vocabulary = 49408
    max_length: TextLength = 77
    hidden_size: Width = 768
    intermediate_size: Annotated[int, Field(gt=0, le=2**18)] = 3072
    layers: Depth = 12
    heads: Width = 12
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: Width | None = None


@config_class
class T5Shape:
    """The encoder of a T5 v1.1 from random init, with a tokenizer from ``tokenizer`` or from the
    captions; the defaults are those of T5 v1.1 XXL.

    Args:
        tokenizer: folder of a T5 tokenizer; None trains one of ``vocab_size`` on the captions.
        vocab_size: tokens.
        max_length: tokens of a prompt, the end included.
        hidden_size: width.
        intermediate_size: width of the feed-forward layers.
        layers: transformer layers.
        heads: attention heads.
        head_dim: width of each.
    """

    kind: Literal["t5"] = "t5"
    tokenizer: str | None = None
    vocab_size: Vocabulary = 32128
    max_length: TextLength = 256
    hidden_size: Width = 4096
    intermediate_size: Annotated[int, Field(gt=0, le=2**18)] = 10240
    layers: Depth = 24
    heads: Width = 64
    head_dim: Width = 64


def _text_kind(value: Any) -> str | None:
    """Which shape it is; None: none."""
    if isinstance(value, (dict, TextShape, T5Shape)):
        kind = value.get("kind") if isinstance(value, dict) else value.kind
        return kind or "clip"
    return None


Described = Annotated[
    Annotated[TextShape, Tag("clip")] | Annotated[T5Shape, Tag("t5")], Discriminator(_text_kind)
]
Text = Described | str
"""A text encoder: from random init, or that of a folder."""
FamilyName = Annotated[
    str,
    WithJsonSchema(
        {
            "type": "string",
            "enum": ["sd", "sdxl", "sd3", "flux", "imagen", "unclip", "unclip_prior", "pixels"],
        }
    ),
]
"""A family of models, by its name in ``ldm.families``."""


@config_class
class Classes:
    """Labels of classes, one of which every caption says as a whole word.

    Args:
        classes: their names; captions dropped by ``text_dropout`` become a further label.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=1)]


@config_class
class UNetShape:
    """A ``UNet2DConditionModel`` from random init, or a ``UNet2DModel`` where no text is read;
    latent and text widths come from the other parts.

    Args:
        block_out_channels: channels per resolution.
        layers_per_block: residual layers at each, one number or one per resolution; with 0 at the
            first nothing is computed there but on the way down and up (Imagen's efficient U-Net).
        attention: which resolutions have cross-attention, or self-attention without text; None: all
            but the last.
        attention_head_dim: diffusers' argument of that name (which counts heads, or without text
            the channels of one), one number or one per resolution.
        norm_num_groups: groups of every GroupNorm.
        use_linear_projection: linear instead of 1x1 convolutions around the transformers (SD 2).
        scale_shift: the embedding of time and class scales and shifts the normalised activations
            instead of being added to them (Dhariwal & Nichol 2021, section 3.1).
        time_embedding: ``positional`` (sinusoids, the default), or ``fourier``: random features of
            the timestep, whose frequencies are drawn once and do not learn (Song et al. 2021);
            without text they are of log(sigma), and the output is divided by sigma: for scores.
        fourier_scale: their standard deviation, in turns over all timesteps of the process.
        transformer_layers: transformer layers of every attention, one number or one per resolution.
        coordinate_dim: width of the embedding of each number that SDXL's is told (where its picture
            was cut).
        aesthetic_score: whether the last of them is a score in place of the size of the result, as
            SDXL's refiner is told.
    """

    block_out_channels: Widths = (320, 640, 1280, 1280)
    layers_per_block: Depth | Depths = 2
    attention: tuple[bool, ...] | None = None
    attention_head_dim: Width | tuple[Width, ...] = 8
    norm_num_groups: Width = 32
    use_linear_projection: bool = False
    scale_shift: bool = False
    time_embedding: Literal["positional", "fourier"] | None = None
    fourier_scale: Annotated[float, Field(gt=0)] | None = None
    transformer_layers: Depth | tuple[Depth, ...] = 1
    coordinate_dim: Width = 256
    aesthetic_score: bool = False


@config_class
class MmditShape:
    """A transformer of two streams, text and picture, from random init; latent and text widths come
    from the other parts.

    Args:
        layers: transformer layers.
        heads: attention heads of each.
        head_dim: width of a head; the network is ``heads`` times as wide.
        patch_size: latent cells along each side of a token.
        positions: tokens along each side of the largest picture.
        dual_attention: so many of the first layers attend within the picture once more (13 in SD3.5
            medium).
        qk_norm: normalise queries and keys (SD3.5).
        single_layers: so many further layers are of one stream, of text and picture together.
        guidance: whether the network is told a scale of guidance, as one distilled from a guided
            model is.
    """

    layers: Depth = 24
    heads: Width = 24
    head_dim: Width = 64
    patch_size: Annotated[int, Field(gt=0, le=64)] = 2
    positions: Annotated[int, Field(gt=0, le=4096)] = 192
    dual_attention: Annotated[int, Field(ge=0, le=1000)] = 0
    qk_norm: bool = False
    single_layers: Annotated[int, Field(ge=0, le=1000)] = 0
    guidance: bool = False


@config_class
class PriorShape:
    """A ``PriorTransformer`` from random init; text and embedding widths come from the other parts.

    Args:
        layers: transformer layers.
        heads: attention heads of each.
        head_dim: width of a head; the network is ``heads`` times as wide.
    """

    layers: Depth = 20
    heads: Width = 32
    head_dim: Width = 64


@config_class
class VisionShape:
    """A CLIP's picture tower from random init, which knows nothing: for counts and tests. The
    defaults are those of CLIP ViT-L/14.

    Args:
        image_size: side of the pictures that it sees.
        patch_size: side of a patch in pixels.
        hidden_size: width.
        intermediate_size: width of the feed-forward layers.
        layers: transformer layers.
        heads: attention heads.
        activation: of the feed-forward layers.
        projection: numbers of an embedding.
    """

    image_size: Width = 224
    patch_size: Width = 14
    hidden_size: Width = 1024
    intermediate_size: Annotated[int, Field(gt=0, le=2**18)] = 4096
    layers: Depth = 24
    heads: Width = 16
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: Width = 768
