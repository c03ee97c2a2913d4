"""sd-scripts' data sets: what its config means here, and one clear line for all that is wrong."""

import json
import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter

from ldm.data.captions import Grammar
from ldm.data.collection import Collection
from ldm.data.images import ImageTransform
from ldm.data.order import Schedule
from ldm.data.sd_scripts import SdScriptsData
from ldm.diffusion import stream
from ldm.errors import DataError


@pytest.fixture(autouse=True)
def _own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def pictures(folder: Path, count: int, caption: str | None = "a thing", ending: str = ".txt"):
    """``count`` different pictures 0.png, 1.png, ... with the same caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        # Pictures of different folders differ, too: equal bytes are held out together.
        colour = (number, len(folder.name), sum(folder.name.encode()) % 256)
        Image.new("RGB", (4, 3), colour).save(folder / f"{number}.png")
        if caption is not None:
            (folder / f"{number}{ending}").write_text(caption, encoding="utf-8")


def config(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.toml"
    file.write_text(text, encoding="utf-8")
    return file


def data(path: Path, **options: object) -> SdScriptsData:
    return SdScriptsData(path=str(path), **{"held_out_fraction": 0.0, **options})


def captions(path: Path, **options: object) -> list[dict[str, tuple[str, ...]]]:
    found = data(path, **options).sources
    return [{e.key: e.captions for e in source.examples} for source in found]


EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
flip_aug = true
color_aug = false

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'one'
  class_tokens = 'sks girl'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'two'
  keep_tokens = 3
  caption_tag_dropout_rate = 0.25
  caption_prefix = 'best, '
  caption_suffix = ', day'
  caption_separator = ';'
  keep_tokens_separator = '|||'
  secondary_separator = '+'

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'

[[datasets]]
resolution = [768, 768]
color_aug = true
bucket_no_upscale = true
enable_wildcard = true
  [[datasets.subsets]]
  image_dir = 'two'
"""


def example(folder: Path) -> Path:
    pictures(folder / "one", 3, None)
    pictures(folder / "two", 5)
    pictures(folder / "reg", 8, None)
    return config(folder, EXAMPLE)


def test_options_come_from_the_most_special_place(tmp_path: Path) -> None:
    one, two, reg, again = data(example(tmp_path)).sources
    assert one.grammar == Grammar(shuffle=True, keep_tokens=2)
    assert two.grammar == Grammar(
        shuffle=True, keep_tokens=3, tag_dropout=0.25, prefix="best, ", suffix=", day",
        separator=";", keep_tokens_separator="|||", secondary_separator="+",
    )  # fmt: skip
    assert reg.grammar == Grammar(shuffle=True, keep_tokens=2)
    assert again.grammar == Grammar(shuffle=True, keep_tokens=1, wildcards=True)
    assert [s.examples[0].captions for s in (one, two, reg)] == [
        ("sks girl",), ("a thing",), ("human",),
    ]  # fmt: skip
    assert {s.kind for s in (one, two, reg)} == {"sd_scripts"}
    assert again.where("0.png") == str(tmp_path / "two/0.png")
    assert again.load(3).size == (4, 3)
    own = Grammar(tag_dropout=0.5)
    assert {s.grammar for s in data(tmp_path / "data.toml", grammar=own).sources} == {own}
    few = data(tmp_path / "data.toml", variants=4).sources
    assert [s.grammar.variants for s in few] == [4] * 4
    assert few[1].grammar.tag_dropout == 0.25
    assert len(few[1].captions(0)) == 4


def test_weights_are_repeats_times_pictures(tmp_path: Path) -> None:
    group = data(example(tmp_path))
    # 3 pictures x 10 and 5 x 1; 8 regularisation pictures weigh as much as these 35.
    assert [s.weight for s in group.sources] == [30, 5, 35, 5]
    assert [s.weight for s in data(tmp_path / "data.toml", weight=1.5).sources] == pytest.approx(
        [0.6, 0.1, 0.7, 0.1]
    )
    collection = Collection(group, ImageTransform())
    assert len(collection.train) == 3 + 5 + 8 + 5
    schedule = Schedule([s.weight for s in collection.sources])
    assert Counter(schedule[turn][0] for turn in range(75)) == {0: 30, 1: 5, 2: 35, 3: 5}


