"""The composition root of `mullion serve`: the one file that knows every floor.

Order of a start: lock → store → accelerator → adopt what runs → finish or fail what was interrupted → serve the API.
Partitions are adopted before the web server is even imported. The end goes the other way and touches no partition.

`python -m mullion.daemon serve` runs the service; `doctor --format json` prints the host's checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from mullion import __version__
from mullion.base import log as logs
from mullion.base.errors import MullionError, UnavailableError
from mullion.base.files import raise_descriptor_limit
from mullion.base.paths import HostPaths
from mullion.base.settings import Settings
from mullion.base.units import utc_now
from mullion.host import ServiceLock, allocate_uid, host_checks, isolates, prepare_host_folders
from mullion.hypervisor.accel import AcceleratorChoice, accelerator_check, probe_accelerator
from mullion.model.definition import Accelerator
from mullion.model.views import CheckView, StatusView
from mullion.parent.events import Events
from mullion.parent.operations import Operations
from mullion.parent.schedules import Schedules
from mullion.parent.store import SqliteStore, Store
from mullion.services.backup.controller import BackupController
from mullion.services.backup.schedules import BackupSchedules
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.exports import CheckpointExports
from mullion.services.checkpoint.keeper import MergeSlots
from mullion.services.checkpoint.schedules import CheckpointSchedules
from mullion.services.disk.controller import DiskController
from mullion.services.files.controller import FilesController
from mullion.services.image.controller import ImageController
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Surroundings
from mullion.services.partition.preparation import Preparer
from mullion.services.partition.provider_link import ProviderFleet

if TYPE_CHECKING:
    from mullion.parent.api import ApiServer

log = logging.getLogger(__name__)

_SLOTS_PER_CORE: Final = 2


class Daemon:
    """The service of one host, put together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._paths = HostPaths(settings.data_dir, settings.run_dir)
        self._begun_s = time.monotonic()
        self._started_at = utc_now()
        self._ending = asyncio.Event()
        self._api_url = ""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises: ConflictError when a service of this run folder runs already; what the store raises.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._ending.set)
        paths, settings = self._paths, self._settings
        async with contextlib.AsyncExitStack() as stack:
            isolated = isolates(settings.isolation)
            prepare_host_folders(paths, isolated=isolated)
            stack.enter_context(ServiceLock(paths.service_lock))
            store = await SqliteStore.open(paths.database)
            stack.push_async_callback(store.close)
            events = Events(store)
            await events.open()
            stack.push_async_callback(events.close)
            operations = Operations(store, events)
            await operations.open()
            schedules = Schedules(store, events)
            images = ImageController(paths)
            fleet = ProviderFleet(paths.log)
            stack.push_async_callback(fleet.close)
            disks = DiskController(
                paths,
                store,
                images.resolve,
                holders=lambda: partitions.holders(),  # noqa: PLW0108 - made below
                attached=lambda: partitions.attached(),  # noqa: PLW0108 - made below
            )
            await disks.open()
            partitions = PartitionController(
                store=store,
                events=events,
                operations=operations,
                paths=paths,
                disks=disks,
                surroundings=Surroundings(
                    preparer=Preparer(disks, lambda: partitions.holders()),  # noqa: PLW0108 - being made
                    fleet=fleet,
                    boot_slots=asyncio.Semaphore(settings.boot_slots or _SLOTS_PER_CORE * (os.cpu_count() or 1)),
                    choose_accelerator=self._choose_accelerator,
                    allow_faults=settings.fault_injection == "on",
                    homecoming_rate=settings.homecoming_rate,
                ),
                allocate_uid=allocate_uid if isolated else None,
            )
            await partitions.open()
            stack.push_async_callback(partitions.close)
            checkpoints = CheckpointController(
                store=store,
                events=events,
                operations=operations,
                partitions=partitions,
                slots=MergeSlots(asyncio.Semaphore(settings.merge_slots), settings.merge_rate),
            )
            exports = CheckpointExports(checkpoints=checkpoints, partitions=partitions, events=events, paths=paths)
            await exports.open()
            stack.push_async_callback(exports.close)
            await checkpoints.open()
            stack.push_async_callback(checkpoints.close)
            backups = BackupController(
                store=store,
                events=events,
                operations=operations,
                paths=paths,
                partitions=partitions,
                checkpoints=checkpoints,
                disks=disks,
            )
            await backups.open()
            checkpoint_schedules = CheckpointSchedules(schedules, checkpoints, partitions, operations)
            checkpoint_schedules.register()
            backup_schedules = BackupSchedules(schedules, backups, partitions, operations)
            backup_schedules.register()
            files = FilesController(checkpoints)
            stack.push_async_callback(files.close)
            log.info("partitions are adopted %.3f s after the start", time.monotonic() - self._begun_s)
            await operations.recover()
            await backups.homecomings.resume()
            stack.push_async_callback(backups.homecomings.close)
            stack.push_async_callback(operations.close)
            await fleet.open()
            await schedules.open()
            stack.push_async_callback(schedules.close)
            server = await self._serve_api(
                store=store,
                operations=operations,
                events=events,
                partitions=partitions,
                checkpoints=checkpoints,
                exports=exports,
                backups=backups,
                checkpoint_schedules=checkpoint_schedules,
                backup_schedules=backup_schedules,
                files=files,
                disks=disks,
                images=images,
            )
            stack.push_async_callback(server.stop)
            log.info("ready %.3f s after the start", time.monotonic() - self._begun_s)
            events.publish("service.started", "service", {"version": __version__, "pid": os.getpid()})
            await self._ending.wait()
            log.info("ending; partitions go on")
            events.publish("service.ending", "service")

    async def _serve_api(
        self,
        *,
        store: Store,
        operations: Operations,
        events: Events,
        partitions: PartitionController,
        checkpoints: CheckpointController,
        exports: CheckpointExports,
        backups: BackupController,
        checkpoint_schedules: CheckpointSchedules,
        backup_schedules: BackupSchedules,
        files: FilesController,
        disks: DiskController,
        images: ImageController,
    ) -> ApiServer:
        from mullion.parent import api
        from mullion.services.backup import routes as backup_routes
        from mullion.services.backup import schedule_routes as backup_schedule_routes
        from mullion.services.checkpoint import routes as checkpoint_routes
        from mullion.services.checkpoint import schedule_routes
        from mullion.services.disk import routes as disk_routes
        from mullion.services.files import routes as files_routes
        from mullion.services.image import routes as image_routes
        from mullion.services.partition import provider_routes
        from mullion.services.partition import routes as partition_routes
        from mullion.services.system import routes as system_routes

        closing = asyncio.Event()
        app = api.create_app(
            store=store,
            operations=operations,
            events=events,
            authority=api.Authority(api.load_token(self._paths.token_file)),
            closing=closing,
            routes=[
                *system_routes.ROUTES,
                *partition_routes.ROUTES,
                *provider_routes.ROUTES,
                *checkpoint_routes.ROUTES,
                *schedule_routes.ROUTES,
                *backup_routes.ROUTES,
                *backup_schedule_routes.ROUTES,
                *files_routes.ROUTES,
                *disk_routes.ROUTES,
                *image_routes.ROUTES,
            ],
            services={
                "partitions": partitions,
                "checkpoints": checkpoints,
                "schedules": checkpoint_schedules,
                "backup_schedules": backup_schedules,
                "exports": exports,
                "backups": backups,
                "files": files,
                "disks": disks,
                "images": images,
                "system": system_routes.System(lambda: self._status(partitions)),
            },
        )
        server = api.ApiServer(app, self._paths, self._settings.listen, closing)
        await server.start()
        self._api_url = server.url
        return server

    def _choose_accelerator(self, wanted: Accelerator) -> AcceleratorChoice:
        forced = Accelerator(self._settings.accelerator) if wanted is Accelerator.AUTO else wanted
        return probe_accelerator(self._paths.accelerator_cache, forced=forced)

    def _status(self, partitions: PartitionController) -> StatusView:
        choice = self._choose_accelerator(Accelerator.AUTO)
        return StatusView(
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            uptime_s=round(time.monotonic() - self._begun_s, 3),
            host_name=socket.gethostname(),
            accelerator=choice.accelerator.value,
            accelerator_reason=choice.reason,
            partitions=partitions.count_states(),
            api_socket=self._paths.api_socket,
            api_url=self._api_url,
            data_dir=self._paths.data_dir,
            run_dir=self._paths.run_dir,
        )


