"""Chooses kernel modules and writes the indexes by which the guest's modprobe finds them.

Spec: modules.dep(5) (`path: path of each module it needs …`), modules.alias as depmod(8) writes it
(`alias pattern module`). The kernel package ships the modules without these two files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mullion.base.errors import InvalidError
from mullion.services.image.elf import module_info


@dataclass(frozen=True, slots=True)
class Module:
    """A kernel module: its path below `lib/modules/RELEASE`, its file, what it needs and answers to."""

    path: str
    content: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def module_name(path: str) -> str:
    """The name by which modules refer to each other: `-` and `_` are the same."""
    return path.rpartition("/")[2].removesuffix(".ko").replace("-", "_")


def read_module(path: str, content: bytes) -> Module:
    """Raises: InvalidError when it is not a kernel module."""
    info = module_info(content)
    depends = tuple(module_name(name) for name in info.get("depends", ("",))[0].split(",") if name)
    return Module(path, content, depends, info.get("alias", ()))


def plan_modules(
    wanted: Iterable[str], required: Iterable[str], files: Mapping[str, bytes], builtin: Iterable[str]
) -> dict[str, Module]:
    """The wanted modules with all that they need, by name. Those not wanted by force may be missing from the kernel.

    `files` has each module of the package by its path, `builtin` the paths of those inside the kernel.
    Raises: InvalidError when a required module, or one that a chosen module needs, is neither a file nor built in.
    """
    by_name = {module_name(path): path for path in files}
    inside = {module_name(path) for path in builtin}
    chosen: dict[str, Module] = {}
    must = {module_name(name) for name in required}
    todo = [*must, *(module_name(name) for name in wanted)]
    while todo:
        name = todo.pop()
        if name in chosen or name in inside:
            continue
        if name not in by_name:
            if name in must:
                raise InvalidError(f"the kernel package has no module {name}", module=name)
            continue
        chosen[name] = read_module(by_name[name], files[by_name[name]])
        must |= set(chosen[name].depends)
        todo += chosen[name].depends
    return chosen


def dependency_index(modules: Mapping[str, Module]) -> bytes:
    """`modules.dep`: for each module all it needs, nearest first, so that loading them from the end on works."""
    lines = []
    for name in sorted(modules):
        needs = [modules[need].path for need in _all_needs(name, modules)]
        lines.append(f"{modules[name].path}: {' '.join(needs)}".rstrip() + "\n")
    return "".join(lines).encode()


def _all_needs(name: str, modules: Mapping[str, Module]) -> list[str]:
    """Everything below a module; each comes after all that need it."""
    order: list[str] = []
    seen = {name}

    def visit(current: str) -> None:
        for need in modules[current].depends:
            if need in modules and need not in seen:
                seen.add(need)
                visit(need)
                order.append(need)

    visit(name)
    return order[::-1]


def alias_index(modules: Mapping[str, Module]) -> bytes:
    """`modules.alias`: which module drives which hardware."""
    return "".join(f"alias {alias} {name}\n" for name in sorted(modules) for alias in modules[name].aliases).encode()
