"""The one door for pictures: preparation, training, audit, preview, reports and generation open them here.

Standard library, Pillow and numpy only, so that data preparation can import it without PyTorch.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Of Pillow's decoders only these are offered a file; some of the others start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# The limit at which Pillow itself refuses a picture: decoded it is half a gigabyte. Preparation asks for less.
MAX_PIXELS = 178_956_970
# What Pillow's decoders raise for damaged files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError)
DECODING_ERRORS += (struct.error, zlib.error)
# Files that operating systems leave between pictures.
LITTER = ("thumbs.db", "desktop.ini", ".ds_store", "__macosx")
# How files begin that are no pictures of FORMATS, whatever they are called. Offset, bytes, name.
OTHER_KINDS = (
    (0, b"\x00\x05\x16\x07", "macOS's notes on a file (AppleDouble), not the file itself"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: fetch the picture with `git lfs pull`"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "a video (MP4)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska)"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"8BPS", "Photoshop"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML (SVG?)"),
    (0, b"<!doctype html", "a web page: the download failed"),
    (0, b"<html", "a web page: the download failed"),
    (0, b"PK\x03\x04", "a zip archive"),
)
# The ways back from EXIF's orientation tag (274): how the stored picture becomes upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, SAMPLE_FORMAT = 274, 339  # tags of EXIF and TIFF
# 16-bit colours whose largest 8-bit value stays under this hold 12 bits or fewer, and would be taught as black.
DARK_16_BIT = 16

# More values than this at one end of the scale: a wrong depth or exposure, not a scene.
SATURATED_SHARE = 0.99


class PictureError(ValueError):
    """A picture that cannot be used. `reason` is a short code, the message one sentence without the file's name."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def open_picture(
    source: str | Path | bytes | Mapping[str, Any] | Image.Image, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture as the model is shown it: RGB, 8 bits, upright, decoded, without anything of the file but pixels.

    `source` is a path, the file's bytes, a dataset's `{"bytes", "path"}`, or a Pillow image. EXIF orientation is
    applied. Transparency is laid onto white, as transformers' processors do. Grey of 16 bits, 32 bits or float is scaled
    from its own smallest and largest value to 0 and 255. Pixels are counted from the header, before any is decoded.

    Raises PictureError, with `reason`

        missing_image, unreadable_image     no such file; it cannot be read
        not_an_image                        of none of FORMATS, whatever it is called
        oversized_image                     more than `max_pixels`
        several_frames                      animated, or of several pages
        unsupported_depth                   grey or colours that cannot be scaled to 8 bits without a guess
        corrupt_image                       it does not decode
    """
    held = source if isinstance(source, Image.Image) else _read(source)
    with warnings.catch_warnings():
        # Pillow warns of large pictures while it opens them; the limit here is checked straight after.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # Pillow's own guard, an error above twice its limit, must not come before a larger one that was asked for.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
        try:
            if isinstance(held, Image.Image):
                return _as_shown(held, max_pixels)
            with Image.open(io.BytesIO(held), formats=FORMATS) as image:
                return _as_shown(image, max_pixels)
        except PictureError:
            raise
        except Image.DecompressionBombError as error:
            raise PictureError("oversized_image", f"{error}; at most {max_pixels:,} are allowed") from error
        except Image.UnidentifiedImageError as error:
            raise PictureError("not_an_image", _what_it_is(held)) from error
        except DECODING_ERRORS as error:
            detail = f"it does not decode: {error or type(error).__name__}".replace("\n", " ")
            raise PictureError("corrupt_image", detail) from error


def name_picture(number: int, picture: Any) -> str:
    """`picture 2 (frames/a.jpg)`: a row's picture, counted from 1, and the name that is stored with it, if any."""
    name = picture.get("path") if isinstance(picture, Mapping) else None
    return f"picture {number}{f' ({name})' if name else ''}"


def open_pictures(pictures: Iterable[Any]) -> list[Image.Image]:
    """A row's pictures, each by `open_picture`. Raises PictureError that says which of them cannot be used."""
    opened = []
    for number, picture in enumerate(pictures, start=1):
        try:
            opened.append(open_picture(picture))
        except PictureError as error:
            missing = error.reason == "missing_image"  # this sentence has the name
            raise PictureError(
                error.reason, f"{name_picture(number, None if missing else picture)}: {error}"
            ) from error
    return opened


