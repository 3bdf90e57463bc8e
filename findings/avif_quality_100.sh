#!/usr/bin/env bash
# Pillow's AVIF at quality=100 with subsampling="4:4:4" is nearly, not quite, lossless.
#
# Bits per pixel of lossless files are a yardstick for bits/dim of generative models. In Pillow,
# JPEG 2000 is lossless as it comes and WebP by lossless=True. AVIF has no such switch: with the
# highest quality and full colour resolution most bytes of an RGB picture change, by a few levels,
# as colours pass through YCbCr in bytes. With 4:2:0, the default of quality=100, it is far more.
# So its size is no code length of the picture.
#
# Seen with Pillow 13.0.0, a picture of 64x64 random RGB bytes:
#     JPEG 2000: 0.0 % of bytes changed, by at most 0
#     WebP, lossless=True: 0.0 % of bytes changed, by at most 0
#     AVIF, quality=100, 4:4:4: 62.5 % of bytes changed, by at most 3
#     AVIF, quality=100: 99.3 % of bytes changed, by at most 209
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
from PIL import Image

picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def change(**options):
    """The share of bytes that change, and the largest change."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **options)
    difference = np.abs(np.asarray(Image.open(file).convert("RGB")).astype(int) - picture)
    return (difference > 0).mean(), difference.max()


kinds = {
    "JPEG 2000": {"format": "JPEG2000"},
    "WebP, lossless=True": {"format": "WEBP", "lossless": True},
    "AVIF, quality=100, 4:4:4": {"format": "AVIF", "quality": 100, "subsampling": "4:4:4"},
    "AVIF, quality=100": {"format": "AVIF", "quality": 100},
}
seen = {name: change(**options) for name, options in kinds.items()}
for name, (share, largest) in seen.items():
    print(f"{name}: {100 * share:.1f} % of bytes changed, by at most {largest}")
jpeg2000, webp, full, halved = seen.values()
assert jpeg2000[1] == webp[1] == 0
assert 0.4 < full[0] < 0.8 and 1 <= full[1] <= 4
assert halved[0] > 0.95 and halved[1] > 50
PYTHON
