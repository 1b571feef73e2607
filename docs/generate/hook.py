"""What mkdocs does beside turning pages into HTML (`hooks` in mkdocs.yml): generated pages, drawings, llms.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from api_reference import reference as api_reference
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from recipe_reference import reference as recipe_reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r'<img alt="(?P<words>[^"]*)" src="(?P<source>[^"]*\.svg)"\s*/?>')

ELSEWHERE = {
    "kernels.md": ROOT / "kernels/README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "embedded-model.md": ROOT / "sparsetrain/assets/tiny/README.md",
}
"""Pages of the site whose text lies elsewhere in the repository."""


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are written from the code, and those that lie elsewhere."""
    from sparsetrain.recipe.describe import json_schema

    made = {"recipe-reference.md": recipe_reference(json_schema()), "api.md": api_reference()}
    made |= {name: source.read_text(encoding="utf-8") for name, source in ELSEWHERE.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links to files of the repository to their pages; where a file has none, its name stays."""
    source = ELSEWHERE.get(page.file.src_uri, DOCS / page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        mark, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        if re.match(r"\w+:", target):
            return found[0]
        path = (source.parent / target).resolve()
        name = next((name for name, other in ELSEWHERE.items() if other == path), None)
        if name is None and path.is_relative_to(DOCS):
            name = path.relative_to(DOCS).as_posix()
        if name is not None:
            return f"{mark}[{words}]({name}{anchor})"
        if not path.exists():
            raise PluginError(f"{source.relative_to(ROOT)} links to {target}, which does not exist")
        inside = path.relative_to(ROOT).as_posix()
        return words if words.strip("`") == inside else f"{words} (`{inside}`)"

    # Every other part is a block of code, which stays.
    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.S | re.M)
    return "".join(part if place % 2 else LINK.sub(lead, part) for place, part in enumerate(parts))


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Put drawings into the page, so that they take its colours."""

    def drawn(found: re.Match[str]) -> str:
        svg = (DOCS / "images" / Path(found["source"]).name).read_text(encoding="utf-8")
        inside = re.sub(r"<style>.*?</style>", "", svg).partition("<svg ")[2]
        words = found["words"]
        return f'<span class="drawing"><svg aria-label="{words}" {inside}</span>'

    return PICTURE.sub(drawn, html)


def on_post_build(*, config: Any) -> None:
    """Write llms.txt, and every page as Markdown beside its HTML."""
    site = Path(config.site_dir)
    (site / "llms.txt").write_text(llms(INDEX.read_text(encoding="utf-8"), config.site_name), encoding="utf-8")


def on_nav(nav: Any, *, config: Any, files: Files) -> Any:
    """The home page has a line for each page, and llms.txt is made of these.

    Raises:
        PluginError: a page has no line, or a line no page.
    """
    listed = {target for _, target, _ in entries(INDEX.read_text(encoding="utf-8"))}
    pages = {page.file.src_uri for page in nav.pages} - {"index.md"}
    if listed != pages:
        raise PluginError(f"docs/index.md must list the pages of mkdocs.yml: {sorted(listed ^ pages)}")
    return nav


def on_page_context(context: Any, *, page: Any, config: Any, nav: Any) -> Any:
    """Keep the text of a page, with its links led, beside the page."""
    target = Path(config.site_dir) / page.file.src_uri
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.markdown or "", encoding="utf-8")
    return context


def entries(index: str) -> list[tuple[str, str, str]]:
    """Title, file and line of each page that the home page lists."""
    return re.findall(r"^- \[([^\]]+)\]\(([^)]+\.md)\): (.+(?:\n  .+)*)", index, re.M)


def llms(index: str, name: str) -> str:
    """The file that tells language models which pages there are (llmstxt.org)."""
    about = index.split("\n\n")[1]
    lines = [f"# {name}", "", f"> {' '.join(about.split())}", ""]
    for part in re.split(r"^(?=## )", index, flags=re.M):
        found = entries(part)
        if found:
            lines += [part.partition("\n")[0], ""]
            lines += [f"- [{title}]({target}): {' '.join(line.split())}" for title, target, line in found] + [""]
    return "\n".join(lines)
