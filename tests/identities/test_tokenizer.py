"""No character is ever dropped, and what is saved is what was trained."""

import json
import unicodedata
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from ldm.models.tokenizer import save_tokenizer, train_tokenizer

TEXTS = ["a red apple, twemoji style", "two green apples", "a red apple", "an apple's core"] * 3
HARD = [
    "xyzzy",
    "Ça va, élève naïf?",
    "e\u0301 decomposed",
    "\U0001f34e\U0001f9d1\u200d\U0001f680\ufe0f",
    "日本語 テスト",
    "Здравствуй мир",
    "العربية",
    "12,345.67% of $9 (a_b) {c|d} ~^`\\\"'",
    "tabs\tand\nlines",
    "\x00\x7f\u0378",
    "don't they're I'll",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(TEXTS, vocab_size=540, max_length=77)


def letters(text: str) -> str:
    """What CLIP keeps of a text: everything but case and spaces."""
    return "".join(unicodedata.normalize("NFC", text).lower().split())


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]  # also what an unknown token would become
    assert letters(tokenizer.decode(ids, skip_special_tokens=True)) == letters(text)


def test_every_character_of_three_planes_round_trips(tokenizer: CLIPTokenizer) -> None:
    characters = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000][::7]
    backend = tokenizer.backend_tokenizer
    for character, encoding in zip(characters, backend.encode_batch(characters), strict=True):
        # Python's tables of cases are older than those of the tokenizer's normalizer.
        lower = "".join(backend.normalizer.normalize_str(character).split())
        assert "".join(backend.decode(encoding.ids).split()) == lower, f"{ord(character):x}"


def test_layout_of_the_vocabulary(tokenizer: CLIPTokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocab) == 540
    names = sorted(vocab, key=vocab.get)
    assert [vocab[name] for name in names] == list(range(540))
    assert names[0] == "!" and names[256] == "!</w>"  # as OpenAI's
    assert [name + "</w>" for name in names[:256]] == names[256:512]
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 539
    assert tokenizer.tokenize("a red apple") == ["a</w>", "red</w>", "apple</w>"]


def test_deterministic_and_blind_to_order(tokenizer: CLIPTokenizer) -> None:
    again = train_tokenizer(reversed(TEXTS), vocab_size=540, max_length=77)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_few_texts_give_few_tokens() -> None:
    tokenizer = train_tokenizer(["ab", "ab"], vocab_size=5000, max_length=8)
    assert len(tokenizer) == 512 + 1 + 2
    assert tokenizer.model_max_length == 8


def test_saved_and_loaded_by_stock(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    written = (tmp_path / "tokenizer.json").read_bytes()
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 77 and len(loaded) == 540
    plain = CLIPTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for text in HARD + TEXTS[:4]:
        assert loaded(text).input_ids == tokenizer(text).input_ids == plain(text).input_ids
    assert json.loads((tmp_path / "vocab.json").read_text()) == tokenizer.get_vocab()
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version") and len(merges) == 1 + 540 - 514

    # Use must not show in the file.
    tokenizer(["a"], padding="max_length", max_length=9, truncation=True)
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == written


def test_sizes_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=513"):
        train_tokenizer(TEXTS, vocab_size=513, max_length=77)
    with pytest.raises(ValueError, match="max_length=2"):
        train_tokenizer(TEXTS, vocab_size=600, max_length=2)
