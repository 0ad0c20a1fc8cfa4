"""The documentation is run: Python and console blocks, job files, links."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.pages import ROOT, Block, blocks, commands, links, pages

PAGES = pages()
MAX_NORUN = 6
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FIRST = (ROOT / "README.md", ROOT / "docs/start/quickstart.md")
"""What somebody new types; other pages that start ranks are left to `make wide`."""
STARTS_RANKS = re.compile(
    r"\b(verify|run_ranks|run_on_ranks|parallelize)\(|torchrun|make "
    r"|meshwright (launch|verify|doctor .*(--calibrate|allreduce))"
)
SHELL_TIMEOUT_S = 540


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(path: Path) -> list[Block]:
    return list(blocks(path.read_text(encoding="utf-8")))


def _runnable(path: Path) -> list[Block]:
    return [each for each in _blocks(path) if each.language in {"python", "console", "yaml"} and not each.norun]


def _cases() -> list[Any]:
    cases = []
    for path in PAGES:
        if found := _runnable(path):
            slow = any(each.language != "yaml" and STARTS_RANKS.search(each.text) for each in found)
            marks = [pytest.mark.slow] * slow + [pytest.mark.wide] * (slow and path not in FIRST)
            cases.append(pytest.param(path, id=_name(path), marks=marks))
    return cases


class Reader:
    """Someone who works through a page in an empty folder that has the examples beside it."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        (folder / "examples").symlink_to(ROOT / "examples")

    def follow(self, block: Block) -> None:
        """Does what one block says."""
        if block.words.startswith("file="):
            (self.folder / block.words.removeprefix("file=")).write_text(block.text)
        elif block.language == "console":
            for command, shown in commands(block.text):
                self.type(command, shown, block)
        elif block.language == "yaml":
            self.load(block)
        elif block.text.lstrip().startswith(">>>"):
            self.compare(block)
        else:
            code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
            exec(code, self.names)

    def type(self, command: str, shown: str, block: Block) -> None:
        """Runs a command line and compares all it prints with what the page shows."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "COLUMNS": "120"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SHELL_TIMEOUT_S,
            check=False,
        )
        where = f"{_name(self.page)}:{block.line}: $ {command}"
        assert done.returncode == 0, f"{where}\nexit {done.returncode}\n{done.stdout}"
        if shown:
            same = doctest.OutputChecker().check_output(shown, done.stdout, FLAGS)
            assert same, f"{where}\n--- the page shows\n{shown}--- it prints\n{done.stdout}"

    def load(self, block: Block) -> None:
        """Loads a job; a part of one only has to be YAML as jobs are."""
        from meshwright.launch.load import load_job
        from meshwright.launch.yaml_text import read_tree

        if re.search(r"^name:", block.text, re.MULTILINE):
            job = self.folder / "page.yaml"
            job.write_text(block.text)
            load_job(job)
        else:
            assert not read_tree(block.text.encode(), str(self.page)).problems

    def compare(self, block: Block) -> None:
        """Runs a block of `>>>` lines as a doctest."""
        test = doctest.DocTestParser().get_doctest(block.text, self.names, self.page.name, str(self.page), block.line)
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        runner.run(test, out=said.append, clear_globs=False)
        self.names.update(test.globs)
        assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("page", _cases())
def test_every_block_of_a_page_does_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader(page, tmp_path)
    for block in _runnable(page):
        reader.follow(block)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dead = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            dead.append(target)
    assert dead == []


def _anchors(file: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_few_blocks_are_not_run() -> None:
    excused = [(path.name, each.norun) for path in PAGES for each in _blocks(path) if each.norun]
    assert len(excused) <= MAX_NORUN, excused


def test_every_page_is_linked_from_another() -> None:
    reached = {ROOT / "README.md", ROOT / "CHANGELOG.md"}
    for page in PAGES:
        targets = (target.partition("#")[0] for target in links(page.read_text(encoding="utf-8")))
        reached |= {(page.parent / target).resolve() for target in targets if target.endswith(".md")}
    assert set(PAGES) - reached == set()


def test_a_page_that_lies_is_caught(tmp_path: Path) -> None:
    reader = Reader(ROOT / "README.md", tmp_path)
    lies = [
        Block("python", "", "assert 1 == 2", 1, ""),
        Block("python", "", ">>> 1 + 1\n3\n", 1, ""),
        Block("console", "", "$ echo yes\nno\n", 1, ""),
        Block("console", "", "$ false\n", 1, ""),
    ]
    for block in lies:
        with pytest.raises(AssertionError):
            reader.follow(block)
    with pytest.raises(ValueError, match="nmae"):
        reader.follow(Block("yaml", "", "name: x\nnmae: y\n", 1, ""))
    reader.follow(Block("console", "", "$ echo yes and more\nyes...\n", 1, ""))
