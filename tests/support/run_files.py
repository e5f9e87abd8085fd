"""Recipes and answers made by hand, and the directory of a run that holds them."""

import json

from eval import records


def recipe(**changes):
    """A recipe of both loops, greedy, K = 4, batch 1."""
    settings = {
        "benchmark": "math500",
        "data": "d",
        "mode": "both",
        "batch_size": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
        "n": 1,
        "accept": "rejection",
        "thinking": False,
        "max_new_tokens": 100,
    }
    return {
        "title": "MATH-500",
        "model": "some/<model>",
        "problems": 4,
        "graded": True,
        "trained": True,
        "hardware": "cpu",
        "asked": settings | changes,
        "loaded": {"draft_length": 4, "dtype": "float32"},
    }


def answer(loop, accepted, tokens=None, *, sample=0, turn=0, correct=True, **changes):
    """An answer whose every cycle emits its drafts and one more token."""
    tokens = 1 + sum(accepted) + len(accepted) if tokens is None else tokens
    orthrus = loop == "orthrus"
    cycles = len(accepted) if orthrus else tokens - 1
    line = {
        "loop": loop,
        "sample": sample,
        "turn": turn,
        "text": "x",
        "tokens": tokens,
        "digest": "same",
        "finish_reason": "stop",
        "cycles": cycles,
        "accepted": list(accepted) if orthrus else [],
        "forwards": 1 + (2 if orthrus else 1) * cycles,
        "seconds": 1.0,
        "first_seconds": 0.25,
        "correct": correct,
        "note": "",
    }
    return line | changes


def row(name, answers, seconds=None, **groups):
    seconds = {"ar": 1.0, "orthrus": 0.5} if seconds is None else seconds
    return {"id": name, "groups": groups, "seconds": seconds, "answers": answers}


def both(name, accepted, seconds=None, *, correct=True, digest="same", **groups):
    tokens = 1 + sum(accepted) + len(accepted)
    answers = [
        answer("ar", accepted, correct=correct),
        answer("orthrus", accepted, tokens, correct=correct, digest=digest),
    ]
    return row(name, answers, seconds, **groups)


def save(directory, recipe, rows):
    directory.mkdir()
    (directory / records.RECIPE).write_text(json.dumps(recipe))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / records.ANSWERS).write_text(lines)
    return directory
