"""A service in memory, with the face of the client: enough meaning to test what the commands ask and print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from mullion.base.errors import AlreadyExistsError, MullionError, NotFoundError, PreconditionError, StateError
from mullion.model.definition import PartitionDefinition
from mullion.model.states import OperationState, PartitionState
from mullion.model.views import (
    AttachedDiskView,
    ChainFileView,
    DiskView,
    EventView,
    ImageView,
    OperationView,
    PartitionView,
    StatusView,
)

AT = "2030-01-02T03:04:05Z"
POOL = "/var/lib/mullion/disks"
_RESULT = {
    "start": PartitionState.RUNNING,
    "resume": PartitionState.RUNNING,
    "reset": PartitionState.RUNNING,
    "pause": PartitionState.PAUSED,
    "stop": PartitionState.STOPPED,
}


@dataclass
class FakeClient:
    """Records what was asked in `asked`; `faults` makes a method raise."""

    faults: dict[str, BaseException] = field(default_factory=dict)
    asked: list[tuple[str, object]] = field(default_factory=list)
    closed: bool = False
    _partitions: dict[str, PartitionView] = field(default_factory=dict)
    _disks: dict[str, DiskView] = field(default_factory=dict)
    _images: dict[str, ImageView] = field(default_factory=dict)
    _operations: dict[str, OperationView] = field(default_factory=dict)
    _pending: dict[str, Callable[[], None]] = field(default_factory=dict)

    def _ask(self, method: str, detail: object = None) -> None:
        self.asked.append((method, detail))
        if method in self.faults:
            raise self.faults[method]

    def close(self) -> None:
        self.closed = True

    def status(self) -> StatusView:
        self._ask("status")
        counts: dict[str, int] = {}
        for view in self._partitions.values():
            counts[view.state.value] = counts.get(view.state.value, 0) + 1
        return StatusView(
            "0.1.0", 4711, AT, 62.0, "host", "tcg", "KVM cannot run a guest here", counts,
            "/run/mullion/api.sock", "http://127.0.0.1:8440", "/var/lib/mullion", "/run/mullion",
        )  # fmt: skip

    # Partitions

    def partitions(self) -> list[PartitionView]:
        self._ask("partitions")
        return list(self._partitions.values())

    def partition(self, name: str) -> PartitionView:
        self._ask("partition", name)
        if name not in self._partitions:
            raise NotFoundError(f"there is no partition named {name}")
        return self._partitions[name]

    def create_partition(self, definition: PartitionDefinition) -> PartitionView:
        self._ask("create_partition", definition)
        if definition.name in self._partitions:
            raise AlreadyExistsError(f"there is a partition named {definition.name} already")
        disks = tuple(
            AttachedDiskView(d.id or f"disk{n}", d.bus.value, d.read_only, (self._path(d.path),), "vhost-user")
            for n, d in enumerate(definition.disks)
        )
        view = PartitionView(
            definition.name, "7d9c2f3e-0000-4000-8000-000000000001", PartitionState.STOPPED, definition, '"1"',
            disks=disks, folder=f"/var/lib/mullion/partitions/{definition.name}",
        )  # fmt: skip
        self._partitions[definition.name] = view
        return view

    def update_partition(self, name: str, definition: PartitionDefinition, etag: str) -> PartitionView:
        self._ask("update_partition", definition)
        old = self.partition(name)
        if old.etag != etag:
            raise PreconditionError(f"partition {name} changed")
        self._partitions[name] = replace(old, definition=definition, etag=f'"{int(etag.strip(chr(34))) + 1}"')
        return self._partitions[name]

    def delete_partition(self, name: str, *, with_disks: bool = False) -> None:
        self._ask("delete_partition", with_disks)
        self.partition(name)
        del self._partitions[name]

    def partition_action(self, name: str, action: str, **options: object) -> OperationView:
        self._ask(action, options)
        view = self.partition(name)
        if action == "start" and view.state is PartitionState.RUNNING:
            raise StateError(f"partition {name} is running", state="running", required="stopped")

        def act() -> None:
            running = _RESULT[action] is PartitionState.RUNNING
            self._partitions[name] = replace(
                view, state=_RESULT[action], accelerator="tcg" if running else None, agent_answers=running,
                accelerator_reason="KVM cannot run a guest here" if running else None, boot_s=3.2 if running else None,
            )  # fmt: skip

        return self._operation(f"partition.{action}", f"partition/{name}", act)

    # Disks and images

    def disks(self) -> list[DiskView]:
        self._ask("disks")
        return list(self._disks.values())

    def disk(self, path: str) -> DiskView:
        self._ask("disk", path)
        if self._path(path) not in self._disks:
            raise NotFoundError(f"there is no disk {path}")
        return self._disks[self._path(path)]

    def create_disk(
        self,
        *,
        path: str,
        size_bytes: int | None = None,
        type: str = "dynamic",  # noqa: A002 - the API's word
        parent: str | None = None,
        block_bytes: int | None = None,
    ) -> DiskView:
        self._ask("create_disk", (path, size_bytes, type, parent, block_bytes))
        full = self._path(path)
        if full in self._disks:
            raise AlreadyExistsError(f"{full} exists")
        files = (full,) if parent is None else (full, self._path(parent))
        type = type if parent is None else "differencing"  # noqa: A001 - the API's word
        chain = tuple(ChainFileView(f, type, size_bytes or 0, 1536, "id", read_only=n > 0) for n, f in enumerate(files))
        self._disks[full] = DiskView(full, path, type, size_bytes or 64 * 1024**2, 1536, 0, chain)
        return self._disks[full]

    def delete_disk(self, path: str) -> None:
        self._ask("delete_disk", path)
        del self._disks[self._path(path)]

    def images(self) -> list[ImageView]:
        self._ask("images")
        return list(self._images.values())

    def build_image(self, name: str) -> OperationView:
        self._ask("build_image", name)
        built = ImageView(name, f"/var/lib/mullion/images/{name}.vhd", 1024**3, 20 * 1024**2, AT)
        return self._operation("image.build", f"image/{name}", lambda: self._images.__setitem__(name, built))

    def _path(self, path: str) -> str:
        if path.startswith("image:"):
            return f"/var/lib/mullion/images/{path.removeprefix('image:')}.vhd"
        return path if path.startswith("/") else f"{POOL}/{path}.vhd"

    # Operations and events

    def operations(self) -> list[OperationView]:
        self._ask("operations")
        return list(self._operations.values())

    def operation(self, operation_id: str) -> OperationView:
        self._ask("operation", operation_id)
        if operation_id not in self._operations:
            raise NotFoundError(f"there is no operation {operation_id}")
        return self._operations[operation_id]

    def wait(
        self, operation: OperationView, on_progress: Callable[[OperationView], None] | None = None
    ) -> OperationView:
        self.asked.append(("wait", operation.id))
        for progress, stage in ((0.1, "preparing"), (0.9, "finishing")):
            step = replace(operation, state=OperationState.RUNNING, progress=progress, stage=stage)
            if on_progress is not None:
                on_progress(step)
        if "wait" in self.faults:
            raise self.faults.pop("wait")
        if self._operations[operation.id].state is OperationState.CANCELLED:
            raise MullionError(f"operation {operation.id} was cancelled")
        self._pending.pop(operation.id)()
        done = replace(operation, state=OperationState.SUCCEEDED, progress=1.0)
        self._operations[operation.id] = done
        return done

    def cancel(self, operation_id: str) -> OperationView:
        self._ask("cancel", operation_id)
        self._operations[operation_id] = replace(self.operation(operation_id), state=OperationState.CANCELLED)
        return self._operations[operation_id]

    def events(self, after: int = 0, follow: bool = False) -> Iterator[EventView]:
        self._ask("events", (after, follow))
        for cursor in range(after + 1, 4):
            yield EventView(cursor, AT, "partition.started", "web", {"pid": 4000 + cursor, "note": "a\x1bb"})

    def _operation(
        self, kind: str, target: str, act: Callable[[], object], *, cancellable: bool = True
    ) -> OperationView:
        view = OperationView(
            f"op-{len(self._operations) + 1}", kind, target, OperationState.PENDING, AT, AT, cancellable=cancellable
        )
        self._operations[view.id] = view
        self._pending[view.id] = lambda: (act(), None)[1]
        return view
