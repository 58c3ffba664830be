#!/usr/bin/env bash
# One would guess: `cap.set(CAP_PROP_POS_FRAMES, n)` and a read give what the n-th of n + 1 reads in a row gives, and
# `CAP_PROP_POS_MSEC` the picture of that time.
# Seen: both are turned into each other by the mean rate. In a clip whose rate changes, as cameras write that slow down at
# night, frame 100 gives another frame, 5 s gives another second, and read() returns True. Reading in a row gives each frame
# with its own time.
# Versions: opencv-python-headless 5.0.0.93, av 18.1.0 (writes the clip, H.264 in MP4). Python 3.11.
# Source: opencv/modules/videoio/src/cap_ffmpeg_impl.hpp, CvCapture_FFMPEG::seek
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile opencv-python-headless==5.0.0.93 av==18.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from fractions import Fraction

import av
import cv2
import numpy as np

print("opencv", cv2.__version__, "av", av.__version__)
times = [1000 * n for n in range(20)] + [20_000 + 40 * n for n in range(100)]  # ms: one frame a second, then 25


def drawn(number: int) -> np.ndarray:
    """The frame's number as eight black or white stripes."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8) * 255
    return np.broadcast_to(bits.repeat(8)[None, :, None], (64, 64, 3)).copy()


def read_off(frame: np.ndarray) -> int:
    """The number drawn into a frame."""
    stripes = frame.mean(axis=(0, 2)).reshape(8, 8).mean(axis=1) > 127
    return int(sum(1 << bit for bit in range(8) if stripes[bit]))


with av.open("gate.mp4", "w") as file:
    stream = file.add_stream("libx264", rate=25)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, 0
    for number, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(drawn(number), format="rgb24")
        frame.pts, frame.time_base = time, Fraction(1, 1000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())

capture = cv2.VideoCapture("gate.mp4")
in_a_row = []
while (read := capture.read())[0]:
    in_a_row.append((read_off(read[1]), round(capture.get(cv2.CAP_PROP_POS_MSEC))))
print("read in a row:", len(in_a_row), "frames, numbers and times as written:", in_a_row == list(enumerate(times)))
found = {}
for name, unit, places in (
    ("frame", cv2.CAP_PROP_POS_FRAMES, (10, 30, 60, 100)),
    ("ms", cv2.CAP_PROP_POS_MSEC, (5000, 10_000, 22_000)),
):
    for place in places:
        capture.set(unit, place)
        succeeded, frame = capture.read()
        found[name, place] = read_off(frame) if succeeded else None
wanted = {("frame", n): n for n in (10, 30, 60, 100)} | {("ms", t): times.index(t) for t in (5000, 10_000, 22_000)}
for place, number in found.items():
    print("set to", *place, "-> reads frame", number, "where it is", wanted[place])
assert in_a_row == list(enumerate(times))
wrong = [place for place in wanted if found[place] != wanted[place] and found[place] is not None]
assert {("frame", 100), ("ms", 5000)} <= set(wrong)
PYTHON
