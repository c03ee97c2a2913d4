"""What users do with a pipeline of diffusers, done with ours and with stock: the same pictures."""

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny
from ldm.calls import running
from ldm.formats import lora
from ldm.models.codec import VaeCodec
from ldm.models.lora import Update
from ldm.models.wrapped import bare
from ldm.pipeline import LatentDiffusionPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
STEPS = 4
Pair = tuple[Any, Any]


def both(parts: dict[str, Any]) -> Pair:
    """Ours and stock's, of the same networks."""
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    ours = LatentDiffusionPipeline(**parts | {"scheduler": tiny.scheduler()})
    stock = StableDiffusionPipeline(**parts | {"scheduler": tiny.scheduler()}, **none)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    return ours, stock


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return tiny.components()


@pytest.fixture
def pair(parts: dict[str, Any]) -> Pair:
    return both(parts)


@pytest.fixture
def ours() -> Any:
    """Of networks that a test may change."""
    return tiny.pipeline()


def draw(pipe: Any, prompt: Any = "a red heart", **arguments: Any) -> Any:
    count = 1 if isinstance(prompt, str) else len(prompt)
    latents = torch.randn(count, *tiny.LATENT, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": STEPS, "latents": latents, "output_type": "np", **arguments}
    return pipe(prompt, **call).images


def same(pair: Pair, prompt: Any = "a red heart", **arguments: Any) -> np.ndarray:
    """What both draw, which must be the same to the last bit."""
    ours, stock = (np.asarray(draw(pipe, prompt, **arguments)) for pipe in pair)
    assert ours.dtype == stock.dtype and np.array_equal(ours, stock)
    return ours


def swap(pair: Pair, kind: type[Any], **pins: Any) -> Pair:
    for pipe in pair:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **pins)
    return pair


def test_arguments_come_in_the_order_of_stock() -> None:
    ours, stock = (
        [
            name
            for name, one in inspect.signature(kind.__call__).parameters.items()
            if one.kind == one.POSITIONAL_OR_KEYWORD
        ]
        for kind in (LatentDiffusionPipeline, StableDiffusionPipeline)
    )
    assert ours == stock and len(ours) == 24


def test_positional_arguments(pair: Pair) -> None:
    noise = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(1))
    found = []
    for pipe in pair:
        draws = torch.Generator().manual_seed(2)  # of the noise of eta
        told = ("a red heart", 16, 16, 3, None, None, 3.0, "blue", 2, 0.5, draws, noise)
        found.append(pipe(*told, None, None, None, None, "pt", False, None, 0.5, None))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][0]) == 2


@pytest.mark.parametrize(
    "kind, own",
    [
        (DDPMScheduler, {"timesteps": [900, 500, 100, 3]}),
        (EulerDiscreteScheduler, {"timesteps": [999, 400, 100]}),
        (EulerDiscreteScheduler, {"sigmas": [14.0, 3.0, 0.5, 0.0]}),
        (HeunDiscreteScheduler, {"timesteps": [999, 400, 100]}),
        (DPMSolverMultistepScheduler, {"timesteps": [999, 700, 400, 100]}),
    ],
    ids=str,
)
def test_timesteps_and_sigmas_of_one_s_own(pair: Pair, kind: type[Any], own: Any) -> None:
    swap(pair, kind)
    for pipe in pair:
        torch.manual_seed(0)  # of the noise of DDPM
        pipe.images = draw(pipe, **own)
    assert np.array_equal(pair[0].images, pair[1].images)
    assert not np.array_equal(pair[0].images, draw(pair[0]))


# --- callbacks ------------------------------------------------------------------------------------


def test_interrupt_stops_as_in_stock(pair: Pair) -> None:
    swap(pair, EulerDiscreteScheduler)
    seen: list[int] = []

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        assert not pipe.interrupt
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0.5} if step == 1 else tensors

    stopped = same(pair, callback_on_step_end=stop)
    assert seen == [0, 1, 0, 1]
    assert not np.array_equal(stopped, same(pair))  # and the next call is not stopped
    # By the pipeline itself as well as by what the callback is handed; no later batch is drawn.
    ours, seen = pair[0], []

    def stop_all(_: Any, step: int, *told: Any) -> None:
        seen.append(step)
        if len(seen) == STEPS + 2:
            ours._interrupt = True

    call = {"output_type": "latent", "latents": None, "seed": 0, "batch_size": 2}
    whole = draw(ours, [*"abcdef"], **call)
    found = draw(ours, [*"abcdef"], **call, callback_on_step_end=stop_all)
    assert len(found) == 4 and len(seen) == STEPS + 2
    assert torch.equal(found[:2], whole[:2]) and not torch.equal(found[2:], whole[2:4])