def test_held_out_pictures_have_no_weight(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 40)
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\ncaption_extension='.txt'\n"
    (source,) = data(config(tmp_path, text + "num_repeats=7"), held_out_fraction=0.5).sources
    held_out = int(source.held_out.sum())
    assert 8 < held_out < 32
    assert source.weight == 7 * (40 - held_out)


def test_one_line_about_what_other_keys_decide(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        _ = data(example(tmp_path)).sources
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'data.toml'}: left to this run's own config: batch_size = 4 as batch_size, "
        "resolution = 512 and [768, 768] as images.size, bucket_no_upscale = true as "
        "images.buckets.upscale, flip_aug = true as images.flip; without a counterpart here: "
        "color_aug = false and true"
    ]


def test_json_config_and_paths_beside_it(tmp_path: Path, monkeypatch) -> None:
    pictures(tmp_path / "set/one", 2, ending=".caption")
    tree = {
        "general": {"secondary_separator": None},
        "datasets": [{"subsets": [{"image_dir": "one"}]}],
    }
    file = tmp_path / "set/data.json"
    file.write_text(json.dumps(tree))
    monkeypatch.chdir(tmp_path)
    assert captions(file) == [{"0.png": ("a thing",), "1.png": ("a thing",)}]
    pictures(tmp_path / "one", 1, "nearer", ".caption")
    assert captions(file) == [{"0.png": ("nearer",)}]


def test_lines_are_alternatives_with_wildcards(tmp_path: Path, caplog) -> None:
    pictures(tmp_path / "a", 1, "\n1girl, {hat|cap}\r\n\n a girl\twith a hat \n")
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\ncaption_extension='txt'\n"
    (source,) = data(config(tmp_path, text + "enable_wildcard=true")).sources
    assert source.examples[0].captions == ("1girl, {hat|cap}", "a girl with a hat")
    assert source.captions(0) is None
    drawn = Counter(source.caption(0, stream(0, "test", n)) for n in range(400))
    assert drawn.keys() == {"1girl, hat", "1girl, cap", "a girl with a hat"}
    assert 150 < drawn["a girl with a hat"] < 250
    assert source.caption(0, None) == "1girl, hat"
    assert not caplog.records
    assert captions(config(tmp_path, text)) == [{"0.png": ("1girl, {hat|cap}",)}]
    assert "of 1 caption files with several lines the first is used" in caplog.text


def test_class_tokens_where_text_files_have_another_ending(tmp_path: Path, caplog) -> None:
    pictures(tmp_path / "a", 2)
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\nclass_tokens=' a  dog '"
    assert captions(config(tmp_path, text)) == [{"0.png": ("a dog",), "1.png": ("a dog",)}]
    assert "2 pictures get class_tokens as their caption, although text files lie" in caplog.text


def metadata(folder: Path, entries: object, image_dir: str = "image_dir = 'a'", more: str = ""):
    pictures(folder / "a", 3, None)
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "meta.json").write_text(text, encoding="utf-8")
    return config(
        folder,
        f"[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'meta.json'\n{image_dir}\n{more}",
    )


def test_metadata(tmp_path: Path) -> None:
    entries = {
        "0": {"caption": "a frog\nan animal", "tags": "green, sits", "train_resolution": [64, 64]},
        "1.png": {"tags": "red,  stands"},
        str(tmp_path / "a/2.png"): {"caption": " only\n\n words "},
        "below/0": {"caption": "deeper"},
    }
    pictures(tmp_path / "a/below", 1, None)
    first = {
        "0.png": ("a frog, green, sits",),
        "1.png": ("red, stands",),
        "2.png": ("only",),
        "below/0.png": ("deeper",),
    }
    assert captions(metadata(tmp_path, entries)) == [first]
    lines = captions(metadata(tmp_path, entries, more="enable_wildcard = true"))[0]
    assert lines["0.png"] == ("a frog, green, sits", "an animal, green, sits")
    assert lines["2.png"] == ("only", "words")


