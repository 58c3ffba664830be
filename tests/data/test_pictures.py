"""The one door for pictures: each kind becomes the RGB picture that a person sees, or is refused by a true sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from finetuning.data.pictures import FORMATS, PictureError, find_pictures, open_picture

HEIGHT, WIDTH = 24, 36
RAMP = np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)
COLOURS = np.dstack([RAMP, RAMP.T.reshape(HEIGHT, WIDTH), 255 - RAMP])


def encoded(picture: Image.Image, form: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


def tiff(values: np.ndarray, sample_format: int) -> bytes:
    """A grey TIFF as cameras write it. Pillow itself writes no unsigned 32 bits, no signed 8 and 16."""
    height, width = values.shape
    tags = [(256, width), (257, height), (258, values.itemsize * 8), (259, 1), (262, 1), (273, 0), (277, 1)]
    tags += [(278, height), (279, values.nbytes), (339, sample_format)]
    begin = 8 + 2 + 12 * len(tags) + 4
    fields = [struct.pack("<HHII", tag, 4, 1, begin if tag == 273 else value) for tag, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(fields) + bytes(4) + values.tobytes()


def refusal(source, **settings) -> PictureError:
    with pytest.raises(PictureError) as caught:
        open_picture(source, **settings)
    return caught.value


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_phones_are_upright(form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(COLOURS), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected.load()
    shown = open_picture(data)
    assert shown.size == ((HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT))
    assert shown.tobytes() == expected.tobytes()
    # What is opened already stays as it is.
    assert open_picture(shown).tobytes() == shown.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_notes_leave_the_pixels_as_they_are():
    data = encoded(Image.fromarray(COLOURS), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_picture(data).size == (WIDTH, HEIGHT)


def test_transparency_lies_on_white():
    clear = np.dstack([COLOURS, np.where(RAMP < 128, 0, 255).astype(np.uint8)])
    rgba = Image.fromarray(clear)
    expected = np.where(RAMP[..., None] < 128, 255, COLOURS)
    for form in ("PNG", "TIFF"):
        assert (np.asarray(open_picture(encoded(rgba, form))) == expected).all()
    assert (np.asarray(open_picture(encoded(rgba, "WEBP", lossless=True, exact=True))) == expected).all()
    # One grey, one palette entry, one colour that is transparent; a grey with an alpha channel.
    grey = Image.fromarray(RAMP)
    expected = np.where(RAMP == 100, 255, RAMP)
    assert (np.asarray(open_picture(encoded(grey, transparency=100)))[..., 0] == expected).all()
    palette = Image.fromarray(RAMP // 128 * 255).quantize(2)
    (place,) = [i for i in (0, 1) if palette.getpalette()[3 * i] == 0]
    for form in ("PNG", "GIF"):
        assert open_picture(encoded(palette, form, transparency=place)).getextrema() == ((255, 255),) * 3
    two = Image.merge("LA", [grey, Image.fromarray(clear[..., 3])])
    assert (np.asarray(open_picture(encoded(two)))[..., 1] == np.where(RAMP < 128, 255, RAMP)).all()
    single = encoded(Image.fromarray(COLOURS), transparency=tuple(COLOURS[3, 3].tolist()))
    assert open_picture(single).getpixel((3, 3)) == (255, 255, 255)


FLOATS = RAMP.astype(np.float64)
DEEP = {
    "16-bit PNG": encoded(Image.fromarray((FLOATS * 40 + 2000).astype(np.uint16))),
    "16-bit TIFF": tiff((FLOATS * 16).astype(np.uint16), 1),
    "signed 16-bit TIFF": tiff((FLOATS * 100 - 9000).astype(np.int16), 2),
    "unsigned 32-bit TIFF": tiff((FLOATS * 16_843_009).astype(np.uint32), 1),
    "signed 32-bit TIFF": tiff((FLOATS * 100_000 - 9e6).astype(np.int32), 2),
    "float TIFF": tiff((FLOATS / 255).astype(np.float32), 3),
    "float TIFF of degrees": tiff((FLOATS / 10 - 12.5).astype(np.float32), 3),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_by_its_own_range(kind):
    shown = np.asarray(open_picture(DEEP[kind]))
    assert shown.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(shown[..., 0].astype(int) - RAMP).max() <= 1
    assert (shown == shown[..., :1]).all()


def test_depths_that_would_be_a_guess_are_refused():
    assert refusal(tiff(RAMP.astype(np.int8), 2)).reason == "unsupported_depth"
    holes = (RAMP / 255).astype(np.float32)
    holes[:2] = np.nan
    assert "72 of its values are no finite numbers" in str(refusal(tiff(holes, 3)))
    flat = Image.fromarray(np.full((HEIGHT, WIDTH), 700, np.uint16))
    assert "each of its I;16 values is 700" in str(refusal(encoded(flat)))
    # Colours of 12 bits in 16: Pillow keeps the upper 8 of 16, which are nearly nothing.
    dark = bytearray()
    for row in (COLOURS.astype(np.uint16) * 16).astype(">u2"):
        dark += b"\0" + row.tobytes()
    refused = refusal(png(bytes(dark)))
    assert (refused.reason, "reach 15 of 255" in str(refused)) == ("unsupported_depth", True)
    full = b"".join(b"\0" + row.tobytes() for row in (COLOURS.astype(np.uint16) * 257).astype(">u2"))
    assert (np.asarray(open_picture(png(full))) == COLOURS).all()


def png(rows: bytes, width: int = WIDTH, height: int = HEIGHT, bits: int = 16) -> bytes:
    """A PNG of colours, its header as told and its rows as given."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_other_modes_look_as_they_do_in_rgb(mode):
    picture = Image.fromarray(COLOURS).convert(mode)
    form = "PNG" if mode in ("1", "L", "P") else "TIFF"
    expected = np.asarray(picture.convert("RGB")).astype(int)
    shown = open_picture(encoded(picture, form))
    assert shown.mode == "RGB"
    assert np.abs(np.asarray(shown) - expected).max() <= 2  # YCbCr is rounded once more on the way
    assert open_picture(picture).tobytes() == picture.convert("RGB").tobytes()


