"""The fields of a run's YAML. Lengths are in images, whatever the batch and the number of
processes.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ldm.config import distil, learning
from ldm.config.aside import AnyAside
from ldm.config.distil import AnyDistil
from ldm.config.ema import Ema, TextToImageEma
from ldm.config.fields import MayChange
from ldm.config.learning import CONTROLNET, ControlNet, Learning, Lora, TextualInversion
from ldm.config.loader import Duration, Interval, config_class
from ldm.config.noise import ObjectiveSettings, Positive, ProcessConfig, ProcessSettings
from ldm.config.optimizer import Optimizer, TextToImageOptimizer, refuse_halves
from ldm.config.shapes import (
    Classes,
    FamilyName,
    MmditShape,
    PriorShape,
    T5Shape,
    Text,
    TextShape,
    UNetShape,
    VaeShape,
    VisionShape,
)
from ldm.config.sources import DataConfig
from ldm.config.suites import SUITES
from ldm.data.images import ImageTransform
from ldm.data.ranges import Count, Seed, Share
from ldm.sampling.names import canonical

Batch = Annotated[int, Field(gt=0, le=2**20)]
Pictures = Annotated[Count, Field(gt=0)]
SamplerSteps = Annotated[int, Field(gt=0, le=10_000)]
GuidanceScale = Annotated[float, Field(ge=0, lt=1000)]
SamplerName = Annotated[str, AfterValidator(canonical)]
Precision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]


def _seeds(first: int, pictures: int) -> None:
    """``ValueError`` where not every picture i has the seed ``first + i``."""
    if first + pictures > 2**32:
        raise ValueError(f"seed: {first} + {pictures:,} pictures goes beyond 2^32 - 1")


@config_class
class Checkpoints:
    """How often a loadable, resumable folder is written, and how many are kept.

    Args:
        every: how often.
        keep: how many, the newest.
    """

    every: Interval = "5k steps"
    keep: Positive = 2


@config_class
class Validation:
    """Held-out loss per noise level with fixed noise, and pictures from fixed prompts and seeds.

    Args:
        every: how often.
        images: held-out pictures in the loss; 0 for none.
        levels: noise levels, the middles of equal cells of t.
        prompts: texts, or names of classes, that are drawn; none by default. "" is what every
            picture of an unconditional model is drawn from.
        count: pictures of each prompt.
        seed: of the noise, the same at every validation.
        steps: sampler steps; None: those that ``model`` states, else 30.
        guidance: guidance scale; None: that which ``model`` states, else 7.5. What a run gives here
            its folder states.
        sampler: named sampler; None: that which ``model`` states, else ``dpm++``, or ``ode-heun``
            where no scheduler runs the process.
    """

    every: Interval = "5k steps"
    images: Count = 128
    levels: Annotated[int, Field(gt=0, le=1000)] = 10
    prompts: tuple[str, ...] = ()
    count: Pictures = 1
    seed: Seed = 0
    steps: SamplerSteps | None = None
    guidance: GuidanceScale | None = None
    sampler: SamplerName | None = None

    def __post_init__(self) -> None:
        _seeds(self.seed, self.drawn)

    @property
    def drawn(self) -> int:
        """Pictures of one validation; picture i is drawn from ``seed + i``."""
        return len(self.prompts) * self.count


DrawnSuite = Literal[*(name for name, suite in SUITES.items() if suite.in_runs)]


@config_class
class TextToImageValidation(Validation):
    """The same, previews of the run's own captions, and suites of captions, measured as ``ldm
    evaluate`` does.

    Args:
        captions: how many of the run's own captions are drawn as well, each beside its true
            picture; half of them of held-out pictures, as far as there are any.
        suites: of how many captions each; ``quality`` compares with the run's own training
            pictures, as squares. Their figures are ``SUITE/FIGURE`` in ``metrics.jsonl``, with
            ``/low`` and ``/high`` of the 95 % interval and ``/n``.
        spaces: of features (``ldm.evaluation.features.space``); the first ``clip:FOLDER`` among
            them also gives CLIP scores.
    """

    captions: Annotated[int, Field(ge=0, le=256)] = 0
    suites: dict[DrawnSuite, Annotated[Count, Field(ge=8)]] = field(default_factory=dict)
    spaces: Annotated[tuple[str, ...], Field(min_length=1)] = ("pixels:16",)

    @property
    def drawn(self) -> int:
        """The most pictures of the prompts, of the captions, or of a suite."""
        return max(super().drawn, self.captions, *self.suites.values())


@config_class
class Score:
    """Nearest-picture retrieval at the end of a run (``ldm.tasks.score``).

    Args:
        captions: how many training captions of every source are drawn.
        shown: how many of them go into ``samples.png``.
        before: score ``model`` as well, which the run started from.
        seed: image i is drawn from seed + i.
        steps: sampler steps; None: those that ``model`` states, else 30.
        guidance: guidance scale; None: that which ``model`` states, else 7.5. What a run gives here
            its folder states.
        sampler: named sampler; None: that which ``model`` states, else ``dpm++``, or ``ode-heun``
            where no scheduler runs the process.
    """

    captions: Pictures = 256
    shown: Pictures = 16
    before: bool = False
    seed: Seed = 0
    steps: SamplerSteps | None = None
    guidance: GuidanceScale | None = None
    sampler: SamplerName | None = None

    def __post_init__(self) -> None:
        _seeds(self.seed, self.captions)


@config_class
class Order:
    """Which pictures come when; always endless permutations.

    Args:
        window: read few shards (tars, row groups of parquet files) at a time: an epoch is a random
            order of the shards, and pictures are mixed over so many of them. For data on a disk or
            a network that is slow at random access. None: over the whole data set.
    """

    window: Positive | None = None


@config_class
class NonFinite:
    """What becomes of a step whose loss or gradient norm is not finite.

    Args:
        action: ``stop`` ends the run, the last checkpoint being from before; ``skip`` leaves
            weights, optimiser and average as they are and goes on with the next images. To know in
            time, ``skip`` waits for the device at every step.
        at_most: steps skipped in the whole run; one more ends it.
    """

    action: Literal["stop", "skip"] = "stop"
    at_most: Positive = 10


@config_class
class Resume:
    """Going on with a config that is not the one the run was started with.

    Args:
        allow: keys that may have changed, ``optimizer.lr`` or all of ``optimizer``; ``data`` also
            stands for the pictures and captions themselves.
    """

    allow: tuple[str, ...]


@config_class
class RunConfig:
    """What every training program needs.

    Args:
        run: folder of the run: config, metrics, samples, checkpoints, and ``final`` at the end.
        seed: of every draw.
        data: where pictures and captions come from: one source, or several, in proportion to their
            weights or else to their numbers of pictures.
        on_bad_sample: ``error`` refuses data with a picture or row that cannot be used; ``skip``
            leaves those out, and lists them with the reasons in ``RUN/skipped.jsonl``.
        images: size, crop, flip, background, buckets.
        order: mixed over all pictures, or over the shards of a window at a time.
        batch_size: images per optimiser step over all processes.
        micro_batch_size: images that fit at once on one process; accumulation follows from it.
        duration: length of the run.
        optimizer: its kind, and the schedule of its learning rate.
        ema: None trains without.
        precision: of the forward pass; parameters (but for ``weights``) and optimiser stay
            float32. ``auto``: bfloat16 where the device has it in hardware, else float32; a run
            that goes on keeps what it began in. ``tf32`` is float32 whose products round to 10 bits
            on GPUs that can; ``float16``, with loss scaling, is for GPUs without bfloat16.
        log_every: steps between two lines of ``metrics.jsonl``.
        trackers: where its numbers and the sample sheets go as well: ``tensorboard`` writes into
            ``RUN/tensorboard``, ``wandb`` to its server, or with WANDB_MODE=offline into ``RUN``.
        validation: None for none.
        checkpoints: how often and how many.
        nonfinite: stop at a loss that is not a number, or skip the step.
        resume: ``auto`` goes on from the newest complete checkpoint of ``run``, ``never`` refuses
            to touch a folder that has one, ``{allow: [KEY, ...]}`` goes on though these changed.
        workers: processes that read and transform pictures; 0 reads in the training process.
            ``auto``: 0 on a CPU, whose cores compute; beside a GPU 1 where the caches have all or
            it is a stream, else one for each core that is left, at most 8.
    """

    run: MayChange[Annotated[str, Field(min_length=1)]]
    seed: Seed = 0
    data: DataConfig | tuple[DataConfig, ...]
    on_bad_sample: MayChange[Literal["error", "skip"]] = "error"
    images: ImageTransform = field(default_factory=ImageTransform)
    order: Order = field(default_factory=Order)
    batch_size: Batch = 64
    micro_batch_size: MayChange[Batch | None] = None
    duration: Duration
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Ema | None = field(default_factory=Ema)
    precision: Precision = "auto"
    log_every: MayChange[Positive] = 10
    trackers: MayChange[tuple[Literal["tensorboard", "wandb"], ...]] = ()
    validation: MayChange[Validation | None] = field(default_factory=Validation)
    checkpoints: MayChange[Checkpoints] = field(default_factory=Checkpoints)
    nonfinite: MayChange[NonFinite] = field(default_factory=NonFinite)
    resume: MayChange[Literal["auto", "never"] | Resume] = "auto"
    workers: MayChange[Annotated[int, Field(ge=0, le=1024)] | Literal["auto"]] = "auto"


@config_class
class TrainConfig(RunConfig):
    """Training of a model of latents or pixels, told a text, a class or nothing, from random init
    or from a pipeline folder.

    Args:
        model: pipeline folder that every part not described here is taken from; a whole model in
            one file; or OWNER/NAME[@REVISION] of the Hub.
        family: of the model, where no folder tells it (``ldm.families``); None: ``sd``, or
            ``pixels`` without text.
        vae: folder of an autoencoder, a safetensors file of one (in the layout of A1111 and
            ComfyUI, with the config of ``model``'s), or a shape for random init; ``pixels``: none,
            pictures are their own latents.
        condition: ``text``; ``none``, an unconditional model; or ``{classes: [NAME, ...]}``, of
            which captions say one each. None: that of ``model``, else text.
        text: folder of a pipeline's text encoder and tokenizer, folder (or file of weights) of an
            open_clip model, or a shape for random init; of a family of several text encoders a
            list, one for each, null where there is none.
        text_layers: only the first layers of the text encoder of a folder, with its final norm
            behind them (Stable Diffusion 2: 23 of 24); None: all.
        prompt_syntax: how captions and prompts are read: ``a1111`` with weights and breaks,
            ``(word:1.3)``, ``[word]``, ``BREAK``; None: brackets are text.
        prompt_windows: of tokens, each read alone, that every caption is to a CLIP: one longer than
            the tokenizer's is not cut then.
        unet: a shape for random init.
        transformer: the same, of a family that has one in place of a U-Net.
        prior: the same, of the family ``unclip_prior``.
        image_encoder: folder of a CLIP's picture tower, or of a pipeline with one, or a shape for
            random init, of ``unclip`` and ``unclip_prior``; None: that of ``model``.
        aside: what the network is told of the picture itself (of ``imagen``: the same in small,
            which it enlarges; of ``unclip``: its embedding); None: nothing.
        train: what learns: parts, or parameters of one as ``unet.PATTERN``, a glob over their names
            (``unet.*attn2*`` is cross-attention).
        lora: adapters learn in place of those parts, which stay as they are; None: all weights do.
        textual_inversion: a new word learns in their place.
        controlnet: what the ControlNet is that ``train: [controlnet]`` teaches beside the U-Net, by
            hints beside the pictures (``data.hints``, ``data.hint_column``).
        distil: a teacher makes what is learnt; None: the data does.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping
            them: less memory, more time, the same gradients. A number n: of every n-th block.
        optimizer: its kind, and the schedule of its learning rate.
        ema: None trains without; several half-lives are several averages, of which held-out loss
            chooses.
        validation: None for none.
        process: the noise; what is left out is that of ``model``, else of ``DiscreteVP``.
        objective: target and weight; the target left out is that of ``model``, else eps.
        dropout: share of activations left out of every residual layer of the U-Net in training;
            None: what its folder says, 0 for one of random init.
        text_dropout: share of captions dropped for classifier-free guidance: replaced by "", or
            their tokens by zeros, as the family does; a list: of each text encoder on its own.
        cache_latents: encode every picture once; off with a random crop but for ``images.crops``.
        cache_text: encode every caption once; off where the text encoder learns.
        cache_dtype: in which what text encoders say is cached. ``bfloat16`` takes half the disk,
            and changes nothing in a run that computes in it; in float32 it rounds to three digits.
        cache_precision: in which autoencoder and text encoders compute what is cached. ``bfloat16``
            is faster on what has it, and rounds what they say to two or three digits.
        frozen: in which weights that do not learn are held, but for the autoencoder's.
            ``bfloat16`` takes half the memory: below a LoRA it changes no bit, in a run that
            computes in it, and what text encoders say it rounds to three digits. Where all weights
            learn it is of text encoders alone; what does not learn is in ``RUN/frozen`` as it was,
            and checkpoints and result are linked to that. ``int8``, ``nf4``: the same, and linear
            layers below a LoRA in 8 and 4 bits, which rounds them (bitsandbytes).
        weights: in which weights that learn are held. ``bfloat16``: those of convolutions and
            linear layers, half the memory, also of their gradient; steps are computed in float32
            and rounded at random, so that all count on average. For runs in bfloat16 of whole
            weights without ``ema``, by ``adamw``, ``adafactor``, ``muon`` or ``lion``.
        attention: PyTorch's ``sdpa``, ``plain`` products, or ``xformers``. ``auto``: ``plain`` in
            bfloat16 on a CPU, else ``sdpa``.
        compile: ``blocks`` compiles the residual and transformer blocks of the network that
            predicts; ``off`` none. ``auto``: ``blocks`` on a CUDA GPU in runs of 3,000 steps and
            more whose pictures are all of one shape.
        cuda_graphs: replay forward and backward as recorded once for each shape of batches: for
            networks whose kernels a GPU runs faster than they are launched. On one GPU.
        score: draw training captions at the end and count whose nearest picture is their own.
    """

    model: str | None = None
    family: FamilyName | None = None
    vae: Literal["pixels"] | VaeShape | str | None = None
    condition: Literal["text", "none"] | Classes | None = None
    text: Text | tuple[Text | None, ...] | None = None
    text_layers: Positive | None = None
    prompt_syntax: Literal["a1111"] | None = None
    prompt_windows: Annotated[int, Field(ge=1, le=32)] = 1
    unet: UNetShape | None = None
    transformer: MmditShape | None = None
    prior: PriorShape | None = None
    image_encoder: VisionShape | str | None = None
    aside: AnyAside | None = None
    train: Annotated[tuple[Learning, ...], Field(min_length=1)] = ("unet",)
    lora: Lora | None = None
    textual_inversion: TextualInversion | None = None
    controlnet: ControlNet | None = None
    distil: AnyDistil | None = None
    gradient_checkpointing: MayChange[bool | Annotated[int, Field(ge=2, le=64)]] = False
    optimizer: TextToImageOptimizer = field(default_factory=TextToImageOptimizer)
    ema: TextToImageEma | None = field(default_factory=TextToImageEma)
    validation: MayChange[TextToImageValidation | None] = field(
        default_factory=TextToImageValidation
    )
    process: ProcessConfig = field(default_factory=ProcessSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    text_dropout: Share | tuple[Share, ...] = 0.1
    cache_latents: MayChange[bool] = True
    cache_text: MayChange[bool] = True
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    cache_precision: Literal["float32", "bfloat16"] = "float32"
    frozen: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    weights: Literal["float32", "bfloat16"] = "float32"
    attention: MayChange[Literal["auto", "sdpa", "plain", "xformers"]] = "auto"
    compile: MayChange[Literal["auto", "blocks", "off"]] = "auto"
    cuda_graphs: MayChange[bool] = False
    score: MayChange[Score | None] = None

    def __post_init__(self) -> None:
        word, rate = self.textual_inversion, self.optimizer.text_encoder_lr
        learning.refuse(self.train, self.lora, word, rate, self.controlnet)
        distil.refuse(self)
        if self.weights == "bfloat16":
            small = "lora" if self.lora else "textual_inversion" if word else None
            refuse_halves(self.optimizer, averages=self.ema is not None, small=small)
        given = [name for name in ("unet", "transformer", "prior") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two kinds of networks: leave one out")
        if self.text_layers is not None and isinstance(self.text, (TextShape, T5Shape)):
            raise ValueError("text_layers: a described text encoder has text.layers: leave it out")

    @property
    def network(self) -> UNetShape | MmditShape | PriorShape | None:
        """The network that predicts, if it is described and not that of ``model``."""
        return self.unet or self.transformer or self.prior

    @property
    def adds(self) -> bool:
        """Whether adapters, a new word or a ControlNet learn: all weights of the model stay as they
        are, and no checkpoint holds them.
        """
        new = self.lora is not None or self.textual_inversion is not None
        return new or CONTROLNET in self.learns

    @property
    def learns(self) -> tuple[str, ...]:
        """The parts in which something learns, in order."""
        return learning.parts(self.train, self.textual_inversion)
