"""Captions that the text encoder does not see the end of: one line in a run, and a list."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.data.folder import FolderData
from ldm.encoding.long_captions import tell
from ldm.models.conditioner import TextConditioner
from ldm.models.tokenizer import save_tokenizer, train_tokenizer
from runs import tree

WORDS = ["picture one two three four five six seven"]


def folder(root: Path, long: int) -> Path:
    """Eight pictures, so many of them with captions of more than eight tokens, and one of 2 MB."""
    root.mkdir()
    for n in range(8):
        Image.new("RGB", (16, 16), (30 * n, 0, 0)).save(root / f"{n}.png")
        more = " one two three four five six seven" * (n + 1) if n < long else ""
        (root / f"{n}.txt").write_text(f"picture{more}" if n else f"picture{' two' * 500_000}")
    return root


def settings(tmp_path: Path, **changes: object) -> dict:
    save_tokenizer(train_tokenizer(WORDS * 2, 700, 8), tmp_path / "words")
    text = {
        "vocab_size": 700, "max_length": 8, "hidden_size": 32, "intermediate_size": 64, "layers": 1,
        "heads": 2, "tokenizer": str(tmp_path / "words"),
    }  # fmt: skip
    data = {"path": str(folder(tmp_path / "data", 6)), "held_out_fraction": 0}
    return tree(tmp_path / "run", data=data, text=text, batch_size=4, duration="2 steps", **changes)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "tokens" in r.getMessage()]


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_says_in_one_line_which_captions_are_cut(command, tmp_path, caplog, cached):
    """The captions of the data in a list, a prompt of the user's own by its words; each once."""
    validation = {"every": "1 steps", "images": 4, "levels": 1, "steps": 1}
    validation |= {"prompts": [f"{WORDS[0]} one"]}
    config = settings(tmp_path, cache_text=cached, validation=None if cached else validation)
    status, output = command(config)
    assert status == 0, output
    file = tmp_path / "run" / "long_captions.jsonl"
    said = [
        "6 of 8 pictures have a caption longer than the 8 tokens that the text encoder sees; of the"
        " worst, 0.png, at least 505 tokens are cut: it has 2,000,007 characters; all are in"
        f" {file}"
    ]
    prompt = "a text is longer than 8 tokens, this part of it is not seen: 'six seven one'"
    assert messages(caplog) == (said if cached else [*said, prompt])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["key"], line["tokens_cut"]) for line in lines] == [
        ("0.png", 505), *((f"{n}.png", 7 * (n + 1) - 5) for n in range(1, 6)),
    ]  # fmt: skip
    assert lines[1]["caption"].startswith("picture one two") and lines[1]["source"].endswith("data")


def test_nothing_is_said_where_nothing_is_cut_and_where_a_run_goes_on(tmp_path, caplog):
    source = FolderData(path=str(folder(tmp_path / "data", 0)), held_out_fraction=0)
    words = train_tokenizer(WORDS * 2, 700, 8)
    numbers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    numbers |= {"vocab_size": len(words), "eos_token_id": words.eos_token_id}
    shape = CLIPTextConfig(**numbers, num_attention_heads=1, max_position_embeddings=8)
    conditioner = TextConditioner(words, CLIPTextModel(shape))
    (tmp_path / "on/checkpoints/images-000000000004").mkdir(parents=True)
    tell(tmp_path / "on", [source], conditioner)
    assert messages(caplog) == [] and len(list((tmp_path / "on").iterdir())) == 1
    tell(tmp_path / "new", [source], conditioner)
    assert len(messages(caplog)) == 1 and (tmp_path / "new/long_captions.jsonl").exists()
    (tmp_path / "data/0.txt").write_text("picture one two three four five")
    short = FolderData(path=source.path, held_out_fraction=0)
    tell(tmp_path / "none", [short], conditioner)
    assert len(messages(caplog)) == 1 and not (tmp_path / "none").exists()
