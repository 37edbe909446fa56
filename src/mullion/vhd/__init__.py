"""Virtual hard disks: fixed, dynamic and differencing VHD files, and chains of them, as block devices."""

from mullion.vhd.chain import Chain, open_chain
from mullion.vhd.create import create_differencing, create_dynamic, create_fixed
from mullion.vhd.errors import DiskBusyError, VhdError
from mullion.vhd.inspection import ChainInfo, inspect_chain

__all__ = [
    "Chain",
    "ChainInfo",
    "DiskBusyError",
    "VhdError",
    "create_differencing",
    "create_dynamic",
    "create_fixed",
    "inspect_chain",
    "open_chain",
]
