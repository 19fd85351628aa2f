"""The house: how ccproxy.py is laid out and written, and that what stands beside it agrees."""
from __future__ import annotations

import ast
import collections
import functools
import io
import json
import os
import re
import statistics
import sys
import tokenize

import pytest
from harness import ccproxy

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "ccproxy.py"), encoding="utf-8") as source:
    TEXT = source.read()
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)

BANNER = re.compile(r"# === (\S.*?) =+")
LONGEST_SECTION = 450
BUDGET_OF_OTHERS = 260
BUDGETS = {
    # Lines at most, the banner and all up to the next banner counted; sections that are not
    # here have BUDGET_OF_OTHERS.
    "(head)": 120, "CONSTANTS & LIMITS": 140, "ERRORS": 180, "CONFIG": 350,
    "REDACTION & LOG LINES": 140, "HTTP WIRE": 420, "STREAM FRAMING": 120, "CATALOGUE": 120,
    "MODELS": 230, "KEYS": 140, "EVENTS": 240, "CONTENT PARTS": 350, "PROMPT REPAIR": 220,
    "TOKEN COUNT": 170, "JSON SCHEMA": 220, "ANSWER FILTERS": 250, "SHARED BY FORMATS": 300,
    "UPSTREAM FORMAT: ALPHA": 300, "UPSTREAM FORMAT: OPENAI": 300,
    "UPSTREAM FORMAT: ANTHROPIC": 300, "FACE: CHAT": 450, "FACE: MESSAGES": 450,
    "FACE: RESPONSES": 450, "ANSWER": 275, "KEY ROUTING": 280, "JOBS": 300,
    "THE SHELL": 140, "WIRE": 235, "UPSTREAM CALLS": 450, "RELAY": 200, "ACCOUNTS": 250,
    "USAGE LOG": 250, "METRICS": 250, "ALERTS": 250, "ENDPOINTS": 360, "SERVER": 360,
    "DEMO UPSTREAM": 350, "SELFTEST": 350, "PAGE STYLE": 300, "PAGE MARKUP": 300,
    "PAGE WORDS": 300, "PAGE SCRIPT": 300, "PAGE FRAME": 300,
    "PAGE REQUESTS": 300, "PAGE SETTINGS": 300, "PAGE KEYS": 300, "PAGE CLIENTS": 300,
    "COMMAND LINE": 450, "SETTINGS": 330, "SERVICE": 300}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)

IMPURE_MODULES = {"asyncio", "time", "random", "secrets", "os", "socket", "ssl", "subprocess",
                  "sys", "logging", "uuid", "select", "signal", "shutil", "threading", "tempfile"}
HARMLESS = {("os", "path"), ("time", "struct_time"), ("sys", "maxsize")}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval"}
CLOCK_READINGS = {"now", "utcnow", "today"}


# What the file is made of.


class Section:
    """Lines `first` to `last` (from 1) under one banner."""

    def __init__(self, title, first, last):
        self.title, self.first, self.last = title, first, last
        self.name = title.replace(" (pure)", "")
        self.pure = title.endswith(" (pure)")

    def holds(self, line):
        return self.first <= line <= self.last


def banners():
    """(line number from 1, title) of each banner, a part's above its first section's."""
    return [(number, BANNER.fullmatch(line)[1]) for number, line in enumerate(LINES, 1)
            if BANNER.fullmatch(line)]


def parts():
    """{title of a part: titles of its sections}."""
    found = {}
    for _, title in banners():
        if title.startswith("PART: "):
            found[title[len("PART: "):]] = sections = []
        else:
            sections.append(title)
    return found


def sections():
    starts = [(number, title) for number, title in banners() if not title.startswith("PART: ")]
    ends = [number - 1 for number, _ in starts[1:]] + [len(LINES)]
    return [Section("(head)", 1, starts[0][0] - 1)] + [
        Section(title, first, last) for (first, title), last in zip(starts, ends)]


def section_of(line):
    return next(number for number, section in enumerate(SECTIONS) if section.holds(line))


SECTIONS = sections()
for_each_section = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)


def functions():
    """(qualified name, node) of every function, methods and inner ones too."""
    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS):
                yield prefix + child.name, child
                yield from visit(child, prefix + child.name + ".")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, prefix + child.name + ".")
            else:
                yield from visit(child, prefix)
    return list(visit(TREE, ""))


