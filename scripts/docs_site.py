"""Two hooks for mkdocs (mkdocs.yml): pages that lie outside docs/, and fields explained by the comments beside them.

README, changelog and dated results stay where a repository's reader looks for them; each becomes a page of the site from the one copy
there is, and links keep working. A link to a file that is no page (source, a result's data) leads to the repository where mkdocs knows
its address (`repo_url`), else it becomes the file's path. A link to nothing is a warning, so a strict build fails. Knows Markdown's links
and where pages lie; knows nothing of eyas.
"""

from __future__ import annotations

import ast
import io
import logging
import os
import re
import tokenize
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/**/*.md")  # of the site, beside docs/
PICTURES = ("benchmarks/**/*.png", "benchmarks/**/*.svg")
RENAMED = {"README.md": "index.md"}
CODE = r"(?P<code>^```.*?^```|`[^`\n]+`)"
LINK = r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)"
CODE_OR_LINK = re.compile(f"{CODE}|{LINK}", re.DOTALL | re.MULTILINE)
log = logging.getLogger("mkdocs.plugins.docs_site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside docs/."""
    for pattern in PAGES + PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            place = site_place(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that hold in the repository into links that hold on the site."""
    source = Path(page.file.abs_src_path or "").relative_to(ROOT).as_posix()

    def rewritten(match: re.Match[str]) -> str:
        target, _, anchor = (match["target"] or "").partition("#")
        if match["code"] or not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not there", source, match["target"])
            return match[0]
        if files.get_file_from_path(site_place(path)):
            place = os.path.relpath(site_place(path), PurePosixPath(page.file.src_uri).parent)
            return f"{match['picture']}[{match['text']}]({place}{'#' * bool(anchor)}{anchor})"
        return outside(match["text"], path, config.repo_url)

    return CODE_OR_LINK.sub(rewritten, markdown)


def site_place(path: str) -> str:
    """Where a file of the repository lies on the site, docs/ being its root."""
    return RENAMED.get(path, path.removeprefix("docs/"))


def outside(text: str, path: str, repository: str | None) -> str:
    """A link to a file that the site does not have."""
    if repository:
        return f"[{text}]({repository.rstrip('/')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/HEAD/{path})"
    return f"`{path}`" if path.rstrip("/").endswith(text.strip("`/")) else f"{text} (`{path}`)"


class FieldComments(griffe.Extension):
    """Gives a class's field the comment that stands beside it as its description, where it has no other."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, agent: Any, **others: Any) -> None:
        if attr.docstring or not isinstance(node, ast.AnnAssign) or not attr.parent or not attr.parent.is_class:
            return
        lines = attr.parent.module.lines[node.lineno - 1 : node.end_lineno]
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines).strip() + "\n").readline):
            if token.type == tokenize.COMMENT:
                words = re.sub(r"(`[^`]*`)|\*", lambda found: found[1] or r"\*", token.string.lstrip("# "))  # a star is a star
                attr.docstring = griffe.Docstring(words, lineno=node.lineno, parent=attr)
