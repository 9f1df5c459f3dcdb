"""Arrays that worker processes change in place: concurrent.futures and joblib, no copies and no pickled data.

Needs numpy, and joblib for the second half.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import joblib
import numpy

import realmap

ROWS, COLUMNS = 8, 1000


def fill(row: realmap.Buffer, number: int) -> None:
    """In a worker: one row, as an array over the very memory of the one who asked."""
    row.array("float64")[:] = numpy.arange(COLUMNS) * number


def row(matrix: realmap.Buffer, number: int) -> realmap.Buffer:
    """A row of it; 8 bytes a number."""
    return matrix.slice(8 * COLUMNS * number, 8 * COLUMNS)


def main() -> None:
    """Fills a matrix twice."""
    expected = numpy.outer(numpy.arange(ROWS), numpy.arange(COLUMNS))
    with realmap.connect() as me, me.map(8 * ROWS * COLUMNS) as matrix:
        rows = [row(matrix, number) for number in range(ROWS)]
        with ProcessPoolExecutor(2) as executor:
            list(executor.map(fill, rows, range(ROWS)))
        print("concurrent.futures:", (matrix.array("float64", (ROWS, COLUMNS)) == expected).all())
        matrix[:] = bytes(len(matrix))
        joblib.Parallel(n_jobs=2)(joblib.delayed(fill)(part, number) for number, part in enumerate(rows))
        print("joblib:", (matrix.array("float64", (ROWS, COLUMNS)) == expected).all())


if __name__ == "__main__":
    main()
