"""What mkdocs is told beside mkdocs.yml: pages made of files that stand outside docs/, and links that lead there.

README.md is the site's first page; CHANGELOG.md and CONTRIBUTING.md are pages too. Any other file of the repository
that a page links to (a result, the Makefile) is copied to the site, under files/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):<code>~?([^<]*)</code>")
BLOCK = re.compile(r'<div class="highlight">.*?</div>', re.S)
TAG = re.compile(r"(<[^>]+>)")
HYPHENED = re.compile(r"[^\s\"']*-[^\s\"']*")
FETCHED, WORKER = "https://unpkg.com/iframe-worker/shim", "assets/worker.js"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/, and copies of the files that any page links to."""
    files.append(File.generated(config, WORKER, abs_src_path=str(DOCS / "tools" / "worker.js")))
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=relinked(text, ROOT, DOCS)))
    for page in [*(ROOT / source for source in PAGES), *DOCS.rglob("*.md")]:
        for place in linked(page):
            name = site_path(place)
            if name.startswith("files/") and place.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page of docs/ to where their files are on the site."""
    if page.file.src_uri in PAGES.values():
        return markdown
    folder = Path(page.file.abs_src_path).parent
    return relinked(markdown, folder, folder)


def on_page_content(html: str, **_: Any) -> str:
    """What Markdown leaves to be done: of :func:`name` in docstrings the name alone; code not broken at hyphens."""
    return BLOCK.sub(lambda block: unbroken(block[0]), ROLE.sub(r"<code>\1</code>", html))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme fetches what search needs in pages opened from a folder; ours lies beside them."""
    return output.replace(FETCHED, "../" * page.url.count("/") + WORKER)


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """The same for the page of a wrong address, which may stand at any depth."""
    return output.replace(FETCHED, f"/{WORKER}")


def unbroken(block: str) -> str:
    """A block of code whose options and paths are not broken at their hyphens."""
    parts = TAG.split(block)
    parts[::2] = [HYPHENED.sub(r'<span class="word">\g<0></span>', text) for text in parts[::2]]
    return "".join(parts)


def linked(page: Path) -> Iterator[Path]:
    for path in LINK.findall(page.read_text(encoding="utf-8")):
        yield (page.parent / path).resolve()


def relinked(text: str, folder: Path, shown_in: Path) -> str:
    """``text`` of a file in ``folder``, its links as a page in ``shown_in``, a folder of docs/, has them."""
    up = "../" * len(shown_in.relative_to(DOCS).parts)
    return LINK.sub(lambda found: up + site_path((folder / found[1]).resolve()), text)


def site_path(place: Path) -> str:
    """Where a file of the repository is on the site."""
    inside = place.relative_to(ROOT).as_posix()
    return PAGES.get(inside) or (inside.removeprefix("docs/") if place.is_relative_to(DOCS) else f"files/{inside}")