def test_metadata_with_whole_paths(tmp_path: Path) -> None:
    file = tmp_path / "a/0.png"
    entries = {str(file): {"caption": "x"}, str(tmp_path / "other/0.png"): {"tags": "y"}}
    pictures(tmp_path / "other", 2, None)
    (source,) = data(metadata(tmp_path, entries, image_dir="")).sources
    assert {e.captions for e in source.examples} == {("x",), ("y",)}
    assert {source.where(e.key) for e in source.examples} == {*entries}
    assert source.load(1).size == (4, 3)


def test_entries_and_texts_of_formats_that_are_not_read_are_not_to_blame(tmp_path: Path) -> None:
    c, d = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    entries = {name: {"caption": "x"} for name in ("0", "1.png", "2.png", f"{c}.psd", "3", "4.psd")}
    listed = metadata(tmp_path / "listed", entries)
    whole = {str(tmp_path / "listed/a" / name): about for name, about in entries.items()}
    named = metadata(tmp_path / "named", whole, image_dir="")
    pictures(tmp_path / "beside/a", 1)
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\ncaption_extension='.txt'"
    beside = config(tmp_path / "beside", text)
    (tmp_path / f"beside/a/{c}.txt").write_text("x")
    for folder in ("listed", "beside"):
        for name in (f"{d}.psd", "3.psd"):
            (tmp_path / folder / "a" / name).write_bytes(b"8BPS")
    lost = "metadata entries without a picture"
    found = {p.key: p.reason.partition(";")[0] for p in data(listed).sources[0].problems}
    unread = "pictures in a format that is not read"
    assert {key: reason[:37] for key, reason in found.items() if reason != lost} == {
        f"{d}.psd": unread, "3.psd": unread,
    }  # fmt: skip
    assert [key for key, reason in found.items() if reason == lost] == ["4.psd"]
    # Without image_dir a whole name is needed.
    problems = [(p.key.rpartition("/")[2], p.reason[:37]) for p in data(named).sources[0].problems]
    assert (f"{d}.psd", unread) in problems and not [k for k, _ in problems if k == f"{c}.psd"]
    assert {p.key for p in data(beside).sources[0].problems} == {f"{d}.psd", "3.psd"}


@pytest.mark.skipif(sys.platform == "darwin", reason="one name there")
def test_whole_paths_in_another_normal_form(tmp_path: Path) -> None:
    c, d = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    pictures(tmp_path / d, 2, None)
    (tmp_path / d / "1.png").rename(tmp_path / d / f"{d}.png")
    paths = [str(tmp_path / c / "0.png"), f"{c}/{c}.png"]
    file = metadata(tmp_path, {path: {"caption": "x"} for path in paths}, image_dir="")
    (source,) = data(file).sources
    assert [e.key for e in source.examples] == [f"{d}/0.png", f"{d}/{d}.png"]
    assert source.load(1).size == (4, 3) and not source.problems


def test_named_folders(tmp_path: Path, caplog) -> None:
    pictures(tmp_path / "img/10_sks dog", 2, None)
    pictures(tmp_path / "img/2_a_cat", 3, "a cat, sitting")
    pictures(tmp_path / "img/.hidden", 1, None)
    pictures(tmp_path / "img/rest", 1, None)
    (tmp_path / "img/10_sks dog/1.caption").write_text("its own")
    pictures(tmp_path / "reg/1_dog", 4, None)
    group = data(tmp_path / "img", reg_path=str(tmp_path / "reg"), grammar=Grammar(shuffle=True))
    cats, dogs, reg = group.sources
    assert [e.captions for e in dogs.examples] == [("sks dog",), ("its own",)]
    assert cats.examples[0].captions == ("a cat, sitting",)
    assert reg.examples[0].captions == ("dog",)
    assert [s.weight for s in group.sources] == [6, 20, 26]
    assert cats.grammar == Grammar(shuffle=True)
    assert "names do not begin with repeats: rest" in caplog.text
    assert data(tmp_path / "img").sources[0].grammar is None


