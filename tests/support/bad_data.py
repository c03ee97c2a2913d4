"""Pictures of any kind that a data set should not hold, and some that it may."""

import json
import os
import struct
import unicodedata
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageCms, ImageEnhance

import icc


def photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Coloured noise with the spectrum of photographs: any two are unrelated."""
    draw = np.random.default_rng(seed)
    waves = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    waves[0, 0] = 1
    power = waves ** draw.uniform(1.2, 1.8)
    planes = [
        np.fft.ifft2(np.fft.fft2(draw.normal(size=(height, width))) / power).real for _ in range(3)
    ]
    pixels = np.stack([plane / plane.std() for plane in planes], -1)
    pixels = pixels @ (0.6 * np.eye(3) + draw.normal(0, 0.5, (3, 3)))
    pixels = 128 + pixels * draw.uniform(30, 60) + draw.uniform(-30, 30, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(BytesIO(encoded(image, "JPEG", quality=quality)))


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    w, h = image.size
    return image.crop((int(w * left), int(h * top), int(w * (1 - right)), int(h * (1 - bottom))))


def scaled(image: Image.Image, by: float) -> Image.Image:
    return image.resize((int(image.width * by), int(image.height * by)), Image.Resampling.LANCZOS)


# Copies that should be found.
COPIES = {
    "half the size": lambda image: scaled(image, 0.5),
    "a third of the size": lambda image: scaled(image, 1 / 3),
    "twice the size": lambda image: scaled(image, 2),
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 30": lambda image: jpeg(image, 30),
    "2 % cut off all around": lambda image: cut(image, 0.02, 0.02, 0.02, 0.02),
    "4 % cut off one side": lambda image: cut(image, 0.04, 0, 0, 0),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "all of it": lambda image: jpeg(
        scaled(cut(ImageEnhance.Brightness(image).enhance(1.1), 0.02, 0, 0, 0.02), 0.6), 60
    ),
}


def put(folder: Path, name: str, data: bytes | Image.Image, caption: str | None = "") -> str:
    """Writes a picture, by default with a caption of its own; returns its name."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, Image.Image):
        data.save(file)
    else:
        file.write_bytes(data)
    if caption is not None:
        Path(f"{file}.txt").write_text(caption or f"what {file.stem} shows in words")
    return name


