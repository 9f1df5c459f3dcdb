"""The standard library's own tests of shared memory, from the interpreter at hand, with the import redirected.

Run as a script: METHOD; unittest's output, on stderr. Every `multiprocessing.shared_memory` in the text of the tests
(their subprocesses' included) becomes `realmap.shared_memory`; nothing else is changed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import unittest
from pathlib import Path

#: By what they expect; not run, and why.
LEFT_OUT = {
    "test_shared_memory_cleaned_after_process_termination": "its last lines expect the warning of the standard tracker",
    "test_shared_memory_tracking": "expects that a reader's exit destroys the memory, with a warning",
}

CHANGES = {
    "from multiprocessing import shared_memory": "from realmap import shared_memory",
    "from multiprocessing.shared_memory import": "from realmap.shared_memory import",
    "'multiprocessing.shared_memory.": "'realmap.shared_memory.lookup.",
    "from multiprocessing.managers import SharedMemoryManager": "from realmap.shared_memory import SharedMemoryManager",
    "multiprocessing.managers.SharedMemoryManager": "shared_memory.SharedMemoryManager",
}


def redirect(folder: Path) -> None:
    """Writes the redirected test module there."""
    found = importlib.util.find_spec("test._test_multiprocessing")
    assert found is not None and found.origin is not None
    text = Path(found.origin).read_text()
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "redirected_tests.py").write_text(text)


def main(method: str) -> int:
    """Runs them under one start method; the exit status."""
    with tempfile.TemporaryDirectory(prefix="rm") as name:
        redirect(Path(name))
        sys.path.insert(0, name)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [name, os.environ.get("PYTHONPATH")]))
        tests = importlib.import_module("redirected_tests")
        namespace = {"__name__": "redirected_cases"}
        tests.install_tests_in_module_dict(namespace, method)
        namespace["setUpModule"]()
        cases = unittest.defaultTestLoader.loadTestsFromTestCase(namespace["WithProcessesTestSharedMemory"])
        chosen = unittest.TestSuite(case for case in cases if case._testMethodName not in LEFT_OUT)  # type: ignore[union-attr]
        done = unittest.TextTestRunner(verbosity=2).run(chosen)
        namespace["tearDownModule"]()
        return 0 if done.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
