"""Reads the pages: code, commands, links and names in README.md and docs/**/*.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("python", "make")
FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*(\w*)")


def split_code(path):
    """[(line number, language, code line)], where an indented block has the language "", and the text without code."""
    code, text, fence, indented = [], [], None, False
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        found = FENCE.match(line)
        if fence is not None:
            if found and found[1].startswith(fence[0]) and not found[2]:
                fence = None
            else:
                code.append((number, fence[1], line))
            text.append("")
        elif found:
            fence = found[1], found[2]
            text.append("")
        else:
            indented = line.startswith("    ") and (indented or not text or not text[-1].strip())
            if indented:
                code.append((number, "", line[4:]))
            text.append("" if indented else line)
    assert fence is None, f"{path}: a code fence is not closed"
    return code, "\n".join(text)


def is_command(line):
    """Whether a line starts a program of ours, possibly after VARIABLE=value."""
    words = [w for w in line.split() if not re.match(r"[A-Z_]+=", w)]
    return bool(words) and words[0] in PROGRAMS


def commands(path):
    """[(line number, command)]: lines of code blocks, and `inline code` of several words."""
    code, text = split_code(path)
    found, open_line = [], None
    for number, _, line in code:
        if open_line is not None:
            found[-1] = (open_line, found[-1][1].removesuffix("\\") + line.strip())
        elif is_command(line):
            found.append((number, line.strip().removeprefix("$ ")))
        else:
            continue
        open_line = (open_line or number) if line.rstrip().endswith("\\") else None
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        command = " ".join(match[1].split())
        if is_command(command) and " " in command:
            found.append((text[: match.start()].count("\n") + 1, command))
    return found


def inline_code(path):
    """The contents of every `inline code`."""
    return [" ".join(m.split()) for m in re.findall(r"(?<!`)`([^`]+)`(?!`)", split_code(path)[1])]


def links(path):
    """The targets of links and pictures, Markdown and HTML."""
    text = re.sub(r"`[^`]*`", "", split_code(path)[1])
    return re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def anchors(path):
    """The anchors that headings of a page make, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", split_code(path)[1], re.M)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


def table_rows(path):
    """Cells of every table row, stripped, the separator rows left out."""
    rows = [line for line in split_code(path)[1].splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", r.strip().strip("|"))] for r in rows]
    return [c for c in cells if not all(re.fullmatch(r":?-+:?", x) for x in c)]
