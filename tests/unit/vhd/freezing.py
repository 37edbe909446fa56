"""A new top on a chain that is in use, as a checkpoint puts it there."""

from __future__ import annotations

import os

from mullion.vhd import Chain, create_differencing
from mullion.vhd.switching import Exchange, Switch, prepare_switch


def prepare_freeze(chain: Chain, child: str) -> Switch:
    """Make the child, and all that can fail of putting it on top."""
    create_differencing(child, chain.paths[0], lock_parent=False)
    exchange = Exchange((child, *chain.paths), {child: os.open(child, os.O_RDWR)})
    return prepare_switch(chain, exchange, pending_path=None, holder="")


def freeze(chain: Chain, child: str) -> None:
    """Freeze the top below a child."""
    switch = prepare_freeze(chain, child)
    switch.settle()
    switch.exchange()
    switch.finish()
