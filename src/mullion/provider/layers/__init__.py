"""What may lie between a disk and those who use it: caps on the rate, a record of the requests, injected faults.

`trace` and `fault` are block devices over a block device. `throttle` is asked before a request is taken, so that nobody
sleeps with one in hand. A disk without any of them is served as if they did not exist.
"""

from mullion.provider.layers.fault import FaultLayer, FaultRule
from mullion.provider.layers.limits import Limits
from mullion.provider.layers.stack import LayerStack
from mullion.provider.layers.throttle import Throttle, Turn
from mullion.provider.layers.trace import TraceLayer

__all__ = ["FaultLayer", "FaultRule", "LayerStack", "Limits", "Throttle", "TraceLayer", "Turn"]
