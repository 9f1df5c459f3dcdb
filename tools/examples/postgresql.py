"""Watches PostgreSQL's shared memory: which of its processes have mapped what, also while a query works in parallel.

It runs a server of its own for that: in a new directory, on a socket there, as the user `postgres` where this is root.
"""

import glob
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time

from realmap.observe import shm

PARALLEL = """
set min_parallel_table_scan_size = 0; set parallel_setup_cost = 0; set parallel_tuple_cost = 0;
set max_parallel_workers_per_gather = 2; create table numbers as select generate_series(1, 200000) as n;
alter table numbers set (parallel_workers = 2);
select count(pg_sleep(0.0001)) from numbers where n % 10 = 0;
"""

found = glob.glob("/usr/lib/postgresql/*/bin")  # Debian's
if not found:
    print("skipped: PostgreSQL is not installed (Debian's package postgresql)")
    sys.exit()
server = max(found, key=lambda path: int(path.split("/")[4]))
user = {"user": "postgres"} if os.geteuid() == 0 else {}
folder = tempfile.mkdtemp(prefix="realmap-postgres-")
if user:
    os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)


def run(program, *words):
    return [f"{server}/{program}", *words]


def segments():
    """What the server or one of its processes has: the same as `realmap shm` shows."""
    with open(f"/proc/{postmaster.pid}/task/{postmaster.pid}/children") as children:
        pids = {postmaster.pid, *map(int, children.read().split())}
    rows = shm.report(shm.look()).segments
    return {(row.device, row.inode): row for row in rows if pids & {holder.pid for holder in row.holders}}


try:
    initdb = run("initdb", "-D", f"{folder}/data", "--no-sync", "--auth", "trust")
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)
    options = ["-D", f"{folder}/data", "-k", folder, "-h", "", "-c", "fsync=off"]
    with open(f"{folder}/log", "w") as log:
        postmaster = subprocess.Popen(run("postgres", *options), stderr=log, cwd=folder, **user)
    try:
        while subprocess.run(run("pg_isready", "-q", "-h", folder)).returncode:
            assert postmaster.poll() is None, open(f"{folder}/log").read()
            time.sleep(0.05)
        before = segments()
        for row in before.values():
            what = row.family or row.name or "no name"
            print(f"{row.kind:9} {row.size:>10} bytes, {what}, mapped by {len(row.holders)} processes")
        assert {"PostgreSQL", ""} <= {row.family for row in before.values()}  # named ones, and everybody's buffers
        assert any(len(row.holders) > 3 for row in before.values())

        words = run("psql", "-q", "-h", folder, "-d", "postgres", "-c", PARALLEL)
        query = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=folder, **user)
        more = []
        while not more and query.poll() is None:  # the workers and their leader share a segment of their own
            more = [row for key, row in segments().items() if key not in before and len(row.holders) > 1]
        for row in more:
            print(f"for the query: {row.size} bytes, mapped by {', '.join(str(holder.pid) for holder in row.holders)}")
        assert more, "no worker was seen"
        query.terminate()
        query.wait()
    finally:
        postmaster.send_signal(2)  # a fast shutdown
        postmaster.wait()
    left = before.keys() & {(row.device, row.inode) for row in shm.report(shm.look()).segments}
    assert not left, left
    print("it was shut down, and nothing of it is left")
finally:
    shutil.rmtree(folder)
