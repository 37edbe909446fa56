"""The store: its contract, and the two that live on one host."""

from mullion.parent.store.memory import MemoryStore
from mullion.parent.store.protocol import Change, Condition, Delete, Entry, HistoryGoneError, Put, Store
from mullion.parent.store.sqlite import SqliteStore

__all__ = ["Change", "Condition", "Delete", "Entry", "HistoryGoneError", "MemoryStore", "Put", "SqliteStore", "Store"]
