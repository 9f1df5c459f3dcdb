"""What pyproject.toml cannot say: a free-threaded Python has no limited API, and gets a build of its own."""

import sysconfig
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class OwnBuild(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions:
            extension.py_limited_api = False
            extension.define_macros = []


class OwnWheel(bdist_wheel):
    def finalize_options(self) -> None:
        self.py_limited_api = ""
        super().finalize_options()


own: dict[str, Any] = {"build_ext": OwnBuild, "bdist_wheel": OwnWheel}
setup(cmdclass=own if sysconfig.get_config_var("Py_GIL_DISABLED") else {})
