"""Bytes that were changed on their way."""

from __future__ import annotations

import hypothesis.strategies as st


def mangle(data: bytearray, more: st.DataObject, times: int, within: int) -> None:
    """Takes bytes away, changes or adds some, so many times at most, among the first `within`."""
    for _ in range(more.draw(st.integers(0, times))):
        how, at = more.draw(st.integers(0, 2)), more.draw(st.integers(0, min(len(data), within)))
        if how == 0:
            del data[at : at + more.draw(st.integers(1, 9))]
        elif how == 1:
            data[at : at + 1] = more.draw(st.binary(max_size=1))
        else:
            data[at:at] = more.draw(st.binary(max_size=4))
