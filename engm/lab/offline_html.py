"""Pieces of a page that loads nothing: a notebook's cells, formulas as MathML, others' HTML."""

import re
import warnings
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


# What nbconvert's bare template does not have: numbers, folds, and where the notebook stopped.
_TEMPLATE = """
{%- extends "basic/index.html.j2" -%}
{%- block codecell -%}
<section class="cell{{ "" if cell.execution_count or cell.metadata.stopped else " not-run" }}">
<span class="number">[{{ cell.metadata.number }}]</span>{{ super.super() }}</section>
{%- endblock -%}
{%- block input_group -%}
{%- set lines = cell.source.count("\n") + 1 -%}
{%- if cell.metadata.stopped -%}
{{ super() }}<p class="alert" id="error">The notebook stopped at this cell.
{{ cell.metadata.stopped | escape_html }}</p>
{%- elif lines > 20 -%}
<details><summary>Code, {{ lines }} lines</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
{%- block markdowncell -%}<div class="prose">{{ cell.source | markdown2html }}</div>{%- endblock -%}
{%- block data_latex -%}{{ output.data["text/latex"] | markdown2html }}{%- endblock -%}
"""


def exporter() -> Any:
    """The exporter of nbconvert to the body of a page, with formulas as MathML.

    A code cell's number is `metadata.number`; `metadata.stopped` says why the notebook ended there.
    """
    try:
        from jinja2 import pass_context
        from nbconvert.exporters import HTMLExporter
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

    @pass_context
    def markdown(context: Any, source: str) -> str:
        attachments = context["cell"].get("attachments", {})
        renderer = Formulas(escape=False, attachments=attachments, exclude_anchor_links=True)
        return str(MarkdownWithMath(renderer=renderer).render(source))

    made = HTMLExporter(
        template_name="basic",
        raw_template=_TEMPLATE,
        filters={"markdown2html": markdown},
        preprocessors=["nbconvert.preprocessors.CoalesceStreamsPreprocessor"],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    kinds = ["image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown"]
    made.config.NbConvertBase.display_data_priority = [*kinds, "text/latex", "text/plain"]
    return made


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
            if name == "mo" and node.text in ("|", "‖"):  # browsers space them as relations
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


def code_style() -> str:
    """The style sheet for the colours of code, light and dark."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def slug(text: str) -> str:
    """The name of a place in a page, from a heading or from a link to it."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")
