"""What the site needs beyond MkDocs: pages from outside docs/, pages for linked source files, formulas as MathML.

Documents link to each other and to source files by relative paths, so that they also work in a checkout.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing/index.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".txt": ""}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for page in list(files.documentation_pages()):
        for target in linked_files(page.content_string, origin(page.src_uri)):
            if files.get_file_from_path(page_of(target)) is None:
                inclusion = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, page_of(target), content=source_page(target), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every link at a page of the site. A broken link stays as it is, and MkDocs reports it."""
    here = page.file.src_uri

    def relink(match: re.Match) -> str:
        target = resolve(match[1], origin(here))
        if not (ROOT / target).is_file():
            return match[0]
        return posixpath.relpath(page_of(target), posixpath.dirname(here) or ".") + (match[2] or "")

    return LINK.sub(relink, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    content = FORMULA.sub(lambda match: mathml(html.unescape(match[2]), match[1] == "div"), content)
    return re.sub(r"(?<=\d) (?=(?:s|MiB)\b)", "&nbsp;", content)  # no line break between a number and its unit


def origin(uri: str) -> str:
    """The file in the repository that a page was made from."""
    return {page: path for path, page in ROOT_PAGES.items()}.get(uri, f"docs/{uri}")


def resolve(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def linked_files(markdown: str, source: str) -> set[str]:
    targets = {resolve(match[1], source) for match in LINK.finditer(markdown)}
    return {target for target in targets if Path(target).suffix in LANGUAGES and (ROOT / target).is_file()}


def page_of(target: str) -> str:
    """The site's page for a file of the repository."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    return f"source/{target}.md" if Path(target).suffix in LANGUAGES else target.removeprefix("docs/")


def source_page(target: str) -> str:
    code, language = (ROOT / target).read_text(), LANGUAGES[Path(target).suffix]
    header = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
    return f"{header}# {Path(target).name}\n\n`{target}`\n\n`````{language}\n{code}\n`````\n"


def mathml(formula: str, block: bool) -> str:
    """Browsers render MathML without a script. Limits and functions need extra markup."""
    math = convert(formula, display="block" if block else "inline")
    if "&<" in math:
        raise ValueError(f"docs: expected a formula that latex2mathml understands, got {formula!r}")
    math = re.sub(r"<mi>(log|exp|tanh)</mi>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', math)
    math = re.sub(r"<msub>(<mo>(?:max|&#x02211;)</mo>.*?)</msub>", r"<munder>\1</munder>", math) if block else math
    return f'<div class="formula">{math}</div>' if block else math
