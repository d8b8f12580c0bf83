"""Build hook of the workspace's root: registers the clean filter that keeps uv.lock portable.

git does not copy filters when it clones. `uv sync` and `uv run` build the root before they can change anything in
the clone, so the filter is in place before the rewritten lock could be committed (docs/decisions/0001).
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RegisterLockFilter(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if (root / ".git").exists():
            subprocess.run([sys.executable, str(root / "ci" / "lock"), "--register"], cwd=root, check=False)
