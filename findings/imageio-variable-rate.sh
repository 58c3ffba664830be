#!/usr/bin/env bash
# One would guess: `imageio.v3.imread` of a clip gives the frames that it holds, and `index=n` the n-th of them.
# Seen: of a clip of 440 frames whose rate changes, as cameras write that slow down at night, the FFMPEG plugin gives 1400:
# pictures of the slow part are repeated up to the fast part's rate. The pyav plugin gives the 440, but with `index=300` the
# 60th of them, unless `constant_framerate=False` is given. Nothing is said; labels by frame number go to other pictures.
# Versions: imageio 2.38.1, imageio-ffmpeg 0.8.1, av 18.1.0, numpy 2.4.6. Python 3.11.
# Source: https://imageio.readthedocs.io/en/stable/_autosummary/imageio.plugins.pyav.html, constant_framerate
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile imageio==2.38.1 imageio-ffmpeg==0.8.1 av==18.1.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from fractions import Fraction
from importlib.metadata import version

import av
import imageio.v3 as iio
import numpy as np

print(*(f"{name} {version(name)}" for name in ("imageio", "imageio-ffmpeg", "av", "numpy")), sep=", ")
times = [1000 * n for n in range(40)] + [40_000 + 40 * n for n in range(400)]  # ms: one frame a second, then 25


def drawn(number: int) -> np.ndarray:
    """The frame's number as sixteen black or white stripes."""
    bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8) * 255
    return np.broadcast_to(bits.repeat(8)[None, :, None], (64, 128, 3)).copy()


def read_off(frame: np.ndarray) -> int:
    """The number drawn into a frame."""
    stripes = frame.mean(axis=(0, 2)).reshape(16, 8).mean(axis=1) > 127
    return int(sum(1 << bit for bit in range(16) if stripes[bit]))


with av.open("gate.mp4", "w") as file:
    stream = file.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
    stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, 0
    for number, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(drawn(number), format="rgb24")
        frame.pts, frame.time_base = time, Fraction(1, 1000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())

by_plugin = {name: [read_off(frame) for frame in iio.imread("gate.mp4", plugin=name)] for name in ("FFMPEG", "pyav")}
for name, numbers in by_plugin.items():
    print(f"{name}: {len(numbers)} frames, {len(set(numbers))} different ones, of the {len(times)} written")
wanted = [100, 300, 400]
by_index = {
    rate: [read_off(iio.imread("gate.mp4", plugin="pyav", index=n, constant_framerate=rate)) for n in wanted]
    for rate in (None, False)
}
print("pyav, index", wanted, "by default:", by_index[None], "| with constant_framerate=False:", by_index[False])
assert len(by_plugin["FFMPEG"]) == 1400 and by_plugin["pyav"] == list(range(len(times)))
assert by_index[False] == wanted and all(a != b for a, b in zip(by_index[None][1:], wanted[1:]))
PYTHON
