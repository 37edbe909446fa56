"""One merge worker: the process that merges a frozen layer into the one below it, while the partition runs on both.

It starts with the rights of whoever forked it, opens and locks the files, gives the rights up, says that it is ready,
and copies at its rate while its control socket answers. It needs nobody: parent and zygote may die, and the next parent
finds it by its identity file and its socket. It yields to the guests: lowest weight of the processors and, where the
host's scheduler knows such a thing, of the disks.

Ready is one JSON line: `{"ready": true, "pid": n}`, or `{"error": {…}, "pid": n}`, after which it exits with status 1.
At the end the result file gets one JSON line:

    {"upper": path, "lower": path, "state": "done", "copied_bytes": n, "resumed_bytes": n, "notes": [text, …]}
    {"upper": path, "lower": path, "state": "stopped"}
    {"upper": path, "lower": path, "error": {code, message, remedy, context, exit_code}}

An empty one is of a worker that was killed. Whatever the end, the same merge may be started again and goes on.

Commands (`control_client` has the framing): `status` → state, upper, lower, done_bytes and total_bytes (of the disk, in
blocks that the layer has), copied_bytes, bytes_per_s (the limit), speed_bytes_per_s (measured since the limit was set),
eta_s or null; `rate` with `bytes_per_s` → another limit, at once; `quit` → it stops within a piece, leaves the file
well, and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Final

from mullion.base.errors import InvalidError, MullionError, OperationFailedError
from mullion.base.files import replace_file
from mullion.base.listener import bind_listener
from mullion.base.process import ProcessIdentity
from mullion.provider.control import Command, ControlServer, close_all
from mullion.provider.control_client import encode
from mullion.provider.merge_spec import MergeSpec
from mullion.provider.startup import drop_privileges
from mullion.provider.working import begin_work, fields_by_hand, yield_to_others
from mullion.vhd.layer_merge import LayerFiles, LayerMerged, merge_layer
from mullion.vhd.pacing import Pace, StoppedError

log = logging.getLogger(__name__)

PROCESS_NAME: Final = "mullion-merge"


class Merger:
    """A merge, and what the control socket says about it."""

    def __init__(self, spec: MergeSpec) -> None:
        self._spec = spec
        self._pace = Pace(spec.bytes_per_s)
        self._quit_read_fd, self.quit_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._files: LayerFiles | None = None
        self._result_fd = -1
        self._control: ControlServer | None = None
        self._thread = threading.Thread(target=self._merge, name="merge")
        self._state = "starting"
        self._begun_s = 0.0
        self._begun_bytes = 0
        self._done_bytes = 0
        self._total_bytes = 0

    def open(self) -> None:
        """Open, lock, bind, drop privileges, and begin. Raises: MullionError, OSError."""
        spec = self._spec
        self._files = LayerFiles.open(spec.upper, spec.lower)
        listener = bind_listener(spec.control, uid=spec.uid, gid=spec.gid)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._result_fd = os.open(spec.result, flags, 0o640)
        replace_file(spec.identity, str(ProcessIdentity.of(os.getpid())).encode(), durable=False)
        drop_privileges(spec.uid, spec.gid)
        yield_to_others()
        actions = {"status": self._answer_status, "rate": self._answer_rate}
        self._control = ControlServer(listener, actions, self._quit_read_fd)
        self._thread.start()

    def run(self) -> int:
        """Answer the control socket until the merge has ended, or is to end; the exit status."""
        assert self._control is not None, "opened before it is run"
        self._control.run()
        self._pace.stop()
        self._thread.join()
        self._control.close()
        with contextlib.suppress(OSError):  # the folder may be the parent's alone
            os.unlink(self._spec.control)
        return 0 if self._state in ("done", "stopped") else 1

    def _merge(self) -> None:
        """The thread that copies; its end is the end of the process."""
        assert self._files is not None
        result: dict[str, object]
        try:
            merged = merge_layer(
                self._files,
                pace=self._pace,
                below_bytes=self._spec.below_bytes,
                progress=self._note,
            )
            self._state, result = "done", _as_result(merged)
        except StoppedError:
            self._state, result = "stopped", {"state": "stopped"}
        except MullionError as error:
            log.error("%s: %s", self._spec.partition, error)
            self._state, result = "failed", {"error": error.to_wire()}
        except Exception as error:  # the root of this thread
            log.exception("%s: the merge failed", self._spec.partition)
            failure = OperationFailedError(f"the merge failed: {error}", remedy=f"See {self._spec.log}.")
            self._state, result = "failed", {"error": failure.to_wire()}
        self._say_result(result)
        os.write(self.quit_fd, b"\0")

    def _say_result(self, result: Mapping[str, object]) -> None:
        line = encode({"upper": self._spec.upper, "lower": self._spec.lower, **result})
        try:
            os.write(self._result_fd, line)
            os.fdatasync(self._result_fd)
        except OSError as error:  # a full run folder: the journal beside the disk says what matters
            log.error("%s: the result cannot be written: %s", self._spec.partition, error)

    def _note(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if not self._begun_s:
            self._begun_s, self._begun_bytes = time.monotonic(), done_bytes
        self._state, self._done_bytes, self._total_bytes = stage, done_bytes, total_bytes

    # What the control socket asks.

    def _answer_status(self, command: Command) -> Mapping[str, object]:
        close_all(command.fds)
        return self.status()

    def _answer_rate(self, command: Command) -> Mapping[str, object]:
        close_all(command.fds)
        rate = command.fields.get("bytes_per_s")
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise InvalidError("rate: bytes_per_s is needed, a whole number", remedy="0 is without a limit.")
        self._pace.set_rate(rate)
        self._begun_s, self._begun_bytes = time.monotonic(), self._done_bytes  # the speed is that at this rate
        return {"bytes_per_s": rate}

    def status(self) -> Mapping[str, object]:
        """How far it is, as JSON values."""
        taken_s = time.monotonic() - self._begun_s if self._begun_s else 0.0
        speed = (self._done_bytes - self._begun_bytes) / taken_s if taken_s > 0 else 0.0
        left = self._total_bytes - self._done_bytes
        return {
            "partition": self._spec.partition,
            "pid": os.getpid(),
            "state": self._state,
            "upper": self._spec.upper,
            "lower": self._spec.lower,
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
            "copied_bytes": self._pace.taken_bytes,
            "bytes_per_s": self._pace.rate,
            "speed_bytes_per_s": int(speed),
            "eta_s": round(left / speed, 1) if speed else None,
        }


def _as_result(merged: LayerMerged) -> dict[str, object]:
    return {
        "state": "done",
        "copied_bytes": merged.copied_bytes,
        "resumed_bytes": merged.resumed_bytes,
        "notes": merged.notes,
    }


def run_merge(spec: MergeSpec, report_fd: int) -> int:
    """Be a merge worker until the end; the exit status. `report_fd` gets the line that says ready or why not."""
    merger = Merger(spec)
    if not begin_work(merger, spec, what="merge worker", process_name=PROCESS_NAME, report_fd=report_fd):
        return 1
    status = merger.run()
    log.info("%s: the merge of %s into %s ends: %s", spec.partition, spec.upper, spec.lower, merger.status()["state"])
    return status


def main() -> int:
    """`python -m mullion.provider.merger SPEC.json`: a worker by hand, in the foreground, ready line on stdout."""
    return run_merge(MergeSpec.from_fields(fields_by_hand()), os.dup(1))


if __name__ == "__main__":
    sys.exit(main())