def rows(folder: Path, *lines: object) -> None:
    """``metadata.jsonl`` with a row for ``row.png`` in front."""
    put(folder, "row.png", photo(77), None)
    every = [{"file_name": "row.png", "text": "a row of its own"}, *lines]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in every)
    (folder / "metadata.jsonl").write_text(text)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"\0\0", *, damage: bool = False) -> bytes:
    """A PNG whose header says whatever it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    if damage:
        header = header[:-1] + bytes([header[-1] ^ 255])
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def half(kind: str, **options: object) -> bytes:
    whole = encoded(photo(5), kind, **options)
    return whole[: len(whole) // 2]


def parquet(folder: Path) -> None:
    put(folder, "row.png", photo(77), None)
    table = {"file_name": ["row.png", "row.png"], "text": ["a row", None]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "metadata.parquet")


def csv(folder: Path, text: str) -> None:
    put(folder, "row.png", photo(77), None)
    (folder / "metadata.csv").write_text("file_name,text\n" + text)


def link(folder: Path, name: str, target: Path | str) -> None:
    (folder / name).symlink_to(target)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.png")


def odd_name(folder: Path) -> None:
    put(folder, "y.png", photo(5), None)
    os.rename(folder / "y.png", os.fsencode(folder) + b"/caf\xe9.png")


def outside(folder: Path) -> Path:
    """A picture with a caption where no data set of the test is."""
    elsewhere = Path(os.environ["LDM_CACHE"]) / "elsewhere"
    put(elsewhere, "x.png", photo(5))
    return elsewhere


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(5), "JPEG", exif=exif)


def inserted(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with ``chunks`` behind its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def talkative() -> bytes:
    """A PNG with a text that its decoder refuses."""
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**20 + 1)))
    return inserted(encoded(photo(5), "PNG"), text)


def scanned(times: int) -> bytes:
    """A progressive JPEG whose last scan stands ``times`` times."""
    whole = encoded(photo(5, 32, 32), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * times + whole[-2:]


def see_through() -> Image.Image:
    image = photo(5).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep() -> Image.Image:
    return Image.fromarray(np.asarray(photo(5).convert("L")).astype(np.uint16) * 257)


ADOBE = icc.rgb(icc.ADOBE, icc.GAMMA[icc.ADOBE])
CUT = "pictures-that-cannot-be-read"
FORMAT = "pictures-in-a-format-that-is-not-read"
NO_TEXT = "rows-whose-caption-is-empty-or-no-text"
JSON = "lines-that-are-not-valid-json"
OUT = "rows-that-point-out-of-the-folder"
LINK_OUT = "links-that-lead-out-of-the-folder"
ROW = "metadata.jsonl:2"
X = "x.png"


def file(name: str, data: bytes | Image.Image, caption: str | None = ""):
    """Makes one picture."""
    return lambda folder: put(folder, name, data, caption)


def row(text: object, name: str = "row.png"):
    return lambda folder: rows(folder, {"file_name": name, "text": text})


# Kind of input: what makes it in an empty folder; kind of finding; keys; part of a detail.
BAD = {
    "empty file": (file(X, b""), CUT, [X], "the file is empty"),
    "half a PNG": (file(X, half("PNG")), CUT, [X], "truncated"),
    "half a JPEG": (file("x.jpg", half("JPEG")), CUT, ["x.jpg"], "truncated"),
    "half a WebP": (file("x.webp", half("WEBP")), CUT, ["x.webp"], ""),
    "half a GIF": (file("x.gif", half("GIF")), CUT, ["x.gif"], ""),
    "half a BMP": (file("x.bmp", half("BMP")), CUT, ["x.bmp"], "truncated"),
    "half a TIFF": (file("x.tif", half("TIFF")), CUT, ["x.tif"], ""),
    "half a PPM": (file("x.ppm", half("PPM")), CUT, ["x.ppm"], "truncated"),
    "half an AVIF": (file("x.avif", half("AVIF")), CUT, ["x.avif"], ""),
    "a PNG's first bytes": (file(X, png(8, 8)[:20]), CUT, [X], ""),
    "damaged header": (file(X, png(8, 8, damage=True)), CUT, [X], ""),
    "too few pixels": (file(X, png(64, 64)), CUT, [X], ""),
    "decompression bomb": (file(X, png(30000, 30000)), CUT, [X], "pixels"),
    "small bomb": (file(X, png(10000, 10000)), CUT, [X], "more than the limit"),
    "no pixels": (file(X, png(0, 0)), CUT, [X], ""),
    "zeros": (file(X, bytes(500)), CUT, [X], "cannot identify"),
    "web page": (file("x.jpg", b"<html>404 Not Found</html>"), CUT, ["x.jpg"], "cannot identify"),
    "SVG as PNG": (file(X, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), CUT, [X], ""),
    "archive": (file(X, b"PK\x03\x04" + bytes(60)), CUT, [X], "cannot identify"),
    "LAB": (file("x.tif", Image.new("LAB", (64, 64))), CUT, ["x.tif"], "mode LAB"),
    "SVG": (file("x.svg", b"<svg/>", None), FORMAT, ["x.svg"], "SVG"),
    "SVG with a caption": (file("x.SVG", b"<svg/>"), FORMAT, ["x.SVG"], "SVG"),
    "camera raw": (file("x.nef", b"...", None), FORMAT, ["x.nef"], "camera raw"),
    "JPEG XL as JPEG": (file("x.jpg", b"\xff\x0a" + bytes(99)), CUT, ["x.jpg"], ": it is JPEG XL"),
    "thousands of scans": (file("x.jpg", scanned(2000)), CUT, ["x.jpg"], "more than 500 scans"),
    "whole numbers of millions": (
        file("x.tif", Image.new("I", (90, 90), 10**6)), CUT, ["x.tif"], "1e+06 do not say what",
    ),
    "light of 3.5": (file("x.tif", Image.new("F", (90, 90), 3.5)), CUT, ["x.tif"], "0 ... 3.5 are"),
    "values that are no numbers": (
        file("x.tif", Image.new("F", (90, 90), float("nan"))), CUT, ["x.tif"], "not finite",
    ),
    "no caption": (file(X, photo(5), None), "pictures-without-a-caption", [X], ""),
    "blank caption": (file(X, photo(5), " \n"), "pictures-with-an-empty-caption-file", [X], ""),
    "Latin-1 caption": (
        lambda f: (f / f"{put(f, X, photo(5))}.txt").write_bytes(b"caf\xe9"),
        "pictures-whose-caption-file-is-unreadable", [X], "byte 3 is not UTF-8",
    ),
    "UTF-16 caption": (
        lambda f: (f / f"{put(f, X, photo(5))}.txt").write_bytes("a cat".encode("utf-16")),
        "pictures-whose-caption-file-is-unreadable", [X], "byte 0 is not UTF-8",
    ),
    "two captions": (
        lambda f: (f / f"{put(f, X, photo(5))[:-4]}.caption").write_text("another"),
        "pictures-with-several-caption-files", [X], "x.caption and x.png.txt",
    ),
    "caption alone": (
        lambda f: (f / "x.txt").write_text("x"), "caption-files-without-a-picture", ["x.txt"], "",
    ),
    "row and caption file": (
        lambda f: (rows(f, {"file_name": X, "text": "x"}), put(f, X, photo(5))),
        "pictures-with-a-metadata-row-and-also-a-text-file", [X], "",
    ),
    "row without picture": (row("x", "no.png"), "rows-without-a-picture", [f"{ROW} no.png"], ""),
    "row without text": (lambda f: rows(f, {"file_name": "row.png", "label": 3}),
                         "rows-with-no-column-text", [f"{ROW} row.png"], "but file_name, label"),
    "row with a path of Windows": (row("x", "C:\\pics\\row.png"),
                                   "rows-with-a-path-of-windows", [f"{ROW} C:\\pics\\row.png"], ""),
    "row to a parent": (row("x", "../../x.png"), OUT, [f"{ROW} ../../x.png"], ""),
    "row to the root": (row("x", "/etc/passwd"), OUT, [f"{ROW} /etc/passwd"], ""),
    "null": (row(None), NO_TEXT, [f"{ROW} row.png"], ""),
    "nothing to see": (row("\u200b\ufeff"), NO_TEXT, [f"{ROW} row.png"], ""),
    "nothing to see in a file": (
        file(X, photo(5), "\u200b"), "pictures-with-an-empty-caption-file", [X], "",
    ),
    "blank": (row("  "), NO_TEXT, [f"{ROW} row.png"], ""),
    "number": (row(3), NO_TEXT, [f"{ROW} row.png"], ""),
    "no texts": (row([]), NO_TEXT, [f"{ROW} row.png"], ""),
    "blank among texts": (row(["x", ""]), NO_TEXT, [f"{ROW} row.png"], ""),
    "half a character": (lambda f: rows(f, r'{"file_name": "row.png", "text": "\ud83d"}'),
                         NO_TEXT, [f"{ROW} row.png"], ""),
    "no file name": (row("x", ""), "rows-with-no-file-name-in-file-name", [ROW], ""),
    "broken JSON": (lambda f: rows(f, '{"file_name": "row'), JSON, [ROW], "Unterminated string"),
    "deep JSON": (lambda f: rows(f, "[" * 100_000), JSON, [ROW], "too deep"),
    "JSON list": (lambda f: rows(f, "[1]"), "lines-that-are-no-json-object", [ROW], ""),
    "ragged CSV": (lambda f: csv(f, "row.png,a row\nrow.png,red, round\n"),
                   "lines-with-more-columns-than-the-header", ["metadata.csv:3"], ""),
    "CSV without text": (lambda f: csv(f, "row.png,a row\nrow.png\n"),
                         NO_TEXT, ["metadata.csv:3 row.png"], ""),
    "CSV that ends in quotes": (lambda f: csv(f, 'row.png,a row\nrow.png,"red'),
                                "tables-that-cannot-be-read", ["metadata.csv"], "is not valid CSV"),
    "null in parquet": (parquet, NO_TEXT, ["metadata.parquet:2 row.png"], ""),
    "link to nothing": (lambda f: link(f, X, "no.png"), "links-to-nothing", [X], ""),
    "link to itself": (lambda f: link(f, X, X), "links-to-nothing", [X], ""),
    "link to a picture outside": (lambda f: link(f, X, outside(f) / X), LINK_OUT, [X], ""),
    "link to a folder outside": (lambda f: link(f, "x", outside(f)), LINK_OUT, ["x"], ""),
    "pipe": (pipe, "neither-files-nor-folders", [X], ""),
    "two normal forms": (
        lambda f: [put(f, unicodedata.normalize(form, "\u00e9.png"), photo(n))
                   for n, form in enumerate(("NFC", "NFD"))],
        "files-whose-names-differ-only-in-how-accents-are-stored",
        ["e\u0301.png", "\u00e9.png"], "Unicode normal form",
    ),
    "name in Latin-1": (odd_name, "files-whose-name-is-not-utf-8", [r"caf\xe9.png"], ""),
}  # fmt: skip
# The same for what can be trained on, but should be known.
ODD = {
    "smaller than a step": (file(X, photo(5, 50, 90)), "smaller-than-a-step", [X], "50x90"),
    "small": (file(X, photo(5, 70, 90)), "small", [X], "70x90"),
    "huge": (file(X, photo(5).resize((4100, 2100), 0)), "huge", [X], "4100x2100"),
    "long": (file(X, photo(5, 240, 80)), "long", [X], "240x80"),
    "one colour": (file(X, Image.new("RGB", (90, 90), "teal")), "blank", [X], ""),
    "floating point": (file("x.tif", photo(5).convert("F")), "float", ["x.tif"], ""),
    "CMYK": (file("x.jpg", photo(5).convert("CMYK")), "cmyk", ["x.jpg"], ""),
    "Adobe RGB": (
        file(X, encoded(photo(5), "PNG", icc_profile=ADOBE)), "colour-profile", [X], "",
    ),
    "CMYK of a press": (
        file("x.jpg", encoded(photo(5).convert("CMYK"), "JPEG", icc_profile=icc.cmyk())),
        "colour-profile", ["x.jpg"], "",
    ),
    "profile of something else": (
        file(X, encoded(photo(5), "PNG", icc_profile=profile())),
        "unused-profile", [X], "it is for XYZ",
    ),
    "profile of CMYK on RGB": (
        file(X, encoded(photo(5), "PNG", icc_profile=icc.cmyk())),
        "unused-profile", [X], "it is for CMYK, the picture is RGB",
    ),
    "damaged profile": (
        file(X, encoded(photo(5), "PNG", icc_profile=ADOBE[:300])),
        "unused-profile", [X], "it is damaged",
    ),
    "PNG of gamma 1": (
        file(X, inserted(encoded(photo(5), "PNG"), chunk(b"gAMA", struct.pack(">I", 100_000)))),
        "other-gamma", [X], "",
    ),
    "text of a megabyte": (file(X, talkative()), "left-out", [X], "text or metadata"),
    "broken EXIF": (
        file(X, inserted(encoded(photo(5), "PNG"), chunk(b"eXIf", b"nonsense"))),
        "left-out", [X], "EXIF",
    ),
    "32 bits": (
        file("x.tif", Image.fromarray(np.asarray(photo(5).convert("L"), np.int32))),
        "32-bit", ["x.tif"], "",
    ),
    "16 bits": (file(X, deep()), "16-bit", [X], ""),
    "grey": (file(X, photo(5).convert("L")), "grey", [X], ""),
    "black and white": (file(X, photo(5).convert("1")), "grey", [X], ""),
    "palette": (file(X, photo(5).convert("P")), "palette", [X], ""),
    "transparent": (file(X, see_through()), "transparent", [X], ""),
    "turned by EXIF": (file("x.jpg", turned()), "rotated", ["x.jpg"], ""),
    "animated WebP": (
        file("x.webp", encoded(photo(5), "WEBP", save_all=True, append_images=[photo(6)])),
        "animated", ["x.webp"], "",
    ),
    "animated PNG": (
        file(X, encoded(photo(5), "PNG", save_all=True, append_images=[photo(6)])),
        "animated", [X], "",
    ),
    "JPEG named PNG": (file(X, encoded(photo(5), "JPEG")), "misnamed", [X], ""),
    "file name as caption": (file("IMG_1.png", photo(5), "img_1"), "file-names", ["IMG_1.png"], ""),
    "path as caption": (file(X, photo(5), "cats/7.jpg"), "file-names", [X], ""),
    **{
        f"{text!r} as caption": (file(X, photo(5), text), "says-nothing", [X], text)
        for text in (",,,", "...", "nan", "None", "null", "N/A", "&amp;", "&nbsp;", "<lora:x:1>",
                     "<p> </p>", "\u2026 \u200b!")
    },
    **{
        f"{text!r} as caption": (file(X, photo(5), text), "markup", [X], text)
        for text in ("cats &amp; dogs", "<b>a cat</b>", 'a <a href="x">cat</a><br/>',
                     "a cat <lora:x:0.8>", "a&#39;cat")
    },
    "mojibake": (file(X, photo(5), "a caf\u00c3\u00a9"), "broken-characters", [X], "xc3"),
    "lost character": (file(X, photo(5), "a caf\ufffd"), "broken-characters", [X], "ufffd"),
    "same file": (
        lambda f: (put(f, "1.png", photo(5)), put(f, "2.png", photo(5))),
        "exact-duplicates", ["1.png", "2.png"], "",
    ),
    "same pixels": (
        lambda f: (put(f, "1.png", photo(5)), put(f, "2.bmp", photo(5))),
        "pixel-duplicates", ["1.png", "2.bmp"], "",
    ),
    "nearly the same": (
        lambda f: (put(f, "1.png", photo(5)), put(f, "2.png", jpeg(photo(5), 75))),
        "near-duplicates", ["1.png", "2.png"], "",
    ),
    "shared caption": (
        lambda f: [put(f, f"{n}.png", photo(9 + n), "a dog" if n < 2 else "") for n in range(4)],
        "shared-captions", ["0.png", "1.png"], "a dog",
    ),
    "one caption for most": (
        lambda f: [put(f, f"{n}.png", photo(9 + n), "a dog") for n in range(2)],
        "dominant-caption", ["0.png", "1.png"], "a dog",
    ),
}  # fmt: skip
