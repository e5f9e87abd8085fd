"""Programs in a model's answers, and their grading: HumanEval and MBPP.

Decides what in an answer is the program, and which names the tests take from it. How a program is
run is sandbox.py's.
"""

import ast
import builtins
import re
import sys
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from eval.sandbox import SandboxResult, Suite, check_program

LIST_ITEM = r"(?:(?:[-*+]|\d+[.)])[ \t]+)*"
OPENING = re.compile(
    rf"^(?P<lead>[ \t]*{LIST_ITEM})"
    r"(?:(?P<tildes>~{3,})|[^`\n]*?(?P<ticks>`{3,}))(?P<language>[^`\n]*)$"
)
PYTHON = ("", "py", "python", "python3")
# A line of code at the margin, as no sentence begins.
STATEMENT = re.compile(
    r"""(?:async\s+def|def|class)\s+\w+\s*[(:\[]   # a definition
    |@\w                                           # a decorator
    |import\s+[\w.]+(?:\s+as\s+\w+)?(?:\s*,\s*[\w.]+(?:\s+as\s+\w+)?)*\s*(?:\#.*)?$
    |from\s+[\w.]+\s+import\s
    |(?:if|for|while|with|try|else|elif|except|finally)\b.*:\s*(?:\#.*)?$
    |(?:assert|print)\b
    |[\w.\[\],'" ]+?(?::\s*[\w.\[\], |]+)?\s*(?:[-+*/%&|^]|//|\*\*|<<|>>)?=[^=]   # an assignment
    |[\w.]+\(                                      # a call
    |[)\]}\#"']""",
    re.VERBOSE,
)


def _fences(answer: str) -> list[tuple[str, str]]:
    """The language and the code of each fenced block; an open one goes to the end.

    Code is moved left by as much as its fence is indented, in a list item too.
    """
    blocks: list[tuple[str, list[str]]] = []
    fence, width = "", 0
    for line in answer.replace("\r\n", "\n").split("\n"):
        if not fence:
            if opening := OPENING.match(line):
                fence = opening["tildes"] or opening["ticks"]
                width = len(opening["lead"])
                blocks.append((opening["language"].strip().lower(), []))
            continue
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith(fence) and not text.strip(fence[0]) and indent < width + 4:
            fence = ""
            continue
        glued = fence[0] == "`" and text.endswith(fence) and text.count(fence) == 1
        code = line.rstrip()[: -len(fence)] if glued and text != fence else line
        blocks[-1][1].append(code[min(indent, width) :])
        if glued and text != fence:
            fence = ""
    return [(language, "".join(f"{line}\n" for line in lines)) for language, lines in blocks]


def _definition(names: Collection[str], indent: str = "") -> re.Pattern[str]:
    """Finds where one of the names is defined, or assigned; at the margin, unless indented."""
    either = "|".join(map(re.escape, names)) or r"(?!)"
    return re.compile(
        rf"^{indent}(?:(?:async\s+def|def|class)\s+(?:{either})\b|(?:{either})\s*(?::[^=\n]*)?=[^=])",
        re.MULTILINE,
    )


def _without_prose(answer: str) -> str:
    """The longest run of lines, from a statement at the margin on, that no sentence interrupts."""
    runs: list[list[str]] = []
    inside = False
    for line in answer.split("\n"):
        if line[:1].strip():
            statement = bool(STATEMENT.match(line))
            if statement and not inside:
                runs.append([])
            inside = statement
        if inside:
            runs[-1].append(line)
    return max(map("\n".join, runs), key=len, default=answer)


def programs_of(answer: str, names: Collection[str]) -> list[str]:
    """The program in a chat answer, as versions: the first that compiles is meant.

    It is the last fence that defines one of `names`, or the last fence. An answer without a Python
    fence is the program itself, or the code between its sentences.
    """
    fences = [code for language, code in _fences(answer) if language.split(" ")[0] in PYTHON]
    defining = [f for f in fences if _definition(names, r"[ \t]*").search(f)]
    if not fences:
        return [answer, _without_prose(answer)]
    program = (defining or fences)[-1]
    return [program, textwrap.dedent(program)]


def check_humaneval(problem: Mapping[str, Any], completion: str, **limits: Any) -> SandboxResult:
    """Whether a completion, of the bare prompt or in a chat, passes a HumanEval problem's test.

    A program that defines the function comes after the part of the prompt before that function,
    imports and helpers, which the test may use too; anything else continues the prompt. `limits`
    are those of `check_program`.
    """
    prompt, name = problem["prompt"], problem["entry_point"]
    defines = _definition({name})
    start = re.search(rf"^def\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    before = prompt[: start.start()] if start else ""
    versions = programs_of(completion, {name})
    whole = [version for version in versions if defines.search(version)]
    parts = [[before], whole] if whole else [[prompt + version for version in versions]]
    tests = Suite(f"{problem['test']}\ncheck({name})\n", before, (name,))
    return check_program(parts, tests, **limits)


def check_mbpp(problem: Mapping[str, Any], completion: str, **limits: Any) -> SandboxResult:
    """Whether a completion, bare or in a chat, passes the tests of an MBPP problem.

    `limits` are those of `check_program`.
    """
    code = "\n".join([problem["test_setup_code"], *problem["test_list"], ""])
    names, modules = program_names(code)
    helpers = "".join(f"import {module}\n" for module in modules)
    return check_program([programs_of(completion, names)], Suite(code, helpers, names), **limits)


def program_names(tests: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that tests take from the program, and the standard modules that they leave out.

    A builtin is the program's only if the tests name nothing else of it: `assert sum(10, 15) == 6`.
    Else a program could redefine what its results are compared by; types always stay.

    Raises:
      SyntaxError, ValueError: for tests that are no Python.
    """
    tree = list(ast.walk(ast.parse(tests)))
    bound = {n.id for n in tree if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.arg for n in tree if isinstance(n, ast.arg)}
    bound |= {n.name for n in tree if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound |= {(n.asname or n.name).split(".")[0] for n in tree if isinstance(n, ast.alias)}
    read = {n.id for n in tree if isinstance(n, ast.Name)} - bound
    owners = {
        n.value.id for n in tree if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    modules = read & owners & sys.stdlib_module_names
    own = {name for name in read if hasattr(builtins, name)}
    free = read - own - modules
    if not free:
        free = {name for name in own if not isinstance(getattr(builtins, name), type)}
    return tuple(sorted(free)), tuple(sorted(modules))
