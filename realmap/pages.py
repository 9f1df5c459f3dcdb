"""Page arithmetic over a 64-bit usize. Nothing here wraps: what does not fit is said.

Ranges are half-open, in bytes. `usize` and `address_of` turn what a caller passed into a number, or into an error that
says why not.
"""

from __future__ import annotations

import operator
import os
from typing import SupportsIndex

from realmap.errors import InvalidAddress, InvalidSize, KernelPanic

PAGE_SIZE: int = os.sysconf("SC_PAGESIZE")
PAGE_MASK: int = PAGE_SIZE - 1
USIZE_MAX: int = (1 << 64) - 1
#: What one huge page covers, in bytes: the second level of the page table (512 entries at 4 KiB pages).
HUGE_SIZE: int = PAGE_SIZE * (PAGE_SIZE // 8)


def align_down(number: int, alignment: int = PAGE_SIZE) -> int:
    """The largest multiple of `alignment` (a power of two) that is not above `number`."""
    return number & ~(alignment - 1)


def align_up(number: int, alignment: int = PAGE_SIZE) -> int:
    """The smallest multiple of `alignment` (a power of two) that is not below `number`.

    Python's integers do not wrap; a caller that needs a usize checks the result against USIZE_MAX.
    """
    return (number + alignment - 1) & ~(alignment - 1)


def integer(value: SupportsIndex, what: str) -> int:
    """`value` as an int. TypeError: it is no integer (a float, a string, None)."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer number of bytes, not {type(value).__name__}") from None


def usize(value: SupportsIndex, what: str) -> int:
    """`value` as a 64-bit size or offset in bytes. InvalidSize: negative, or beyond 64 bits. TypeError: no integer."""
    number = value if type(value) is int else integer(value, what)
    if not 0 <= number <= USIZE_MAX:
        raise InvalidSize(number, why=f"{what} must be from 0 to 2**64 - 1")
    return number


def address_of(value: SupportsIndex, what: str = "address") -> int:
    """`value` as a 64-bit address. InvalidAddress: negative, or beyond 64 bits. TypeError: no integer."""
    number = value if type(value) is int else integer(value, what)
    if not 0 <= number <= USIZE_MAX:
        raise InvalidAddress(number, why=f"{what} must be from 0 to 2**64 - 1")
    return number


def page_range(address: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
    """Checks a range of whole pages that does not wrap, and gives it back as ints (bytes).

    InvalidAddress: unaligned, or its last byte overflows. InvalidSize: zero or unaligned.
    A range that ends at the very last byte of the address space is fine.
    """
    start, size = address_of(address), usize(length, "length")
    if start & PAGE_MASK:
        raise InvalidAddress(start, why=f"address is no multiple of the page size ({PAGE_SIZE})")
    if not size:
        raise InvalidSize(size, why="length must not be zero")
    if size & PAGE_MASK:
        raise InvalidSize(size, why=f"length is no multiple of the page size ({PAGE_SIZE})")
    if start + size - 1 > USIZE_MAX:
        raise InvalidAddress(start, why=f"address + length ({size:#x}) overflows 64 bits")
    return start, size


def demand(holds: bool, what: str) -> None:
    """KernelPanic unless `holds`: `what` says which precondition the caller broke."""
    if not holds:
        raise KernelPanic(what)
