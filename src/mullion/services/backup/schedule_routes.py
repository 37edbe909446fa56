"""REST of schedules of backups: `/1.0/backup-schedules`, and `/1.0/partitions/NAME/backup-schedules/SCHEDULE`."""

from __future__ import annotations

from typing import Annotated, Final

from litestar import delete, get, put
from litestar.params import HeaderParameter, JSONBody, PathParameter, QueryParameter
from msgspec import Meta, Struct

from mullion.base.errors import NotFoundError
from mullion.model.definition import LABEL_PATTERN
from mullion.model.views import BackupScheduleView
from mullion.parent.api import PathName, Service, check_match
from mullion.services.backup.routes import Keep, keep_rules
from mullion.services.backup.schedules import BackupSchedules

_TAGS: Final = ["backups"]
_PATH: Final = "/1.0/partitions/{name:str}/backup-schedules/{schedule:str}"
_Schedule = Annotated[str, PathParameter(description="the schedule's name", pattern=LABEL_PATTERN)]
_IfMatch = Annotated[str | None, HeaderParameter(name="If-Match")]


class WantedBackupSchedule(Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule: `every 6h`, `daily 02:30` or `weekly sun 03:00`, into which repository, and how many are kept."""

    rule: Annotated[str, Meta(min_length=1, max_length=100)]
    repository: str | None = None
    keep: Keep = Keep()
    consistent: bool = False


@get("/1.0/backup-schedules", tags=_TAGS)
async def list_schedules(
    backup_schedules: Service[BackupSchedules],
    partition: Annotated[str | None, QueryParameter(description="only those of this partition")] = None,
) -> list[BackupScheduleView]:
    """The schedules of backups."""
    return list(backup_schedules.list(partition))


@get(_PATH, tags=_TAGS)
async def show_schedule(
    backup_schedules: Service[BackupSchedules], name: PathName, schedule: _Schedule
) -> BackupScheduleView:
    """One schedule, how it ran last and when it runs next."""
    return backup_schedules.get(name, schedule)


@put(_PATH, tags=_TAGS)
async def set_schedule(
    backup_schedules: Service[BackupSchedules],
    name: PathName,
    schedule: _Schedule,
    data: JSONBody[WantedBackupSchedule],
    if_match: _IfMatch = None,
) -> BackupScheduleView:
    """Make a schedule, or change one: then If-Match takes the view's `etag`, or `*`."""
    try:
        check_match(if_match, backup_schedules.get(name, schedule).etag, f"backup schedule {schedule} of {name}")
    except NotFoundError:
        pass  # the first of this name; or no such partition, which `set` says
    return await backup_schedules.set(
        name, schedule, data.rule, data.repository, keep_rules(data.keep), consistent=data.consistent
    )


@delete(_PATH, tags=_TAGS)
async def remove_schedule(
    backup_schedules: Service[BackupSchedules], name: PathName, schedule: _Schedule, if_match: _IfMatch = None
) -> None:
    """Forget a schedule; the backups that it made stay."""
    check_match(if_match, backup_schedules.get(name, schedule).etag, f"backup schedule {schedule} of {name}")
    await backup_schedules.remove(name, schedule)


ROUTES: Final = (list_schedules, show_schedule, set_schedule, remove_schedule)