def test_names_are_compared_in_one_normal_form(tmp_path: Path) -> None:
    c, d = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    pictures(tmp_path / "a", 3, None)
    (tmp_path / "a/0.png").rename(tmp_path / "a" / f"{d}.png")
    (tmp_path / "a" / f"{c}.txt").write_text("of the text file")
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\ncaption_extension='.txt'\n"
    text += "class_tokens='thing'"
    assert captions(config(tmp_path, text))[0][f"{d}.png"] == ("of the text file",)
    entries = {c: {"caption": "an entry"}, "1": {"tags": "x"}, r"C:\pics\2.png": {"tags": "x"}}
    file = metadata(tmp_path, entries)
    (tmp_path / "a/0.png").unlink()
    (source,) = data(file).sources
    assert {e.key: e.captions for e in source.examples} == {
        f"{d}.png": ("an entry",), "1.png": ("x",),
    }  # fmt: skip
    assert {p.key: p.reason.partition(";")[0] for p in source.problems} == {
        r"C:\pics\2.png": "metadata entries with a path of Windows",
        "2.png": "pictures without an entry in metadata_file",
    }
    (tmp_path / "a/1.png").rename(tmp_path / "a" / f"{c}.png")
    for several in (text, f"{text}\nmetadata_file='meta.json'"):
        (source,) = data(config(tmp_path, several)).sources
        assert not any(e.key in (f"{c}.png", f"{d}.png") for e in source.examples)
        named = [p.key for p in source.problems if "differ only in how accents" in p.reason]
        assert sorted(named) == [f"{d}.png", f"{c}.png"]


ONE = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"


