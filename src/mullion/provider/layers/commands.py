"""What the control socket asks of layers: `throttle`, `trace` and `fault`, and what `status` says of them.

`throttle {"disk": id or null for the partition, "limits": {…}}` → the caps now in force; {} takes them away.
`trace {"disk": id or null for all, "do": "start", "read" or "stop"}` → `{"disks": [{"id", "dropped", "more",
"requests": [[µs since the start, kind, offset, length, latency µs, failed], …]}]}`.
`fault {"disk": id, "rules": [{…}]}` → the rules now in force; refused unless the provider was started with
`allow_faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError, StateError
from mullion.provider.device import DirectDevice
from mullion.provider.layers.fault import MAX_RULES, FaultRule
from mullion.provider.layers.limits import Limits
from mullion.provider.layers.stack import LayerStack
from mullion.provider.layers.throttle import Lane, Throttle

_ANSWER_REQUESTS: Final = 500
"""Requests in one answer, of all disks together: it stays below the 64 KiB of a line."""

Handler = Callable[[Mapping[str, object]], Mapping[str, object]]


class LayerControl:
    """The layers of all disks of one provider. Commands come from one thread."""

    def __init__(self, *, allow_faults: bool) -> None:
        self._allow_faults = allow_faults
        self._throttle = Throttle()
        self._stacks: dict[str, LayerStack] = {}

    def add(self, disk_id: str, disk: DirectDevice, limits: Limits, use: Callable[[DirectDevice], None]) -> None:
        """A disk that is served from now on; `use` is told what the exports shall serve from then on."""
        self._stacks[disk_id] = LayerStack(disk, use)
        self._throttle.set_limits(disk_id, limits, is_in_use=False)

    def lane(self, disk_id: str) -> Lane:
        """Where the disk's rings and connections ask before each request."""
        return self._throttle.lane(disk_id)

    def limit_partition(self, limits: Limits) -> None:
        """The caps of all disks together, before any is served."""
        self._throttle.set_limits(None, limits, is_in_use=False)

    def limits(self, disk_id: str | None) -> Limits:
        """The caps in force for a disk, or (None) for all together."""
        return self._throttle.limits(disk_id)

    def add_waker(self, waker: Callable[[], None]) -> None:
        self._throttle.add_waker(waker)

    def open(self) -> None:
        """The provider ends: nothing is held back any more."""
        self._throttle.open()

    def handlers(self) -> Mapping[str, Handler]:
        """The commands by name."""
        return {"throttle": self._set_limits, "trace": self._trace, "fault": self._set_faults}

    def partition_status(self) -> Mapping[str, object]:
        return self._throttle.status(None)

    def disk_status(self, disk_id: str) -> Mapping[str, object]:
        """Caps, faults and trace of a disk."""
        stack = self._stacks[disk_id]
        return {
            "throttle": self._throttle.status(disk_id),
            "faults": stack.faults.status() if stack.faults is not None else [],
            "is_traced": stack.trace is not None,
        }

    def _set_limits(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        limits = Limits.from_fields(fields.get("limits"), "throttle.limits")
        disk_id = fields.get("disk")
        if disk_id is not None:
            disk_id = self._known(disk_id)
        self._throttle.set_limits(disk_id, limits)
        return {"disk": disk_id, "limits": limits.to_fields()}

    def _trace(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        disk_id, act = fields.get("disk"), fields.get("do")
        wanted = list(self._stacks) if disk_id is None else [self._known(disk_id)]
        if act == "start":
            for one in wanted:
                self._stacks[one].start_trace()
        elif act == "stop":
            for one in wanted:
                self._stacks[one].stop_trace()
        elif act != "read":
            raise InvalidError(f"trace.do: {act!r} is not one of start, read, stop")
        left = _ANSWER_REQUESTS
        disks = []
        for one in wanted:
            trace = self._stacks[one].trace
            if trace is not None:
                taken = trace.take(left)
                left -= len(taken)
                disks.append({"id": one, "dropped": trace.dropped, "more": trace.waiting, "requests": taken})
        return {"disks": disks}

    def _set_faults(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        stack = self._stacks[self._known(fields.get("disk"))]
        rules = fields.get("rules")
        if not isinstance(rules, list) or len(rules) > MAX_RULES:
            raise InvalidError(f"fault.rules: a list of at most {MAX_RULES} rules is needed")
        if rules and not self._allow_faults:
            raise StateError(
                "faults are not injected on this host",
                remedy='For a drill set fault_injection = "on" in mullion.toml, and start service and partition anew.',
                state="off",
                required="fault_injection",
            )
        stack.set_faults([FaultRule.from_fields(rule, f"fault.rules[{n}]") for n, rule in enumerate(rules)])
        return {"rules": stack.faults.status() if stack.faults is not None else []}

    def _known(self, disk_id: object) -> str:
        if not isinstance(disk_id, str) or disk_id not in self._stacks:
            raise NotFoundError(
                f"there is no disk {disk_id!r}", remedy=f"Disks here: {', '.join(self._stacks) or 'none'}."
            )
        return disk_id
