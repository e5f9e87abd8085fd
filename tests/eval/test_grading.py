r"""What counts as the same answer: several hundred pairs written by hand, boxes of all kinds, the
real gold answers against themselves, and what must never crash, hang or be taken for right."""

import gzip
import json
import os
import threading
import time

import pytest

from eval import grading
from eval.grading import Grade, final_answer, grade_integer, grade_math
from orthrus_jax.errors import UserError
from tests.support.paths import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")

# (gold, answers that are right, answers that are wrong); each answer stands in a box.
# fmt: off
PAIRS = [
    # integers
    (
        "5",
        ["005", "+5", "5.0", "5.", "(5)", "{5}", r"\textbf{5}", r"\mathbf{5}", "5,", r"\{5\}"],
        ["-5", "5.5", "-6", "51", "15"],
    ),
    ("1000", ["1,000", "1{,}000", r"1\,000", "10^3", r"1\times10^3", "1e3"], ["1.000", "100"]),
    ("10080", [r"10,\!080", "10 080"], []),
    ("58,500", ["58500"], ["58.500"]),
    ("1024", ["2^{10}", "2^10"], []),
    ("12", [r"3\cdot 4", "3*4", "3 \N{MULTIPLICATION SIGN} 4"], []),
    ("120", ["5!"], []),
    ("10", [r"\binom{5}{2}"], []),
    (r"11,\! 111,\! 111,\! 100", ["11111111100"], []),
    ("0", ["-0"], []),
    ("1", [], ["0"]),
    ("17", [], ["7"]),
    ("-5", ["\N{MINUS SIGN}5"], []),
    ("2", [], ["two"]),
    ("7", [], ["VII"]),
    ("1267650600228229401496703205376", ["2^{100}"], []),
    ("1267650600228229401496703205377", [], ["2^{100}"]),
    ("55", [r"\sum_{k=1}^{10}k"], []),
    ("3", [r"\lfloor 3.7\rfloor"], []),
    ("16", [], ["0x10"]),
    ("24", [], ["5!"]),
    # fractions
    (r"\frac12", [r"\frac{1}{2}", r"{1 \over 2}", r"1\over2"], []),
    (
        r"\frac{1}{2}",
        [r"\dfrac{1}{2}", r"\tfrac12", "1/2", r"\frac{2}{4}", "0.5", ".5"],
        [r"\frac{1}{3}", r"-\frac{1}{2}", r"\frac{2}{1}", "0.25"],
    ),
    (r"-\frac{1}{2}", [r"\frac{-1}{2}", r"\frac{1}{-2}", "-1/2"], []),
    (r"\frac{5}{9}", [r"\frac 59"], []),
    (r"\frac 59", [r"\frac{5}9", "5/9"], []),
    ("2", ["2/1"], [r"\frac{1}{2}"]),
    (r"4\frac{2}{3}", [r"\frac{14}{3}"], ["42/3"]),
    (r"\frac{14}{3}", [r"4\frac{2}{3}", r"4 \frac{2}{3}", "4 2/3"], []),
    (r"\frac95", [r"1\frac45"], []),
    (r"1\frac{4}{5}", [r"\frac{9}{5}", "1.8"], [r"1\cdot\frac{4}{5}"]),
    (r"137 \frac{1}{2}", ["137.5"], []),
    (r"-\frac32", [r"-1\frac12"], []),
    (r"\frac16", [r"\frac{1/2}{3}", r"\frac{\frac12}{3}"], []),
    (r"\frac59", [r"5\div 9"], ["9/5"]),
    (r"4\frac{1}{3}", [], [r"\frac{14}{3}"]),
    (r"1\frac12", [], ["11/2"]),
    # decimals
    (r"\frac13", [r"0.\overline{3}"], ["0.333", "0.33"]),
    (r"\frac{11}{30}", [r"0.3\overline{6}"], []),
    ("3.21", ["3.210"], ["3.22"]),
    ("0.35625", [".35625"], []),
    (".35625", ["0.35625"], []),
    (
        ".0000672",
        ["0.0000672", r"6.72\times 10^{-5}", r"6.72 \cdot 10^{-5}", "6.72e-5"],
        ["0.000067", "0.00007"],
    ),
    ("1.25", [r"\frac54", r"\approx 1.25"], ["1.3", "1,25"]),
    ("326.5", ["326.50"], []),
    (r"\pi", [], ["3.14"]),
    (r"\sqrt2", [], ["1.414"]),
    ("1.2", [], ["2.1"]),
    ("0.001", ["10^{-3}"], ["0.01"]),
    (r"\frac{4}{11}", [r"0.\overline{36}"], []),
    ("0.3", [], [r"0.\overline{3}"]),
    (r"\frac76", [r"1.1\overline{6}"], []),
    # percent
    ("50", [r"50\%", "50%"], []),
    (
        r"50\%",
        ["50", "50%", "0.5", r"50 \text{ percent}", "50 percent", r"\frac12"],
        [r"25\%", r"5\%"],
    ),
    ("0.5", [r"50\%"], []),
    (r"33\frac13\%", [r"33\frac{1}{3}\%"], []),
    ("0.05", ["5%"], ["0.5%"]),
    # units, money, degrees, ratios, times
    (
        "5",
        [r"5\text{ cm}", r"5\text{ cm}^2", "5 cm", r"5\ \mathrm{cm}", r"5\text{ km/h}",
         r"5 \text{ m/s}"],
        [],
    ),
    (r"15\mbox{ cm}^2", [r"15\,\text{cm}^2", "15"], [r"16\text{ cm}^2"]),
    (r"864 \mbox{ inches}^2", [r"864\text{ square inches}"], []),
    ("36", [r"\$36"], []),
    (r"\$36", ["36", "$36$", r"36\text{ dollars}"], []),
    ("18.9", [r"\$18.90"], []),
    (r"\$18.90", ["18.9"], []),
    (r"\$32,\!348", ["32348", r"\$32,348", r"\$32{,}348.00"], []),
    (r"5.4 \text{ cents}", ["5.4", r"5.4\text{ cents}"], ["0.054"]),
    ("120", [r"120^\circ"], []),
    (
        r"120^\circ",
        ["120", "120°", r"120^{\circ}", r"120\text{ degrees}", "120 degrees"],
        [r"\frac{2\pi}{3}", r"90^\circ"],
    ),
    (
        r"\frac{270}7\text{ degrees}",
        [r"\frac{270}{7}", r"\frac{270}{7}^\circ", r"38\frac47^\circ"],
        [],
    ),
    ("12", [r"12 \text{ hours}"], []),
    ("3", [r"3 \text{ apples}"], []),
    ("5:31", [], ["5:30"]),
    (r"\$63", [], [r"36\text{ cents}"]),
    ("9:45", [r"9:45 \text{ a.m.}"], []),
    ("0.5", [r"\frac{1}{2}\text{ cup}"], []),
    (r"5\text{ degrees}", [r"5^\circ"], []),
    (r"\frac{5\pi}{6}", [r"\frac{5\pi}{6}\text{ radians}"], []),
    ("3:4", ["6:8"], ["4:3"]),
    # surds
    (r"\sqrt{51}", [], [r"\sqrt51"]),
    (r"11\sqrt2", [r"11\sqrt{2}", r"\sqrt{242}"], [r"2\sqrt{11}"]),
    (r"\sqrt{117}", [r"3\sqrt{13}"], []),
    (r"\frac{\sqrt3}{3}", [r"\frac{1}{\sqrt3}"], []),
    (r"\frac{\sqrt{3}}{3}", [r"\frac{\sqrt3}{3}", r"\sqrt{3}/3"], [r"\sqrt{3}"]),
    (r"\sqrt5", ["sqrt(5)", "5^{1/2}"], []),
    (r"\sqrt{5}", ["√5"], []),
    (r"2\sqrt{5}", ["2√5"], []),
    ("2", [r"\sqrt[3]{8}"], []),
    ("2^{1/3}", [r"\sqrt[3]{2}"], []),
    (r"\sqrt6", [], [r"\sqrt5"]),
    (r"11 \sqrt{5} + 11", [r"11+11\sqrt5", r"11(\sqrt5+1)"], []),
    (r"1+2\sqrt{3}", [r"1+2\sqrt3"], [r"1-2\sqrt3"]),
    (r"1+\sqrt3", [r"\sqrt{4+2\sqrt3}"], []),
    (r"\frac{1+\sqrt5}{2}", [r"\frac{2}{\sqrt5-1}"], []),
    (r"\sqrt{3}", [], [r"-\sqrt{3}", r"\pm\sqrt{3}"]),
    (r"3\sqrt{13}", [], [r"\sqrt{13}"]),
    # pi, e and logarithms
    (r"12\pi", ["12π", r"\pi\cdot 12"], ["12", "37.699", r"12\pi^2"]),
    (r"18+2\pi", [r"2(\pi+9)"], [r"20\pi"]),
    (r"\frac{20000}{\pi}", [r"20000/\pi"], []),
    ("e^{2}", ["e^2"], []),
    ("3", [r"\ln e^3", r"\log_2 8"], []),
    (r"\ln 2", [], [r"\log 2"]),
    ("1", [], ["e"]),
    # complex
    ("6 - 5i", ["6-5i", "-5i+6", r"2\left(3-\frac{5}{2}i\right)"], ["6+5i"]),
    ("i", [r"\sqrt{-1}"], ["-i"]),
    (r"\frac12+\frac12 i", [r"\frac{1+i}{2}"], []),
    ("5", ["(2+i)(2-i)"], ["5i"]),
    ("-3+4i", ["(1+2i)^2"], []),
    ("-1", [r"e^{i\pi}"], []),
    (r"\frac{2-i}{5}", [r"\frac{1}{2+i}"], []),
    (r"\pm i", [r"\{i,-i\}"], []),
    ("2i", ["x=2i"], []),
    (r"\frac12+\frac{\sqrt3}{2}i", [r"\cos\frac{\pi}{3}+i\sin\frac{\pi}{3}"], []),
    # expressions
    ("p - q", ["p-q", "-q+p"], ["q-p"]),
    ("2k+2", ["2(k+1)"], ["2n+2", "k+2"]),
    ("(a+5)(b+2)", ["(b+2)(a+5)", "ab+2a+5b+10"], ["(a+5)(b-2)"]),
    ("x^3+3x-6", ["3x-6+x^3", "x^{3}+3x-6", "x³+3x-6", "p(x)=x^3+3x-6"], ["x^3+3x+6"]),
    ("5r^5", ["f(x) = 5r^5", "5 r^{5}"], ["5r^4", "5r"]),
    ("6r^2-4r-24", ["2(3r^2-2r-12)"], []),
    (r"\frac{11+9a}{20}", [r"\frac{9a+11}{20}", r"\frac{9a}{20}+\frac{11}{20}", "0.45a+0.55"], []),
    (r"\cot x", [r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan x}", r"\cot(x)"], [r"\tan x"]),
    ("8n^2 + 4n + 1", ["8n^2+4n+1"], []),
    ("x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x + 1", [r"\frac{x^9-1}{x-1}"], []),
    ("1", [r"\sin^2 x+\cos^2 x"], []),
    ("|1-x|", ["|x-1|"], []),
    ("6^x", ["2^x 3^x"], []),
    ("(x+1)^2", ["x^2+2x+1"], ["x^2+1"]),
    ("b", [], ["a"]),
    ("x_2", [], ["x_1"]),
    (r"\frac{\pi}{4}+k\pi", [], [r"\frac{\pi}{4}+n\pi"]),
    ("f(x)=x^2", ["x^2"], []),
    # equations
    ("y = 2x + 3", ["y=2x+3", "2x+3", "y-2x=3", "2x-y+3=0"], ["y=2x-3"]),
    ("y = -2x", ["y=-2x"], ["y=x"]),
    ("x=5", ["5"], ["y=5", "x = 6"]),
    ("5", ["x=5", "2+3=5", "x=2+3=5"], []),
    (
        "5x - 7y + 11z + 4 = 0",
        ["5x-7y+11z+4=0", "10x-14y+22z+8=0", "-5x+7y-11z-4=0", "5x-7y+11z=-4"],
        ["5x-7y+11z-4=0", "5x-7y+11z+4", "0"],
    ),
    ("3,5", [r"x=5 \text{ or } x=3"], []),
    ("(1,2)", ["x=1, y=2"], []),
    ("y^2+x^2=4", ["x^2+y^2=4"], []),
    ("x^2+y^2=4", ["x^2+y^2-4=0"], []),
    (r"y=-\frac34x+3", ["3x+4y=12"], ["3x+4y=13"]),
    ("x=3,y=4", ["y=4,x=3"], ["y=3,x=4"]),
    # sets and lists
    (
        "1,-2",
        ["-2,1", "-2, 1", r"\{-2,1\}", "-2 and 1", r"-2\text{ and }1", r"-2 \text{ or } 1",
         "x=1,x=-2", "1;-2"],
        ["1", "1,2", "1,-2,3"],
    ),
    ("3, 5, 7", ["3,5,7", "7,5,3", "3,5,7,7"], ["3,5", "2,3,5"]),
    (r"\{1\pm\sqrt{5},-2\}", [r"\{1\pm\sqrt5,-2\}", r"-2,1+\sqrt5,1-\sqrt5"], [r"\{-2,1+\sqrt5\}"]),
    (r"1 \pm \sqrt{19}", [r"1\pm\sqrt{19}", r"1+\sqrt{19},1-\sqrt{19}"], [r"1+\sqrt{19}"]),
    (r"3 \pm 2 \sqrt{2}", [r"3+2\sqrt2, 3-2\sqrt2", r"3-2\sqrt2 \text{ and } 3+2\sqrt2"], []),
    ("2,-2", [r"\pm 2"], []),
    (r"\pm 2", ["-2,2"], []),
    (r"\pm2", [], ["2"]),
    (r"\emptyset", [r"\varnothing", r"\{\}"], ["0", r"\{\emptyset\}"]),
    (r"\{3,2,1\}", [r"\{1,2,3\}"], []),
    (r"\{1,2,3\}", [], [r"\{1,2\}"]),
    (r"\{0.5,2\}", [r"\{\frac12,2\}"], []),
    ("2,3", ["2 or 3", r"2,\text{ and }3"], []),
    ("2", [], [r"2\text{ or }3"]),
    (r"\frac13,\frac23", ["2/3,1/3"], []),
    # points and vectors as tuples
    ("(6,31,-1)", ["(6, 31, -1)", "6,31,-1", r"\left(6,31,-1\right)"], ["(31,6,-1)", "(6,31)"]),
    ("(-2,1)", ["-2,1"], ["(1,-2)", "[-2,1]"]),
    (
        r"\left( \frac{3}{2}, -13 \right)",
        [r"\left(\frac{3}{2},-13\right)", "(1.5,-13)", "(3/2, -13)"],
        [r"(\frac32,13)"],
    ),
    (
        r"\left( 3, \frac{\pi}{2} \right)",
        [r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"],
        [r"(3, 90^\circ)"],
    ),
    ("(1,-16,-4,43)", ["1,-16,-4,43"], ["(1,-16,-4,34)"]),
    ("(8,-2)", ["(x,y)=(8,-2)", "x=8,y=-2"], ["(-2,8)"]),
    ("(1,2),(3,4)", ["(3,4),(1,2)"], ["(1,2),(3,5)"]),
    ("(3,1),(2,4)", ["(3,1) and (2,4)"], []),
    ("(15,-29)", [], ["15,29"]),
    # intervals
    ("(3,4]", [r"3<x\le4", r"x\in(3,4]", r"3 < x \leq 4"], ["[3,4]", "(3,4)"]),
    (
        r"(2,\infty)",
        [r"(2,+\infty)", "x>2", "2<x"],
        [r"x\ge2", r"[2,\infty)", r"(-\infty,2)", r"(-2,\infty)"],
    ),
    (r"(-\infty, 0]", [r"(-\infty,0]", r"x\le 0"], [r"(-\infty,0)"]),
    (r"x \in [-2,7]", ["[-2,7]", r"-2\le x\le 7", r"x\in[-2,7]"], ["(-2,7)"]),
    (
        r"(-\infty, 2) \cup (3, \infty)",
        [r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)", r"\mathbb{R}\setminus[2,3]"],
        [r"(-\infty,2]\cup[3,\infty)"],
    ),
    (r"(0,9) \cup (9,36)", [r"(0,9)\cup(9,36)", r"(0,36)\setminus\{9\}"], ["(0,36)"]),
    (r"(2,12) \cup (12,102)", [r"(2,12)\cup(12,102)"], []),
    (r"(-\sqrt{3}, \sqrt{3})", [r"(-\sqrt3,\sqrt3)"], []),
    (
        r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]",
        [r"\left[\frac{\pi^2}{8},\frac{5\pi^2}{4}\right]"],
        [],
    ),
    (
        r"\left(\frac{3}{5},\frac{8}{3}\right]",
        [r"(\frac35,\frac83]", r"(0.6,\frac83]"],
        [r"(\frac35,\frac83)"],
    ),
    (r"(-\infty,\infty)", [r"\mathbb{R}"], []),
    (r"(-\infty,2)\cup(2,\infty)", [r"x\neq 2"], []),
    ("(1,2)", ["1<x<2"], []),
    ("(1,3)", [r"(1,2]\cup[2,3)"], [r"(1,2)\cup(2,3)"]),
    # matrices
    (
        r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}",
        [r"\begin{pmatrix}-2\\-14\\-7\end{pmatrix}", r"\begin{bmatrix}-2\\-14\\-7\end{bmatrix}"],
        [r"\begin{pmatrix}-2\\-14\\7\end{pmatrix}", r"\begin{pmatrix}-2&-14&-7\end{pmatrix}"],
    ),
    (
        r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
        [r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}", r"\begin{bmatrix}-1&0\\0&-1\end{bmatrix}",
         r"-\begin{pmatrix}1&0\\0&1\end{pmatrix}"],
        [r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix}0&-1\\-1&0\end{pmatrix}"],
    ),
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        [r"\begin{pmatrix}\frac15\\-\frac{18}5\end{pmatrix}",
         r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", r"\frac15\begin{pmatrix}1\\-18\end{pmatrix}",
         r"\left(\begin{array}{c}1/5\\-18/5\end{array}\right)"],
        [r"\begin{pmatrix}1/5\end{pmatrix}"],
    ),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        [r"\begin{pmatrix}-\frac{1}{3}\\\frac{2}{3}\\\frac{5}{3}\end{pmatrix}"],
        [],
    ),
    (
        r"\begin{pmatrix} 16/49 \\ 48/49 \\ 24/49 \end{pmatrix}",
        [r"\begin{pmatrix}16/49\\48/49\\24/49\end{pmatrix}"],
        [],
    ),
    (
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        [r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}"],
        [r"\begin{pmatrix}2\\1\end{pmatrix}"],
    ),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        [r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"],
        [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"],
    ),
    ("-2", [r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"], []),
    # text
    (
        r"\text{Evelyn}",
        ["Evelyn", "evelyn", r"\textbf{Evelyn}", r"\mathrm{Evelyn}", r"\text{Evelyn.}"],
        ["Briana"],
    ),
    (r"\text{east}", ["east", "East"], ["west", r"\text{west}", r"\text{due east}"]),
    (r"\text{even}", ["even", r"\text{Even}"], ["odd"]),
    (r"\text{ellipse}", ["ellipse"], [r"\text{an ellipse}", "hyperbola"]),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\textbf{(C)}", "c"], ["B", r"\text{(D)}"]),
    (r"\text{(E)}", ["E", "e"], ["2.718281828", "5"]),
    (r"\text{Navin}", ["Navin"], []),
    (r"\text{Tuesday}", [], ["Monday"]),
    (r"\text{Yes}", ["yes"], ["no"]),
    (r"\text{3 days}", ["3 days"], []),
    (r"\text{A, C}", ["AC"], ["C, A"]),
    # bases
    ("52_8", ["52", "52_{8}"], ["52_7", "42", "25_8"]),
    ("4210_{5}", ["4210_5"], ["4211_5"]),
    ("204_5", ["204_{5}"], []),
    ("40", [], ["40_9"]),]
# Where math-verify and a mathematician part, and the grade follows math-verify: (gold, answer,
# whether it is graded as right). A change here changes every published accuracy.
KNOWN = [
    # right in mathematics, graded wrong
    ("10", r"\dbinom52", False),  # no braces
    ("5", "5 cm^2", False),  # bare letters are variables
    ("5", "5 km/h", False),
    (r"\$36", "36 dollars", False),
    (r"5.4 \text{ cents}", "5.4¢", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"x<2 \text{ or } x>3", False),
    (r"(2,\infty)", r"\{x: x>2\}", False),
    ("(3,4]", "]3,4]", False),
    (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", "(-2,-14)", False),  # a column is no tuple
    (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"\langle -2,-14\rangle", False),
    ("52_8", r"52_{\text{eight}}", False),
    (r"\text{3 days}", "3", False),
    (r"\frac12", r"\sin 30^\circ", False),  # degrees are dropped: sin 30
    ("210", "_7P_3", False),
    # wrong in mathematics, graded right
    (r"\frac13", "0.333333", True),  # six decimals are enough
    (r"\pi", "3.14159265", True),
    (r"15\mbox{ cm}^2", r"15\text{ m}^2", True),  # units are dropped
    ("3R^2", "3r^2", True),  # so is the case of letters
    ("1,-2", "(-2,1)", True),  # two numbers in parentheses are a set too
    ("0", "5x - 7y + 11z + 4 = 0", True),  # an equation counts as its right side
]
# fmt: on
MALFORMED = [
    *(
        "?",
        "nan",
        "None",
        "(((((",
        r"\frac{1}{0}",
        r"\frac00",
        "0/0",
        r"\infty",
        r"\sqrt",
        r"\frac",
    ),
    *(r"\begin{pmatrix}1", r"\begin{pmatrix}1&2\\3\end{pmatrix}", r"5\\6", r"\left(5", "5)", " "),
    *(
        "x" * 300,
        "1" * 1500,
        r"\frac" * 300,
        "{" * 200 + "}" * 200,
        "a" * 1999,
        "(" * 500 + ")" * 500,
    ),
    *(
        r"\undefined{5}",
        r"\text{",
        "\\",
        "#",
        "%",
        "&",
        "=",
        "==",
        "5=",
        "=6",
        "<",
        ",",
        ",,,",
        "-",
    ),
    *(r"\{", r"\cup", "_", "^", "^^^", "1e999", "+-+", r"\int", r"\lim_{x\to}", "999999999!"),
    *(
        "\x00",
        "\u202e6\u202c",
        "\ud800",
        "\U0001f600",
        "e\u0301" * 50,
        "\u06f5",
        "\u4e94",
        "\ufeff",
    ),
    "__import__('os').system('true')",
    r"\sum_{k=1}^{10^{9}} \frac1k",
]


def in_box(answer: str) -> str:
    return rf"So the answer is $\boxed{{{answer}}}$."


def flat(right: bool) -> list[tuple[str, str]]:
    return [(gold, answer) for gold, *answers in PAIRS for answer in answers[not right]]


@pytest.fixture
def judge(monkeypatch):
    """A process of the test's own, with a short limit."""
    judge = grading._Judge()
    monkeypatch.setattr(grading, "_judge", judge)
    monkeypatch.setattr(grading, "SECONDS", 1.0)
    yield judge
    judge.close()


def test_the_table_is_large_and_says_nothing_twice():
    rows = flat(True) + flat(False) + [(gold, answer) for gold, answer, _ in KNOWN]
    assert len(rows) == len(set(rows)) >= 400


@pytest.mark.parametrize(("gold", "answer"), flat(True))
def test_right_answers(gold, answer):
    assert grade_math(in_box(answer), gold) == Grade(True, answer.strip())


@pytest.mark.parametrize(("gold", "answer"), flat(False))
def test_wrong_answers(gold, answer):
    grade = grade_math(in_box(answer), gold)
    assert not grade.correct
    assert grade.answer == answer


@pytest.mark.parametrize(("gold", "answer", "graded"), KNOWN)
def test_known_disagreements_with_mathematics_stay_as_they_are(gold, answer, graded):
    assert grade_math(in_box(answer), gold).correct is graded


@pytest.mark.parametrize("gold", sorted({gold for gold, _, _ in PAIRS}))
def test_every_gold_answer_is_right_and_an_unlike_one_is_wrong(gold):
    assert grade_math(in_box(gold), gold).correct
    assert not grade_math(in_box("98765"), gold).correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"$\boxed{ 5 }$", "5"),
        (r"\boxed {5}", "5"),
        (r"\\boxed{5}", "5"),  # escaped once too often
        ("\\\\\n\\boxed{5}", "5"),  # after a line break of LaTeX
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{5} and once more \boxed{6", "5"),  # cut off: the last complete one
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{1}{\sqrt{2}}}} and {more}", r"\sqrt{\frac{1}{\sqrt{2}}}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),  # escaped braces need no partner
        (r"} } \boxed{5} {", "5"),
        (r"{\boxed{5}", "5"),
        (r"\boxed{1}{2}", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{ }", ""),
        ("\\boxed{a\nb}", "a\nb"),
        (r"<think>\boxed{3}</think> \boxed{4}", "4"),
        ("", None),
        ("5", None),
        ("the answer is 5", None),
        (r"\boxed", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        (r"\boxed{", None),
        (r"\boxed{5", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{5\}", None),
        (r"\fbox{5}", None),
    ],
)
def test_the_box_is_the_last_complete_one(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "correct", "note"),
    [
        ("The answer is 5.", False, "no box"),
        ("", False, "no box"),
        (r"\boxed{5", False, "no box"),
        (r"\boxed{}", False, "empty box"),
        (r"\boxed{4}", False, ""),
        (r"\boxed{5} \boxed{4}", False, ""),  # the last one counts, wrong or right
        (r"\boxed{4} \boxed{5}", True, ""),
        (r"\boxed{4} and \boxed{5", False, ""),
        (r"\boxed{5\text{ or }4}", False, ""),
        (r"\boxed{" + "5" * 3000 + "}", False, "too long"),
    ],
)
def test_boxes_and_their_notes(text, correct, note):
    grade = grade_math(text, "5")
    assert (grade.correct, grade.note) == (correct, note)


