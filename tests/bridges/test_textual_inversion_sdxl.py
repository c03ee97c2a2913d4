"""A word in both text encoders of SDXL: files with ``clip_l`` and ``clip_g``, in ours and stock."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
import tiny_sdxl
from ldm.formats import textual_inversion
from ldm.models.conditioner import TextConditioner
from ldm.models.textual_inversion import add_word, rows
from ldm.pipeline import LatentDiffusionPipeline

WORD = "<my-cat>"
TEXT = f"a {WORD}, red"


def embeddings(vectors: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(vectors, width, generator=draw) for width in tiny_sdxl.WIDTHS)
    return first, second


def ours(**parts: Any) -> Any:
    return LatentDiffusionPipeline(**tiny_sdxl.components() | parts)


def draw(pipe: Any) -> np.ndarray:
    """What the networks and tokenizers of ``pipe`` draw in stock."""
    pipe = tiny_sdxl.stock({name: pipe.components[name] for name in tiny_sdxl.components()})
    latents = torch.randn(1, *tiny.LATENT, generator=torch.Generator().manual_seed(1))
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(TEXT, latents=latents, **how).images.numpy()


def as_documented(pipe: Any, file: Path, token: Any = WORD) -> None:
    """As diffusers' documentation of SDXL loads a file."""
    state = load_file(file)
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            state[name],
            token=token,
            text_encoder=getattr(pipe, f"text_encoder{number}"),
            tokenizer=getattr(pipe, f"tokenizer{number}"),
        )


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return draw(tiny_sdxl.stock())


def test_our_file_in_stock_and_in_ours(plain: np.ndarray, tmp_path: Path) -> None:
    written = embeddings(1)
    file = textual_inversion.write(WORD, written, tmp_path, {"unet": "x"})
    assert set(load_file(file)) == {"clip_l", "clip_g"}
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "base": '{"unet": "x"}', "token": WORD}
    word, read = textual_inversion.read_towers(tmp_path)
    assert word == WORD and all(map(torch.equal, read, written))
    pipe, other, stock = ours(), ours(), tiny_sdxl.stock()
    pipe.load_textual_inversion(tmp_path)
    as_documented(other, file)
    as_documented(stock, file)
    picture = draw(stock)
    assert np.abs(picture - plain).max() > 1e-3
    assert np.array_equal(draw(pipe), picture) and np.array_equal(draw(other), picture)
    pipe.unload_textual_inversion()
    assert np.array_equal(draw(pipe), plain)


def test_a_word_of_several_vectors(tmp_path: Path) -> None:
    """Both tokenizers write it out, and several words may be what one file holds."""
    written = embeddings()
    save_file(
        dict(zip(("clip_l", "clip_g"), written, strict=True)), tmp_path / f"{WORD}.safetensors"
    )
    pipe, apart = ours(), ours()
    pipe.load_textual_inversion(tmp_path / f"{WORD}.safetensors")  # A1111: the word is its name
    apart.load_textual_inversion(tmp_path / f"{WORD}.safetensors", token=["<s0>", "<s1>"])
    for one, words in ((pipe, [WORD, f"{WORD}_1"]), (apart, ["<s0>", "<s1>"])):
        towers = (one.tokenizer, one.text_encoder), (one.tokenizer_2, one.text_encoder_2)
        for (known, encoder), vectors in zip(towers, written, strict=True):
            ids = known.convert_tokens_to_ids(words)
            assert torch.equal(encoder.get_input_embeddings().weight[ids], vectors)
            part = "text_encoder" if vectors is written[0] else "text_encoder_2"
            found = TextConditioner(known, encoder, part).tokenize([f"A {words[0].upper()}"])[0]
            assert [i for i in found.tolist() if i >= min(ids)] == ids[: 2 if one is pipe else 1]
    apart.unload_textual_inversion("<s0>")
    for known in (apart.tokenizer, apart.tokenizer_2):
        assert "<s0>" not in known.get_vocab() and "<s1>" in known.get_vocab()