def test_a_dataset_s_entry_its_bytes_and_its_file_are_one_picture(tmp_path):
    data = encoded(Image.fromarray(COLOURS), "JPEG")
    (tmp_path / "a.png").write_bytes(data)  # what a file is called says nothing of what it is
    pictures = [data, tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": data, "path": None}]
    pictures += [{"bytes": None, "path": str(tmp_path / "a.png")}, Image.open(io.BytesIO(data))]
    assert len({open_picture(source).tobytes() for source in pictures}) == 1
    assert open_picture(data).info == {}


def test_what_is_no_picture_is_named(tmp_path):
    phone = encoded(Image.fromarray(COLOURS), "JPEG")
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    for form, word in (("GIF", "frames"), ("WEBP", "frames"), ("PNG", "frames"), ("TIFF", "pages")):
        refused = refusal(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
        assert refused.reason == "several_frames"
        assert f"it holds 2 {word}" in str(refused)
    # A phone's JPEG with a second picture behind it is the first one.
    both = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert open_picture(both).size == (WIDTH, HEIGHT)
    kinds = {
        b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ": "AppleDouble",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC",
        b"\0\0\0\x18ftypisom\0\0\0\0": "video",
        b"\n<!DOCTYPE html><html>": "web page",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "PostScript",
        b"": "empty",
        b"plain text": "no picture that can be read",
    }
    for data, word in kinds.items():
        refused = refusal(data)
        assert (refused.reason, word in str(refused)) == ("not_an_image", True), str(refused)
        assert all(form in str(refused) for form in FORMATS)
    assert refusal(phone[:-400]).reason == "corrupt_image"
    assert refusal(tmp_path / "none.jpg").reason == "missing_image"
    assert refusal(tmp_path).reason == "unreadable_image"
    assert refusal({"bytes": None, "path": None}).reason == "missing_image"


def test_pixels_are_counted_before_they_are_unpacked():
    # 30,000 x 30,000 pixels in a file of 70 bytes: unpacked they would be 2.7 GB.
    assert refusal(png(b"", 30_000, 30_000, bits=8)).reason == "oversized_image"
    data = encoded(Image.fromarray(COLOURS))
    refused = refusal(data, max_pixels=HEIGHT * WIDTH - 1)
    assert (refused.reason, "36x24 are 864 pixels; at most 863" in str(refused)) == ("oversized_image", True)
    assert open_picture(data, max_pixels=HEIGHT * WIDTH).size == (WIDTH, HEIGHT)
    assert refusal(Image.fromarray(COLOURS), max_pixels=10).reason == "oversized_image"


def test_files_that_systems_leave_are_passed_over(tmp_path):
    names = ["b.JPG", "a.png", "._a.png", "Thumbs.db", ".DS_Store", "notes.txt", "clips/c.tiff", "__MACOSX/a.png"]
    for name in [*names, "clips/Thumbs.db"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)]
    assert found == ["a.png", "b.JPG", "clips/c.tiff"]