def toml(text: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pictures(folder / "a", 2, ending=".caption")
        file = config(folder, "")
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return make


def meta(entries: object, **options: str) -> Callable[[Path], Path]:
    return lambda folder: metadata(folder, entries, **options)


def folders(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).mkdir(parents=True)
        return folder

    return make


def captioned(**files: str | bytes | None) -> Callable[[Path], Path]:
    """Two good pictures, and what is given on top or, None, taken away (``_`` for ``.``)."""

    def make(folder: Path) -> Path:
        file = toml(ONE)(folder)
        for name, content in files.items():
            path = folder / "a" / name.removeprefix("n").replace("_", ".")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return make


def nothing_in_it(folder: Path) -> Path:
    file = toml(ONE)(folder)
    for path in (folder / "a").iterdir():
        path.unlink()
    return file


def only_below(folder: Path) -> Path:
    file = nothing_in_it(folder)
    pictures(folder / "a/b", 2)
    return file


def two_ways(folder: Path) -> Path:
    pictures(folder / "1_x", 1, ending=".txt")
    (folder / "1_x/0.caption").write_text("y")
    return folder


FULL = {str(n): {"caption": "x"} for n in range(3)}
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda folder: folder / "none.toml", "this does not exist, check data.path"),
    "no TOML": (toml("a = ?\n"), "data.toml: not valid TOML (Invalid value (at line 1, column 5))"),
    "Windows": (toml(ONE.replace("'a'", "'C:\\hoge'")), 'hoge" does not exist: a path of Windows,'),
    "many digits": (toml("a = " + "1" * 5000), "not valid TOML (a number of too many digits)"),
    "backslash": (toml('image_dir = "C:\\hoge"'), "write paths in 'single quotes'"),
    "deep": (toml("a = " + "[" * 20000), "not valid TOML (nested too deep)"),
    "no UTF-8": (toml(b"a = '\xe9'"), "data.toml: byte 5 is not UTF-8"),
    "empty": (toml(""), "datasets is missing or no list, write it as [[datasets]]"),
    "no list": (toml("[datasets]\nresolution=512"), "datasets is missing or no list"),
    "no subsets": (toml("[[datasets]]\nresolution=1"), "datasets[0].subsets is missing or no list"),
    "no tables": (toml("datasets=[1]"), "datasets[0].subsets is missing"),
    "no table": (toml("datasets=[{subsets=[1]}]"), "datasets[0].subsets[0] must hold keys and"),
    "general": (toml("general=3"), "general must hold keys and values, write it as [general]"),
    "top": (toml("[general2]\n" + ONE), "unknown key 'general2'; did you mean 'general'?"),
    "top option": (toml("keep_tokens=1"), "unknown key 'keep_tokens'; put it below [general]"),
    "top subsets": (toml("[[subsets]]"), "unknown key 'subsets'; write it as [[datasets.subsets]]"),
    "typo": (toml(ONE + "num_repeat=1"), "subsets[0]: unknown key 'num_repeat'; did you mean 'num"),
    "strange": (toml(ONE + "zzz=1"), "datasets[0].subsets[0]: unknown key 'zzz'; remove it"),
    "control": (toml(ONE + "conditioning_data_dir='a'"), "pictures that steer (ControlNet) are no"),
    "place": (toml(ONE + "resolution=1"), "resolution belongs into [general] or [[datasets]], mov"),
    "place 2": (toml("[general]\nimage_dir='a'"), "general: image_dir belongs into [[datasets.sub"),
    "type": (toml(ONE + "num_repeats='3'"), 'subsets[0].num_repeats = "3" is not a whole number'),
    "bool": (toml(ONE + "num_repeats=true"), "num_repeats = true is not a whole number"),
    "float": (toml(ONE + "keep_tokens=1.5"), "keep_tokens = 1.5 is not a whole number"),
    "no bool": (toml(ONE + "shuffle_caption=1"), "shuffle_caption = 1 is not true or false"),
    "no text": (toml(ONE + "class_tokens=1"), "class_tokens = 1 is not a text"),
    "date": (toml(ONE + "class_tokens=2020-01-01"), 'class_tokens = "2020-01-01" is not a text'),
    "no number": (toml(ONE + "caption_tag_dropout_rate='x'"), 'rate = "x" is not a number'),
    "repeats": (toml(ONE + "num_repeats=0"), "num_repeats = 0 is less than 1, remove the subset"),
    "ending": (toml(ONE + "caption_extension='*'"), 'caption_extension = "*" is no file ending'),
    "rate": (toml(ONE + "caption_tag_dropout_rate=2"), "caption_tag_dropout_rate = 2 is not in [0"),
    "separators": (toml(ONE + "keep_tokens_separator=','"), "caption_separator = ',' is in keep_t"),
    "no folder": (toml("[[datasets]]\n[[datasets.subsets]]\n"), "subsets[0] has no image_dir, nam"),
    "lost folder": (toml(ONE.replace("'a'", "'b'")), '.image_dir = "b" does not exist, neither he'),
    "file": (toml(ONE.replace("'a'", "'data.toml'")), "data.toml is a file, name its folder"),
    "lost file": (toml(ONE + "metadata_file='m'"), '.metadata_file = "m" does not exist'),
    "folder as file": (toml(ONE + "metadata_file='a'"), "a is no file"),
    "twice": (toml(ONE + ONE.replace("[[datasets]]\n", "")), "stands twice in one dataset"),
    "no pictures": (nothing_in_it, "a: no picture in this folder, put .png"),
    "deeper": (only_below, "a: no picture in this folder, but 2 below it: name each folder"),
    "no caption": (captioned(n0_caption=None), "1 pictures without a .caption file where there ar"),
    "blank": (captioned(n0_caption=" \n"), "1 pictures with an empty caption file: 0.png; write i"),
    "Latin-1": (captioned(n0_caption=b"\xe9"), "caption file is unreadable (byte 0 is not UTF-8"),
    "orphan": (captioned(n7_caption="x"), "1 caption files without a picture: 7.caption; add it"),
    "broken": (captioned(n0_png=b"\x89PNG"), "pictures that cannot be read"),
    "JPEG XL": (captioned(n8_jxl=b"..."), "not read (JPEG XL): 8.jxl; save them as PNG"),
    "two ways": (two_ways, "1 pictures with several caption files (0.txt and 0.caption): 0.png;"),
    "no JSON": (meta('{"0": '), "meta.json: not valid JSON (Expecting value at line 1, column 7)"),
    "deep JSON": (meta("[" * 50000), "meta.json: not valid JSON (nested too deep)"),
    "double": (meta('{"0": {}, "0": {}}'), "meta.json: key '0' stands twice, remove one"),
    "a list": (meta([1]), "meta.json: no entry in this metadata file, it must hold"),
    "no entry": (meta({}), "meta.json: no entry in this metadata file"),
    "no object": (meta({**FULL, "0": "x"}), "1 metadata entries that are no objects: 0; write"),
    "numbers": (meta({**FULL, "0": {"tags": 3}}), "1 metadata entries whose caption or tags are n"),
    "null": (meta({**FULL, "0": {"caption": None}}), "1 metadata entries with neither caption nor"),
    "lost": (meta({**FULL, "9": {"tags": "x"}}), "1 metadata entries without a picture: 9; add it"),
    "outside": (meta({**FULL, "../9": {"tags": "x"}}), "1 metadata entries that point out of imag"),
    "again": (meta({**FULL, "0.png": {"tags": "x"}}), "1 metadata entries for a picture that has"),
    "not named": (meta({"0": {"tags": "x"}}), "2 pictures without an entry in metadata_file: 1.pn"),
    "nowhere": (meta(FULL, image_dir=""), "3 metadata entries without a picture: 0, 1, 2; add it"),
    "names": (folders("cats", "dogs"), "no folder in it is named like 10_sks dog"),
    "img": (folders("img/1_a", "log"), "no folder in it is named like 10_sks dog (repeats, class"),
    "zero": (folders("0_a"), "0_a: its name says 0 repeats, give at least 1 or move it away"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    path = make(tmp_path / "set")
    with pytest.raises(DataError) as error:
        Collection(data(path), ImageTransform())
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith(str(tmp_path))


def test_a_stem_that_fits_two_pictures(tmp_path: Path) -> None:
    file = metadata(tmp_path, FULL)
    Image.new("RGB", (4, 3)).save(tmp_path / "a/1.jpg")
    (source,) = data(file).sources
    assert [example.key for example in source.examples] == ["0.png", "2.png"]
    assert [(p.key, p.reason[:42]) for p in source.problems] == [
        ("1", "metadata entries that fit several pictures")
    ]


def test_bad_rows_can_be_skipped(tmp_path: Path) -> None:
    collection = Collection(
        data(captioned(n0_caption="", n1_caption="fine")(tmp_path)), ImageTransform(), "skip"
    )
    assert [item.example.key for item in collection.train] == ["1.png"]
    assert [problem.key for _, problem in collection.skipped] == ["0.png"]


def test_yaml_values() -> None:
    tree = {"kind": "sd_scripts", "path": "x", "grammar": {"tag_dropout": "1e-1", "shuffle": True}}
    found = TypeAdapter(SdScriptsData).validate_python(tree)
    assert found == SdScriptsData(path="x", grammar=Grammar(tag_dropout=0.1, shuffle=True))


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variants stands beside a grammar"):
        SdScriptsData(path="x", grammar=Grammar(), variants=2)
    with pytest.raises(ValueError, match="variants=-1: it cannot be less than 0"):
        SdScriptsData(path="x", variants=-1)
    with pytest.raises(DataError, match="data.reg_path is for folders, set is_reg"):
        _ = data(toml(ONE)(tmp_path), reg_path="y").sources
