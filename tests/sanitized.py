"""A pytest plugin (`-p tests.sanitized`): `wise_ext._C` is the module WISE_SANITIZED_MODULE names.

`make asan` runs the tests of the ops on modules that carry AddressSanitizer. The installed module
stays where it is and is never loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType


class Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "wise_ext._C":
            return None
        return spec_from_file_location(fullname, os.environ["WISE_SANITIZED_MODULE"])


sys.meta_path.insert(0, Finder())
