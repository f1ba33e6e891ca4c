"""What the documentation names exists: links, files, flags, and the names that docs/ARCHITECTURE.md sends readers to."""

import re

import pytest

from utils.testing import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = {
    f"/{path.relative_to(ROOT).as_posix()}": path.read_text()
    for pattern in ("*.py", "*.sh")
    for path in ROOT.rglob(pattern)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
}
CODE = "\n".join(FILES.values())
OF_OTHERS = {
    "downsample-size", "codebook-size", "codebook-embed-dim", "gpt-type", "cls-token-num", "no-local-save", "from-fsdp",
    "data-face-path", "gpus-per-node", "nodes", "signal",
    "X_test.py", "pyproject.toml",
}  # fmt: skip


def anchors(text: str) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_files_and_flags_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other.read_text()), target
    for flag in set(re.findall(r"(?<![\w-])--([a-z]+(?:-[a-z0-9]+)*)(?![\w-])", text)) - OF_OTHERS:
        field = flag.removeprefix("no-").replace("-", "_")
        assert re.search(rf'\b{field}: |"--{flag}"', CODE), f"--{flag}"
    for file in set(re.findall(r"(?<![\w/])[\w./]*\w+\.(?:py|sh)\b", text)) - OF_OTHERS:
        assert any(path.endswith(f"/{file}") for path in FILES), file
    for module in re.findall(r"python3? -m ([a-z_0-9.]+)", text):
        path = f"/{module.replace('.', '/')}"
        assert f"{path}.py" in FILES or f"{path}/__main__.py" in FILES, module


def test_names_of_the_architecture_are_in_the_code():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    names = set(re.findall(r"`([A-Za-z_][\w.]*\w)(?:\([^`]*\))?`", page)) - OF_OTHERS
    unknown = [name for name in names if not all(re.search(rf"\b{part}\b", CODE) for part in name.split("."))]
    assert not unknown