def test_a_file_for_other_towers(tmp_path: Path) -> None:
    one = textual_inversion.write(WORD, embeddings()[:1], tmp_path / "one")
    both = textual_inversion.write(WORD, embeddings(), tmp_path / "both")
    pipe = ours()
    for there, file, told in (
        (pipe, one, "for one text encoder, and here are two"),
        (tiny.pipeline(), both, "for two text encoders (clip_l and clip_g), and here is one"),
    ):
        with pytest.raises(ValueError) as error:
            there.load_textual_inversion(file)
        assert str(error.value) == f"{file}: {told}"
    with pytest.raises(ValueError, match=r"is for two text encoders \(clip_l, clip_g\), and here "):
        textual_inversion.read(both)
    swapped = textual_inversion.write(WORD, embeddings()[::-1], tmp_path / "swapped")
    with pytest.raises(ValueError, match="for text encoder 1 of these: .* width 48, .* of 32$"):
        pipe.load_textual_inversion(swapped)
    for source in ({WORD: embeddings()[0]}, embeddings()[0], "someone/word"):
        with pytest.raises(
            ValueError, match="is no file for two text encoders: give one of clip_l"
        ):
            pipe.load_textual_inversion(source, token=WORD)
    uneven = {"clip_l": embeddings(1)[0], "clip_g": embeddings(2)[1]}
    save_file(uneven, tmp_path / "uneven.safetensors")
    with pytest.raises(ValueError, match="does not hold as many vectors for both text encoders$"):
        pipe.load_textual_inversion(tmp_path / "uneven.safetensors")
    # A word that only the second tokenizer has leaves the first as it was.
    pipe.load_textual_inversion({"<MY-CAT>": embeddings()[1]}, text_encoder=pipe.text_encoder_2)
    known = len(pipe.tokenizer)
    for more, told in (
        ({}, "differ in case alone"),
        ({"token": "<MY-CAT>"}, "the second tokenizer"),
    ):
        with pytest.raises(ValueError, match=told):
            pipe.load_textual_inversion(both, **more)
    assert len(pipe.tokenizer) == known and len(pipe.tokenizer_2) == known + 2
    pipe.unload_textual_inversion("<MY-CAT>")
    assert len(pipe.tokenizer) == known
    with pytest.raises(ValueError, match="No tokens to remove found"):
        pipe.unload_textual_inversion("<MY-CAT>")


def test_the_only_tower_is_the_second(tmp_path: Path) -> None:
    """As in SDXL's refiner."""
    pipe = ours(text_encoder=None, tokenizer=None)
    vectors = embeddings()[1]
    save_file({"clip_g": vectors}, tmp_path / f"{WORD}.safetensors")
    pipe.load_textual_inversion(tmp_path / f"{WORD}.safetensors")
    ids = pipe.tokenizer_2.convert_tokens_to_ids([WORD, f"{WORD}_1"])
    assert torch.equal(pipe.text_encoder_2.get_input_embeddings().weight[ids], vectors)


def test_a_word_learns_in_the_second_tower() -> None:
    parts = tiny_sdxl.components()
    words, tower = parts["tokenizer_2"], parts["text_encoder_2"].requires_grad_(False)
    known = tower.get_input_embeddings()
    start = known.weight[words("cat", add_special_tokens=False).input_ids]
    add_word(words, tower, WORD, "cat", len(start))
    (made,) = rows(tower).items()
    assert made[0] == "text_model.embeddings.token_embedding.rows"
    assert torch.equal(made[1], start)
    ids = torch.tensor([words(f"{WORD} {WORD}_1").input_ids])
    tower(ids).text_embeds.sum().backward()
    assert (made[1].grad[:2].abs().sum(1) > 0).all() and not made[1].grad[2:].any()
    assert known.weight.grad is None
