"""The boot code of the demo disk's first sector, assembled from boot.S, which says what it does and why it is ours.

A test assembles boot.S anew and compares.
"""

from __future__ import annotations

from typing import Final

BOOT_CODE: Final = bytes.fromhex(
    "fa31c08ed0bc007c8ed88ec0fbfcbe007cbf0006b90001f3a5ea1e060000bebe07b90400f60480750a83c610e2f6bb8b06eb"
    "43525666b800000000665066ff7408506800106a016a1089e6b442cd138d64105e5abba106721d56be0010bf007cb90001f3"
    "a55ebbc206813efe7d55aa7505ea007c00008a074384c0740b53b40ebb0700cd105bebeef4ebfd4e6f206163746976652070"
    "6172746974696f6e0d0a0054686520626f6f7420736563746f722063616e6e6f7420626520726561640d0a00546865207061"
    "72746974696f6e20686173206e6f20626f6f7420736563746f720d0a00"
)
