"""Where the record is written down, and gateways' slots: an SQLite file, or memory.

Write-ahead log with synchronous FULL: a commit that returned survives a crash of the machine, so an epoch that anyone
heard of is never handed out again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError
from stagemesh.faults import point

from ..values import Loaded, StagePlan, StoredPlan
from ..world.record import Record

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


class Store:
    """Synchronous: a commit takes about a millisecond, and nothing may go on before it is done."""

    def __init__(self, state_dir: str | None) -> None:
        """Opens, or makes, `state_dir`/coordinator.sqlite; None keeps everything in memory. Raises ConfigError."""
        where = ":memory:"
        try:
            if state_dir is not None:
                Path(state_dir).mkdir(parents=True, exist_ok=True)
                where = str(Path(state_dir) / "coordinator.sqlite")
            # Exclusive: two coordinators on one state would both think that an epoch is theirs.
            self._db = sqlite3.connect(where, isolation_level=None, timeout=2.0)
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
            raise ConfigError(
                f"--state-dir {state_dir}: cannot open {where} ({e}): give a folder that this user can write and that "
                "no other coordinator uses"
            ) from e

    def load(self, terms: str) -> Record:
        """The record as it was written down. Layer counts are those that were wanted under the same `terms`."""
        select = self._db.execute
        counts = select("SELECT counts FROM partitions WHERE terms = ?", (terms,)).fetchone()
        drains = select("SELECT worker_id, incarnation FROM drains").fetchall()
        return Record(
            epochs=dict(select("SELECT pipeline_id, epoch FROM epochs").fetchall()),
            plans={name: _plan(json.loads(text)) for name, text in select("SELECT * FROM plans").fetchall()},
            replicas=dict(select("SELECT stage, count FROM replicas").fetchall()),
            counts=tuple(json.loads(counts[0])) if counts is not None else None,
            drains={worker_id: int(incarnation) for worker_id, incarnation in drains},
            forced=frozenset(name for (name,) in select("SELECT worker_id FROM forced").fetchall()),
        )

    def save(self, before: Record, after: Record, terms: str) -> None:
        """Writes down what changed. Epochs come first and never fall."""
        for name, epoch in after.epochs.items():
            if before.epochs.get(name) != epoch:
                self._save_epoch(name, epoch)
        for name, plan in after.plans.items():
            if before.plans.get(name) != plan:
                self._save_plan(plan)
        for name in before.plans.keys() - after.plans.keys():
            self._db.execute("DELETE FROM plans WHERE pipeline_id = ?", (name,))
        tables = {
            "replicas": [*after.replicas.items()] if after.replicas != before.replicas else None,
            "partitions": _counts(terms, after.counts) if after.counts != before.counts else None,
            "drains": [(n, str(life)) for n, life in after.drains.items()] if after.drains != before.drains else None,
            "forced": [(name,) for name in after.forced] if after.forced != before.forced else None,
        }
        wishes = {table: rows for table, rows in tables.items() if rows is not None}
        if wishes:
            self._save_wishes(wishes)

    def _save_epoch(self, pipeline_id: str, epoch: int) -> None:
        point("coordinator.before_epoch_write")
        self._db.execute(
            "INSERT INTO epochs VALUES (?, ?) "
            "ON CONFLICT (pipeline_id) DO UPDATE SET epoch = max(epoch, excluded.epoch)",
            (pipeline_id, epoch),
        )
        point("coordinator.after_epoch_write")

    def _save_plan(self, plan: StoredPlan) -> None:
        point("coordinator.before_plan_write")
        self._db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?)", (plan.pipeline_id, json.dumps(asdict(plan))))
        point("coordinator.after_plan_write")

    def _save_wishes(self, tables: Mapping[str, Sequence[tuple[object, ...]]]) -> None:
        """What operators want, in place of what they wanted before."""
        point("coordinator.before_order_write")
        with self._db:
            self._db.execute("BEGIN")
            for table, rows in tables.items():
                self._db.execute(f"DELETE FROM {table}")
                point("coordinator.within_order_write")
                for row in rows:
                    self._db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        point("coordinator.after_order_write")

    def slots(self) -> dict[int, tuple[str, int]]:
        """Slot -> (gateway, instance) that had it last."""
        rows = self._db.execute("SELECT slot, gateway_id, instance FROM slots").fetchall()
        return {slot: (gateway_id, int(instance)) for slot, gateway_id, instance in rows}

    def save_slot(self, slot: int, gateway_id: str, instance: int) -> None:
        """Writes down who has a slot."""
        point("coordinator.before_slot_write")
        self._db.execute("INSERT OR REPLACE INTO slots VALUES (?, ?, ?)", (slot, gateway_id, str(instance)))
        point("coordinator.after_slot_write")

    def forget_slots(self, slots: Iterable[int]) -> None:
        """Any gateway may have them now."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("DELETE FROM slots WHERE slot = ?", [(slot,) for slot in slots])

    def close(self) -> None:
        """Closes the file."""
        self._db.close()


def _counts(terms: str, counts: tuple[int, ...] | None) -> list[tuple[object, ...]]:
    return [] if counts is None else [(terms, json.dumps(counts))]


def _plan(raw: dict[str, Any]) -> StoredPlan:
    following = raw.get("next")
    return StoredPlan(
        raw["pipeline_id"],
        raw["epoch"],
        tuple(StagePlan(**{**stage, "layers": tuple(stage["layers"])}) for stage in raw["stages"]),
        tuple(Loaded(**loaded) for loaded in raw["loaded"]),
        tuple(raw["routes"]),
        raw["terms"],
        raw.get("shares", 1),
        _plan(following) if following is not None else None,
    )
