"""Picture files of any colours, depth and format, and whatever stands beside their pixels."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from typer.testing import CliRunner

import icc
from bad_data import ADOBE, chunk, deep, encoded, inserted, photo, put, scanned, talkative
from ldm.cli import app
from ldm.data import colour, picture
from ldm.data.collection import Collection
from ldm.data.container import MOST_SCANNED, bounded, scans
from ldm.data.folder import FolderData
from ldm.data.images import ImageTransform, flatten
from ldm.data.picture import READABLE, UNREADABLE, decode, look, read
from ldm.data.sd_scripts import SdScriptsData
from ldm.errors import DataError
from ldm.evaluation.reference import of_items

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RED = (200, 40, 40)
BLUE = (0, 0, 255)
SRGB = icc.rgb(icc.SRGB)
LCMS_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def plain(mode: str, value: object, profile: bytes | None, kind: str = "PNG") -> bytes:
    return encoded(Image.new(mode, (16, 16), value), kind, icc_profile=profile)


def seen(data: bytes) -> tuple[int, ...]:
    """What is trained on of the first pixel, over blue."""
    return tuple(ImageTransform(1, background=BLUE)(decode(data, "x"))[:, 0, 0].tolist())


# -- colours --


@pytest.mark.parametrize("primaries", icc.GAMMA, ids=["Adobe RGB", "Display P3", "ProPhoto"])
def test_colours_of_cameras_and_displays(primaries: tuple) -> None:
    profile = icc.rgb(primaries, icc.GAMMA[primaries])
    for pixel in (RED, (172, 44, 44), (10, 200, 90), (90, 90, 90), (0, 0, 0), (255, 255, 255)):
        found = read(plain("RGB", pixel, profile), "x")
        assert found.converted and not found.profile
        pixels = found.picture.getpixel((0, 0))
        assert np.abs(np.array(pixels) - icc.meant(pixel, primaries)).max() < 1
        assert "icc_profile" not in found.picture.info


def test_the_reds_of_the_report() -> None:
    """sRGB (200, 40, 40) in the files of other programs."""
    for primaries, stored in ((icc.ADOBE, (172, 44, 44)), (icc.DISPLAY_P3, (182, 59, 52))):
        profile = icc.rgb(primaries, icc.GAMMA[primaries])
        for kind in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            data = encoded(Image.new("RGB", (16, 16), stored), kind, icc_profile=profile, **options)
            assert seen(data) == RED


def test_colours_of_a_press() -> None:
    profile = icc.cmyk()
    for n, lab in enumerate(icc.INKS.values()):
        inks = tuple(255 * (place == n) for place in range(4))
        found = np.array(seen(plain("CMYK", inks, profile, "TIFF")))
        assert np.abs(found - icc.of_lab(lab)).max() < 2
    assert seen(plain("CMYK", (0, 0, 0, 0), profile, "JPEG")) == (255, 255, 255)
    assert seen(plain("CMYK", (0, 255, 255, 0), None, "JPEG")) == (255, 0, 0)  # as always


def test_grey_with_a_profile() -> None:
    for gamma, level in ((1.8, 119), (1.0, 168), (2.2, 100)):
        light = np.array([0.9642, 1, 0.8249]) * (100 / 255) ** gamma
        assert np.abs(icc.levels(light) - level).max() < 0.5
        assert seen(plain("L", 100, icc.grey(gamma))) == (level, level, level)
        assert read(plain("LA", (100, 51), icc.grey(gamma)), "x").picture.getpixel((0, 0))[3] == 51
    # Grey in the space of a camera, as many programs leave it.
    assert seen(plain("L", 128, icc.rgb(icc.ADOBE, 1.0))) == (188, 188, 188)
    # Of more bits, too.
    for mode, value, kind in (
        ("I;16", 25700, "PNG"),
        ("I;16", 25700, "TIFF"),
        ("I", 100, "TIFF"),
        ("F", 100 / 255, "TIFF"),
    ):
        data = plain(mode, value, icc.grey(1.0), kind)
        assert seen(data) == (168, 168, 168) and read(data, "x").converted
        damaged = read(plain(mode, value, icc.grey(1.0)[:150], kind), "x")
        assert damaged.profile == "it is damaged" and not damaged.converted
        assert damaged.picture.convert("RGB").getpixel((0, 0)) == (100, 100, 100)


def test_transparency_is_no_colour() -> None:
    for mode, pixel in (("RGBA", (*RED, 0)), ("RGBA", (*RED, 77)), ("P", 1)):
        image = Image.new(mode, (4, 4), pixel)
        if mode == "P":
            image.putpalette([0, 0, 0, *RED])
            image.info["transparency"] = 1
        data = encoded(image, "PNG", icc_profile=ADOBE)
        alpha = decode(data, "x").convert("RGBA").getpixel((0, 0))[3]
        assert alpha == (77 if 77 in np.atleast_1d(pixel) else 0)
        assert seen(data) == BLUE or alpha


@pytest.mark.parametrize("profile", [SRGB, LCMS_SRGB], ids=["sRGB of HP", "sRGB of lcms"])
def test_srgb_moves_no_level(profile: bytes) -> None:
    for image in (photo(1), photo(2).convert("L"), photo(3).convert("P"), photo(4).convert("RGBA")):
        with_it, without = (encoded(image, "PNG", icc_profile=p) for p in (profile, None))
        one, other = (read(data, "x") for data in (with_it, without))
        assert one.picture.mode == other.picture.mode == image.mode
        assert one.picture.tobytes() == other.picture.tobytes() == image.tobytes()
        assert not one.converted and not one.profile and one.how == other.how == ""
        assert look(with_it).digest == hashlib.sha256(with_it).digest()


def test_what_is_nearly_srgb_is_left_alone_up_to_a_level() -> None:
    (red, *rest), (green, *others), blue = icc.SRGB
    for by, converted in ((0.0002, False), (0.002, True)):
        profile = icc.rgb(((red + by, *rest), (green - by, *others), blue))
        assert read(plain("RGB", RED, profile), "x").converted == converted


def test_only_what_is_seen_otherwise_has_another_digest() -> None:
    """Caches of pictures are keyed by it."""
    image = photo(1)
    others = {
        "Adobe RGB": encoded(image, "PNG", icc_profile=ADOBE),
        "CMYK": encoded(image.convert("CMYK"), "TIFF", icc_profile=icc.cmyk()),
        "floats": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        "32 bits": encoded(Image.new("I", (4, 4), 128), "TIFF"),
    }
    for data in others.values():
        assert look(data).digest != hashlib.sha256(data).digest()
        assert look(data) == look(data) and not look(data).problem
    same = [
        encoded(image, "JPEG"),
        encoded(image, "PNG", icc_profile=ADOBE[:300]),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "PNG", icc_profile=icc.cmyk()),
        encoded(deep(), "PNG"),
        encoded(image.convert("F"), "TIFF"),
    ]
    for data in same:
        assert look(data).digest == hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    ("profile", "mode", "reason"),
    [
        (ADOBE[:300], "RGB", "it is damaged"),
        (b"nonsense" * 40, "RGB", "it is damaged"),
        (icc.cmyk(), "RGB", "it is for CMYK, the picture is RGB"),
        (icc.grey(1.8), "RGB", "it is for L, the picture is RGB"),
        (ADOBE, "CMYK", "it is for RGB, the picture is CMYK"),
    ],
)
def test_a_profile_that_cannot_be_used_counts_as_none(
    profile: bytes, mode: str, reason: str
) -> None:
    image = Image.new("RGB", (16, 16), RED).convert(mode)
    found = read(encoded(image, "TIFF", icc_profile=profile), "x")
    assert found.profile == reason and not found.converted and not found.how
    assert found.picture.tobytes() == image.tobytes()
    assert "icc_profile" not in found.picture.info


def test_a_profile_of_many_megabytes_is_not_opened(monkeypatch) -> None:
    monkeypatch.setattr(colour, "LARGEST_PROFILE", 2**20)
    found = read(encoded(photo(1), "TIFF", icc_profile=ADOBE + bytes(2**20)), "x")
    assert found.profile == "it has more than 1 MB" and not found.converted


def test_without_littlecms_pictures_are_read_all_the_same(monkeypatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("The _imagingcms C module is not installed")

    colour._transform.cache_clear()
    monkeypatch.setattr(ImageCms, "getOpenProfile", missing)
    found = read(plain("RGB", RED, ADOBE), "x")
    assert found.picture.getpixel((0, 0)) == RED and "not installed" in found.profile


def test_a_profile_is_opened_once(monkeypatch) -> None:
    opened = []
    original = ImageCms.getOpenProfile
    monkeypatch.setattr(ImageCms, "getOpenProfile", lambda *a: opened.append(a) or original(*a))
    profile = icc.rgb(icc.ADOBE, 2.1)
    for n in range(5):
        read(plain("RGB", (n, 0, 0), profile), "x")
    assert len(opened) == 1


def test_converted_to_plain_files(own_cache, tmp_path: Path) -> None:
    """``--fix convert`` leaves no profile on a file whose colours are not those any more."""
    root, out = tmp_path / "data", tmp_path / "plain"
    put(root, "a.png", encoded(photo(1), "PNG", icc_profile=ADOBE))
    put(root, "b.jpg", encoded(photo(2).convert("CMYK"), "JPEG", icc_profile=icc.cmyk()))
    put(root, "c.png", encoded(photo(3), "PNG", icc_profile=SRGB))
    put(root, "d.png", encoded(photo(4), "PNG", icc_profile=icc.cmyk()))
    result = CliRunner().invoke(
        app, ["data", "check", str(root), "--fix", "convert", "--out", str(out)]
    )
    assert result.exit_code == 0
    for name in ("a.png", "b.jpg", "c.png", "d.png"):
        copy = Image.open(out / (name if name.endswith(".png") else f"{name}.png"))
        assert copy.mode == "RGB" and "icc_profile" not in copy.info
        assert copy.tobytes() == flatten(decode((root / name).read_bytes(), name), BLUE).tobytes()


def test_evaluation_sees_what_training_sees(own_cache, tmp_path: Path) -> None:
    from ldm.evaluation.features import Space

    put(tmp_path / "data", "a.png", plain("RGB", (172, 44, 44), ADOBE))
    transform = ImageTransform(size=4)
    items = Collection(FolderData(str(tmp_path / "data"), held_out_fraction=0), transform).train
    mean = Space("pixels", lambda x: x.mean((2, 3)), ())
    levels = (of_items(items, transform)(mean) + 1) * 127.5
    assert levels.round().tolist() == [list(RED)]


# -- depth --


def png(depth: int, kind: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of 2 x 1 pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels


def clear(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def tiff(values: bytes, bits: int, photometric: int = 1, kind: int = 1) -> bytes:
    """A TIFF of 2 x 1 grey pixels."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
            279: len(values), 339: kind}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    values += bytes(len(values) % 2)
    start = struct.pack("<4sI", b"II*\0", 8 + len(values))
    return start + values + struct.pack("<H", len(tags)) + entries + bytes(4)


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(floats(0.5, 1), 32, kind=3), [128, 255]),
        (tiff(floats(7, 255), 32, kind=3), [7, 255]),
        (tiff(floats(0, 0.25), 32, photometric=0, kind=3), [255, 191]),
        (tiff(np.array([128, 3], "<i4").tobytes(), 32, kind=2), [128, 3]),
        (tiff(np.array([128, 3], "<u4").tobytes(), 32), [128, 3]),
        (tiff(np.array([257 * 9, 65535], "<u4").tobytes(), 32), [9, 255]),
        (tiff(np.array([257 * 9, 257], "<u2").tobytes(), 16), [9, 1]),
        (tiff(np.array([257 * 9, 257], "<u2").tobytes(), 16, photometric=0), [246, 254]),
        (tiff(b"\xff\xf8\0", 12), [255, 128]),
        (png(16, 0, b"\x64\x64\x12\x12"), [100, 18]),
        (png(16, 0, b"\x64\x64\x12\x12", clear(0x1212)), [100, BLUE]),
        (png(4, 0, b"\xf3", clear(15)), [BLUE, 51]),
        (png(2, 0, b"\xd0", clear(1)), [255, BLUE]),
        (png(1, 0, b"\x80", clear(1)), [BLUE, 0]),
        (png(8, 0, b"\x07\x70", clear(7)), [BLUE, 112]),
        (png(16, 2, b"\x12\x34" * 3 + b"\x99\0" * 3, clear(*[0x1234] * 3)), [BLUE, 0x99]),
        (png(16, 4, b"\x12\x34\0\0\x55\x55\xff\xff"), [BLUE, 0x55]),
    ],
)  # fmt: skip
def test_values_of_any_depth(data: bytes, expected: list) -> None:
    found = np.asarray(flatten(decode(data, "x"), BLUE))[0].tolist()
    assert found == [[v] * 3 if isinstance(v, int) else list(v) for v in expected]


