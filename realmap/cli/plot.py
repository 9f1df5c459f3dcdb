"""The crossover curves of `realmap bench access`, as a picture."""

from __future__ import annotations

import io

from realmap.lab.bench.access import WAYS, WORKS
from realmap.lab.bench.report import Report
from realmap.observe import words


def plot(report: Report, kind: str) -> bytes:
    """Draws time over size, a panel for each work, as "png" or "svg"."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    works = [work for work in WORKS if work != "none"]
    figure = Figure(figsize=(5 * len(works), 5), layout="constrained")
    panels = figure.subplots(1, len(works), sharey=True)
    for panel, work in zip(panels, works, strict=True):
        for at, way in enumerate(WAYS):  # one is in the first panel only: each has the same colour in all
            points = [
                found
                for found in report.figures
                if (found.group, found.work, found.name) == ("access", work, way.name) and found.size
            ]
            if points:
                sizes = [found.size for found in points]
                medians, color = [found.time.median / 1e3 for found in points], f"C{at}"
                panel.plot(sizes, medians, marker=".", label=way.name, color=color)
                low, high = ([getattr(found.time, edge) / 1e3 for found in points] for edge in ("p10", "p90"))
                panel.fill_between(sizes, low, high, alpha=0.15, color=color, linewidth=0)
        panel.set(xscale="log", yscale="log", title=WORKS[work], xlabel="bytes")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: words.size(round(size))))
        panel.set_xticks([64 << shift for shift in range(0, 23, 4)])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("µs (median; shaded: 10th to 90th percentile)")
    panels[0].legend(fontsize="small")
    machine = report.machine
    figure.suptitle(f"reaching the bytes of another process: {machine['cpu']}, Linux {machine['linux']}", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=150)
    return drawn.getvalue()
