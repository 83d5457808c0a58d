"""Write the tables that are made from the registry: README's and docs/methods.md. `python scripts/tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

from spatiotoken.catalog import methods_page, readme_methods, readme_presets

ROOT = Path(__file__).parents[1]


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for rows in (readme_methods(), readme_presets()):
        head = "\n".join(rows[:2])
        readme, found = re.subn(re.escape(head) + r"\n(\|.*\n)*", "\n".join(rows).replace("\\", r"\\") + "\n", readme)
        if found != 1:
            raise SystemExit(f"README.md has {found} tables that begin with {rows[0]!r}")
    (ROOT / "README.md").write_text(readme, encoding="utf-8")
    (ROOT / "docs" / "methods.md").write_text(methods_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
