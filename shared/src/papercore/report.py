"""Tables, claims and pictures -> terminal text, Markdown, and one self-contained HTML page."""

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papercore.cli import format_value
from papercore.rundir import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, column names and rows of values."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def cells(self) -> list[list[str]]:
        return [["" if value is None else format_value(value) for value in row] for row in self.rows]

    def to_terminal(self, width: int | None = None) -> str:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title), box=box.SIMPLE_HEAD, title_justify="left")
        for column in self.columns:
            table.add_column(escape(column), overflow="fold")
        for row in self.cells():
            table.add_row(*map(escape, row))
        text = io.StringIO()
        Console(file=text, width=width or _terminal_width()).print(table)
        return text.getvalue().rstrip() + "\n"

    def to_markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        return "\n".join([line(self.columns), line(["---"] * len(self.columns)), *map(line, self.cells())]) + "\n"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG image with a caption."""

    title: str
    png: bytes
    caption: str = ""

    @classmethod
    def of_figure(cls, title: str, figure: "Figure", caption: str = "") -> "Picture":
        """A matplotlib figure, drawn without a display and without dates inside (equal figures, equal bytes)."""
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        return cls(title, data.getvalue(), caption)

    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with text, tables and pictures below it."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def write_markdown(path: Path, title: str, sections: Sequence[Section]) -> None:
    """One Markdown file; pictures lie beside it as PNG files."""
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        if section.text:
            parts.append(section.text + "\n")
        for table in section.tables:
            parts += [f"**{table.title}**\n", table.to_markdown()]
        for number, picture in enumerate(section.pictures):
            name = f"{path.stem}-{_slug(section.title)}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(name).write_bytes(picture.png)
            parts += [f"![{picture.title}]({name})\n", f"*{picture.title}.* {picture.caption}\n"]
    write_text(path, "\n".join(parts))


def write_html(path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, Any] | None = None) -> None:
    """One HTML page without any reference to the outside: styles and pictures are inside."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    write_text(path, page.render(title=title, sections=sections, facts=facts or {}))


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _terminal_width() -> int:
    import shutil

    return max(80, shutil.get_terminal_size((140, 24)).columns)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #b42318; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
td.yes { color: var(--good); font-weight: 600; } td.no { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: #fff; image-rendering: auto; }
figcaption, .facts { color: #888; font-size: .9rem; }
.wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if facts %}
<p class="facts">{% for key, value in facts.items() %}{{ key }}: {{ value }}{{ "; " if not loop.last }}{% endfor %}</p>
{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% for table in section.tables %}
<div class="wide"><table>
<caption>{{ table.title }}</caption>
<thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.cells() %}
<tr>
{% for cell in row %}
<td{% if cell in ("yes", "no") %} class="{{ cell }}"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% for picture in section.pictures %}
<figure><img src="{{ picture.data_uri() }}" alt="{{ picture.title }}">
<figcaption><b>{{ picture.title }}.</b> {{ picture.caption }}</figcaption></figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""
