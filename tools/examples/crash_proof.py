"""Producers and consumers that are killed at any moment: the next ones go on, no number is lost and none counted twice.

    crash_proof.py [NUMBERS] [KILLS]

The state stands in memory that outlives them all, twice; a counter says which of the two holds. A change writes the
other one, and takes effect by one step of the counter. So a robust lock is all that is needed: who dies with it has
changed everything or nothing, and whoever gets it next has nothing to mend.
"""

from __future__ import annotations

import random
import struct
import sys
import time

import realmap
from realmap.sync import Condition, Counter

#: How many numbers were made, how many taken, and the sum of those that were taken.
STATE = "3q"
PLACES = 8


class Line:
    """A line of numbers in a page: a condition, which of the two states holds, the states, the places."""

    def __init__(self, page: realmap.Buffer) -> None:
        self.page, self.changed, self.holds = page, Condition(page), Counter(page, 64)

    def enter(self) -> None:
        """Takes the lock, whoever died with it."""
        try:
            self.changed.acquire()
        except realmap.OwnerDied:
            self.changed.recovered()

    def wait(self) -> None:
        """Until somebody tells of a change, or for a moment; has the lock again then, whoever died with it."""
        try:
            self.changed.wait(0.1)
        except realmap.OwnerDied:
            self.changed.recovered()

    def state(self) -> tuple[int, ...]:
        """made, taken, sum."""
        return struct.unpack_from(STATE, self.page, 128 + 64 * (self.holds.value % 2))

    def change(self, *state: int) -> None:
        """In one step; and tells all who wait."""
        struct.pack_into(STATE, self.page, 128 + 64 * ((self.holds.value + 1) % 2), *state)
        self.holds.add(1)
        self.changed.notify_all()


def produce(me: realmap.Process, handle: realmap.Handle, numbers: int) -> None:
    """Makes the numbers up to `numbers` that are not made yet."""
    line, made = Line(me.attach(handle)), 0
    while made < numbers:
        line.enter()
        made, taken, total = line.state()
        if made < numbers and made - taken < PLACES:
            struct.pack_into("q", line.page, 256 + 8 * (made % PLACES), made)
            line.change(made + 1, taken, total)
        elif made < numbers:
            line.wait()
        line.changed.release()


def consume(me: realmap.Process, handle: realmap.Handle, numbers: int) -> None:
    """Takes numbers, and adds them up, until all are taken."""
    line, taken = Line(me.attach(handle)), 0
    while taken < numbers:
        line.enter()
        made, taken, total = line.state()
        if made > taken:
            (number,) = struct.unpack_from("q", line.page, 256 + 8 * (taken % PLACES))
            line.change(made, taken + 1, total + number)
        elif taken < numbers:
            line.wait()
        line.changed.release()


def main(numbers: int = 20_000, kills: int = 20) -> None:
    """Two of each kind; one of them is killed now and then, and another one started."""
    rng = random.Random(7)
    with realmap.boot() as kernel, kernel.connect() as me:
        line = Line(me.map(4096))
        handle = me.share(line.page)
        at_work = [kernel.spawn(role, handle, numbers) for role in (produce, consume) * 2]
        for _ in range(kills):
            time.sleep(rng.uniform(0.01, 0.1))
            place = rng.randrange(4)
            at_work[place].kill()
            at_work[place].join()
            at_work[place] = kernel.spawn((produce, consume)[place % 2], handle, numbers)
        for each in at_work:
            each.join(60)
        assert line.state() == (numbers, numbers, sum(range(numbers)))
        print(f"{numbers} numbers, each counted once; {kills} of their producers and consumers were killed")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