def test_a_box_of_words_is_no_mathematics():
    assert grade_math(in_box(r"\begin{pmatrix}"), r"\frac12").note == "unreadable"


@pytest.mark.parametrize("answer", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_wrong_and_no_more(answer, monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1.0)  # some of them never end
    assert not grade_math(in_box(answer), r"\frac{5}{7}").correct
    assert not grade_math(in_box(answer), r"\text{five}").correct
    assert not grade_integer(in_box(answer), "7").correct
    grade_integer(answer, "7", last_number=True)


def test_a_very_long_text_is_read_in_no_time():
    begin = time.perf_counter()
    for text in ("\\" * 200_000, r"\boxed{" * 50_000, "{" * 200_000, "}" * 200_000, "1," * 100_000):
        assert not grade_math(text, "5").correct
        assert not grade_integer(text, "5", last_number=True).correct
    assert not grade_integer(in_box("5" + " m" * 900 + "!"), "5").correct
    assert time.perf_counter() - begin < 60  # quadratic time would be hours


def test_a_comparison_without_end_is_stopped_and_the_next_one_is_graded(judge):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    begin = time.perf_counter()
    grade = grade_math(in_box("9^{9^{9^{9}}}"), r"\frac12")
    assert grade == Grade(False, "9^{9^{9^{9}}}", "took too long")
    assert time.perf_counter() - begin < 60
    assert grade_math(in_box(r"\frac12"), "0.5").correct


def test_a_process_that_died_is_replaced(judge):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    judge._process.kill()
    judge._process.wait()
    assert grade_math(in_box(r"\frac12"), "0.5").correct


def test_an_interrupted_question_is_not_answered_to_the_next(judge, monkeypatch):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    process, stdout = judge._process, judge._process.stdout

    class Interrupted:
        close = stdout.close

        def readline(self):
            raise KeyboardInterrupt

    process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        grade_math(in_box(r"\frac12"), "0.5")
    assert process.poll() is not None
    assert not grade_math(in_box(r"\frac13"), "0.5").correct


def test_many_threads_may_grade_at_once():
    found: dict[int, list[bool]] = {}

    def work(n: int) -> None:
        pairs = [(n, n), (n, n + 1)] * 5
        found[n] = [grade_math(in_box(rf"\frac{{{a}}}{{7}}"), f"{b}/7").correct for a, b in pairs]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [True, False] * 5 for n in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_its_parents_process_alone(judge):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    before = judge._process.pid
    judge._owner = -1  # what a fork's child sees
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    assert judge._process.pid != before
    os.kill(before, 0)  # still there
    os.kill(before, 9)
    os.waitpid(before, 0)


def test_a_missing_math_verify_is_told_in_one_line(judge, monkeypatch, tmp_path):
    monkeypatch.setattr(grading, "WORKER", tmp_path / "absent.py")
    with pytest.raises(UserError, match="pip install 'math-verify"):
        grade_math(in_box(r"\frac12"), "0.5")


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        (r"\boxed{25}", "025", True),
        (r"\boxed{025}", "25", True),
        (r"\boxed{25}", "25", True),
        (r"\boxed{25.0}", "25", True),
        (r"\boxed{25.}", "25", True),
        (r"\boxed{1,450,000}", "1450000", True),
        (r"\boxed{1450000}", "1,450,000", True),
        (r"\boxed{1{,}450{,}000}", "1,450,000", True),
        (r"\boxed{1\,450\,000}", "1,450,000", True),
        (r"\boxed{\$25}", "25", True),
        (r"\boxed{$25.00}", "25", True),
        (r"\boxed{-10}", "-10", True),
        ("\\boxed{\N{MINUS SIGN}10}", "-10", True),
        (r"\boxed{25\text{ dollars}}", "25", True),
        (r"\boxed{25 dollars}", "25", True),
        (r"\boxed{25\%}", "25", True),
        (r"\boxed{25^\circ}", "25", True),
        (r"\boxed{25 \text{ cm}^2}", "25", True),
        (r"\boxed{m+n = 25}", "25", True),
        (r"\boxed{\textbf{(025)}}", "25", True),
        (r"\boxed{\mathbf{25}}", "25", True),
        (r"\boxed{26}", "25", False),
        (r"\boxed{2.5}", "25", False),
        (r"\boxed{250}", "25", False),
        (r"\boxed{-25}", "25", False),
        (r"\boxed{25.5}", "25", False),
        (r"\boxed{25.0001}", "25", False),
        (r"\boxed{25x}", "25", False),
        (r"\boxed{25\pi}", "25", False),
        (r"\boxed{25, 26}", "25", False),
        (r"\boxed{25 or 26}", "25", False),
        (r"\boxed{25\text{ or }26}", "25", False),
        (r"\boxed{\frac{50}{2}}", "25", False),  # AIME asks for the integer itself
        (r"\boxed{24} \boxed{25}", "25", True),
        (r"\boxed{25} \boxed{24}", "25", False),
        (r"\boxed{}", "25", False),
        ("25", "25", False),
        ("", "25", False),
    ],
)
def test_integers(text, gold, correct):
    grade = grade_integer(text, gold)
    assert grade.correct is correct
    assert not (grade.correct and grade.note)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 25.", "25"),
        ("He pays $25, not $26... no: $25", "$25"),
        ("**25**", "25"),
        ("10 + 15 = 25 apples", "25"),
        ("- 25", "25"),  # a list, not a sign
        ("40-25", "25"),
        ("x=-25", "-25"),
        ("it costs $1,450,000.00!", "$1,450,000.00"),
        ("25 or 26", "26"),
        (r"26 \boxed{25} 27", "25"),  # a box comes first
        (r"25 \boxed{}", ""),
        ("none", None),
    ],
)
def test_the_last_number_stands_in_for_a_box_where_asked(text, answer):
    grade = grade_integer(text, "25", last_number=True)
    assert grade.answer == answer
    assert grade.correct is (answer in ("25", "$25"))


