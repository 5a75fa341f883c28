"""What must outlive a coordinator: epochs, plans, what an operator asked for, gateways' slots. SQLite, or memory.

Write-ahead log with synchronous FULL: a commit that returned survives a crash of the machine, so an epoch that anyone
heard of is never handed out again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError
from stagemesh.faults import point

from .values import Loaded, StagePlan, StoredPlan

SCHEMA = """
CREATE TABLE IF NOT EXISTS epochs (pipeline_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS plans (pipeline_id TEXT PRIMARY KEY, plan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replicas (stage INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS partitions (terms TEXT PRIMARY KEY, counts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS drains (worker_id TEXT PRIMARY KEY, incarnation TEXT NOT NULL);
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

    def epochs(self) -> dict[str, int]:
        """Pipeline -> the highest epoch it had."""
        return dict(self._db.execute("SELECT pipeline_id, epoch FROM epochs").fetchall())

    def save_epoch(self, pipeline_id: str, epoch: int) -> None:
        """Writes an epoch down; it never falls."""
        point("coordinator.before_epoch_write")
        self._db.execute(
            "INSERT INTO epochs VALUES (?, ?) "
            "ON CONFLICT (pipeline_id) DO UPDATE SET epoch = max(epoch, excluded.epoch)",
            (pipeline_id, epoch),
        )
        point("coordinator.after_epoch_write")

    def plans(self) -> dict[str, StoredPlan]:
        """Pipeline -> the plan that last served."""
        rows = self._db.execute("SELECT pipeline_id, plan FROM plans").fetchall()
        return {name: _plan(json.loads(text)) for name, text in rows}

    def save_plan(self, plan: StoredPlan) -> None:
        """Writes down a pipeline that serves, and where it is going."""
        point("coordinator.before_plan_write")
        self._db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?)", (plan.pipeline_id, json.dumps(asdict(plan))))
        point("coordinator.after_plan_write")

    def forget_plan(self, pipeline_id: str) -> None:
        """The pipeline is no more; its epoch stays."""
        self._db.execute("DELETE FROM plans WHERE pipeline_id = ?", (pipeline_id,))

    def replicas(self) -> dict[int, int]:
        """Stage -> workers that an operator wants on it at once."""
        return dict(self._db.execute("SELECT stage, count FROM replicas").fetchall())

    def save_replicas(self, replicas: Iterable[tuple[int, int]]) -> None:
        """Writes down what an operator wants, in place of what he wanted before."""
        self._replace("replicas", replicas)

    def partition(self, terms: str) -> tuple[int, ...] | None:
        """Layers of each stage that an operator wants, of a model and bounds with this digest."""
        row = self._db.execute("SELECT counts FROM partitions WHERE terms = ?", (terms,)).fetchone()
        return tuple(json.loads(row[0])) if row is not None else None

    def save_partition(self, terms: str, counts: tuple[int, ...] | None) -> None:
        """Writes down what an operator wants, or that it is nothing of his own any more."""
        self._replace("partitions", [(terms, json.dumps(counts))] if counts is not None else [])

    def drains(self) -> dict[str, int]:
        """Worker -> its life that an operator has drained."""
        rows = self._db.execute("SELECT worker_id, incarnation FROM drains").fetchall()
        return {worker_id: int(incarnation) for worker_id, incarnation in rows}

    def save_drains(self, drains: Iterable[tuple[str, int]]) -> None:
        """Writes down whom an operator has drained, in place of those of before."""
        self._replace("drains", [(worker_id, str(incarnation)) for worker_id, incarnation in drains])

    def _replace(self, table: str, rows: Iterable[tuple[object, object]]) -> None:
        point("coordinator.before_order_write")
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(f"DELETE FROM {table}")
            point("coordinator.within_order_write")
            self._db.executemany(f"INSERT INTO {table} VALUES (?, ?)", list(rows))
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
