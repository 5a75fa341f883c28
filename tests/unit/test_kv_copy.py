"""KV pages over a link, on every transport: as they were, each gateway for itself, no harm where an end goes."""

from __future__ import annotations

import torch
from inproc import open_any
from links_bench import DTYPE, Bench, identity

from stagemesh.stage_worker.kv.copy import PageFrames, PageReceiver, PageSender
from stagemesh.stage_worker.kv.pool import KvLayerSpec, KvPool


class Pages:
    """Pages of a pool that go from one end of a bench to the other."""

    def __init__(self, bench: Bench, slots: tuple[int, ...] = (0,)) -> None:
        layers = [KvLayerSpec(i, 2, 8, 8) for i in range(2)]
        self.here, self.there = (KvPool(layers, 40, 16, DTYPE, "cpu") for _ in range(2))
        for layer in (0, 1):
            self.here.k(layer).normal_()
            self.here.v(layer).normal_()
        ours, theirs = (PageFrames([(pool, [0, 1])]) for pool in (self.here, self.there))
        self.bench = bench
        self.link, receiver = bench.link(
            identity(hidden_size=ours.page_bytes, dtype=torch.uint8, credits=4, max_rows=ours.most_pages)
        )
        self.sender, self.receiver = PageSender(self.link, ours), PageReceiver(receiver, theirs)
        bench.drive(lambda: self.link.up and receiver.up)
        for slot in slots:
            receiver.open_lane(slot)

    def copy(self, slot: int, number: int, pages: list[int]) -> None:
        self.receiver.expect(slot, number, pages)
        self.sender.send(slot, number, pages)

    def took(self, slot: int, number: int) -> bool:
        self.sender.progress()
        return self.receiver.take(slot) == number

    def same(self, pages: list[int]) -> bool:
        return all(self.there.k(i)[pages].equal(self.here.k(i)[pages]) for i in (0, 1)) and all(
            self.there.v(i)[pages].equal(self.here.v(i)[pages]) for i in (0, 1)
        )


def test_pages_come_as_they_were(bench: Bench) -> None:
    pages = Pages(bench)
    for number in range(1, 9):
        pages.copy(0, number, [number, 20 + number])
    for number in range(1, 9):
        bench.drive(lambda number=number: pages.took(0, number))  # type: ignore[misc]
        assert pages.same([number, 20 + number])
    assert not pages.same([0])


def test_pages_of_one_gateway_do_not_wait_for_those_of_another(bench: Bench) -> None:
    pages = Pages(bench, slots=(1, 2))
    for number in range(1, 12):
        pages.copy(1, number, [number])  # Nobody takes them: soon there is no credit.
    pages.copy(2, 1, [30, 31])
    bench.drive(lambda: pages.took(2, 1))
    assert pages.same([30, 31])


def test_whose_receiver_is_gone_goes_on(bench: Bench) -> None:
    pages = Pages(bench)
    pages.copy(0, 1, [1])
    bench.drive(lambda: pages.took(0, 1))
    bench.right.close()
    for number in range(2, 20):
        pages.sender.send(0, number, [number])
        bench.left.progress()
        pages.sender.progress()
    pages.link.close()
    pages.sender.send(3, 1, [1])
    bench.right = open_any(bench.left.name)  # for the end of the bench
    bench.links.clear()
