"""Stores the record and gateways' slots in an SQLite file, or in memory.

It uses a write-ahead log with synchronous FULL: a commit that returned survives a crash of the machine, so no epoch
that was used is ever used again. Of the coordinators on one state folder, the leader is the one that has the file open.
The lock is the operating system's: it ends with the process, even if that crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from stagemesh.errors import ConfigError
from stagemesh.faults import point

from ..values import StoredPlan
from ..world.record import Record

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS epochs (pipeline_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS plans (pipeline_id TEXT PRIMARY KEY, plan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replicas (stage INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS partitions (terms TEXT PRIMARY KEY, counts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS drains (worker_id TEXT PRIMARY KEY, incarnation TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS forced (worker_id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS slots (slot INTEGER PRIMARY KEY, gateway_id TEXT NOT NULL, instance TEXT NOT NULL);
"""
VERSION = 1
PLAN = TypeAdapter(StoredPlan)


class InUse(ConfigError):
    """Another coordinator has the state folder open."""


class Store:
    """The store. It is synchronous: a commit takes about a millisecond, and nothing may go on before it is done."""

    def __init__(self, state_dir: str | None) -> None:
        """Opens or creates `state_dir`/coordinator.sqlite. None keeps everything in memory.

        Raises InUse when another coordinator has it open, ConfigError when it cannot be opened or has another format.
        """
        where = ":memory:"
        try:
            if state_dir is not None:
                Path(state_dir).mkdir(parents=True, exist_ok=True)
                where = str(Path(state_dir) / "coordinator.sqlite")
            # Exclusive: two coordinators on one state would both think that an epoch is theirs.
            self._db = sqlite3.connect(where, isolation_level=None, timeout=0)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version not in (0, VERSION):
                raise ConfigError(
                    f"{where} was written by another release (format {version}, this one knows {VERSION}): "
                    "use that release, or another --state-dir"
                )
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        except (OSError, sqlite3.Error) as e:
            in_use = getattr(e, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY
            raise (InUse if in_use else ConfigError)(
                f"--state-dir {state_dir}: cannot open {where} ({e}): give a folder that this user can write and that "
                "no other coordinator uses"
            ) from e

    def load(self, terms: str) -> Record:
        """The stored record. Its layer counts are those that were wanted under the same `terms`."""
        select = self._db.execute
        counts = select("SELECT counts FROM partitions WHERE terms = ?", (terms,)).fetchone()
        return Record(
            epochs=dict(select("SELECT * FROM epochs").fetchall()),
            plans={name: PLAN.validate_json(text) for name, text in select("SELECT * FROM plans").fetchall()},
            replicas=dict(select("SELECT * FROM replicas").fetchall()),
            counts=tuple(json.loads(counts[0])) if counts is not None else None,
            drains={name: int(incarnation) for name, incarnation in select("SELECT * FROM drains").fetchall()},
            forced=frozenset(name for (name,) in select("SELECT * FROM forced").fetchall()),
        )

    def save(self, before: Record, after: Record, terms: str) -> None:
        """Stores what changed, in one transaction. Epochs never fall."""
        old, new = _rows(before, terms), _rows(after, terms)
        changed = [table for table in new if new[table] != old[table]]
        orders = set(changed) - {"epochs", "plans"}
        if "epochs" in changed:
            point("coordinator.before_epoch_write")
        if "plans" in changed:
            point("coordinator.before_plan_write")
        if orders:
            point("coordinator.before_order_write")
        with self._db:
            self._db.execute("BEGIN")
            for table in changed:
                rises = "ON CONFLICT (pipeline_id) DO UPDATE SET epoch = max(epoch, excluded.epoch)"
                if table != "epochs":
                    rises = ""
                    self._db.execute(f"DELETE FROM {table}")
                if orders:
                    point("coordinator.within_order_write")
                for row in new[table]:
                    self._db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))}) {rises}", row)
        if "epochs" in changed:
            point("coordinator.after_epoch_write")
        if "plans" in changed:
            point("coordinator.after_plan_write")
        if orders:
            point("coordinator.after_order_write")

    def slots(self) -> dict[int, tuple[str, int]]:
        """Slot -> (gateway, instance) that had it last."""
        return {slot: (name, int(instance)) for slot, name, instance in self._db.execute("SELECT * FROM slots")}

    def save_slot(self, slot: int, gateway_id: str, instance: int) -> None:
        """Stores which gateway has a slot."""
        point("coordinator.before_slot_write")
        self._db.execute("INSERT OR REPLACE INTO slots VALUES (?, ?, ?)", (slot, gateway_id, str(instance)))
        point("coordinator.after_slot_write")

    def forget_slots(self, slots: Iterable[int]) -> None:
        """Deletes stored slots, which other gateways may get from now on."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("DELETE FROM slots WHERE slot = ?", [(slot,) for slot in slots])

    def close(self) -> None:
        self._db.close()


async def open_store(state_dir: str | None, look_s: float, stop: asyncio.Event) -> Store | None:
    """Opens the store once no other coordinator has it open. Tries every `look_s`. None if `stop` is set before.

    Raises ConfigError.
    """
    told = False
    while not stop.is_set():
        try:
            return Store(state_dir)
        except InUse:
            if not told:
                log.info("another coordinator has --state-dir %s; this one waits until it is gone", state_dir)
                told = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(look_s):
                await stop.wait()
    return None


def _rows(record: Record, terms: str) -> dict[str, list[tuple[object, ...]]]:
    """Table -> its rows. Unsigned 64-bit numbers are stored as text, as SQLite's integers are signed."""
    return {
        "epochs": [*record.epochs.items()],
        "plans": [(name, PLAN.dump_json(plan).decode()) for name, plan in record.plans.items()],
        "replicas": [*record.replicas.items()],
        "partitions": [(terms, json.dumps(record.counts))] if record.counts is not None else [],
        "drains": [(name, str(incarnation)) for name, incarnation in record.drains.items()],
        "forced": [(name,) for name in sorted(record.forced)],
    }