def check_host(settings: Settings) -> tuple[CheckView, ...]:
    """What `mullion doctor` shows; works without the service."""
    paths = HostPaths(settings.data_dir, settings.run_dir)
    try:
        choice = probe_accelerator(paths.accelerator_cache, forced=Accelerator(settings.accelerator))
        accelerator = accelerator_check(choice)
    except MullionError as error:
        accelerator = CheckView("accelerator", "missing", error.message, error.remedy)
    return host_checks(paths, accelerator=accelerator, isolation=settings.isolation)


def main(argv: list[str]) -> int:
    """`serve`, or `doctor --format json`; the exit code is the error's."""
    try:
        settings = Settings.load()
        if argv[:1] == ["doctor"]:
            print(msgspec.json.encode(check_host(settings)).decode())
            return 0
        _make_data_folder(settings.data_dir)
        log_path = HostPaths(settings.data_dir, settings.run_dir).log
        logs.set_up(settings.log_level, log_path, stderr=not _is_same_file(sys.stderr.fileno(), log_path))
        raise_descriptor_limit()
        asyncio.run(Daemon(settings).run())
    except MullionError as error:
        log.error("%s", error)
        print(f"mullion: {error.message}\n  → {error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


def _make_data_folder(path: str) -> None:
    try:
        os.makedirs(path, mode=0o711, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"the data folder {path} cannot be made: {error.strerror}",
            remedy="Make it, or name another one: setting data_dir.",
            path=path,
        ) from error


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
