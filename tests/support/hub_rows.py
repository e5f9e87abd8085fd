"""A row of each benchmark as the hub's copy has it."""

HUB_ROWS = {
    "math500": {
        "problem": "1+1?",
        "solution": "2",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    "gsm8k": {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"},
    "aime24": {"id": 60, "problem": "1+1?", "solution": "2", "answer": "2", "year": "2024"},
    "aime25": {"problem": "1+1?", "answer": "2", "id": "0"},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(g):\n    assert g() == 1\n",
        "entry_point": "f",
    },
    "mbpp": {
        "source_file": "x",
        "task_id": 11,
        "prompt": "Write f.",
        "code": "",
        "test_imports": ["import math"],
        "test_list": ["assert f() == math.pi"],
    },
    "mt_bench": {"prompt": ["Hi", "Why?"], "prompt_id": 7, "category": "writing", "reference": []},
    "spec_bench": {"question_id": 81, "category": "rag", "turns": ["Hi"]},
    "demo": {"question": "1+1?", "answer": "2", "operations": 1},
}
