"""Pieces of a page that loads nothing: Markdown, formulas as MathML, code, other people's HTML."""

import re
import warnings
from collections.abc import Mapping
from html import escape
from typing import Any
from xml.etree import ElementTree

from engm.errors import InputError

# What latex2mathml 3.81 gets wrong without a word, and what it gets right instead.
_TEX = (
    (r"\\(begin|end)\{(?:align|aligned|gather|gathered|eqnarray)\*?\}", r"\\\1{align*}"),
    (r"(\\[bB]ig+[lrm]?)\s*(?:\\\||\\[lr]?Vert\b)", r"\1‖"),
    (r"\\operatorname\*?\{(\w+)(?:\\[,;: ]\s*(\w+))?\}", r"\\operatorname{\1\2}"),
    (r"\\mathbb\{1\}|\\mathbb\s*1", "𝟙"),
)
_UNDER = {"min", "max", "argmin", "argmax", "arg\u2009min", "arg\u2009max", "sup", "inf", "lim"}
_CHILDREN = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "mroot": 2}
_LOADING = ("src", "srcset", "poster", "data", "background", "action", "formaction")


def markdown(source: str, attachments: Mapping[str, Any]) -> str:
    """Jupyter's Markdown as HTML, with raw HTML kept and formulas as MathML.

    Args:
        source: The text of a cell.
        attachments: The pictures that the cell carries, as the notebook stores them.

    Warns:
        UserWarning: For a formula that has no MathML; its TeX is shown instead.
    """
    try:
        from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    except ImportError:
        raise InputError('nbconvert is not installed: pip install "engm[batch]"') from None

    class Formulas(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return formula(body, "block")

        def inline_math(self, body: str) -> str:
            return formula(body, "inline")

        def latex_environment(self, name: str, body: str) -> str:
            return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

        def block_html(self, html: str) -> str:  # Jupyter sets formulas in <summary> as well
            return re.sub(r"\$([^$<>]+)\$", lambda found: formula(found[1], "inline"), html)

    renderer = Formulas(escape=False, attachments=dict(attachments), exclude_anchor_links=True)
    return str(MarkdownWithMath(renderer=renderer).render(source))


def formula(tex: str, display: str) -> str:
    """MathML for `tex`; `display` is "block" or "inline".

    Warns:
        UserWarning: If there is none; what comes back then is the TeX itself, as code.
    """
    from latex2mathml.converter import convert

    plain = tex.strip()
    for pattern, better in _TEX:
        plain = re.sub(pattern, better, plain)
    try:
        mathml = ElementTree.fromstring(convert(plain, display=display))
        text = "".join(mathml.itertext())
        if left_over := re.search(r"\\(?:[A-Za-z]+|\S)", text):
            raise ValueError(f"{left_over[0]} is not known")
        for node in mathml.iter():
            name = node.tag = node.tag.rpartition("}")[2]  # HTML needs no namespace
            if len(node) != _CHILDREN.get(name, len(node)):
                raise ValueError(f"{name} has {len(node)} parts")
            if name == "mo" and node.text in (
                "|",
                "‖",
            ):  # encloses; browsers space it as a relation
                node.attrib.update(lspace="0", rspace="0")
            elif name == "mi" and node.text in ("~", ":"):  # these two are relations
                node.tag, node.text = "mo", node.text.replace("~", "∼")
            elif name == "msub" and display == "block" and "".join(node[0].itertext()) in _UNDER:
                node.tag = "munder"
    except Exception as error:  # every fault in a formula has its own class there
        warnings.warn(f"shown as TeX, not as a formula: {tex.strip()} ({error!r})", stacklevel=2)
        return f'<code class="tex">{escape(tex.strip())}</code>'
    html = ElementTree.tostring(mathml, encoding="unicode", short_empty_elements=False)
    return f'<span class="formula" tabindex="0">{html}</span>' if display == "block" else html


def offline(html: str) -> Any:
    """`html` as a BeautifulSoup tree without scripts, handlers and whatever would load something.

    Pictures that are not embedded are replaced by their alternative text. Links stay.
    """
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.find_all(["script", "link", "meta", "base", "iframe", "object", "embed"]):
        tag.decompose()
    for tag in soup.find_all(True):
        for name, value in list(tag.attrs.items()):
            text = " ".join(value) if isinstance(value, list) else str(value)
            loads = name in _LOADING and not text.startswith("data:")
            follows = name in ("href", "xlink:href") and tag.name != "a" and text[:1] != "#"
            if loads or follows or name.startswith("on") or (name == "style" and "url(" in text):
                del tag[name]
        if tag.name == "style" and re.search(r"url\(|@import", tag.get_text()):
            tag.decompose()
        elif tag.name == "img" and "src" not in tag.attrs:
            tag.replace_with(f"[picture: {tag.get('alt') or 'not part of the notebook'}]")
    return soup


def highlighted(source: str) -> str:
    """Python code as HTML with classes for its colours."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return str(highlight(source, PythonLexer(), HtmlFormatter()))


def code_style() -> str:
    """The style sheet for `highlighted`, light and dark."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def plain_text(text: str) -> str:
    """What a terminal would show: no colour codes, and of an overwritten line the last state."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines).strip("\n")


def slug(text: str) -> str:
    """The name of a place in a page, from a heading or from a link to it."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")
