"""The program in an answer, and the tests of HumanEval and MBPP that judge it."""

import json

import pytest

from eval.programs import check_humaneval, check_mbpp, program_names, programs_of
from tests.support.paths import DATA
from tests.support.sandbox import needs_posix

pytestmark = needs_posix
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")

TASK = {
    "task_id": "HumanEval/x",
    "prompt": 'from typing import List\n\n\ndef helper(x):\n    return x\n\n\n'
    'def total(numbers: List[int]) -> int:\n    """Add up."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n",
}  # fmt: skip
RIGHT = "def total(numbers: List[int]) -> int:\n    return helper(sum(numbers))\n"
WRONG = RIGHT.replace("sum", "max")
INDENTED = "".join(f"   {line}\n" for line in RIGHT.splitlines())
DOCUMENTED = RIGHT.replace(
    "    return",
    """    \'\'\'Add up.

    ```
    total([1])
    ```
    \'\'\'
    return""",
)


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("    return sum(numbers)\n", "passed"),  # as a base model continues the prompt
        ("    return 0\n", "failed"),
        ("", "failed"),
        ("\x00", "failed"),
        (RIGHT, "passed"),
        (WRONG, "failed"),
        (f"Sure!\n```python\n{RIGHT}```\nThis adds.", "passed"),
        (f"Sure!\n```Python3\r\n{RIGHT}```", "passed"),
        (f"```\n{RIGHT}```", "passed"),
        (f"```python\n{WRONG}```\nWait.\n```python\n{RIGHT}```", "passed"),
        (f"```python\n{RIGHT}```\nWait.\n```python\n{WRONG}```", "failed"),
        (f"```python\n{RIGHT}```\nUse it:\n```python\nprint(total([1]))\n```", "passed"),
        (f"```bash\npip install x\n```\nthen\n```python\n{RIGHT}```\n```text\n3\n```", "passed"),
        (f"```python\n{RIGHT}", "passed"),  # cut off after the code
        (f"```python\n{RIGHT}\nassert total([1, 2]) == 4\n```", "failed"),
        (f"```python\n{RIGHT}\nif __name__ == '__main__':\n    print(input())\n```", "passed"),
        (f"```python\n{RIGHT}\nimport sys; sys.exit(0)\n```", "failed"),
        ("```python\n    return sum(numbers)\n```", "passed"),
        ("I cannot do that.", "failed"),
        (f"~~~python\n{RIGHT}~~~\nThis adds.", "passed"),
        (f"````python\n{RIGHT}````", "passed"),
        (f"1. Write:\n\n   ```python\n{INDENTED}   ```\n2. Run it.", "passed"),
        (f"- Write:\n\t```python\n{INDENTED}\t```", "passed"),
        (f"1. ```python\n{INDENTED}   ```", "passed"),
        (f"It is:\n   ```python\n{RIGHT}   ```", "passed"),
        (f"```python\n{INDENTED}```", "passed"),
        (f"Here is the function:\n\n{RIGHT}\nIt adds them up.", "passed"),
        (f"Import it first.\nimport math\n\n{RIGHT}\nIt's O(n).", "passed"),
        (f"{RIGHT}\nThat is all.", "passed"),
        (f"from the list:\n\n{WRONG}\nDone.", "failed"),
        (f"```python\nfrom __future__ import annotations\n{RIGHT}```", "passed"),
        (f"from __future__ import annotations\n\n{RIGHT}", "passed"),
        ("```python\nfrom typing import *\ntotal = lambda x: sum(x)\n```", "passed"),
        (f"```python\n{RIGHT.rstrip()}```\nDone.", "passed"),
        (f"```python\n{DOCUMENTED}```", "passed"),
        (f"```python title=add\n{RIGHT}```", "passed"),
        (f"Of `x` and ```y``` this is it.\n```python\n{RIGHT}```", "passed"),
        ("```python\nasync def total(x):\n    return sum(x)\n```", "failed"),
    ],
)
def test_humaneval_answer_is_extracted_and_tested(completion, status):
    assert check_humaneval(TASK, completion).status == status


