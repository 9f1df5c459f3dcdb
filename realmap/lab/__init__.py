"""The experiments that ship: what `realmap demo` runs."""