def defined_names():
    """(name, line) of every function, class and constant at the top level."""
    def visit(body):
        for node in body:
            if isinstance(node, FUNCTIONS + (ast.ClassDef,)):
                yield node.name, node.lineno
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            yield name.id, node.lineno
            elif isinstance(node, (ast.If, ast.Try)):
                yield from visit(node.body)
    return list(visit(TREE.body))


DEFINED = defined_names()
WHERE = {name: line for name, line in reversed(DEFINED)}


# Banners, index, budgets.

def test_the_index_lists_the_parts_in_order():
    text = ast.get_docstring(TREE)
    text = text[text.index("Parts, in order"):]
    index = re.findall(r"(?m)^    ([A-Z]+(?: [A-Z]+)*(?: \(pure\))?)  +\S", text)
    assert index == list(parts()) and len(index) > 10


def test_parts_are_of_one_kind():
    kinds = {title: {section.endswith(" (pure)") for section in sections}
             for title, sections in parts().items()}
    assert kinds == {title: {title.endswith(" (pure)")} for title in parts()}


def test_every_line_that_looks_like_a_banner_is_one():
    marked = [line for line in LINES if re.match(r"#\s*={3}", line)]
    assert marked == [LINES[number - 1] for number, _ in banners()]
    titles = [title for _, title in banners()]
    assert len(titles) == len(set(titles))
    assert "THE SHELL" in titles


def test_every_banner_is_78_wide():
    assert {number: len(LINES[number - 1]) for number, _ in banners()
            if len(LINES[number - 1]) != 78} == {}


@for_each_section
def test_every_section_says_what_it_is_for(section):
    if section.title == "(head)":
        assert ast.get_docstring(TREE)
        return
    comment = 0
    while LINES[section.first + comment].startswith("#"):
        comment += 1
    assert 2 <= comment <= 12


@for_each_section
def test_sections_keep_within_their_budget(section):
    budget = BUDGETS.get(section.name, BUDGET_OF_OTHERS)
    assert section.last - section.first + 1 <= min(budget, LONGEST_SECTION)


def test_the_core_stands_above_the_shell():
    shell = [section.title for section in SECTIONS].index("THE SHELL")
    assert all(section.pure for section in SECTIONS[1:shell])
    assert not any(section.pure for section in SECTIONS[shell:])


# Layers and purity.


def uses_of(node):
    """(line, name) of every name that is read below a node."""
    return [(one.lineno, one.id) for one in ast.walk(node)
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)]


USES = uses_of(TREE)


@for_each_section
def test_no_section_uses_what_stands_below_it(section):
    ahead = sorted({name for line, name in USES
                    if section.holds(line) and WHERE.get(name, 0) > section.last})
    assert ahead == []


def test_no_upstream_format_uses_another():
    formats = [section for section in SECTIONS if section.name.startswith("UPSTREAM FORMAT: ")]
    names = [section.name[len("UPSTREAM FORMAT: "):].lower() for section in formats]
    assert names == list(ccproxy.UPSTREAM_FORMATS) and len(names) >= 3
    borrowed = [(section.name, name) for section in formats for line, name in USES
                if section.holds(line)
                for other in formats if other is not section and other.holds(WHERE.get(name, 0))]
    assert borrowed == []


def compared_names(tree):
    """Every name that is a side of a comparison, or stands in a list that is one."""
    sides = [side for node in ast.walk(tree) if isinstance(node, ast.Compare)
             for side in [node.left] + node.comparators]
    return {name.id for side in sides for name in getattr(side, "elts", [side])
            if isinstance(name, ast.Name)}


def test_no_function_or_upstream_format_is_compared():
    """What differs is a member of the row or an argument: which row it is decides nothing."""
    sample = "fault is client_fault and ALPHA != upstream and reader in (read_error, None)"
    assert compared_names(ast.parse(sample)) == {
        "fault", "client_fault", "ALPHA", "upstream", "reader", "read_error"}
    flags = {name for name, value in vars(ccproxy).items() if not isinstance(value, type)
             and (callable(value) or isinstance(value, ccproxy.UpstreamFormat))}
    assert {"client_fault", "ALPHA", "OPENAI", "ANTHROPIC"} < flags
    assert compared_names(TREE) & flags == set()


def test_most_of_what_is_used_was_met_before():
    inside = [(line, WHERE[name]) for top in TREE.body for line, name in uses_of(top)
              if isinstance(top, FUNCTIONS + (ast.ClassDef,)) and name in WHERE
              and name != top.name]
    assert len(inside) > 500
    assert sum(where > line for line, where in inside) <= 0.10 * len(inside)