def test_mbpp_answer_is_extracted_and_tested():
    task = {
        "test_setup_code": "start = 1",
        "test_list": ["assert add(start, 2) == 3", "assert set(add([1], [2])) == {1, 2}"],
    }
    right, wrong = "def add(a, b):\r\n    return a + b", "def add(a, b):\n    return a - b"
    assert check_mbpp(task, right).passed
    assert check_mbpp(task, wrong).status == "failed"
    assert check_mbpp(task, "def sub(a, b):\n    return a + b").status == "failed"
    assert check_mbpp(task, f"```python\n{right}\n```\n```python\nprint(add(1, 2))\n```").passed
    assert check_mbpp(task, "while True: pass", seconds=1).status == "timeout"
    assert check_mbpp(task, "import os\nos.fork()").status == "blocked"


def test_last_defining_fence_is_the_program():
    def program(answer: str, names: set[str]) -> str:
        return programs_of(answer, names)[0]

    assert program("x = 1", {"f"}) == "x = 1"
    assert program("```python\na\n```\n```python\nb\n```", set()) == "b\n"
    assert program("```python\ndef f(): 1\n```\n```python\nf()\n```", {"f"}) == "def f(): 1\n"
    assert program("```python\ndef fun(): 1\n```\n```python\nf()\n```", {"f"}) == "f()\n"
    assert program("```\n", {"f"}).strip() == ""
    assert program("```python\nx = 1\n~~~\n```", set()) == "x = 1\n~~~\n"


@pytest.mark.parametrize(
    ("tests", "names", "modules"),
    [
        ("assert f(1) == 2", ("f",), ()),
        ("assert sum(10, 15) == 6", ("sum",), ()),  # MBPP 126
        ("assert set(sum(10)) == {6}", ("sum",), ()),
        ("assert set(f(1)) == set(sorted([1]))", ("f",), ()),
        ("assert f(()) == sys.getsizeof(())", ("f",), ("sys",)),  # MBPP 596
        ("import math\nassert math.isclose(f(1), 2)", ("f",), ()),
        ("root = Node(1)\nroot.left = Node(2)\nassert f(root)", ("Node", "f"), ()),
        ("def g(x): return x\nassert f([n for n in [1]]) == (lambda y: y)(1)", ("f",), ()),
        ("assert True is None", (), ()),
    ],
)
def test_names_of_a_program_are_those_that_tests_do_not_have(tests, names, modules):
    assert program_names(tests) == (names, modules)


def test_mbpp_tests_with_objects_types_and_builtins_of_the_program():
    node = "class Node:\n    def __init__(self, x): self.x, self.left = x, None\n"
    depth = f"{node}def depth(n): return 1 + depth(n.left) if n else 0"
    task = {
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)\nroot.left.left = Node(3)",
        "test_list": ["assert depth(root) == 3", "assert root.left.x == 2", "assert root is root"],
    }
    assert check_mbpp(task, depth).passed
    assert check_mbpp(task, depth.replace("1 +", "2 +")).status == "failed"
    task = {"test_setup_code": "", "test_list": ["assert sum(10, 15) == 6"]}
    assert check_mbpp(task, "def sum(a, b): return 6").passed
    assert not check_mbpp(task, "def other(a, b): return 6").passed
    task = {"test_setup_code": "", "test_list": ["assert kept([1, 'a'], str) == ['a']"]}
    assert check_mbpp(task, "def kept(x, t): return [y for y in x if isinstance(y, t)]").passed


def tasks(name: str, step: int) -> list[dict]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[::step]]


def check_solutions(humaneval: int, mbpp: int) -> None:
    for task in tasks("humaneval.jsonl", humaneval):
        assert check_humaneval(task, task["canonical_solution"], seconds=60).passed, task["task_id"]
        chat = f"```python\n{task['prompt']}{task['canonical_solution']}```"
        assert check_humaneval(task, chat, seconds=60).passed, task["task_id"]
        result = check_humaneval(task, "    return NotImplemented\n")
        assert result.status == "failed", task["task_id"]
    for task in tasks("mbpp.jsonl", mbpp):
        assert check_mbpp(task, task["code"], seconds=60).passed, task["task_id"]
        broken = task["code"].replace("return", "return None and")
        assert "return" not in broken or not check_mbpp(task, broken).passed, task["task_id"]


@needs_data
def test_solutions_pass_and_broken_ones_fail_for_some_tasks():
    check_solutions(humaneval=8, mbpp=48)  # 21 of each


@needs_data
@pytest.mark.slow
def test_solutions_pass_and_broken_ones_fail_for_all_tasks():
    check_solutions(humaneval=1, mbpp=1)
