"""Our text conditions are what stock Stable Diffusion computes, to the bit."""

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.models.conditioner import TextConditioner, unnamed
from ldm.models.labels import LabelConditioner
from ldm.models.lengths import most, shortened
from ldm.models.tokenizer import train_tokenizer

TEXTS = [
    "a red apple, twemoji style",
    "",
    "xyzzy",
    "one two three four five six seven eight nine ten",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(["a red apple, twemoji style", "a green apple"] * 2, 560, max_length=12)


def text_encoder(tokenizer: CLIPTokenizer, **overrides: object) -> CLIPTextModel:
    numbers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(**(numbers | overrides))).eval()


def stock(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, text: str) -> torch.Tensor:
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    pipe.tokenizer, pipe.text_encoder, pipe.unet = tokenizer, encoder, None
    return pipe.encode_prompt(text, "cpu", 1, False)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_equals_stock_encode_prompt(tokenizer: CLIPTokenizer, masked: bool) -> None:
    encoder = text_encoder(tokenizer)
    encoder.config.use_attention_mask = masked
    with torch.no_grad():
        ours = TextConditioner(tokenizer, encoder).encode(TEXTS)
        theirs = torch.cat([stock(tokenizer, encoder, text) for text in TEXTS])
    assert ours.tokens.shape == (4, 12, 16)
    # One batch against four calls: matmuls of other sizes round differently.
    torch.testing.assert_close(ours.tokens, theirs, rtol=0, atol=1e-6)


def test_mask_is_the_tokenizers(tokenizer: CLIPTokenizer) -> None:
    condition = TextConditioner(tokenizer, text_encoder(tokenizer)).encode(TEXTS)
    theirs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12)
    assert condition.mask is not None and condition.mask.dtype == torch.bool
    assert condition.mask.long().tolist() == theirs["attention_mask"]
    assert condition.mask.sum(1).tolist() == [8, 2, 7, 12]


def test_mask_with_another_padding_token() -> None:
    trained = train_tokenizer(["a red apple"] * 2, 530, max_length=12)
    vocab = trained.get_vocab()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=12)
    condition = TextConditioner(tokenizer, text_encoder(tokenizer)).encode(["hey!", ""])
    theirs = tokenizer(["hey!", ""], padding="max_length", truncation=True, max_length=12)
    assert condition.mask is not None
    assert condition.mask.long().tolist() == theirs["attention_mask"]


def test_pooled_is_the_output_at_the_end_of_text(tokenizer: CLIPTokenizer) -> None:
    condition = TextConditioner(tokenizer, text_encoder(tokenizer)).encode(TEXTS)
    assert condition.mask is not None and condition.pooled is not None
    last = condition.mask.sum(1) - 1
    assert torch.equal(condition.pooled, condition.tokens[torch.arange(4), last])


def test_null_is_the_empty_text(tokenizer: CLIPTokenizer) -> None:
    conditioner = TextConditioner(tokenizer, text_encoder(tokenizer))
    null, empty = conditioner.null(3), conditioner.encode([""])
    assert len(null) == 3
    for row in range(3):
        assert torch.equal(null.tokens[row], empty.tokens[0])
        assert torch.equal(null.pooled[row], empty.pooled[0])
        assert torch.equal(null.mask[row], empty.mask[0])