def impure_uses(tree):
    """(line, what) of all that touches the clock, the environment, files, sockets or chance."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = (node.value.id, node.attr)
            if (used[0] in IMPURE_MODULES and used not in HARMLESS) or (
                    used[0] in ("datetime", "date") and used[1] in CLOCK_READINGS):
                yield node.lineno, "%s.%s" % used
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in IMPURE_CALLS:
                yield node.lineno, node.func.id
        elif isinstance(node, (ast.Await, ast.AsyncFor, ast.AsyncWith)):
            yield node.lineno, "await"
        elif isinstance(node, ast.AsyncFunctionDef):
            yield node.lineno, "async def " + node.name
        elif isinstance(node, ast.ImportFrom) and node.module in IMPURE_MODULES:
            yield node.lineno, "from %s import" % node.module


@pytest.mark.parametrize("text, count", [
    ("import time\ntime.time()", 1), ("os.environ['a']\nos.path.join('a')", 1), ("open('a')", 1),
    ("async def f():\n    await g()", 2), ("x = sys.maxsize\ny = sys.argv", 1),
    ("from random import choice", 1), ("datetime.now()", 1),
    ("json.loads('1')\nre.compile('')", 0)])
def test_the_check_of_purity_itself(text, count):
    assert len(list(impure_uses(ast.parse(text)))) == count


IMPURE = list(impure_uses(TREE))


@for_each_section
def test_pure_sections_are_pure(section):
    assert [what for line, what in IMPURE if section.pure and section.holds(line)] == []


def test_the_shell_is_where_the_impure_uses_are():
    assert len(IMPURE) > 50


def test_nothing_at_the_top_level_is_defined_twice():
    twice = [name for name, count in collections.Counter(name for name, _ in DEFINED).items()
             if count > 1]
    assert len(DEFINED) > 300
    assert twice == []


def test_no_method_is_defined_twice():
    for node in ast.walk(TREE):
        if isinstance(node, ast.ClassDef):
            names = [child.name for child in node.body if isinstance(child, FUNCTIONS)]
            assert len(names) == len(set(names)), node.name


# Functions.


def own_nodes(function):
    """Every node of a function, not entering the functions inside it."""
    stack = list(ast.iter_child_nodes(function))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, FUNCTIONS + (ast.ClassDef,)):
            stack.extend(ast.iter_child_nodes(node))


def length(function):
    return function.end_lineno - function.lineno + 1


def complexity(function):
    """1, and 1 for each way that the function can go besides."""
    total = 1
    for node in own_nodes(function):
        if isinstance(node, (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler,
                             ast.IfExp, ast.Assert)):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
    return total


def nesting(node, depth=0):
    """How deep control blocks stand inside one another; an elif ladder stays on one level."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, FUNCTIONS + (ast.ClassDef,)):
                continue
            ladder = (isinstance(node, ast.If) and name == "orelse" and len(value) == 1
                      and isinstance(child, ast.If))
            step = 1 if isinstance(child, BLOCKS) and not ladder else 0
            deepest = max(deepest, nesting(child, depth + step))
    return deepest


def parameters(function):
    given = function.args
    found = given.posonlyargs + given.args
    if found and found[0].arg in ("self", "cls"):
        found = found[1:]
    return found + given.kwonlyargs + [one for one in (given.vararg, given.kwarg) if one]


MEASURES = {"length": length, "complexity": complexity, "nesting": nesting,
            "parameters": lambda function: len(parameters(function))}
ALL_FUNCTIONS = functions()


def measured(measure):
    return {name: MEASURES[measure](node) for name, node in ALL_FUNCTIONS}


@pytest.mark.parametrize("measure, most", [
    ("length", 80), ("complexity", 15), ("nesting", 4), ("parameters", 6)])
def test_no_function_goes_beyond(measure, most):
    assert {name: value for name, value in measured(measure).items() if value > most} == {}


