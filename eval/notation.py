r"""How an answer in mathematics may be spelled: LaTeX made plain, numbers with units read.

Decides which spellings of a number are the same value. Compares nothing and knows no grade; what is
no number stays LaTeX, for math-verify.
"""

import re
from fractions import Fraction

SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "²": "^2",
        "³": "^3",
        "°": r"^\circ ",
        "º": r"^\circ ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "\N{UNION}": r"\cup ",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∅": r"\emptyset ",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        **dict.fromkeys("€£¢"),
    }
)
COMMAND = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|emph|operatorname)"
TEXT = re.compile(rf"{COMMAND}\s*\{{([^{{}}]*)\}}")
# Rewrites of LaTeX that math-verify misreads.
REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\?\$|\\!\s*|(?<!\\)\\[()]|^\s*\\\[|\\\]\s*$", ""),  # dollars, delimiters, kerning
        (r"^\s*\\approx(?![a-zA-Z])", ""),
        (r"(?<!\\right)(?<!\\left)[.,;]\s*$", ""),
        (r"\\(?:text)?degree(?![a-zA-Z])", r"^\\circ "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"^\s*[a-zA-Z]\s*\\in(?![a-zA-Z])", ""),
        (r"^\s*\\\{\s*[a-zA-Z]\s*(?:\\mid|[:|])(.*)\\\}\s*$", r"\1"),  # {x | x > 2} is x > 2
        (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
        (r"(?<![a-zA-Z\\])oo(?![a-zA-Z])", r"\\infty "),
        (rf"{COMMAND}\s*\{{\s*\\?pi\s*\}}|(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"√\s*\(([^()]*)\)|√\s*(\d+|\w)", r"\\sqrt{\1\2}"),
        (r"\^\s*-\s*(\d+)", r"^{-\1}"),
        (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),  # 6.72 x 10^5
        (r"(?<=\d)(?:\\[,;: ]|~|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),
        (r"^\s*(-?\d+)\s+(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),
        (r"\\\\\[[^\]]*\]", r"\\\\"),  # the height of a matrix row
    )
)
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d{1,50})\}")

GROUPED = r"\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+"
DECIMAL = rf"[-+]?\s*(?:(?:{GROUPED})(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
NUMBER = re.compile(DECIMAL, re.ASCII)
POWER = re.compile(r"([-+]?)\s*(\d{1,4})\s*\^\s*(?:(\d{1,3})|\{\s*(\d{1,3})\s*\})", re.ASCII)
SPACE = r"(?:\s|~|\\[,;: ])"
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that make another value of the number before them. A dozen is no scale: where GSM8K has the
# word, the question asks for dozens.
OPERATORS = (
    *("and", "or", "plus", "minus", "times", "over", "divided", "mod", "choose", "to", "half"),
    *("halves", "thirds", "squared", "cubed", "doubled", "tripled", "factorial", "sqrt", "root"),
    *("tenths", "hundredths", "thousandths", "millionths", "billionths", "pi", *SCALES),
)
OPERATOR = rf"(?<![a-zA-Z])(?i:{'|'.join(OPERATORS)})s?(?![a-zA-Z])"
SCALE = re.compile(
    rf"{SPACE}*(?:{COMMAND}\s*\{{\s*)?((?i:{'|'.join(SCALES)}))s?(?![a-zA-Z])"
    rf"(?:(?![^{{}}]*{OPERATOR})[^{{}}\d]*\}})?"
)
# Possessive, or a long answer would take for ever. One bare letter is a variable: 5x is not 5. An
# exponent belongs to a unit, as in 5 cm^2: 5^2 is 25.
UNIT = re.compile(
    rf"(?:\\?%|\^\{{?\\circ\s*\}}?(?:\s*[CF](?![a-zA-Z]))?|{SPACE}|[./]"
    rf"|(?:(?!{OPERATOR})[a-zA-Z]{{2,}}+|{COMMAND}\s*\{{(?![^{{}}]*{OPERATOR})[^{{}}\d]*\}})"
    r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?(?:/[a-z](?![a-zA-Z]))?)*+"
)
PERCENT = re.compile(r"%|\bpercent\b")
WORDED = re.compile(
    rf"{DECIMAL}{SPACE}*[a-zA-Z]{{2,}}+(?:{SPACE}|,|[a-zA-Z]{{2,}}+|a\b|{DECIMAL})*+", re.ASCII
)
IN_PROSE = re.compile(
    rf"(?:(?<![\w.)])-)?\$?(?:{GROUPED.replace(' ', '')})(?:\.\d+)?"
    rf"(?:\s*\^\s*(?:\d+|\{{\d+\}})|/\d+|\s+(?i:{'|'.join(SCALES)})\b)?",
    re.ASCII,
)
BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
IN_BASE = re.compile(rf"(\d+)(?:_(?:base)?|base)(\d+|{'|'.join(BASES)})", re.ASCII)


