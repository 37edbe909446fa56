"""How Hypothesis chooses its examples: the same ones each time, unless somebody looks for new ones.

The suite judges a change, so it must not depend on luck, nor on the machine's speed. `MULLION_EXPLORE=10 pytest …` runs
ten times as many examples of the long machines, chosen anew each time; what fails is kept in `.hypothesis`.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import settings
from hypothesis.internal.conjecture import providers

EXPLORE: Final = int(os.environ.get("MULLION_EXPLORE", "0"))


def load_profile() -> None:
    """Make it the default of every test."""
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("explore", deadline=None, print_blob=True)
    settings.load_profile("explore" if EXPLORE else "same")
    if not EXPLORE:
        # It would try numbers and texts that it finds in the modules that are loaded, too: its examples would change
        # with each change of any source, and with what the tests before have imported.
        providers._get_local_constants = lambda: providers._local_constants
