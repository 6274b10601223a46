"""A hook of mkdocs: what lies beside docs/ and is read on GitHub too becomes pages of the site.

README.md is the site's first page, and each program of examples/ a page that shows it. Links are written
for the repository, so that they work on GitHub; here they are turned to where a page lies in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples/README.md",
    **{
        f"examples/{program.name}": f"examples/{program.stem}.md"
        for program in sorted((ROOT / "examples").glob("*.py"))
    },
}
_FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/."""
    for source, page in BESIDE.items():
        text = (ROOT / source).read_text()
        if source.endswith(".py"):
            text = f"# {Path(source).name}\n\n```python\n{text}```\n"
        beside = InclusionLevel.NOT_IN_NAV if source.endswith(".py") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, page, content=text, inclusion=beside))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site, outside of code."""
    here = page.file.src_uri
    source = next((s for s, p in BESIDE.items() if p == here), f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        place = BESIDE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{link[2] or ''})"

    parts = _FENCE.split(markdown)
    return "".join(p if p.startswith("```") else _LINK.sub(turned, p) for p in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Show a bar in a cell of a table as GitHub does, which wants it written as `\|`."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)
