"""Generate the parts of the documentation that must not drift: tables of conf/, plans, and copies of results/.

Writes docs/_generated/, which git ignores. docs/conf.py calls `main` at every build.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

DOCS = Path(__file__).parent
ROOT = DOCS.parent
CONF = ROOT / "conf"
GENERATED = DOCS / "_generated"


def escape(text: str) -> str:
    """Markdown that shows `text` in a table cell; code in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([|*_<$\[\]])", r"\\\1", part) for part in parts)


def leading_comment(text: str) -> list[str]:
    """The comment lines above the first key, without Hydra's @package."""
    lines = text.removeprefix("# @package _global_\n").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("# ") for line in lines[:end]]


def keys(text: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, value as it is written, comment) of every value of a YAML text, its defaults list left out."""
    lines = text.splitlines()

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, yaml.MappingNode) and (node.value or not prefix):
            for key, value in node.value:
                yield from walk(value, f"{prefix}.{key.value}" if prefix else key.value)
        elif prefix != "defaults":
            value = text[node.start_mark.index : node.end_mark.index].strip()
            comment = re.match(
                r"[\s}]*#\s+(.*)$", lines[node.end_mark.line][node.end_mark.column :]
            )  # the line's last key
            yield prefix, " ".join(value.split()), comment[1] if comment else ""

    document = yaml.compose(text, Loader=yaml.SafeLoader)
    return walk(document, "") if document else iter(())


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]


def key_table(text: str, strip: str = "") -> list[str]:
    """Key, default and meaning of every value of a YAML text."""
    rows = [(f"`{key.removeprefix(strip)}`", f"`{value}`", escape(comment)) for key, value, comment in keys(text)]
    return table(rows, ("key", "default", "meaning"))


def config_page() -> str:
    """Every section of conf/config.yaml, then every group of options."""
    text = (CONF / "config.yaml").read_text()
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, value, comment in keys(text):
        section = key.partition(".")[0] if "." in key else "At the top level"
        sections.setdefault(section, []).append((f"`{key}`", f"`{value}`", escape(comment)))
    page = ["## Sections", ""]
    for section, rows in sections.items():
        about = re.search(rf"^{section}:\s+# (.*)$", text, re.MULTILINE)
        title = f"`{section}`" if section in text else section
        page += [f"### {title}", "", *([f"{escape(about[1])[0].upper()}{escape(about[1])[1:]}.", ""] if about else [])]
        page += [*table(rows, ("key", "default", "meaning")), ""]

    page += ["## Groups", ""]
    for group in ("model", "size", "hydra/launcher", "task"):
        page += [f"### `{group}=...`", ""]
        for path in sorted((CONF / group).glob("*.yaml")):
            option = path.read_text()
            page += [f"**{path.stem}**: {escape(' '.join(leading_comment(option)))}", ""]
            page += [*key_table(option), ""] if group == "task" else []
    page += ["### `recipe=TASK/SIZE`", "", "Chosen by `task` and `size`.", ""]
    rows = []
    for path in sorted((CONF / "recipe").glob("*/*.yaml")):
        option = path.read_text()
        values = ", ".join(f"`{key}={value}`" for key, value, _ in keys(option) if not key.startswith("simplified."))
        simplified = "; ".join(yaml.safe_load(option).get("simplified", {}).values())
        about = [*leading_comment(option), *([f"Simplified: {simplified}."] if simplified else [])]
        rows.append((f"`{path.parent.name}/{path.stem}`", f"{escape(' '.join(about))} {values}"))
    page += [*table(rows, ("recipe", "what it is, and its values")), ""]
    return "\n".join(page)


def experiment(path: Path) -> tuple[str, ...]:
    """A preset's row: command, task and model, own values, the paper's figures."""
    text = path.read_text()
    _, *notes = leading_comment(text)
    preset = yaml.safe_load(text)
    figures = ", ".join(f"`{metric}` {value}" for metric, value in preset.get("paper", {}).items())
    defaults = preset.get("defaults", [])
    overrides = {key.removeprefix("override /"): value for item in defaults for key, value in item.items()}
    what = ", ".join(f"`{overrides[group]}`" for group in ("task", "model") if group in overrides)
    values = [f"`{key}={value}` {comment}".strip() for key, value, comment in keys(text)
              if not key.startswith("paper.")]  # fmt: skip
    cells = [what, *values, *(notes if figures else [])]
    return f"`{path.stem}`", escape("; ".join(cell for cell in cells if cell)), figures or escape(notes[0])


def experiments_page() -> str:
    """A table of presets for each table and figure of the paper."""
    page = []
    paths = sorted((CONF / "experiment").glob("*.yaml"), key=lambda path: (path.stem[0] != "t", path.stem))
    for name in dict.fromkeys(path.stem.partition("_")[0] for path in paths):
        rows = [experiment(path) for path in paths if path.stem.startswith(f"{name}_")]
        page += [f"## {name[:-1].capitalize()} {name[-1]}", ""]
        page += [*table(rows, ("experiment=", "task, model, values", "the paper's figures")), ""]
    return "\n".join(page)


def plans_page() -> str:
    """What `expire-span-plan` prints for a preset of each table of the paper, then a line for every preset."""
    from expire_span.runner.commands.plan import make_plan, short

    page, rows, shown = [], [], set()
    for path in sorted((CONF / "experiment").glob("table*.yaml")):
        command = f"experiment={path.stem} gpus=8 device=h100"
        plan = make_plan(command.split())
        table_of_paper = path.stem.partition("_")[0]
        if table_of_paper not in shown:
            page += ["```console", f"$ expire-span-plan {command}", str(plan), "```", ""]
            shown.add(table_of_paper)
        case = plan.cases[0]
        gigabytes, hours = sum(case.memory.values()) / 1e9, case.hours(plan.sizes.config)
        rows.append((f"`{path.stem}`", case.title, f"{case.num_memories:,.0f}", short(gigabytes), short(hours)))
    header = ("experiment=", "memories", "of a stream in a layer", "GB of each GPU", "hours")
    return "\n".join([*page, "All presets, on eight H100, predicted:", "", *table(rows, header), ""])


def copy_results() -> None:
    """Copy results/ as pages of the site; a page without a heading gets its path as one."""
    target = GENERATED / "results"
    shutil.copytree(ROOT / "results", target, ignore=shutil.ignore_patterns("*.json"))
    (target / "README.md").rename(target / "index.md")
    for path in target.rglob("*.md"):
        text = path.read_text()
        if not text.startswith("# "):
            text = f"# {path.relative_to(target).with_suffix('')}\n\n{text}"
        if path.name == "index.md":
            pages = sorted(str(each.relative_to(target).with_suffix("")) for each in target.rglob("*.md"))
            text += "\n```{toctree}\n:hidden:\n" + "\n".join(page for page in pages if page != "index") + "\n```\n"
        path.write_text(text)


def main() -> None:
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir()
    (GENERATED / "config.md").write_text(config_page())
    (GENERATED / "experiments.md").write_text(experiments_page())
    (GENERATED / "plans.md").write_text(plans_page())
    copy_results()


if __name__ == "__main__":
    main()
