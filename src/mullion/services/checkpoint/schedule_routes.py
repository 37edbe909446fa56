"""REST of schedules of checkpoints: `/1.0/partitions/NAME/checkpoint-schedules`."""

from __future__ import annotations

from typing import Annotated, Final

from litestar import delete, get, put
from litestar.params import HeaderParameter, JSONBody, PathParameter
from msgspec import Meta, Struct

from mullion.base.errors import NotFoundError
from mullion.model.definition import LABEL_PATTERN
from mullion.model.schedule import INTERVAL_LIMIT_S, KEEP_LIMIT, MINUTE_S
from mullion.model.views import CheckpointScheduleView
from mullion.parent.api import PathName, Service, check_match
from mullion.services.checkpoint.schedules import CheckpointSchedules, ScheduleOptions

_TAGS: Final = ["checkpoints"]
_Schedule = Annotated[str, PathParameter(description="the schedule's name", pattern=LABEL_PATTERN)]
_IfMatch = Annotated[str | None, HeaderParameter(name="If-Match")]


class WantedSchedule(Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule: `every 6h`, `daily 02:30` or `weekly sun 03:00`, and how many, or for how long, are kept."""

    rule: Annotated[str, Meta(min_length=1, max_length=100)]
    keep: Annotated[int, Meta(ge=1, le=KEEP_LIMIT)] | None = None
    keep_for_s: Annotated[int, Meta(ge=MINUTE_S, le=100 * INTERVAL_LIMIT_S)] | None = None
    consistent: bool = False


@get("/1.0/partitions/{name:str}/checkpoint-schedules", tags=_TAGS)
async def list_schedules(schedules: Service[CheckpointSchedules], name: PathName) -> list[CheckpointScheduleView]:
    """The schedules of a partition's checkpoints."""
    return list(schedules.list(name))


@get("/1.0/partitions/{name:str}/checkpoint-schedules/{schedule:str}", tags=_TAGS)
async def show_schedule(
    schedules: Service[CheckpointSchedules], name: PathName, schedule: _Schedule
) -> CheckpointScheduleView:
    """One schedule, how it ran last and when it runs next."""
    return schedules.get(name, schedule)


@put("/1.0/partitions/{name:str}/checkpoint-schedules/{schedule:str}", tags=_TAGS)
async def set_schedule(
    schedules: Service[CheckpointSchedules],
    name: PathName,
    schedule: _Schedule,
    data: JSONBody[WantedSchedule],
    if_match: _IfMatch = None,
) -> CheckpointScheduleView:
    """Make a schedule, or change one: then If-Match takes the view's `etag`, or `*`."""
    _check_match(schedules, name, schedule, if_match)
    options = ScheduleOptions(keep=data.keep, keep_for_s=data.keep_for_s, consistent=data.consistent)
    return await schedules.set(name, schedule, data.rule, options)


@delete("/1.0/partitions/{name:str}/checkpoint-schedules/{schedule:str}", tags=_TAGS)
async def remove_schedule(
    schedules: Service[CheckpointSchedules], name: PathName, schedule: _Schedule, if_match: _IfMatch = None
) -> None:
    """Forget a schedule; the checkpoints that it made stay."""
    schedules.get(name, schedule)
    _check_match(schedules, name, schedule, if_match)
    await schedules.remove(name, schedule)


def _check_match(schedules: CheckpointSchedules, name: str, schedule: str, if_match: str | None) -> None:
    """Of a schedule that is there. Raises: PreconditionRequiredError; PreconditionError."""
    try:
        etag = schedules.get(name, schedule).etag
    except NotFoundError:
        return
    check_match(if_match, etag, f"schedule {schedule} of partition {name}")


ROUTES: Final = (list_schedules, show_schedule, set_schedule, remove_schedule)