def tidy(latex: str) -> str:
    """An answer without typography, in the LaTeX that math-verify reads."""
    latex = latex.translate(SYMBOLS)
    for pattern, by in REWRITES:
        latex = pattern.sub(by, latex)
    return REPEATING.sub(_fraction, latex).strip()


def _fraction(repeating: re.Match[str]) -> str:
    whole, fixed, period = repeating.groups()
    nines = 10 ** len(period) - 1
    value = int(whole + fixed or "0") + Fraction(int(period), nines)
    value /= 10 ** len(fixed)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def words(latex: str) -> str:
    r"""The letters and digits of a text answer: (C), \text{C} and \textbf{(c)} are the same."""
    return re.sub(r"[\W_]", "", plain(latex)).casefold()


def plain(latex: str) -> str:
    r"""LaTeX with the content of \text{...} and its kin in their place."""
    return TEXT.sub(r"\1", latex)


def number(latex: str) -> Fraction | None:
    """The value of a tidy decimal number; None for all other mathematics."""
    return Fraction(re.sub(r"[,\s]", "", latex)) if NUMBER.fullmatch(latex) else None


def quantity(latex: str) -> Fraction | None:
    """The value of a tidy number, also with a scale and a unit: 10^2, 2 million, 5 cm^2, 50 %.

    Units are dropped, and an emphasis or parentheses around the whole. None for all other
    mathematics.
    """
    if whole := TEXT.fullmatch(latex):
        latex = whole[1].strip()
    while len(latex) > 1 and latex[0] + latex[-1] in ("()", "{}"):
        latex = latex[1:-1].strip()
    if power := POWER.match(latex):
        sign, base, *exponents = power.groups()
        value = Fraction(int(base) ** int(exponents[0] or exponents[1]))
        value = -value if sign == "-" else value
        end = power.end()
    elif decimal := NUMBER.match(latex):
        value, end = Fraction(re.sub(r"[,\s]", "", decimal[0])), decimal.end()
    else:
        return None
    if scale := SCALE.match(latex, end):
        value, end = value * SCALES[scale[1].lower()], scale.end()
    return value if UNIT.fullmatch(latex, end) else None


def has_percent(latex: str) -> bool:
    """Whether a percent sign or the word is in it: 50 % may stand for 50 and for 0.5."""
    return PERCENT.search(latex) is not None


def is_worded(latex: str) -> bool:
    """Whether it is a number and words: 5 or more, 5 hours 30 minutes; a unit is a word too."""
    return WORDED.fullmatch(plain(latex)) is not None


def in_base(latex: str) -> tuple[str, str] | None:
    r"""The digits and the base of a number with its base: 52_8, 52_{\text{eight}}, 52 base 8."""
    digits = IN_BASE.fullmatch(re.sub(rf"[{{}}()]|{SPACE}", "", plain(latex)))
    if digits is None:
        return None
    base = str(BASES.index(digits[2]) + 2) if digits[2] in BASES else digits[2]
    return digits[1], base