def test_a_gold_answer_that_is_no_integer_is_a_mistake_of_the_caller():
    for gold in ("", "2.5", "five", r"\frac12"):
        with pytest.raises(ValueError, match="integer"):
            grade_integer(r"\boxed{5}", gold)


def lines(name: str) -> list[dict]:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@needs_data
def test_every_gold_answer_of_math_500_is_right_without_exception():
    for problem in lines("math500_test.jsonl"):
        gold = problem["answer"]
        assert grade_math(in_box(gold), gold).correct, gold
        assert grade_math(problem["solution"], gold).correct, gold  # as its author boxed it
        # And to math-verify alone, though equal spellings never get that far.
        tidy = grading._tidy(gold)
        assert grading._judge.ask(tidy, tidy) == "yes", gold


@needs_data
def test_every_gold_answer_of_aime_and_gsm8k_is_right_without_exception():
    for name in ("aime24.jsonl", "aime25.jsonl"):
        for problem in lines(name):
            gold = problem["answer"]
            for answer in (gold, gold.lstrip("0"), gold.zfill(3), f"{gold}.0"):
                assert grade_integer(in_box(answer), gold).correct, gold
            assert not grade_integer(in_box(f"1{gold}"), gold).correct, gold
    for name in ("gsm8k_test_first1000.jsonl", "gsm8k_train.jsonl.gz"):
        for problem in lines(name):
            gold = problem["answer"].split("#### ")[1]
            assert grade_integer(in_box(gold), gold).correct, gold
            assert grade_integer(problem["answer"], gold, last_number=True).correct, gold
            assert not grade_integer(in_box(gold + "1"), gold).correct, gold