def what_is_wrong(path: Path) -> str | None:
    """Why a file cannot be opened as a picture, told from its header: format and size, before any pixel is decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except FileNotFoundError:
        return "no such file"
    except Image.UnidentifiedImageError:
        with path.open("rb") as file:
            return _what_it_is(file.read(64))
    except (Image.DecompressionBombError, *DECODING_ERRORS) as error:
        return f"no picture that can be read ({error})"
    return f"{width}x{height} pixels; at most {MAX_PIXELS:,} are allowed" if width * height > MAX_PIXELS else None


def is_litter(path: Path) -> bool:
    """Whether `path` is a file that an operating system left there: `._a.jpg`, `__MACOSX/`, `Thumbs.db`, `.DS_Store`."""
    return path.name.startswith("._") or any(part.lower() in LITTER for part in path.parts)


def what_is_blank(picture: Image.Image) -> str | None:
    """What is wrong with an RGB picture in which there is nothing to see; None where there is."""
    counts = picture.histogram()
    num_values = sum(counts)
    if max(counts[:256]) == max(counts[256:512]) == max(counts[512:]) == num_values // 3:
        return f"each pixel is {picture.getpixel((0, 0))}"
    for value, word in ((255, "white"), (0, "black")):
        share = sum(counts[value::256]) / num_values
        if share > SATURATED_SHARE:
            return f"{share:.1%} of its values are {value}: it is {word}"
    return None


def find_pictures(folder: Path) -> list[Path]:
    """Files under `folder` with a suffix of SUFFIXES in either case, sorted; what operating systems leave is passed over."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not is_litter(path.relative_to(folder)) and path.is_file()
    )


def _read(source: str | Path | bytes | Mapping[str, Any]) -> bytes:
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if source is None:
            raise PictureError("missing_image", "neither bytes nor a path is stored")
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        raise PictureError("missing_image", f"{source}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise PictureError("unreadable_image", f"it cannot be read: {getattr(error, 'strerror', error)}") from error


def _what_it_is(data: bytes) -> str:
    expected = f"expected one of {', '.join(FORMATS)}"
    if not data:
        return f"the file is empty, {expected}"
    head = data[:64].lstrip(b"\xef\xbb\xbf \r\n\t")
    for offset, begin, name in OTHER_KINDS:
        if head[offset : offset + len(begin)].lower() == begin.lower():
            return f"it is {name}; {expected}"
    return f"its bytes are no picture that can be read, {expected} with 1, 2, 4, 8, 16 or 32 bits a value"


def _as_shown(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        detail = f"{width}x{height} are {width * height:,} pixels; at most {max_pixels:,} are allowed"
        raise PictureError("oversized_image", detail)
    # Phones put previews and depth maps behind the picture of a JPEG (MPO): the first one is what they show.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        kind = "pages" if image.format == "TIFF" else "frames of an animation"
        detail = f"it holds {frames} {kind} ({image.format}): save the one that is meant as a picture of its own"
        raise PictureError("several_frames", detail)
    # Read before the pixels: Pillow forgets both as it decodes.
    colours_of_16_bits = ";16" in "".join(str(tile.args) for tile in getattr(image, "tile", []))
    sample_format = image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] if image.format == "TIFF" else None
    image.load()
    orientation = _orientation(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        picture = _scaled_grey(image, unsigned=sample_format == 1)
    elif sample_format == 2:
        raise PictureError("unsupported_depth", "its 8-bit values are signed: save it with 8 unsigned bits")
    elif image.has_transparency_data:
        # convert() gives a palette's or a single colour's transparency an alpha channel of its own.
        clear = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, clear).convert("RGB")
    else:
        picture = image.convert("RGB")
    if colours_of_16_bits and image.mode in ("RGB", "RGBA", "LA", "CMYK"):
        _refuse_dark(picture)
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    if picture.info or picture is image:
        picture = picture.copy()
        picture.info = {}
    return picture


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except DECODING_ERRORS:
        return None  # damaged notes say nothing of the pixels, which every viewer then shows as they are stored


def _scaled_grey(image: Image.Image, *, unsigned: bool) -> Image.Image:
    """Grey of more than 8 bits -> RGB, its own range scaled to 0 ... 255. Cameras fill 10 to 14 of 16 bits."""
    values = np.asarray(image)
    if unsigned and values.dtype == np.int32:
        values = values.view(np.uint32)  # Pillow holds unsigned 32 bits as signed ones
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise PictureError("unsupported_depth", f"{bad:,} of its values are no finite numbers: fill them first")
    low, high = values.min(), values.max()
    if low == high:
        detail = f"each of its {image.mode} values is {low:g}: nothing says how to scale them to 8 bits"
        raise PictureError("unsupported_depth", detail)
    grey = ((values - low) * (255 / (high - low))).round().astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[np.asarray(image) == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _refuse_dark(picture: Image.Image) -> None:
    # Pillow keeps the upper 8 of 16 bits of a colour. What is left of 12 bits in them cannot be scaled up again.
    brightest = max(high for _, high in picture.getextrema())
    if brightest < DARK_16_BIT:
        detail = f"its 16-bit colours reach {brightest} of 255 only: scale them to the full range, or save 8 bits"
        raise PictureError("unsupported_depth", detail)