def test_pgm_of_16_bits_is_not_brightened() -> None:
    """Its values reach 255 of 65535 at most: nearly black."""
    data = b"P5 2 1 65535\n" + struct.pack(">2H", 255, 128)
    assert np.asarray(flatten(decode(data, "x"), BLUE)).max() == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(floats(0, 3.5), 32, kind=3), "0 ... 3.5 are neither 0 ... 1 nor 0 ... 255"),
        (tiff(floats(-1, 1), 32, kind=3), "of -1 ... 1 do not say what white is"),
        (tiff(floats(0, 300), 32, kind=3), "of 0 ... 300 do not say what white is"),
        (tiff(floats(0, float("nan")), 32, kind=3), "not finite"),
        (tiff(np.array([0, 70000], "<i4").tobytes(), 32, kind=2), "0 ... 70000 do not say"),
        (tiff(np.array([-5, 9], "<i2").tobytes(), 16, kind=2), "-5 ... 9 do not say"),
    ],
)
def test_values_that_do_not_say_what_white_is(data: bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        decode(data, "a.tif")
    assert message in str(error.value) and "save it with 8 bits" in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK",
                                  "YCbCr", "HSV", "I", "F", "I;16", "I;16B", "I;16L"])  # fmt: skip
def test_every_mode_of_pillow_can_be_flattened(mode: str) -> None:
    found = flatten(Image.new(mode, (2, 2)), BLUE)
    assert (found.mode, found.size) == ("RGB", (2, 2))