@pytest.mark.parametrize("measure, most", [("length", 40), ("complexity", 8)])
def test_nine_functions_in_ten_keep_within(measure, most):
    values = sorted(measured(measure).values())
    assert len(values) > 200
    assert values[-(-len(values) * 9 // 10) - 1] <= most


def test_functions_are_short():
    lengths = list(measured("length").values())
    assert statistics.median(lengths) <= 14
    assert sum(value for value in lengths if value > 60) <= 0.05 * len(LINES)


SAMPLE = '''
def low(a, b, *rest, key=None):
    """Say."""
    if a and b:
        return 1
    elif a or b:
        for _ in range(3):
            try:
                pass
            except Exception:
                pass
    return [x for x in (a, b) if x][0]
'''


@pytest.mark.parametrize("measure, expected", [
    ("length", 11), ("complexity", 9), ("nesting", 3), ("parameters", 4)])
def test_the_measures_themselves(measure, expected):
    assert MEASURES[measure](ast.parse(SAMPLE).body[0]) == expected


def code_lines(node):
    """Lines of a function that are neither blank, comment nor docstring."""
    first = node.body[0]
    text = ast.get_docstring(node) is not None
    docstring = range(first.lineno, first.end_lineno + 1) if text else ()
    return sum(1 for number in range(node.lineno, node.end_lineno + 1)
               if number not in docstring and LINES[number - 1].strip()
               and not LINES[number - 1].lstrip().startswith("#"))


def test_classes_and_longer_functions_say_what_they_are():
    bare = [node.name for node in ast.walk(TREE)
            if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)]
    assert bare == []
    long_ones = [node for _, node in ALL_FUNCTIONS if code_lines(node) >= 8]
    told = [node for node in long_ones if ast.get_docstring(node)]
    assert len(long_ones) > 50
    assert len(told) >= 0.80 * len(long_ones)


def test_signatures_are_typed():
    places = typed = 0
    for _, node in ALL_FUNCTIONS:
        places += len(parameters(node)) + 1
        typed += sum(one.annotation is not None for one in parameters(node))
        typed += node.returns is not None
    assert places > 500
    assert typed >= 0.95 * places


# Habits.

def test_no_line_is_longer_than_100_columns():
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 100] == []


def test_the_file_is_plain_text():
    assert "\t" not in TEXT and "\r" not in TEXT
    assert [number for number, line in enumerate(LINES, 1) if line != line.rstrip()] == []
    assert TEXT.endswith("\n") and not TEXT.endswith("\n\n")


def test_comments_are_plenty():
    kinds = collections.Counter(token.type for token in tokenize.generate_tokens(
        io.StringIO(TEXT).readline))
    page = [section for section in SECTIONS if section.name.startswith("PAGE ")]     # data
    code = sum(1 for number, line in enumerate(LINES, 1)
               if line.strip() and not line.lstrip().startswith("#")
               and not any(section.holds(number) for section in page))
    assert kinds[tokenize.COMMENT] >= 0.08 * code


def test_there_are_no_module_level_variables():
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []
    for node in TREE.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                mutable = isinstance(node.value, (ast.List, ast.Dict, ast.Set))
                assert not (mutable and target.id != target.id.upper()), target.id


def test_nothing_is_swallowed():
    for node in ast.walk(TREE):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, "line %d: except without a name" % node.lineno
        names = {one.id for one in ast.walk(node.type) if isinstance(one, ast.Name)}
        if names & {"Exception", "BaseException"}:
            silent = all(isinstance(one, (ast.Pass, ast.Continue)) for one in node.body)
            assert not silent, "line %d: a silent catch-all" % node.lineno


def test_no_input_is_checked_with_assert():
    # python -O leaves them out (CVE-2025-69227).
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Assert)] == []


def test_the_syntax_is_that_of_python_3_9():
    ast.parse(TEXT, feature_version=(3, 9))
    assert not [node for node in ast.walk(TREE) if type(node).__name__ in ("Match", "TryStar")]


def test_no_runs_of_six_lines_occur_twice():
    code = [(number, re.sub(r"\s+", " ", line.strip())) for number, line in enumerate(LINES)
            if len(line.strip()) > 2 and not line.lstrip().startswith("#")]
    places = collections.defaultdict(list)
    for at in range(len(code) - 5):
        places[tuple(line for _, line in code[at:at + 6])].append(at)
    repeated = {number for found in places.values() if found[-1] - found[0] >= 6
                for at in found for number, _ in code[at:at + 6]}
    assert len(repeated) <= 0.02 * len(code)


# Imports.


def imported_modules():
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module.partition(".")[0]


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names came with 3.10")
def test_imports_are_of_the_standard_library_only():
    assert set(imported_modules()) - set(sys.stdlib_module_names) <= {"compression"}


