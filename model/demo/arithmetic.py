"""The demo's sums: which there are, and how they are worked out on paper, digit by digit.

A model this small can memorise sums it has seen and nothing else, unless its answer shows the steps: each of them needs one
line of a table of single digits, and what was written before. Digits within the steps are Chinese numerals, so that the
result is the only number of the answer that the question does not give.
"""

import itertools
from operator import add, mul, sub

from model.errors import UserError

CALCULATIONS = {"addition": add, "subtraction": sub, "multiplication": mul}
NUMERALS = "零一二三四五六七八九"


def all_problems(tables):
    """Yield {a, b, c, word, sign, steps, task} for every pair of operands in the ranges of arithmetic.json whose result is
    not negative; steps is "" where both have one digit. UserError for numbers that steps cannot work out."""
    for task in filter(CALCULATIONS.get, tables):
        words = tables[task]
        for side, most in (("left", 99), ("right", 9 if task == "multiplication" else 99)):
            if not 0 <= words[side][0] <= words[side][1] <= most:
                raise UserError(f"arithmetic.json: {task}: {side} is {words[side]}, which must be within 0 and {most}")
        for a, b in itertools.product(*(range(low, high + 1) for low, high in (words["left"], words["right"]))):
            if (c := CALCULATIONS[task](a, b)) >= 0:
                problem = {"a": a, "b": b, "c": c, "word": words["word"], "sign": words["sign"], "task": task}
                yield {**problem, "steps": steps(task, a, b) if max(a, b) > 9 else ""}


def steps(task, a, b):
    """How a child works it out, units first: 47 + 38 is 七加八写五进一；四加三加一写八；

    Numbers have two digits at most, the right one of a product one. "写" is the digit of the result, "进" what is carried,
    "借" that ten were borrowed; a product is worked out in full: 47 x 6 is 七乘六得四二；四乘六得二四，加四得二八；
    """
    if task == "multiplication":
        return multiplication_steps(a, b)
    written, carried = "", 0
    for left, right in ((a % 10, b % 10), (a // 10, b // 10)):
        more = f"{'加' if task == 'addition' else '减'}一" if carried else ""
        if task == "addition":
            carried, digit = divmod(left + right + carried, 10)
            after = f"{NUMERALS[left]}加{NUMERALS[right]}{more}写{NUMERALS[digit]}{'进一' if carried else ''}"
        else:
            borrowed, digit = divmod(left - right - carried, 10)
            carried = -borrowed
            after = f"{NUMERALS[left]}减{NUMERALS[right]}{more}写{NUMERALS[digit]}{'借一' if carried else ''}"
        written += after + "；"
    return written


def multiplication_steps(a, b):
    units, tens = a % 10 * b, a // 10 * b
    carried = units // 10
    more = f"，加{NUMERALS[carried]}得{spelt(tens + carried)}" if carried else ""
    first, second = NUMERALS[a % 10], NUMERALS[a // 10]
    return f"{first}乘{NUMERALS[b]}得{spelt(units)}；{second}乘{NUMERALS[b]}得{spelt(tens)}{more}；"


def spelt(number):
    """A number digit by digit: 42 is 四二."""
    return "".join(NUMERALS[int(digit)] for digit in str(number))


def needs_steps(problem):
    """Whether the result cannot be in any table of single digits: of such problems some are held out."""
    least = 2 if problem["task"] == "multiplication" else 10
    return problem["a"] > 9 and problem["b"] >= least


def operands(problem):
    """The two numbers, whatever their order."""
    return frozenset((problem["a"], problem["b"]))