# -- what stands beside the pixels --


def crowded(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with further segments."""
    made = (struct.pack(">BBH", 0xFF, kind, len(text) + 2) + text for kind, text in segments)
    whole = encoded(photo(5), "JPEG")
    return whole[:2] + b"".join(made) + whole[2:]


WHOLE = encoded(photo(5), "PNG")
LONG = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**20 + 1)))
SHORT = zlib.compress(bytes(2**20))
BESIDE = {
    "compressed text of a megabyte": talkative(),
    "70 MB of text": inserted(
        WHOLE, *[chunk(b"zTXt", b"%d\0\0" % n + SHORT) for n in range(70)]
    ),
    "text behind the pixels": WHOLE[:-12] + LONG + WHOLE[-12:],
    "text of an unknown method": inserted(WHOLE, chunk(b"zTXt", b"k\0\x07abc")),
    "damaged text": inserted(WHOLE, chunk(b"tEXt", b"k\0abc")[:-1] + b"?"),
    "short chunk": inserted(WHOLE, chunk(b"gAMA", b"k")),
    "profile of a bomb": inserted(
        WHOLE, chunk(b"iCCP", b"n\0\0" + zlib.compress(bytes(2**25)))
    ),
    "animation with text": inserted(
        encoded(photo(5), "PNG", save_all=True, append_images=[photo(6)]), LONG
    ),
    "broken EXIF": inserted(WHOLE, chunk(b"eXIf", b"nonsense")),
    "broken EXIF as text": inserted(
        WHOLE, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz\n")
    ),
    "comments of 13 MB": crowded(*[(0xFE, b"x" * 65000)] * 200),
    "EXIF of 13 MB": crowded(*[(0xE1, b"Exif\0\0II*\0" + b"x" * 65000)] * 200),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_pixels_is_left_out(name: str) -> None:
    found = read(BESIDE[name], "x")
    expected = photo(5)
    if BESIDE[name].startswith(b"\xff\xd8"):
        expected = Image.open(io.BytesIO(encoded(expected, "JPEG")))
    assert found.left_out
    assert found.picture.tobytes() == expected.tobytes()
    assert look(BESIDE[name]).digest == hashlib.sha256(BESIDE[name]).digest()


def test_a_large_profile_of_a_png_is_used() -> None:
    """Pillow alone refuses the file from 1 MB on."""
    size = 2 * 2**20
    large = struct.pack(">I", size) + ADOBE[4:] + bytes(size - len(ADOBE))
    data = inserted(plain("RGB", (172, 44, 44), None),
                    chunk(b"iCCP", b"n\0\0" + zlib.compress(large)))  # fmt: skip
    assert seen(data) == RED


def test_which_way_is_up_is_not_left_out() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo(5), "JPEG", exif=exif)
    crowd = crowded(*[(0xFE, b"x" * 65000)] * 100)
    many = turned[:2] + crowd[2 : crowd.index(b"\xff\xe0")] + turned[2:]
    for data in (turned, many, inserted(encoded(photo(5), "PNG", exif=exif), LONG)):
        found = read(data, "x")
        assert found.picture.size == (80, 96) and found.turned
    assert len(bounded(many)) < len(turned) + 100


def test_the_limits_of_the_caller_stay(monkeypatch) -> None:
    from PIL import ImageFile, PngImagePlugin

    read(talkative(), "x")
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20 and not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError, match="Decompressed data too large"):
        Image.open(io.BytesIO(talkative()))


def test_scans_of_a_jpeg(monkeypatch) -> None:
    ordinary = encoded(photo(5, 32, 32), "JPEG", progressive=True)
    assert scans(encoded(photo(5), "JPEG")) == 1 and 5 < scans(ordinary) < 15
    assert scans(scanned(400)) == scans(ordinary) + 399
    assert decode(scanned(400), "x").size == (32, 32)
    with pytest.raises(DataError, match="a JPEG of more than 500 scans"):
        decode(scanned(600), "x")
    # Where a thumbnail or a profile holds the bytes of a scan's marker, none is counted.
    assert scans(crowded((0xE2, b"\xff\xda" * 1000))) == 1
    # Every scan goes through the whole picture: the larger it is, the fewer.
    assert MOST_SCANNED // 8000**2 == 67
    monkeypatch.setattr(picture, "MOST_SCANNED", 300 * 32**2)
    assert decode(scanned(200), "x").size == (32, 32)
    with pytest.raises(DataError, match="more than 300 scans, the limit at its size"):
        decode(scanned(400), "x")


# -- formats --

FORMATS = {
    ".apng": ("PNG", {}), ".jpe": ("JPEG", {}), ".jfif": ("JPEG", {}), ".mpo": ("MPO", {}),
    ".dib": ("DIB", {}), ".pgm": ("PPM", {}), ".pnm": ("PPM", {}), ".qoi": ("QOI", {}),
    ".tga": ("TGA", {}), ".jp2": ("JPEG2000", {}), ".j2k": ("JPEG2000", {"no_jp2": True}),
}  # fmt: skip


def test_formats_that_are_read(own_cache, tmp_path: Path) -> None:
    for suffix, (kind, options) in FORMATS.items():
        put(tmp_path, f"x{suffix}", encoded(photo(5), kind, **options))
    data = FolderData(str(tmp_path), held_out_fraction=0)
    keys = [example.key for example in data.examples]
    assert sorted(keys) == sorted(f"x{suffix}" for suffix in FORMATS) and not data.problems
    for n, key in enumerate(keys):
        difference = np.abs(np.asarray(data.load(n), int) - np.asarray(photo(5), int))
        assert difference.mean() < (12 if key.endswith((".jpe", ".jfif", ".mpo")) else 1), key


def test_tga_without_bits_of_alpha_is_not_transparent() -> None:
    data = bytearray(encoded(Image.new("RGBA", (2, 2), (*RED, 0)), "TGA"))
    assert seen(bytes(data)) == BLUE
    data[17] &= 0xF0
    assert seen(bytes(data)) == RED


def test_every_suffix_of_a_picture_is_read_or_named() -> None:
    assert not set(READABLE) & set(UNREADABLE)
    for suffix in UNREADABLE:
        reason = picture.not_read(f"sub/x{suffix.upper()}")
        assert reason.startswith("pictures in a format that is not read (") and "); " in reason


def test_no_program_is_started_for_a_picture() -> None:
    """Pillow would hand this to Ghostscript."""
    with pytest.raises(DataError, match="it is PDF or PostScript"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "x.png")


def test_heic_is_named_first_with_the_way_out(own_cache, tmp_path: Path) -> None:
    if picture.HEIF:
        pytest.skip("it is read here")
    put(tmp_path, "a.png", photo(5))
    put(tmp_path, "b.heic", b"\0\0\0\x18ftypheic" + bytes(99), None)
    (tmp_path / "b.txt").write_text("what telephones make")
    data = FolderData(str(tmp_path), held_out_fraction=0)
    with pytest.raises(DataError) as error:
        Collection(data, ImageTransform())
    assert str(error.value).startswith(
        f"{tmp_path}: 1 pictures in a format that is not read (HEIF, pip install"
        " 'ldm[heif]' or pillow-heif): b.heic; save them as PNG or JPEG, or set on_bad_sample"
    )
    assert [problem.key for problem in data.problems] == ["b.heic"]
    with pytest.raises(DataError, match="it is HEIF, pip install"):
        decode(b"\0\0\0\x18ftypheic" + bytes(99), "c.jpg")


def test_a_format_that_is_not_read_is_named_where_it_is_all(own_cache, tmp_path: Path) -> None:
    put(tmp_path, "b.jxl", b"\xff\x0a")
    with pytest.raises(DataError, match=r"not read \(JPEG XL\): b.jxl; save them as PNG"):
        Collection(FolderData(str(tmp_path)), ImageTransform())


def test_heic_is_read_with_pillow_heif(own_cache, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    put(tmp_path, "a.heic", encoded(photo(5), "HEIF", quality=95))
    data = FolderData(str(tmp_path), held_out_fraction=0)
    assert np.abs(np.asarray(data.load(0), int) - np.asarray(photo(5), int)).mean() < 12


def test_files_that_are_no_pictures_are_told(own_cache, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "ldm")
    root = tmp_path / "data"
    folder = root / "10_dog"
    put(folder, "a.png", photo(5), None)
    (folder / "a.txt").write_text("a dog")
    for name in ("b.mp4", "c.MP4", "d.zip", "noise", "README.md", "LICENSE", ".hidden"):
        (folder / name).write_bytes(b"...")
    for source in (FolderData(str(root)), SdScriptsData(str(root))):
        caplog.clear()
        Collection(source, ImageTransform())
        assert caplog.messages == [
            f"{root if isinstance(source, FolderData) else folder}: 4 files are neither"
            " pictures that are read nor captions: 2 .mp4, 1 .zip, 1 noise"
        ]
    result = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert "3 kinds of files that are neither pictures that are read nor captions" in result.stdout
    assert ".mp4 (2 files)" in result.stdout
