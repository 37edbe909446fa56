"""The passphrase of a repository is changed; interrupted at any instant, the change goes on.

    secret file: old, and which one is next ─► worker: a key slot of the new one, durable
    secret file: new, and which slots it replaces ─► worker: those go, durable
    secret file: new

The secret file is the one that only the service reads. What it says opens the repository at every instant, so backups
go on meanwhile; the operation, which is resumed after a crash, finds there what is left to do. Nobody else has to
stand still: the slot that was put last stays, whoever else changes the passphrase meanwhile (`repository.slots`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mullion.base.errors import MullionError, OperationFailedError
from mullion.model.views import OperationView
from mullion.parent.events import Events
from mullion.parent.operations import InterruptedError as OperationInterruptedError
from mullion.parent.operations import Operation, Operations
from mullion.services.backup.repositories import WRONG_KEY, Repositories

KIND: Final = "backup.passphrase"
_PREFIX: Final = "repository/"
_CHANGE: Final = "change"
"""In the secret file: `operation`, and while it goes on `next` (a passphrase) or `replaced` (names of slots)."""


class PassphraseChanges:
    """The changes of passphrases that are asked for, and those that a crash has interrupted."""

    def __init__(self, operations: Operations, events: Events, repositories: Repositories) -> None:
        self._operations = operations
        self._events = events
        self._repositories = repositories

    def open(self) -> None:
        """After a crash the operations go on."""
        self._operations.register_resume(KIND, self.resume)

    async def begin(self, name: str, passphrase: str) -> OperationView:
        """Begin to let a passphrase open a repository in place of all that do now.

        Raises: NotFoundError; ConflictError while an operation of this host works on the repository itself.
        """
        name = self._repositories.choose(name)

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self.change(operation, name, passphrase)

        return await self._operations.start(KIND, f"{_PREFIX}{name}", work)

    async def change(self, operation: Operation, name: str, passphrase: str) -> Mapping[str, object]:
        """The operation's work. Raises: what the repository raises: then the passphrase is the old one still."""
        async with self._repositories.turn(name):
            secret = await self._repositories.read_secret(name)
            secret[_CHANGE] = {"operation": operation.id, "next": passphrase}
            await self._repositories.write_secret(name, secret)
            return await self._go_on(operation, name, secret)

    async def resume(self, operation: Operation) -> Mapping[str, object]:
        """After a crash: from where the secret file says. Raises: InterruptedError when nothing had begun."""
        name = operation.target.removeprefix(_PREFIX)
        async with self._repositories.turn(name):
            secret = await self._repositories.read_secret(name)
            if secret.get(_CHANGE, {}).get("operation") != operation.id:
                raise OperationInterruptedError(
                    f"the service ended before the passphrase of repository {name} was changed: it is the old one",
                    remedy=f"Change it again: mullion backup repository passphrase {name}",
                    operation=operation.id,
                )
            return await self._go_on(operation, name, secret)

    async def _go_on(self, operation: Operation, name: str, secret: dict[str, Any]) -> Mapping[str, object]:
        if "next" in secret[_CHANGE]:
            operation.stage("adding a key slot for the new passphrase", 0.0)
            secret = await self._add_slot(operation, name, secret)
        if "replaced" in secret[_CHANGE]:
            operation.stage("removing the key slots of the old one", 0.5)
            secret = await self._remove_slots(operation, name, secret)
        self._events.publish("backup.passphrase-changed", f"{_PREFIX}{name}")
        return {"repository": name}

    async def _add_slot(self, operation: Operation, name: str, secret: dict[str, Any]) -> dict[str, Any]:
        passphrase = secret[_CHANGE]["next"]
        try:
            said = await self._repositories.ask(name, "add-passphrase", new_passphrase=passphrase)
        except MullionError:
            await self._repositories.write_secret(name, _without_change(secret))
            raise
        change = {"operation": operation.id, "replaced": said["replaced"]}
        secret = {**secret, "passphrase": passphrase, _CHANGE: change}
        await self._repositories.write_secret(name, secret)
        return secret

    async def _remove_slots(self, operation: Operation, name: str, secret: dict[str, Any]) -> dict[str, Any]:
        try:
            await self._repositories.ask(name, "remove-slots", slots=secret[_CHANGE]["replaced"])
        except MullionError as error:
            await self._repositories.write_secret(name, _without_change(secret))
            if error.code == WRONG_KEY:  # another host has changed it since
                raise
            raise OperationFailedError(
                f"the new passphrase of repository {name} is in use, but the old one opens it still: {error.message}",
                remedy=f"Mend that, then change it again, to the same one if you like: "
                f"mullion backup repository passphrase {name}",
                repository=name,
            ) from error
        secret = {**secret, _CHANGE: {"operation": operation.id}}
        await self._repositories.write_secret(name, secret)
        return secret


def _without_change(secret: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in secret.items() if field != _CHANGE}