@pytest.mark.parametrize("sampler", ["ode-heun", "dpm++", "ddpm"])
def test_interrupt_stops_every_sampler(pair: Pair, sampler: str) -> None:
    seen: list[int] = []

    def stop(pipe: Any, step: int, *told: Any) -> None:
        seen.append(step)
        pipe._interrupt = True

    assert np.isfinite(draw(pair[0], sampler=sampler, callback_on_step_end=stop)).all()
    assert seen == [0]


def test_another_thread_stops_all_calls_of_a_pipeline(pair: Pair) -> None:
    ours, seen = pair[0], []

    def other() -> None:
        assert not hasattr(ours, "interrupt")  # it runs no call
        ours._interrupt = True

    def stop(_: Any, step: int, *told: Any) -> None:
        seen.append(step)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    draw(ours, callback_on_step_end=stop)
    assert seen == [0]
    ours._interrupt = True  # between calls it stops nothing, as in stock
    draw(ours, callback_on_step_end=lambda pipe, step, *told: seen.append(step))
    assert len(seen) == 1 + STEPS and ours.interrupt is False  # of the last call of this thread


def test_a_call_that_ends_meanwhile_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = running.SeenFromCallbacks()

    class Called:
        interrupt, thread, looks = False, 0, 0

        @property
        def pipeline(self) -> Any:
            self.looks += 1  # whose call it is comes first, which are to be stopped then
            if self is first and self.looks == 2:
                calls.remove(self)  # as its own thread would
            return pipe

    calls = [Called(), Called(), Called()]
    first, *others = calls
    monkeypatch.setattr(running, "_CALLS", calls)
    pipe._interrupt = True
    assert [each.interrupt for each in others] == [True, True] and calls == others


