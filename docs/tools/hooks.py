"""What mkdocs is told beside mkdocs.yml: pages made of files that stand outside docs/, and links that lead there.

README.md is the site's first page, CHANGELOG.md and CONTRIBUTING.md are pages too. A link to any other file of the
repository (a result, the Makefile) gets a copy of that file on the site, under files/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the linked files."""
    for source, name in PAGES.items():
        text = LINK.sub(from_root, (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
        for place in outside(text):
            add(files, config, place)
    for file in list(files.documentation_pages()):
        if file.abs_src_path and file.src_uri not in PAGES.values():
            text = Path(file.abs_src_path).read_text(encoding="utf-8")
            for place in outside(LINK.sub(lambda found: to_site(found, Path(str(file.abs_src_path)).parent), text)):
                add(files, config, place)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page in docs/ that leave docs/ to the copies."""
    if page.file.abs_src_path is None or page.file.src_uri in PAGES.values():
        return markdown
    return LINK.sub(lambda found: to_site(found, Path(page.file.abs_src_path).parent), markdown)


def from_root(found: re.Match[str]) -> str:
    """A link of a file at the repository's root, as the page on the site has it."""
    path, anchor = found[1], found[2] or ""
    if path in PAGES:
        return PAGES[path] + anchor
    return (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}") + anchor


def to_site(found: re.Match[str], folder: Path) -> str:
    """A link of a page in ``folder``, as it is unless it leaves docs/."""
    place = (folder / found[1]).resolve()
    docs = ROOT / "docs"
    if place.is_relative_to(docs) or not place.is_relative_to(ROOT):
        return found[0]
    inside = str(place.relative_to(ROOT))
    up = "../" * len(folder.relative_to(docs).parts)
    return up + PAGES.get(inside, f"files/{inside}") + (found[2] or "")


def outside(text: str) -> set[str]:
    """The repository's files that a page's links name by their copies."""
    return {path.rpartition("files/")[2] for path, _ in LINK.findall(text) if re.match(r"(\.\./)*files/", path)}


def add(files: Files, config: Any, place: str) -> None:
    name = f"files/{place}"
    if files.get_file_from_path(name) is None and (ROOT / place).is_file():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
