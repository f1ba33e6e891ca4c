"""A page as Markdown, and as one HTML file with its pictures inside, light and dark."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfc; --line: #d9d9d4; --quiet: #63636b; --tint: #f1f1ee; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e7ea; --paper: #17181b; --line: #393a40; --quiet: #a0a0a8; --tint: #212226; }
}
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; image-rendering: auto; }
figcaption { color: var(--quiet); font-size: .9rem; }
pre { background: var(--tint); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
"""


class Page:
    """A page in the making, as Markdown and as HTML at once. Its pictures are named in the one, and inside the other."""

    def __init__(self, title: str, folder: Path) -> None:
        """folder: where the Markdown will lie; pictures are named from there."""
        self.title, self.folder = title, folder
        self._markdown, self._html = [f"# {title}"], [f"<h1>{escape(title)}</h1>"]

    def as_markdown(self) -> str:
        """The page as Markdown."""
        return "\n\n".join(self._markdown) + "\n"

    def as_html(self) -> str:
        """The page as one HTML file that needs no other."""
        body = "\n".join(self._html)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )

    def heading(self, text: str) -> None:
        self._markdown.append(f"## {text}")
        self._html.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph; what stands between backticks is code."""
        self._markdown.append(text)
        marked = re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))
        self._html.append(f"<p>{marked}</p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._markdown.append("\n".join(map(_markdown_row, (head, ["---"] * len(head), *rows))))
        body = "".join(_html_row(row, "td") for row in rows)
        self._html.append(f"<table><thead>{_html_row(head, 'th')}</thead><tbody>{body}</tbody></table>")

    def picture(self, path: Path, caption: str) -> None:
        """path: a PNG. caption: what one sees."""
        self._markdown.append(f"![{caption}]({path.relative_to(self.folder).as_posix()})")
        data, text = base64.b64encode(path.read_bytes()).decode(), escape(caption)
        self._html.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def code(self, about: str, text: str) -> None:
        """Commands, and what they are for."""
        self._markdown.append(f"{about}\n\n```bash\n{text}\n```")
        self._html.append(f"<p>{escape(about)}</p><pre><code>{escape(text)}</code></pre>")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