def test_guidance_set_in_a_callback(pair: Pair) -> None:
    seen: list[Any] = []

    def change(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps))
        pipe._guidance_scale = 2.0 + step
        pipe._guidance_rescale = 0.3
        return tensors

    changed = same(pair, callback_on_step_end=change)
    assert not np.array_equal(changed, same(pair))
    assert [scale for scale, *_ in seen] == [7.5, 2.0, 3.0, 4.0] * 2
    assert all(guided and steps == STEPS for _, guided, steps in seen)

    def off(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    names = ["latents", "prompt_embeds"]
    call = {"callback_on_step_end_tensor_inputs": names}
    same(pair, ["a red heart", "blue"], callback_on_step_end=off, **call)
    cut = same(pair, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    assert not np.array_equal(cut, same(pair))


def test_guidance_that_a_callback_begins_or_must_not_touch(pair: Pair) -> None:
    ours = pair[0]

    def at(step: int, scale: float) -> Any:
        def change(pipe: Any, index: int, *told: Any) -> None:
            if index == step:
                pipe._guidance_scale = scale

        return change

    begun = draw(ours, guidance_scale=1.0, callback_on_step_end=at(0, 4.0))
    ended = draw(ours, guidance_scale=4.0, callback_on_step_end=at(0, 1.0))
    plain, guided = (draw(ours, guidance_scale=scale) for scale in (1.0, 4.0))
    assert all(np.abs(a - b).max() > 1e-4 for a in (begun, ended) for b in (plain, guided))
    with pytest.raises(ValueError, match="must be a finite number, not nan"):
        draw(ours, callback_on_step_end=at(0, float("nan")))
    with pytest.raises(ValueError, match="passed a guidance of its own"):
        draw(ours, guidance=lambda predict, null: predict, callback_on_step_end=at(0, 1.0))


def test_texts_replaced_in_a_callback(pair: Pair) -> None:
    def swapped(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if step == 2 else tensors

    call = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = same(pair, callback_on_step_end=swapped, **call)
    assert not np.array_equal(changed, same(pair))

    def in_place(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        tensors["prompt_embeds"] *= -0.5 - step  # of both halves, and step upon step
        return tensors if step else {}

    for scale in (7.5, 1.0):
        edited = same(pair, callback_on_step_end=in_place, guidance_scale=scale, **call)
        assert not np.array_equal(edited, same(pair, guidance_scale=scale))

    def negative(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        null = tensors["negative_prompt_embeds"]
        null *= 2
        return {"negative_prompt_embeds": null.flip(1)}

    call = {"callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    assert np.array_equal(same(pair, callback_on_step_end=negative, **call), same(pair))
    with pytest.raises(ValueError, match="prompt_embeds of 3 texts for 1 pictures"):
        draw(pair[0], callback_on_step_end=lambda *_: {"prompt_embeds": torch.zeros(3, 1, 1)})


def test_a_callback_sees_the_scheduler_that_runs(pair: Pair) -> None:
    swap(pair, EulerDiscreteScheduler)
    seen: list[Any] = []

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        mine = pipe.scheduler
        seen.append((mine.step_index, len(mine.timesteps), mine.sigmas[mine.step_index].item()))
        return tensors

    same(pair, callback_on_step_end=look)
    assert seen[:STEPS] == seen[STEPS:] and [step for step, *_ in seen[:3]] == [1, 2, 3]
    assert len(pair[0].scheduler.timesteps) == 1000  # the pipeline's own has not run
    inner: list[Any] = []

    def again(pipe: Any, step: int, *told: Any) -> None:
        assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
        if not inner:
            inner.append(draw(pipe))  # a call within a call: of the pipeline's own scheduler
            assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"

    draw(pair[0], sampler="dpm++", callback_on_step_end=again)
    assert np.array_equal(inner[0], same(pair))


def test_latents_changed_in_place(pair: Pair) -> None:
    def change(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["latents"][:, :, :2] *= 0.5
        return tensors

    assert not np.array_equal(same(pair, callback_on_step_end=change), same(pair))


# --- other parts in place of a pipeline's own -----------------------------------------------------


def asymmetric() -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 32),
        norm_num_groups=4,
        sample_size=tiny.SIZE,
    )


def few() -> AutoencoderTiny:
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(
        **blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.9
    )


def consistency() -> ConsistencyDecoderVAE:
    return ConsistencyDecoderVAE(
        sample_size=tiny.SIZE,
        encoder_block_out_channels=(8, 16),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(16, 16),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
        decoder_num_train_timesteps=1024,
    )


@pytest.mark.parametrize("made", [asymmetric, few, consistency])
def test_other_autoencoders(pair: Pair, made: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = made().eval()
    for pipe in pair:
        pipe.vae = vae
    images = [draw(pipe, ["a", "b"], generator=torch.Generator().manual_seed(3)) for pipe in pair]
    assert np.array_equal(*images) and images[0].shape == (2, 16, 16, 3)
    codec, x = VaeCodec(vae), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        moments = codec.encode(x)
        z = codec.sample(moments, torch.zeros(1, *tiny.LATENT))
        raw = vae.encode(x)
    mean = raw.latents if made is few else raw.latent_dist.mean
    assert torch.equal(z, mean * vae.config.scaling_factor)
    assert (codec.factor, codec.channels) == (2, 4)


@pytest.mark.parametrize("zero", [False, True])
def test_trained_betas(pair: Pair, zero: bool) -> None:
    betas = (torch.linspace(0.03, 0.12, 1000) ** 2).tolist()
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero else {}
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        swap(pair, kind, trained_betas=betas, prediction_type="v_prediction", **more)
        same(pair)


# --- compiled and wrapped networks ----------------------------------------------------------------


@pytest.fixture
def eager() -> Iterator[None]:
    """torch.compile wraps, and nothing waits for a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_a_compiled_unet_draws_is_saved_and_takes_loras(
    ours: Any, eager: None, tmp_path: Any
) -> None:
    plain = draw(ours)
    for name in ("unet", "vae", "text_encoder"):
        setattr(ours, name, torch.compile(getattr(ours, name), backend="eager"))
    assert np.array_equal(draw(ours), plain)
    ours.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), plain)
    # A LoRA after compilation, by all that diffusers' own methods do with it.
    one = updates(ours, 1)
    ours.load_lora_weights(one, adapter_name="one")
    with_it = draw(ours)
    assert np.abs(with_it - plain).max() > 1e-3
    assert ours.get_list_adapters() == {"unet": ["one"]} and ours.get_active_adapters() == ["one"]
    ours.set_adapters("one", 0.0)
    assert np.array_equal(draw(ours), plain)
    ours.set_adapters("one", 1.0)
    ours.fuse_lora()
    assert ours.num_fused_loras == 1 and np.abs(draw(ours) - with_it).max() < 1e-4
    ours.save_pretrained(tmp_path / "fused")
    fused = LatentDiffusionPipeline.from_pretrained(tmp_path / "fused")
    fused.set_progress_bar_config(disable=True)
    assert np.abs(draw(fused) - with_it).max() < 1e-4
    ours.unfuse_lora()
    with pytest.raises(ValueError, match="no place for adapters"):
        ours.save_pretrained(tmp_path / "loaded")
    ours.load_textual_inversion({"<new>": torch.ones(tiny.WIDTH)})
    assert np.abs(draw(ours, "<new>") - draw(ours, "a")).max() > 1e-3
    ours.unload_textual_inversion()
    assert len(ours.tokenizer) == len(tiny.tokenizer())
    ours.unload_lora_weights()
    assert ours.get_list_adapters() == {} and np.abs(draw(ours) - plain).max() < 1e-4


def updates(pipe: Any, seed: int) -> dict[str, Tensor]:
    """A LoRA of two layers of the U-Net, as tensors of a file."""
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in bare(pipe.unet).named_modules():
        if name.endswith("attn2.to_v"):
            wide, high = module.weight.shape
            down, up = (torch.randn(*s, generator=draws) for s in ((2, high), (wide, 2)))
            found[name] = Update(down, up, 2.0)
    return lora.to_diffusers({"unet": found})[0]


def test_a_lora_of_the_hub_goes_into_the_compiled_network(
    ours: Any, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, seen = ours.unet, []

    def load(self: Any, *told: Any, **named: Any) -> None:
        seen.append((self.unet, told, named["weight_name"]))

    monkeypatch.setattr(StableDiffusionLoraLoaderMixin, "load_lora_weights", load)
    ours.unet = torch.compile(unet, backend="eager")
    ours.load_lora_weights("somebody/their-lora", "one", weight_name="x.safetensors")
    assert seen == [(unet, ("somebody/their-lora", "one", False), "x.safetensors")]
    assert ours.unet is not unet


def test_words_and_their_updates_need_a_text_encoder(ours: Any) -> None:
    pixels = LatentDiffusionPipeline(None, None, None, ours.unet, ours.scheduler)
    with pytest.raises(ValueError, match="^this model reads no text$"):
        pixels.load_textual_inversion({"<new>": torch.ones(tiny.WIDTH)})
    with pytest.raises(ValueError, match="^this model reads no text$"):
        pixels.unload_textual_inversion()
    update = Update(torch.ones(2, 8), torch.ones(8, 2), 2.0)
    tensors = lora.to_diffusers({"text_encoder": {"encoder.layers.0.mlp.fc1": update}})[0]
    with pytest.raises(
        ValueError, match="updates of a text_encoder, and this model reads no text$"
    ):
        pixels.load_lora_weights(tensors)


def test_hotswap_in_the_documented_order(ours: Any, eager: None) -> None:
    other = tiny.pipeline()
    one, two = updates(ours, 1), updates(ours, 2)
    other.load_lora_weights(two)
    ours.enable_lora_hotswap(target_rank=4)
    ours.load_lora_weights(one, adapter_name="default_0")
    ours.unet = torch.compile(ours.unet, backend="eager")
    first = draw(ours)
    ours.load_lora_weights(two, adapter_name="default_0", hotswap=True)
    assert np.abs(draw(ours) - first).max() > 1e-3
    assert np.abs(draw(ours) - draw(other)).max() < 1e-5


def test_a_unet_wrapped_by_peft_draws(ours: Any, tmp_path: Any) -> None:
    plain = draw(ours)
    with torch.random.fork_rng():
        ours.unet = get_peft_model(ours.unet, LoraConfig(r=2, target_modules=["to_q"]))
    assert np.array_equal(draw(ours), plain)  # B starts at zero
    for name, parameter in ours.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    assert np.abs(draw(ours) - plain).max() > 1e-3
    with pytest.raises(ValueError, match="no place for adapters"):
        ours.save_pretrained(tmp_path)


# --- savings --------------------------------------------------------------------------------------


def test_tiles_slices_and_freeu() -> None:
    pair = both(tiny.components())
    ours, stock = pair
    latents = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(1))

    def drawn() -> np.ndarray:
        return same(pair, ["a", "b"], latents=latents, num_inference_steps=1)

    whole = drawn()
    ours.vae.enable_slicing()  # the networks are the same objects
    assert np.abs(drawn() - whole).max() < 1e-5
    ours.disable_vae_slicing()
    assert not ours.vae.use_slicing
    ours.enable_vae_slicing()
    ours.enable_vae_tiling()
    assert stock.vae.use_slicing and stock.vae.use_tiling
    assert np.abs(drawn() - whole).max() > 1e-3
    ours.disable_vae_tiling()
    assert not stock.vae.use_tiling
    ours.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    same(pair)
    ours.disable_freeu()
    pixels = LatentDiffusionPipeline(None, None, None, ours.unet, ours.scheduler)
    with pytest.raises(ValueError, match="this model has no autoencoder"):
        pixels.enable_vae_tiling()
