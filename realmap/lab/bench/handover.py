"""64 MiB in one process; another one sums them and answers."""

from __future__ import annotations

from realmap.lab.bench import handlers
from realmap.lab.bench.measure import Contender, timed
from realmap.lab.bench.run import KEPT, Bench

LENGTH = 64 << 20


def measure(bench: Bench) -> None:
    bench.say("handover: 64 MiB")
    _, me = bench.kernel()
    _, keeping = bench.kernel(lazy_unmap=KEPT)
    with me.map(LENGTH) as plain, keeping.map(LENGTH) as kept, me.map(LENGTH, huge=True) as huge:
        for buffer in (plain, kept, huge):
            with memoryview(buffer) as view:
                view[:] = bytes(range(256)) * (LENGTH // 256)
        own = "sum in the caller's own memory"
        shared, by_hand = bench.peer("shared_memory"), bench.peer("posix_ipc")
        contenders = [
            Contender("C sum, mapped already", bench.floor.batch("own", LENGTH, after=("read",))),
            Contender(own, timed(lambda: handlers.read(plain)), "C sum, mapped already"),
            Contender("mirror kept", timed(lambda: keeping.call("bench_sum", kept)), own),
            Contender("mirror huge, unmapped each time", timed(lambda: me.call("bench_sum", huge)), own),
            Contender("mirror, unmapped each time", timed(lambda: me.call("bench_sum", plain)), own),
            Contender("posix_ipc, attached each time", by_hand.batch("handover", LENGTH, after=("attach",)), own),
            Contender("posix_ipc, attached once", by_hand.batch("handover", LENGTH, after=("keep",)), own),
            Contender("SharedMemory, attached each time", shared.batch("handover", LENGTH, after=("attach",)), own),
            Contender("SharedMemory, attached once", shared.batch("handover", LENGTH, after=("keep",)), own),
            Contender("iceoryx2, in place", bench.peer("iceoryx2").batch("handover_in_place", LENGTH), own),
            Contender("Pipe", bench.peer("pipe").batch("handover", LENGTH), own),
        ]
        if huge.huge < LENGTH:
            bench.missing("mirror huge, unmapped each time", f"Linux gave {huge.huge} of {LENGTH} bytes in huge pages")
            contenders = [each for each in contenders if not each.name.startswith("mirror huge")]
        bench.race("handover", contenders, LENGTH, "read")
