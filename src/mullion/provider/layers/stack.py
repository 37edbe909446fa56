"""The layers that lie over one disk now: injected faults next to the disk, the trace over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mullion.provider.device import DirectDevice
from mullion.provider.layers.fault import FaultLayer, FaultRule
from mullion.provider.layers.trace import TraceLayer


class LayerStack:
    """Builds the disk that the exports serve, and hands it to them whenever it has changed."""

    def __init__(self, disk: DirectDevice, use: Callable[[DirectDevice], None]) -> None:
        """`use` takes the new top; requests that are under way end on the old one."""
        self._disk = disk
        self._use = use
        self._lock = threading.Lock()
        self.faults: FaultLayer | None = None
        self.trace: TraceLayer | None = None

    @property
    def top(self) -> DirectDevice:
        return self.trace or self.faults or self._disk

    def set_faults(self, rules: Sequence[FaultRule]) -> None:
        """Replace the rules; none takes the layer away."""
        with self._lock:
            self.faults = FaultLayer(self._disk, rules) if rules else None
            if self.trace is not None:
                self.trace.below = self.faults or self._disk
            self._use(self.top)

    def start_trace(self) -> TraceLayer:
        """Begin anew to record."""
        with self._lock:
            trace = TraceLayer(self.faults or self._disk, self.stop_trace)
            self.trace = trace
            self._use(trace)
            return trace

    def stop_trace(self, trace: TraceLayer | None = None) -> None:
        """Take the record away, or only if it is this one; may be called again."""
        with self._lock:
            if trace is None or trace is self.trace:
                self.trace = None
                self._use(self.top)
