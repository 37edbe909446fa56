"""From what people and programs write to definitions and back; for a wrong field: which one, and what is allowed.

Two kinds of document, said by `kind` at the top (which may be left out): `partition`, one definition, and `apply`,
several as `[[partition]]`. Beside the fields of `PartitionDefinition`, `memory = "512M"` is taken for `memory_bytes`.
Disks without an id become disk0, disk1, … by their place. All that is wrong is reported at once.

Pure: bytes or mappings in, definitions or InvalidError out.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from mullion.base.errors import InvalidError
from mullion.base.units import parse_size
from mullion.model.definition import DiskAttachment, DiskLimits, PartitionDefinition

Format = Literal["toml", "json"]
_T = TypeVar("_T")
_SECRET: Final = re.compile(r"passphrase|password|secret|token|credentials")
_MAX_PROBLEMS: Final = 8


class Problem(NamedTuple):
    """What is wrong with one field, and what it takes."""

    path: str
    message: str
    allowed: str


def parse_partition(
    data: bytes | Mapping[str, object],
    *,
    source: str,
    format: Format = "toml",  # noqa: A002 - the word for it
) -> PartitionDefinition:
    """One definition. `source` (a file's name, "the request") begins every message.

    Raises: InvalidError that names each wrong field and what is allowed there.
    """
    found = parse_document(data, source=source, format=format)
    if len(found) != 1:
        raise InvalidError(
            f"{source}: {len(found)} partitions where one is expected",
            remedy="Use `mullion apply -f FILE` for a document with several.",
            field="partition",
        )
    return found[0]


def parse_document(
    data: bytes | Mapping[str, object],
    *,
    source: str,
    format: Format = "toml",  # noqa: A002 - the word for it
) -> tuple[PartitionDefinition, ...]:
    """The definitions of a document of kind `partition` (one) or `apply` (any number, with different names).

    Raises: InvalidError as `parse_partition`.
    """
    document = dict(data) if isinstance(data, Mapping) else load(data, source=source, format=format)
    kind = document.pop("kind", "apply" if "partition" in document and "name" not in document else "partition")
    if kind == "partition":
        return (_definition(document, source, ""),)
    if kind != "apply":
        raise InvalidError(
            f"{source}: kind is {kind!r}", remedy="Allowed for kind: 'partition', 'apply'.", field="kind"
        )
    items = document.pop("partition", [])
    if document:
        raise _error(source, [_unknown(name, name, ("kind", "partition")) for name in document])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidError(
            f"{source}: partition is not a list of tables", remedy="Write [[partition]] above each.", field="partition"
        )
    found = tuple(_definition(item, source, f"partition[{number}].") for number, item in enumerate(items))
    names = [definition.name for definition in found]
    for name in names:
        if names.count(name) > 1:
            raise InvalidError(f"{source}: the name {name!r} is used twice", field="name")
    return found


def load(data: bytes, *, source: str, format: Format) -> dict[str, object]:  # noqa: A002 - the word for it
    """The table of a TOML or JSON text. Raises: InvalidError with line and column."""
    try:
        text = data.decode("utf-8")
        found = tomllib.loads(text) if format == "toml" else json.loads(text)
    except UnicodeDecodeError as error:
        raise InvalidError(f"{source}: byte {error.start} is not UTF-8", remedy="Save the file as UTF-8.") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise InvalidError(
            f"{source} is not {format.upper()}: {error}", remedy="Correct the text at the place that is named."
        ) from error
    except RecursionError:
        raise InvalidError(f"{source}: nested too deeply", remedy="Definitions need three levels.") from None
    if not isinstance(found, dict):
        raise InvalidError(f"{source}: a table of fields is expected", remedy='Write {"name": …}.')
    return found


def explain(data: bytes, kind: object, *, source: str) -> InvalidError | None:
    """Why JSON does not fit a type, field by field; None when it does."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return InvalidError(f"{source} is not JSON: {error}", remedy="Send a body of JSON in UTF-8.")
    problems = list(find_problems(value, kind))
    return _error(source, problems) if problems else None


def find_problems(value: object, kind: object) -> list[Problem]:
    """All that keeps a value (of JSON or TOML) from being of a type that msgspec knows."""
    found: list[Problem] = []
    _check(value, inspect.type_info(kind), "", found)
    return found


def complete(definition: PartitionDefinition, *, source: str = "the request") -> PartitionDefinition:
    """A definition that came as JSON, with the ids of its disks. Raises: InvalidError for what its types cannot say."""
    return _definition(msgspec.to_builtins(definition), source, "")


def to_toml(definition: PartitionDefinition) -> str:
    """A definition as people write it: what is at its default is left out. `parse_partition` gives it back."""
    fields = msgspec.to_builtins(definition)
    defaults = msgspec.to_builtins(PartitionDefinition(name="x"))
    lines = ['kind = "partition"', f"name = {_toml(fields.pop('name'))}"]
    disks, boot, labels = fields.pop("disks"), fields.pop("direct_boot"), fields.pop("labels")
    caps = fields.pop("disk_limits")
    for name, value in fields.items():
        if name == "memory_bytes":
            lines.append(f'memory = "{_size(value)}"')
        elif value != defaults[name] or name == "vcpus":
            lines.append(f"{name} = {_toml(value)}")
    plain = msgspec.to_builtins(DiskAttachment(path="x"))
    for disk in disks:
        wanted = (name for name in disk if name in ("id", "path", "bus") or disk[name] != plain[name])
        lines += ["", "[[disks]]", *(f"{name} = {_toml(disk[name])}" for name in wanted if name != "limits")]
        lines += _limits_toml("disks.limits", disk["limits"])
    lines += _limits_toml("disk_limits", caps)
    for title, table in (("direct_boot", boot), ("labels", labels)):
        if table:
            lines += ["", f"[{title}]", *(f"{_toml(k)} = {_toml(v)}" for k, v in table.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _limits_toml(title: str, limits: Mapping[str, object] | None) -> list[str]:
    plain = msgspec.to_builtins(DiskLimits())
    wanted = {name: value for name, value in (limits or {}).items() if value != plain[name]}
    if not wanted:
        return []
    return ["", f"[{title}]", *(f"{name} = {_toml(value)}" for name, value in wanted.items())]


def _definition(fields: Mapping[str, object], source: str, where: str) -> PartitionDefinition:
    fields = dict(fields)
    problems: list[Problem] = []
    disks = fields.get("disks")
    if isinstance(disks, list | tuple):
        fields["disks"] = [
            {**disk, "limits": _read_limits(disk["limits"], f"{where}disks[{number}].limits", problems)}
            if isinstance(disk, Mapping) and "limits" in disk
            else disk
            for number, disk in enumerate(_with_ids(disks))
        ]
        problems += _disk_problems(fields["disks"], where)
    if "disk_limits" in fields:
        fields["disk_limits"] = _read_limits(fields["disk_limits"], f"{where}disk_limits", problems)
    if "memory" in fields:
        try:
            memory = fields.pop("memory")
            if "memory_bytes" in fields:
                problems.append(Problem(f"{where}memory", "is given twice, as memory_bytes too", "one of them"))
            fields["memory_bytes"] = parse_size(memory) if isinstance(memory, str) else memory
        except InvalidError as error:
            problems.append(Problem(f"{where}memory", error.message, "a size such as 512M or 4G"))
    kind = inspect.type_info(PartitionDefinition)
    assert isinstance(kind, inspect.StructType)
    _check_struct(fields, kind, where, problems, aliases=("memory",))
    problems += [Problem(f"{where}{name}", "holds a NUL character", "a text without one") for name in _with_nul(fields)]
    if fields.get("uuid") and not _is_uuid(fields["uuid"]):
        problems.append(Problem(f"{where}uuid", f"is {fields['uuid']!r}", "a UUID, or nothing: one is made"))
    if problems:
        raise _error(source, problems)
    return msgspec.convert(fields, PartitionDefinition)


def _read_limits(given: object, where: str, problems: list[Problem]) -> object:
    """Caps with their bytes as numbers, and None for caps that limit nothing."""
    if not isinstance(given, Mapping):
        return given
    limits = dict(given)
    for name, value in given.items():
        if "bytes_per_s" in name and isinstance(value, str):
            try:
                limits[name] = parse_size(value)
            except InvalidError as error:
                problems.append(Problem(f"{where}.{name}", error.message, "bytes a second, such as 10M"))
                limits[name] = 0
    for name in ("iops", "bytes_per_s"):
        cap, burst = limits.get(name, 0), limits.get(f"{name}_burst", 0)
        if isinstance(cap, int) and isinstance(burst, int) and burst and not 0 < cap < burst:
            problems.append(Problem(f"{where}.{name}_burst", f"is {burst}, and {name} is {cap}", f"more than {name}"))
    return limits if any(value for name, value in limits.items() if name != "burst_s") else None


def _with_ids(disks: Sequence[object]) -> list[object]:
    return [
        {**disk, "id": f"disk{number}"} if isinstance(disk, Mapping) and not disk.get("id") else disk
        for number, disk in enumerate(disks)
    ]


def _with_nul(value: object, path: str = "") -> list[str]:
    """The fields whose text holds a NUL: no path and no command line can."""
    if isinstance(value, str):
        return [path] if "\0" in value else []
    if isinstance(value, Mapping):
        return [found for name, item in value.items() for found in _with_nul(item, f"{path}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [found for number, item in enumerate(value) for found in _with_nul(item, f"{path}[{number}]")]
    return []


def _disk_problems(disks: object, where: str) -> list[Problem]:
    """Ids that are used twice, and files that would be written through two disks."""
    problems: list[Problem] = []
    seen: dict[tuple[str, object], tuple[int, bool]] = {}
    for number, disk in enumerate(disks if isinstance(disks, list) else []):
        if not isinstance(disk, Mapping):
            continue
        read_only = disk.get("read_only") is True
        for name in ("id", "path"):
            value = disk.get(name)
            if not isinstance(value, str):
                continue
            first = seen.setdefault((name, value), (number, read_only))
            if first[0] != number and not (name == "path" and read_only and first[1]):
                taken = f"is {value!r}, as that of disks[{first[0]}]"
                allowed = "an id of its own" if name == "id" else "one disk per file, or read_only for all of them"
                problems.append(Problem(f"{where}disks[{number}].{name}", taken, allowed))
    return problems


def _check(value: object, kind: inspect.Type, path: str, found: list[Problem]) -> None:
    """Compare a value with a type, going down into it; `path` ends with a dot when fields follow."""
    here = path.rstrip(".") or "the document"

    def wrong(allowed: str) -> None:
        found.append(Problem(here, _told(here, value), allowed))

    match kind:
        case inspect.Metadata():
            inner: list[Problem] = []
            _check(value, kind.type, path, inner)
            words = (kind.extra_json_schema or {}).get("description")
            found += [one._replace(allowed=str(words)) if words and one.path == here else one for one in inner]
        case inspect.AnyType():
            return
        case inspect.UnionType():
            options = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
            if value is None and len(options) < len(kind.types):
                return
            if len(options) == 1:
                _check(value, options[0], path, found)
            else:
                attempts: list[list[Problem]] = []
                for option in options:
                    attempts.append([])
                    _check(value, option, path, attempts[-1])
                attempts.sort(key=len)
                found += attempts[0]
        case inspect.StructType():
            _check_struct(value, kind, path, found)
        case inspect.EnumType():
            allowed = [member.value for member in kind.cls]
            if not any(type(value) is type(one) and value == one for one in allowed):
                wrong(f"one of {', '.join(repr(one) for one in allowed)}")
        case inspect.LiteralType():
            if value not in kind.values or isinstance(value, bool):
                wrong(f"one of {', '.join(repr(one) for one in kind.values)}")
        case inspect.BoolType():
            if not isinstance(value, bool):
                wrong("true or false")
        case inspect.IntType() | inspect.FloatType():
            _check_number(value, kind, here, found)
        case inspect.StrType():
            if not isinstance(value, str) or not _fits(value, kind):
                wrong(_describe_str(kind))
        case inspect.VarTupleType() | inspect.ListType():
            if not isinstance(value, list | tuple):
                wrong("a list")
                return
            if kind.max_length is not None and len(value) > kind.max_length:
                found.append(Problem(here, f"has {len(value)} entries", f"at most {kind.max_length}"))
            for number, item in enumerate(value):
                _check(item, kind.item_type, f"{here}[{number}].", found)
        case inspect.DictType():
            if not isinstance(value, Mapping):
                wrong("a table")
                return
            for key, item in value.items():
                _check(item, kind.value_type, f"{path}{key}.", found)
        case _:
            return  # a type that no definition has: msgspec's own message has to do


def _check_struct(
    value: object, kind: inspect.StructType, path: str, found: list[Problem], aliases: Sequence[str] = ()
) -> None:
    here = path.rstrip(".") or "the document"
    if not isinstance(value, Mapping):
        found.append(Problem(here, _told(here, value), "a table of fields"))
        return
    fields = {field.encode_name: field for field in kind.fields}
    names = [*fields, *aliases]
    found += [_unknown(str(name), f"{path}{name}", names) for name in value if name not in fields]
    for name, field in fields.items():
        if name in value:
            _check(value[name], field.type, f"{path}{name}.", found)
        elif field.required:
            found.append(Problem(f"{path}{name}", "is missing", _describe(field.type, name)))


def _check_number(value: object, kind: inspect.IntType | inspect.FloatType, here: str, found: list[Problem]) -> None:
    whole = isinstance(kind, inspect.IntType)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        found.append(Problem(here, _told(here, value), _describe(kind, here)))
        return
    too_low = (kind.ge is not None and value < kind.ge) or (kind.gt is not None and value <= kind.gt)
    too_high = (kind.le is not None and value > kind.le) or (kind.lt is not None and value >= kind.lt)
    if too_low or too_high or (kind.multiple_of and value % kind.multiple_of):
        found.append(Problem(here, _told(here, value), _describe(kind, here)))


def _fits(value: str, kind: inspect.StrType) -> bool:
    if kind.min_length is not None and len(value) < kind.min_length:
        return False
    if kind.max_length is not None and len(value) > kind.max_length:
        return False
    return kind.pattern is None or re.search(kind.pattern, value) is not None


def _describe(kind: inspect.Type, name: str = "") -> str:
    """What a field takes, in words; the limits of a field whose name ends with `_bytes` are sizes."""
    match kind:
        case inspect.Metadata():
            described = (kind.extra_json_schema or {}).get("description")
            return str(described) if described else _describe(kind.type, name)
        case inspect.IntType() | inspect.FloatType():
            is_size = name.endswith("_bytes")
            limit = _size_in_words if is_size else _number
            word = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            words = f"{word} of bytes" if is_size else word
            if kind.ge is not None and kind.le is not None:
                words += f" from {limit(kind.ge)} to {limit(kind.le)}"
            elif kind.ge is not None:
                words += f" of at least {limit(kind.ge)}"
            if kind.multiple_of and kind.multiple_of != 1:
                words += f", a multiple of {limit(kind.multiple_of)}"
            return words + ("; or memory, with a size such as 512M" if name == "memory_bytes" else "")
        case inspect.StrType():
            return _describe_str(kind)
    return "a value"


def _number(limit: float) -> str:
    """A limit in full: a whole number without a fraction or an exponent."""
    return str(int(limit)) if limit == int(limit) else str(limit)


def _size_in_words(limit: float) -> str:
    """A limit of a size, in the largest unit in which it is exact: `2040 GiB`, `512 bytes`."""
    text = _size(int(limit))
    return f"{text[:-1]} {text[-1]}iB" if text[-1].isalpha() else f"{text} bytes"


def _describe_str(kind: inspect.StrType) -> str:
    words = "a text"
    if kind.min_length or kind.max_length is not None:
        words += f" of {kind.min_length or 0} to {kind.max_length} characters"
    return words + (f" that matches {kind.pattern}" if kind.pattern else "")


def _unknown(name: str, path: str, allowed: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return Problem(path, f"is not a field{hint}", ", ".join(sorted(allowed)))


def _error(source: str, problems: Sequence[Problem]) -> InvalidError:
    shown = problems[:_MAX_PROBLEMS]
    message = "; ".join(f"{problem.path} {problem.message}" for problem in shown)
    if len(problems) > len(shown):
        message += f"; and {len(problems) - len(shown)} more"
    remedies = dict.fromkeys(f"Allowed for {problem.path}: {problem.allowed}." for problem in shown)
    return InvalidError(f"{source}: {message}", remedy=" ".join(remedies), field=problems[0].path)


def _told(here: str, value: object) -> str:
    """What is there instead; not of a field whose name says that it is a secret."""
    return "is nothing that it takes" if _SECRET.search(here.lower()) else f"is {_show(value)}"


def _show(value: object) -> str:
    """A value in a message, cut short."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_uuid(value: object) -> bool:
    try:
        return str(uuid.UUID(str(value))) == str(value).lower()
    except ValueError:
        return False


def _size(size_bytes: int) -> str:
    """The shortest size that is exact: `4G`, `1536M`."""
    for suffix, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift}{suffix}"
    return str(size_bytes)


def _toml(value: object) -> str:
    """A TOML value; JSON's escapes are TOML's, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
