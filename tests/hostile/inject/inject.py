"""Fault injection from outside: the command line, and the summaries."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cycles
import errors
import kills
import services
import strace
from paths import PATHS


def _say(text: str) -> None:
    print(text, flush=True)


def run_errors(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """Part A. What was found, and how many failures."""
    sweep = errors.Sweep(folder, options.seed, options.every, _say)
    begun = time.monotonic()
    try:
        for path, carrier, target in errors.plan(options.path, options.carrier, options.target):
            before, failed = sum(tally.tried for tally in sweep.tallies), len(sweep.failures)
            sweep.sweep(path, carrier, target, options.only, options.errno)
            tried = sum(tally.tried for tally in sweep.tallies) - before
            _say(f"{path.name:22} {carrier:6} {target:6} {tried:5} injected, {len(sweep.failures) - failed} failed")
    finally:
        sweep.end()
    seconds = time.monotonic() - begun
    _table(sweep)
    tried = sum(tally.tried for tally in sweep.tallies)
    sites = len({(tally.path, tally.carrier, tally.target, tally.call) for tally in sweep.tallies})
    _say(
        f"\n{sites} calls of paths, {len(sweep.tallies)} with their errnos, {tried} injected "
        f"({tried / seconds:.1f} a second): {len(sweep.failures)} failed"
    )
    for end in sorted(set(sweep.ends)):
        _say(f"the kernel ended, as it must: {end}")
    if sweep.unknown:
        _say(f"seen and not injected: {', '.join(sorted(sweep.unknown))}")
    found = {
        "tallies": [vars(tally) for tally in sweep.tallies],
        "failures": [dataclasses.asdict(failure) for failure in sweep.failures],
        "ends": sweep.ends,
        "injected": tried,
        "seconds": seconds,
    }
    _failures(sweep.failures)
    return found, len(sweep.failures)


def run_kills(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """Part B. What was found, and how many failures."""
    chosen = [each for each in kills.POINTS if options.point in ("", each.name) and options.only in ("", each.call)]
    return _points("kills", kills.Killer(folder, options.seed, _say), chosen, options.rounds)


def run_services(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """Part D. What was found, and how many failures."""
    chosen = [each for each in services.POINTS if options.point in ("", each.name) and options.who in ("", each.who)]
    return _points("services", services.Services(folder, _say), chosen, options.rounds)


def _points(part: str, killer: Any, points: list[Any], count: int) -> tuple[dict[str, Any], int]:
    tallies = []
    _say(f"{'point':55} {'rounds':>6} {'there':>6} {'swept':>6} {'a second':>8} {'failed':>6}")
    try:
        for point in points:
            tally = killer.point(point, count)
            tallies.append(tally)
            rate = tally.rounds / tally.seconds
            _say(
                f"{tally.point:55} {tally.rounds:6} {tally.hits:6} {tally.swept:6} {rate:8.1f} {len(tally.failures):6}"
            )
    finally:
        killer.end()
    failures = [
        errors.Failure(tally.point, [each], f"tools/inject {part} --point '{tally.point}' --rounds {count}")
        for tally in tallies
        for each in tally.failures
    ]
    # A point that is never reached tests nothing.
    failures += [
        errors.Failure(tally.point, ["never died there"], f"tools/inject {part} --point '{tally.point}'")
        for tally in tallies
        if tally.rounds and not tally.hits
    ]
    _failures(failures)
    rounds = sum(tally.rounds for tally in tallies)
    _say(f"\n{len(tallies)} points, {rounds} rounds: {len(failures)} failed")
    return {"points": [vars(tally) for tally in tallies]}, len(failures)


def run_cycles(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """Part C. What was found, and how many failures."""
    result = cycles.run(folder, options.cycles, _say)
    _say(
        f"{result.cycles} cycles ({result.cycles / result.seconds:.0f} a second), the kernel's memory from "
        f"{result.resident[0]} to {result.resident[-1]} bytes: {len(result.failures)} failed"
    )
    return vars(result), len(result.failures)


def _table(sweep: errors.Sweep) -> None:
    by_call: dict[str, Counter[str]] = {}
    errnos: dict[str, dict[str, None]] = {}
    for tally in sweep.tallies:
        by_call.setdefault(tally.call, Counter()).update(tally.outcomes)
        errnos.setdefault(tally.call, {})[tally.errno] = None
    _say(f"\n{'call':16} {'injected':>8}  errnos, and what came of them")
    for call, outcomes in sorted(by_call.items()):
        _say(f"{call:16} {outcomes.total():8}  {' '.join(errnos[call])}")
        _say(f"{'':26} {', '.join(f'{name} {count}' for name, count in outcomes.most_common())}")


def _failures(failures: list[errors.Failure]) -> None:
    for failure in failures:
        _say(f"\nFAILED {failure.name}\n  again: {failure.replay}")
        for line in failure.what:
            _say(f"  {line}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/inject", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("errors", help="system calls that fail")
    part.add_argument("--only", default="", metavar="SYSCALL", help="this call only")
    part.add_argument("--path", action="append", choices=[*PATHS], metavar="NAME", help=", ".join(PATHS))
    part.add_argument("--errno", default="", help="this errno only")
    part.add_argument("--carrier", default="", choices=["", *errors.CARRIERS], help="this kind of kernel only")
    part.add_argument("--target", default="", choices=["", "kernel", "user"], help="calls of this process only")
    part.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th call with its errno")
    part = parts.add_parser("kills", help="SIGKILL at named points of the protocol")
    part.add_argument("--rounds", type=int, default=5, help="of each point; the full count is 500")
    part.add_argument("--point", default="", choices=["", *kills.BY_NAME], metavar="NAME", help="this point only")
    part.add_argument("--only", default="", metavar="SYSCALL", help="points at this call only")
    part = parts.add_parser("services", help="SIGKILL at named points of a call to a service")
    part.add_argument("--rounds", type=int, default=5, help="of each point; the full count is 500")
    part.add_argument("--point", default="", choices=["", *services.BY_NAME], metavar="NAME", help="this point only")
    part.add_argument("--who", default="", choices=["", "server", "caller", "kernel"], help="points of this one only")
    part = parts.add_parser("cycles", help="users that connect, map and are killed")
    part.add_argument("--cycles", type=int, default=500, help="the full count is 10000")
    for each in parts.choices.values():
        each.add_argument("--seed", type=int, default=1)
        each.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where anything failed, 2 where nothing can be injected here."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="hostile.") as name:
        os.environ["REALMAP_DIR"] = name
        if options.part != "services" and (hindrance := strace.hindrance(Path(name))):
            _say(f"nothing can be injected here: {hindrance}")
            return 2
        every = {"errors": run_errors, "kills": run_kills, "cycles": run_cycles, "services": run_services}
        part = every[options.part]
        found, failed = part(options, Path(name))
    if options.json:
        options.json.write_text(json.dumps({"part": options.part, "seed": options.seed, **found}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