def test_what_is_imported_is_used():
    names = {name.asname or name.name.partition(".")[0] for node in TREE.body
             if isinstance(node, (ast.Import, ast.ImportFrom)) for name in node.names}
    words = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    words |= {word for node in ast.walk(TREE) if isinstance(node, ast.Constant)
              and isinstance(node.value, str) for word in re.findall(r"\w+", node.value[:200])}
    assert names - words - {"annotations"} == set()


def test_the_script_metadata_asks_for_nothing():
    found = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///\n", TEXT)
    assert found, "PEP 723 metadata, for `uv run` and `pipx run`"
    assert 'requires-python = ">=3.9"' in found[1]
    assert "dependencies = []" in found[1]


# What stands beside the file.


def tracked_files():
    """Every text file of the tree but hidden ones, caches, and recorded answers."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [one for one in folders if not one.startswith((".", "__"))
                      and one != "streams"]
        for name in names:
            if name.endswith((".py", ".md", ".json")) or name == "LICENSE":
                yield os.path.join(folder, name)


def test_the_version_is_written_in_one_place_only():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\w*)", ccproxy.__version__)
    assert len(re.findall(r"(?m)^__version__ = ", TEXT)) == 1
    version = re.compile(r"(?<![\d.])%s(?![\d.]*\d)" % re.escape(ccproxy.__version__))
    assert len(version.findall(TEXT)) == 1
    elsewhere = []
    for path in tracked_files():
        if os.path.basename(path) == "ccproxy.py":
            continue
        with open(path, encoding="utf-8") as file:
            text = file.read()
        # The README's list of changes names the versions it tells of.
        text = text.partition("\n## Changes")[0]
        if version.search(text) or "__version__ =" in text.replace('"__version__ ="', "").replace(
                "^__version__ =", ""):
            elsewhere.append(os.path.relpath(path, ROOT))
    assert elsewhere == []


def test_the_config_file_holds_known_options_at_their_defaults():
    with open(os.path.join(ROOT, "config.json"), encoding="utf-8") as file:
        entries = json.load(file, object_pairs_hook=list)
    defaults = {option.name: option.default for option in ccproxy.OPTIONS}
    names = [name for name, _ in entries]
    assert names and len(names) == len(set(names))
    given = {name: dict(value) if value == [] and defaults.get(name) == {} else value
             for name, value in entries}
    assert given == {name: defaults.get(name, "no such option") for name in names}


@functools.lru_cache(maxsize=None)
def readme():
    path = os.path.join(ROOT, "README.md")
    if not os.path.exists(path):
        pytest.skip("there is no README.md yet")
    with open(path, encoding="utf-8") as file:
        return file.read()


def option_rows():
    """{option's name: the cells of its row} of the README's option table."""
    rows = {}
    for line in readme().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[1].startswith("`--"):
            assert cells[0].strip("`") not in rows, "two rows for " + cells[0]
            rows[cells[0].strip("`")] = cells
    return rows


def shown_defaults(default):
    """How the README may write a default."""
    if default in ("", [], {}):
        return ("none", "", '""', "[]", "{}")
    return ("`%s`" % (default if isinstance(default, str) else json.dumps(default)),)


@pytest.mark.parametrize("option", ccproxy.OPTIONS, ids=lambda option: option.name)
def test_the_readme_lists_every_option(option):
    rows = option_rows()
    assert option.name in rows
    name, flag, environment, default, words = rows[option.name]
    assert name == "`%s`" % option.name
    assert flag == "`%s`" % ccproxy.flag_name(option)
    assert environment == ", ".join("`%s`" % one for one in ccproxy.environment_names(option))
    assert default.strip("`") in shown_defaults(option.default) or default in shown_defaults(
        option.default)
    assert words.replace("\\", "") == option.help


def test_the_readme_lists_no_option_that_does_not_exist():
    assert list(option_rows()) == [option.name for option in ccproxy.OPTIONS]


def test_the_readme_ends_with_its_changes():
    headings = re.findall(r"(?m)^## (.+)$", readme())
    assert headings[-1] == "Changes"


def test_the_top_of_the_tree_holds_nothing_else():
    allowed = {"ccproxy.py", "config.json", "README.md", "LICENSE", "tests", "__pycache__"}
    found = {name for name in os.listdir(ROOT) if not name.startswith(".")}
    assert found - allowed == set()
    assert {"ccproxy.py", "config.json", "LICENSE", "tests"} <= found


def test_the_license_is_mit():
    with open(os.path.join(ROOT, "LICENSE"), encoding="utf-8") as file:
        assert file.read().startswith("MIT License")