def test_gradients_reach_the_text_encoder(tokenizer: CLIPTokenizer) -> None:
    encoder = text_encoder(tokenizer)
    conditioner = TextConditioner(tokenizer, encoder)
    conditioner.encode_ids(conditioner.tokenize(TEXTS)).tokens.square().mean().backward()
    gradients = [p.grad for p in encoder.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


def test_too_long_texts_are_reported_once_with_the_words_cut(
    tokenizer: CLIPTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    conditioner = TextConditioner(tokenizer, text_encoder(tokenizer))
    long = "a red apple, a green apple, a red apple and Zebra  stripes"
    with caplog.at_level(logging.WARNING):
        ids = conditioner.tokenize([long, "a red apple", long])
        conditioner.tokenize([long])
    assert ids.shape == (3, 12) and ids.dtype == torch.int64
    assert ids[0, -1] == tokenizer.eos_token_id
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].endswith("this part of it is not seen: 'apple and Zebra  stripes'")


def test_of_very_many_too_long_texts_the_first_are_reported(
    tokenizer: CLIPTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    conditioner = TextConditioner(tokenizer, text_encoder(tokenizer))
    with caplog.at_level(logging.WARNING):
        conditioner.tokenize([f"a red apple, a green apple, a red apple {n}" for n in range(300)])
        with unnamed():
            TextConditioner(tokenizer, text_encoder(tokenizer)).tokenize(["a red apple " * 9])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4 and messages[-1].startswith("further texts")


TEXTS_OF_MANY = {
    "words": "a red apple, and then ",
    "one word": "appleredgreen",
    "one letter": "a",
    "emoji": "\U0001f602",
    "marks": ", ",
    "composed": "e\u0301\u0323",  # two characters more than are left of it
    "spaces": "a \n \u3000" + " " * 500,
    "separators": "a\x1c\x1f\u200b ",
}


@pytest.mark.parametrize("name", TEXTS_OF_MANY)
def test_characters_that_are_not_read_move_no_token(
    name: str, tokenizer: CLIPTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """100,000 characters, read whole by the tokenizer and cut in front of it."""
    part = TEXTS_OF_MANY[name]
    text = (part * (100_000 // len(part) + 1))[:100_000]
    whole = tokenizer([text], padding="max_length", truncation=True, max_length=12)["input_ids"]
    conditioner = TextConditioner(tokenizer, text_encoder(tokenizer))
    assert len(shortened(text, 12)) <= most(12) == 3072 < len(text)
    with caplog.at_level(logging.WARNING):
        assert conditioner.tokenize([text]).tolist() == whole
    (message,) = [record.getMessage() for record in caplog.records]
    assert len(message) < 1500 and re.search(
        r" \.\.\. \([0-9]{2,3},[0-9]{3} characters\)$", message
    )
    assert 12 < conditioner.counts([text])[0] <= 4 * most(12) + 2
    longest = max(len(token.encode()) for token in tokenizer.get_vocab())
    assert most(1) > 8 * longest


def test_ten_megabytes_are_as_cheap_as_a_page(tokenizer: CLIPTokenizer) -> None:
    text = "a red apple " * 870_000
    assert len(text) > 10**7
    conditioner = TextConditioner(tokenizer, text_encoder(tokenizer))
    assert conditioner.counts([text, "a red apple"])[1] == 5
    assert torch.equal(conditioner.tokenize([text]), conditioner.tokenize([text[:999]]))
    assert train_tokenizer([text, text], 600, 12).get_vocab() == (
        train_tokenizer([text[: most(12)]] * 2, 600, 12).get_vocab()
    )


def test_labels_name_the_beginning_of_a_text() -> None:
    with pytest.raises(ValueError, match="says none of the classes") as error:
        LabelConditioner(["cat"]).tokenize(["dog " * 10**6])
    assert len(str(error.value)) < 300


def test_parts_that_do_not_belong_together_are_refused(tokenizer: CLIPTokenizer) -> None:
    for overrides, word in (
        ({"max_position_embeddings": 11}, "12 tokens"),
        ({"vocab_size": len(tokenizer) - 1, "pad_token_id": 0}, "tokens but"),
        ({"eos_token_id": 7}, "pools at eos_token_id=7"),
    ):
        with pytest.raises(ValueError, match=word):
            TextConditioner(tokenizer, text_encoder(tokenizer, **overrides))


def test_threads_read_in_turn(tokenizer: CLIPTokenizer) -> None:
    """What the tokenizer pads and cuts to is its own state."""
    conditioner = TextConditioner(tokenizer, text_encoder(tokenizer))
    alone = conditioner.tokenize(TEXTS), conditioner.counts(TEXTS)
    inside, most_inside = [], []

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *texts: Any, **how: Any) -> Any:
            inside.append(1)
            time.sleep(0.005)
            most_inside.append(len(inside))
            inside.pop()
            return tokenizer(*texts, **how)

    conditioner.tokenizer = Slow()  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:
        cut = [pool.submit(conditioner.tokenize, TEXTS) for _ in range(4)]
        counted = [pool.submit(conditioner.counts, TEXTS) for _ in range(4)]
    assert all(torch.equal(each.result(), alone[0]) for each in cut)
    assert all(each.result() == alone[1] for each in counted)
    assert set(most_inside) == {1}
