"""What goes wrong: each fault breaks one thing, for a while where that makes sense, and says whether it could."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from tests.chaos.reclaim import Watch
from tests.chaos.world import LEASE_SECONDS, Slot, World

_BUSY_SECONDS = 5.0


@dataclass
class Chaos:
    """Who breaks things, by a seed."""

    world: World
    watch: Watch
    rng: random.Random
    long_seconds: float
    """How long Redis may be away."""
    done: dict[str, int] = field(default_factory=dict)

    def apply(self, name: str) -> None:
        if FAULTS[name](self):
            self.done[name] = self.done.get(name, 0) + 1

    def slot(self) -> Slot:
        return self.rng.choice(self.world.slots)

    def busy_slot(self) -> Slot | None:
        """A worker with a child, waited for for a while: those that are idle have nothing to lose."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while time.monotonic() < deadline:
            busy = [slot for slot in self.world.slots if self.world.child_of(slot) is not None]
            if busy:
                return self.rng.choice(busy)
            time.sleep(0.02)
        return None


def child_kill(chaos: Chaos) -> bool:
    slot = chaos.busy_slot()
    if slot is None:
        return False
    chaos.watch.expect("child", slot.name)
    child = chaos.world.child_of(slot)
    with contextlib.suppress(psutil.Error):
        if child is not None:
            child.kill()
            return True
    return False


def worker_kill(chaos: Chaos) -> bool:
    """It comes back under its name, and takes its step back."""
    return _kill_worker(chaos, "worker, back under its name", anew=False)


def worker_loss(chaos: Chaos) -> bool:
    """It never comes back; another takes its place."""
    return _kill_worker(chaos, "worker, lost for good", anew=True)


def _kill_worker(chaos: Chaos, kind: str, *, anew: bool) -> bool:
    slot = chaos.busy_slot() or chaos.slot()
    with chaos.world.guard:
        worker = slot.worker
        if worker is None or worker.process.poll() is not None:
            return False
        chaos.watch.expect(kind, slot.name)
        worker.kill()
        slot.worker = None
        slot.held_until = time.monotonic() + chaos.rng.uniform(0, 1)
        if anew:
            slot.generation += 1
    return True


def worker_pause(chaos: Chaos) -> bool:
    """SIGSTOP for longer than its lease, then it goes on as if nothing had been."""
    slot = chaos.busy_slot() or chaos.slot()
    worker = slot.worker
    if worker is None or worker.process.poll() is not None:
        return False
    chaos.watch.expect("worker, stopped", slot.name)
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS * chaos.rng.uniform(1.2, 2.0))
    with contextlib.suppress(ProcessLookupError):
        worker.process.send_signal(signal.SIGCONT)
    return True


def api_kill(chaos: Chaos) -> bool:
    with chaos.world.guard:
        if chaos.world.api.process.poll() is not None:
            return False
        chaos.world.api.kill()
    # Not again before it is back: an API that never answers proves nothing.
    while chaos.world.api.process.poll() is not None:
        time.sleep(0.2)
    time.sleep(chaos.rng.uniform(1, 5))
    return True


def postgres_kill(chaos: Chaos) -> bool:
    postgres = chaos.world.postgres
    if postgres is None:
        return False
    postgres.kill()
    time.sleep(chaos.rng.uniform(0, 3))
    postgres.restart()
    return True


def postgres_pause(chaos: Chaos) -> bool:
    """The database hangs, for longer than a lease."""
    postgres = chaos.world.postgres
    if postgres is None:
        return False
    family = postgres.family()
    for one in family:
        one.suspend()
    time.sleep(LEASE_SECONDS * chaos.rng.uniform(0.5, 1.5))
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.resume()
    return True


def redis_flush(chaos: Chaos) -> bool:
    redis = chaos.world.redis
    if redis is None or not redis.answers():
        return False
    redis.empty()
    return True


def redis_kill(chaos: Chaos) -> bool:
    """Away for a while."""
    redis = chaos.world.redis
    if redis is None or not redis.answers():
        return False
    redis.kill()
    time.sleep(chaos.rng.uniform(0.3, 1.0) * chaos.long_seconds)
    redis.start()
    return True


def disk_full(chaos: Chaos) -> bool:
    if chaos.world.disk is None:
        return False
    filler = chaos.world.disk / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * (1 << 20))
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(b"\0")
        full = os.statvfs(chaos.world.disk).f_bavail == 0
        time.sleep(chaos.rng.uniform(1, 4))
    finally:
        filler.unlink(missing_ok=True)
    return full


def store_refuses(chaos: Chaos) -> bool:
    return _store(chaos, "refuse")


def store_slow(chaos: Chaos) -> bool:
    return _store(chaos, "slow")


def _store(chaos: Chaos, mode: str) -> bool:
    proxy = chaos.world.proxy
    if proxy is None:
        return False
    proxy.set("slow" if mode == "slow" else "refuse")
    time.sleep(chaos.rng.uniform(1, 6))
    proxy.set("pass")
    return True


def clock_step(chaos: Chaos) -> bool:
    """Forwards and back again, or back and forwards."""
    clock = chaos.world.clock
    if clock is None:
        return False
    for sign in chaos.rng.choice(((1, -1), (-1, 1))):
        clock.set(sign * chaos.rng.choice((2, 30, 600, 90_000)))
        time.sleep(chaos.rng.uniform(0.5, 3))
    clock.set(0)
    return True


FAULTS: dict[str, Callable[[Chaos], bool]] = {
    function.__name__: function
    for function in (
        child_kill,
        worker_kill,
        worker_loss,
        worker_pause,
        api_kill,
        postgres_kill,
        postgres_pause,
        redis_flush,
        redis_kill,
        disk_full,
        store_refuses,
        store_slow,
        clock_step,
    )
}
WEIGHTS = {"child_kill": 6, "worker_kill": 4, "worker_loss": 4, "api_kill": 2}
"""The others: 1."""


def possible(world: World) -> list[str]:
    """Faults that this world can have."""
    without = {"postgres_kill", "postgres_pause"} if world.postgres is None else set()
    without |= {"redis_flush", "redis_kill"} if world.redis is None else set()
    without |= {"store_refuses", "store_slow"} if world.proxy is None else set()
    return [name for name in FAULTS if name not in without | set(world.left_out)]
