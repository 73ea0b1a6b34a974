# A grammar reads best with each rule on its line.
# ruff: noqa: E501
# fmt: off
"""The text that the demo model learns from: small grammars in five domains, written for this project.

``documents(seed, n)`` yields ``Document`` objects in a fixed order for a fixed seed. Nothing is read from
disk or network. Facts about geography and science are true ones; stories and people are made up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DOMAINS = ("code", "math", "creative", "factual", "mixed")

Pair = tuple[str, str]
"""(what a user would ask, what is answered)"""


@dataclass(frozen=True)
class Document:
    """One text of the corpus: its domain and what the model sees, as (role, text) turns.

    A document with the single role ``""`` is plain text; any other is a conversation.
    """

    domain: str
    turns: tuple[tuple[str, str], ...]


# --------------------------------------------------------------------------------------------------------
# code

LIST_NAMES = ("values", "numbers", "items", "scores", "rows", "prices", "words", "names", "lines", "points")
ITEM_NAMES = {"values": "value", "numbers": "number", "items": "item", "scores": "score", "rows": "row",
              "prices": "price", "words": "word", "names": "name", "lines": "line", "points": "point"}
KEYS = ("name", "size", "count", "price", "color", "weight", "title", "level", "age", "city")
WORDS = ("apple", "stone", "river", "paper", "table", "green", "cloud", "light", "bread", "horse", "level", "radar")


def code_fold(r: random.Random) -> Pair:
    xs = r.choice(LIST_NAMES)
    x = ITEM_NAMES[xs]
    name, ask, start, step = r.choice([
        ("total", "adds up", "0", f"total += {x}"),
        ("product", "multiplies", "1", f"product *= {x}"),
        ("count", "counts", "0", "count += 1"),
        ("largest", "finds the largest of", f"{xs}[0]", f"if {x} > largest:\n            largest = {x}"),
        ("smallest", "finds the smallest of", f"{xs}[0]", f"if {x} < smallest:\n            smallest = {x}"),
        ("longest", "finds the longest of", f"{xs}[0]", f"if len({x}) > len(longest):\n            longest = {x}"),
    ])
    doc = r.choice(["", f'    """Return the {name} of all {xs}."""\n'])
    guard = r.choice(["", f"    if not {xs}:\n        return None\n"])
    return (f"Write a Python function that {ask} a list of {xs}.",
            f"def {name}_of({xs}):\n{doc}{guard}    {name} = {start}\n    for {x} in {xs}:\n        {step}\n"
            f"    return {name}")


def code_comprehension(r: random.Random) -> Pair:
    xs = r.choice(LIST_NAMES)
    x = ITEM_NAMES[xs]
    n = r.randint(2, 20)
    expr, cond, ask = r.choice([
        (x, f"{x} > {n}", f"keep only the {xs} above {n}"),
        (x, f"{x} % {n} == 0", f"keep the {xs} that {n} divides"),
        (f"{x} * {n}", "", f"multiply all {xs} by {n}"),
        (f"{x} ** 2", "", f"square all {xs}"),
        (f"len({x})", "", f"get the length of all {xs}"),
        (f"{x}.upper()", "", f"make all {xs} upper case"),
        (f"{x}.strip()", f"{x}", f"strip all {xs} and drop the empty ones"),
        (f"str({x})", f"{x} is not None", f"turn the {xs} that exist into strings"),
    ])
    tail = f" if {cond}" if cond else ""
    body = f"[{expr} for {x} in {xs}{tail}]"
    return (f"How do I {ask} in Python?",
            r.choice([f"result = {body}\nprint(result)", f"def select({xs}):\n    return {body}",
                      f"{xs} = load_{xs}()\nchosen = {body}\nprint(len(chosen))"]))


def code_class(r: random.Random) -> Pair:
    name, field, start, verb, change = r.choice([
        ("Counter", "count", "0", "increase", "self.count += step"),
        ("Account", "balance", "0", "deposit", "self.balance += step"),
        ("Stack", "items", "[]", "push", "self.items.append(step)"),
        ("Queue", "items", "[]", "put", "self.items.append(step)"),
        ("Timer", "seconds", "0", "advance", "self.seconds += step"),
        ("Robot", "position", "0", "move", "self.position += step"),
        ("Buffer", "data", "[]", "write", "self.data.append(step)"),
        ("Lamp", "level", "0", "dim", "self.level -= step"),
    ])
    extra = r.choice([
        f"\n\n    def reset(self):\n        self.{field} = {start}",
        f"\n\n    def __repr__(self):\n        return f\"{name}({{self.{field}}})\"",
        f"\n\n    def get(self):\n        return self.{field}",
        "",
    ])
    return (f"Write a class {name} with a method to {verb}.",
            f"class {name}:\n    def __init__(self):\n        self.{field} = {start}\n\n"
            f"    def {verb}(self, step):\n        {change}\n        return self{extra}")


def code_string(r: random.Random) -> Pair:
    f, ask, body, w, out = r.choice([
        ("reverse", "reverses a string", "text[::-1]", r.choice(WORDS), lambda w: repr(w[::-1])),
        ("is_palindrome", "tells whether a string reads the same backwards", "text == text[::-1]",
         r.choice(WORDS), lambda w: str(w == w[::-1])),
        ("count_letters", "counts the letters of a string", "len(text)", r.choice(WORDS), lambda w: str(len(w))),
        ("first_letter", "returns the first letter of a string", "text[0]", r.choice(WORDS), lambda w: repr(w[0])),
        ("count_vowels", "counts the vowels of a string", 'sum(c in "aeiou" for c in text)', r.choice(WORDS),
         lambda w: str(sum(c in "aeiou" for c in w))),
        ("shout", "makes a string upper case", "text.upper()", r.choice(WORDS), lambda w: repr(w.upper())),
    ])
    test = r.choice(["", f"\n\n\nassert {f}(\"{w}\") == {out(w)}".replace("'", '"'),
                     f"\n\n\nprint({f}(\"{w}\"))  # {out(w)}".replace("'", '"')])
    return f"Write a function {f} that {ask}.", f"def {f}(text):\n    return {body}{test}"


def code_recursion(r: random.Random) -> Pair:
    return r.choice([
        ("Write a recursive function for the factorial.",
         "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial(n - 1)"),
        ("Write a function for the Fibonacci numbers.",
         "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"),
        ("Write a function for the greatest common divisor.",
         "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a"),
        ("Write a function that tells whether a number is prime.",
         "def is_prime(n):\n    if n < 2:\n        return False\n    for d in range(2, int(n ** 0.5) + 1):\n"
         "        if n % d == 0:\n            return False\n    return True"),
        ("Write a binary search in Python.",
         "def search(values, target):\n    low, high = 0, len(values) - 1\n    while low <= high:\n"
         "        middle = (low + high) // 2\n        if values[middle] == target:\n            return middle\n"
         "        if values[middle] < target:\n            low = middle + 1\n        else:\n"
         "            high = middle - 1\n    return -1"),
        ("Write a function that flattens a nested list.",
         "def flatten(items):\n    result = []\n    for item in items:\n        if isinstance(item, list):\n"
         "            result.extend(flatten(item))\n        else:\n            result.append(item)\n    return result"),
    ])


def code_dict(r: random.Random) -> Pair:
    xs = r.choice(LIST_NAMES)
    x = ITEM_NAMES[xs]
    a, b = r.sample(KEYS, 2)
    return r.choice([
        (f"How do I count how often each of the {xs} occurs?",
         f"counts = {{}}\nfor {x} in {xs}:\n    counts[{x}] = counts.get({x}, 0) + 1\nprint(counts)"),
        (f"How do I sort the {xs} by {a}?",
         f"{xs} = sorted({xs}, key=lambda {x}: {x}[\"{a}\"]{r.choice(['', ', reverse=True'])})\n"
         f"for {x} in {xs}:\n    print({x}[\"{a}\"], {x}[\"{b}\"])"),
        (f"How do I group the {xs} by {a}?",
         f"groups = {{}}\nfor {x} in {xs}:\n    groups.setdefault({x}[\"{a}\"], []).append({x})\nreturn groups"),
        (f"How do I look up the {a} of a {x}?",
         f"{a} = {x}.get(\"{a}\")\nif {a} is None:\n    raise KeyError(\"no {a} in {x}\")\nreturn {a}"),
        ("How do I swap the keys and values of a dictionary?",
         f"inverse = {{value: key for key, value in {a}s.items()}}"),
    ])


def code_file(r: random.Random) -> Pair:
    name = f"{r.choice(KEYS)}s.{r.choice(['txt', 'csv', 'json', 'log'])}"
    return r.choice([
        (f"How do I read the lines of {name}?",
         f"with open(\"{name}\") as file:\n    for line in file:\n        line = line.strip()\n        if line:\n"
         f"            print(line)"),
        (f"How do I load {name}?",
         f"import json\n\nwith open(\"{name}\") as file:\n    data = json.load(file)\nprint(data[\"{r.choice(KEYS)}\"])"),
        (f"How do I write to {name}?",
         f"with open(\"{name}\", \"w\") as file:\n    for {r.choice('ijk')} in range({r.randint(2, 50)}):\n"
         f"        file.write(f\"{{i}}\\n\")"),
        (f"How do I open {name} safely?",
         f"try:\n    file = open(\"{name}\")\nexcept OSError as error:\n    print(f\"cannot open {name}: {{error}}\")\n"
         f"    sys.exit(1)"),
    ])


def code_loop(r: random.Random) -> Pair:
    i = r.choice(["i", "j", "k", "n", "step"])
    lo, hi = sorted(r.sample(range(0, 40), 2))
    m = r.randint(2, 9)
    return r.choice([
        (f"Print the numbers from {lo} to {hi}.", f"for {i} in range({lo}, {hi + 1}):\n    print({i})"),
        (f"Print the multiples of {m} below {hi}.",
         f"for {i} in range(0, {hi}, {m}):\n    print({i})"),
        (f"Add the numbers from {lo} to {hi} in a loop.",
         f"total = 0\nfor {i} in range({lo}, {hi + 1}):\n    total += {i}\nprint(total)"),
        (f"Count down from {hi}.", f"{i} = {hi}\nwhile {i} > 0:\n    print({i})\n    {i} -= 1\nprint(\"done\")"),
        ("Print a grid.",
         f"for row in range({m}):\n    for column in range({m + 1}):\n        print(row * column, end=\" \")\n    print()"),
    ])


def code_sql(r: random.Random) -> Pair:
    table = r.choice(["users", "orders", "books", "cities", "songs", "trees"])
    a, b = r.sample(KEYS, 2)
    n = r.randint(1, 90)
    return r.choice([
        (f"Write a query for the {a} of all {table} with a {b} above {n}.",
         f"SELECT {a}\nFROM {table}\nWHERE {b} > {n}\nORDER BY {a};"),
        (f"Write a query that counts {table} by {a}.",
         f"SELECT {a}, COUNT(*)\nFROM {table}\nGROUP BY {a}\nLIMIT {n};"),
        (f"Write a query that deletes {table} without a {a}.", f"DELETE FROM {table}\nWHERE {a} IS NULL;"),
    ])


def code_json(r: random.Random) -> Pair:
    a, b, c = r.sample(KEYS, 3)
    return (f"Show an object with {a}, {b} and {c} as JSON.",
            f"{{\"{a}\": {r.randint(1, 99)}, \"{b}\": \"{r.choice(WORDS)}\", "
            f"\"{c}\": [{r.randint(1, 9)}, {r.randint(1, 9)}]}}")


def code_error(r: random.Random) -> Pair:
    a = r.choice(KEYS)
    n = r.randint(1, 99)
    return (f"Check that the {a} is valid.",
            r.choice([
                f"def check_{a}({a}):\n    if not isinstance({a}, int):\n        raise TypeError(\"{a} must be an int\")\n"
                f"    if {a} > {n}:\n        raise ValueError(f\"{a} {{{a}}} is above {n}\")\n    return {a}",
                f"if {a} is None or {a} < {n}:\n    raise ValueError(\"{a} must be at least {n}\")",
            ]))


def code_test(r: random.Random) -> Pair:
    a, b = r.randint(1, 20), r.randint(1, 20)
    f, value = r.choice([("add", a + b), ("multiply", a * b), ("subtract", a - b), ("maximum", max(a, b))])
    return (f"Write a test for {f}.",
            f"def test_{f}():\n    assert {f}({a}, {b}) == {value}\n    assert {f}(0, 0) == 0")


# --------------------------------------------------------------------------------------------------------
# math


def math_sum(r: random.Random) -> Pair:
    a, b = r.randint(2, 99), r.randint(2, 99)
    op, value, verb = r.choice([("+", a + b, "sum"), ("-", a - b, "difference"), ("*", a * b, "product")])
    if op == "*":
        a, b = a % 13 + 2, b % 13 + 2
        value = a * b
    return (r.choice([f"What is {a} {op} {b}?", f"Compute {a} {op} {b}.", f"Find the {verb} of {a} and {b}."]),
            r.choice([f"{a} {op} {b} = {value}.", f"The {verb} of {a} and {b} is {value}.",
                      f"We have {a} {op} {b} = {value}, so the {verb} is {value}."]))


def math_chain(r: random.Random) -> Pair:
    a, b, c = r.randint(2, 12), r.randint(2, 12), r.randint(2, 12)
    return (f"Compute {a} * ({b} + {c}).",
            f"{a} * ({b} + {c}) = {a} * {b + c} = {a * (b + c)}. "
            f"Check: {a} * {b} + {a} * {c} = {a * b} + {a * c} = {a * b + a * c}.")


def math_linear(r: random.Random) -> Pair:
    x = r.choice("xyznt")
    a, v, b = r.randint(2, 9), r.randint(-9, 12), r.randint(1, 20)
    c = a * v + b
    return (f"Solve {a}{x} + {b} = {c} for {x}.",
            r.choice([
                f"Subtract {b} from both sides: {a}{x} = {c - b}. Divide both sides by {a}: {x} = {v}.",
                f"{a}{x} + {b} = {c}\n{a}{x} = {c - b}\n{x} = {v}",
                f"First, {a}{x} = {c} - {b} = {c - b}. Hence {x} = {c - b} / {a} = {v}.",
            ]))


def math_system(r: random.Random) -> Pair:
    x, y = r.randint(1, 12), r.randint(1, 12)
    return (f"Solve x + y = {x + y} and x - y = {x - y}.",
            f"Adding the equations gives 2x = {2 * x}, so x = {x}. Then y = {x + y} - {x} = {y}.")


def math_quadratic(r: random.Random) -> Pair:
    a, b = r.randint(1, 9), r.randint(1, 9)
    return r.choice([
        (f"Expand (x + {a})(x + {b}).", f"(x + {a})(x + {b}) = x^2 + {a + b}x + {a * b}."),
        (f"Factor x^2 + {a + b}x + {a * b}.",
         f"We need two numbers with sum {a + b} and product {a * b}: {a} and {b}. "
         f"Hence x^2 + {a + b}x + {a * b} = (x + {a})(x + {b})."),
        (f"Solve x^2 = {a * a}.", f"The square root of {a * a} is {a}, so x = {a} or x = -{a}."),
        (f"Find the roots of x^2 - {a + b}x + {a * b}.",
         f"x^2 - {a + b}x + {a * b} = (x - {a})(x - {b}), so the roots are x = {a} and x = {b}."),
    ])


def math_derivative(r: random.Random) -> Pair:
    a, n, b = r.randint(2, 9), r.randint(2, 7), r.randint(1, 9)
    power = f"x^{n - 1}" if n > 2 else "x"
    return r.choice([
        (f"Find the derivative of {a}x^{n}.", f"The derivative of {a}x^{n} is {a * n}{power}."),
        (f"Differentiate f(x) = {a}x^{n} + {b}x.", f"f'(x) = {a * n}{power} + {b}, by the power rule."),
        (f"Integrate {a * n}{power}.", f"The integral of {a * n}{power} is {a}x^{n} + C."),
        ("What is the derivative of sin(x)?", "The derivative of sin(x) is cos(x), and that of cos(x) is -sin(x)."),
    ])


def math_fraction(r: random.Random) -> Pair:
    p, q, k = r.randint(1, 7), r.randint(2, 9), r.randint(2, 9)
    g = math.gcd(p, q)
    p, q = p // g, q // g
    s = r.randint(1, 5)
    return r.choice([
        (f"Simplify {p * k}/{q * k}.",
         f"Both {p * k} and {q * k} are divisible by {k}, so {p * k}/{q * k} = {p}/{q}."),
        (f"Add {p}/{q} and {s}/{q}.", f"The denominators are equal: {p}/{q} + {s}/{q} = {p + s}/{q}."),
        (f"What is {k * 10} percent of {s * 10}?",
         f"{k * 10} percent of {s * 10} is {k * 10}/100 * {s * 10} = {k * s}."),
    ])


def math_shape(r: random.Random) -> Pair:
    a, b = r.randint(2, 20), r.randint(2, 20)
    m, n = r.choice([(3, 4), (6, 8), (5, 12), (9, 12), (8, 15)])
    return r.choice([
        (f"What is the area of a rectangle with sides {a} and {b}?",
         f"The area is the product of the sides: {a} * {b} = {a * b}. The perimeter is 2 * ({a} + {b}) = {2 * (a + b)}."),
        (f"A triangle has base {2 * a} and height {b}. Find its area.",
         f"The area is half of base times height: {2 * a} * {b} / 2 = {a * b}."),
        (f"A right triangle has legs {m} and {n}. How long is the hypotenuse?",
         f"By the theorem of Pythagoras c^2 = {m}^2 + {n}^2 = {m * m} + {n * n} = {m * m + n * n}, "
         f"so c = {math.isqrt(m * m + n * n)}."),
        (f"What is the volume of a cube with side {a}?", f"The volume is {a}^3 = {a} * {a} * {a} = {a ** 3}."),
        (f"Two angles of a triangle are {a + 30} and {b + 40} degrees. Find the third.",
         f"The angles add up to 180 degrees, so the third is 180 - {a + 30} - {b + 40} = {180 - a - 30 - b - 40} degrees."),
    ])


def math_sequence(r: random.Random) -> Pair:
    a, d = r.randint(1, 12), r.randint(2, 9)
    t = [a + d * i for i in range(6)]
    g = [a * 2**i for i in range(6)]
    return r.choice([
        (f"What comes next: {t[0]}, {t[1]}, {t[2]}, {t[3]}?",
         f"Each term is {d} more than the one before, so the next terms are {t[4]} and {t[5]}."),
        (f"What comes next: {g[0]}, {g[1]}, {g[2]}, {g[3]}?",
         f"Each term is twice the one before, so the next terms are {g[4]} and {g[5]}."),
        (f"Find the sum of the first {d} integers.",
         f"The sum of the first n integers is n(n + 1)/2. For n = {d} this is {d} * {d + 1} / 2 = {d * (d + 1) // 2}."),
    ])


def math_number(r: random.Random) -> Pair:
    n, m = r.randint(4, 60), r.randint(2, 9)
    a, b = r.randint(2, 9) * m, r.randint(2, 9) * m
    factors = [d for d in range(2, n) if n % d == 0]
    prime = (f"{n} is prime: no number between 1 and {n} divides it." if not factors
             else f"{n} is not prime: {n} = {factors[0]} * {n // factors[0]}.")
    return r.choice([
        (f"Is {n} prime?", prime),
        (f"What is {n} modulo {m}?", f"{n} = {n // m} * {m} + {n % m}, so {n} modulo {m} is {n % m}."),
        (f"Find the greatest common divisor of {a} and {b}.",
         f"The greatest common divisor of {a} and {b} is {math.gcd(a, b)}, "
         f"because {a} = {a // math.gcd(a, b)} * {math.gcd(a, b)} and {b} = {b // math.gcd(a, b)} * {math.gcd(a, b)}."),
        (f"What is {m} squared?", f"{m} squared is {m} * {m} = {m * m}, and {m} cubed is {m ** 3}."),
    ])


def math_proof(r: random.Random) -> Pair:
    return r.choice([
        ("Prove that the square of an even number is even.",
         "Let n be even. Then n = 2k for some integer k, so n^2 = 4k^2 = 2(2k^2), which is even."),
        ("Prove that the sum of two odd numbers is even.",
         "Let a = 2m + 1 and b = 2n + 1 be odd. Then a + b = 2m + 2n + 2 = 2(m + n + 1), which is even."),
        ("Prove that the product of two odd numbers is odd.",
         "Let a = 2m + 1 and b = 2n + 1. Then ab = 4mn + 2m + 2n + 1 = 2(2mn + m + n) + 1, which is odd."),
        ("Prove that the square root of 2 is irrational.",
         "Suppose that it equals p/q in lowest terms. Then p^2 = 2q^2, so p is even, p = 2k. Then q^2 = 2k^2, so q is "
         "even as well. This is a contradiction."),
        ("Prove that n(n + 1) is even.",
         "One of n and n + 1 is even, so their product is even."),
        ("Show that a multiple of 6 is a multiple of 3.", "If n = 6k for some integer k, then n = 3(2k), so 3 divides n."),
        (f"Show that the sum of {r.randint(2, 9)} even numbers is even.",
         "Each of them is 2k for some integer k, and 2 can be taken out of the sum. Hence the sum is even."),
    ])


def math_mean(r: random.Random) -> Pair:
    v = [r.randint(1, 12) for _ in range(4)]
    v[3] += -sum(v) % 4
    p = r.randint(2, 6)
    return r.choice([
        (f"Find the mean of {v[0]}, {v[1]}, {v[2]} and {v[3]}.",
         f"The sum is {sum(v)} and there are 4 numbers, so the mean is {sum(v)} / 4 = {sum(v) // 4}."),
        (f"Find the median of {', '.join(map(str, v[:3]))}.",
         f"In order the numbers are {', '.join(map(str, sorted(v[:3])))}. The median is {sorted(v[:3])[1]}."),
        (f"A die is rolled. What is the probability of at most {p}?",
         f"There are {p} good cases out of 6, so the probability is {p}/6."),
        (f"Solve the inequality {p}x < {p * v[0]}.", f"Divide both sides by {p}: x < {v[0]}."),
    ])


# --------------------------------------------------------------------------------------------------------
# creative

WHO = ("the fox", "the old sailor", "a young girl", "the lighthouse keeper", "the baker", "a tired wolf", "the queen",
       "a small dragon", "the gardener", "an old woman", "the clockmaker", "a lost boy", "the shepherd", "the owl",
       "a quiet stranger", "the painter", "the miller", "a white cat", "the fiddler", "her brother")
NAMES = ("Mira", "Tom", "Elsa", "Jonas", "Lena", "Oskar", "Nora", "Felix", "Ada", "Hugo", "Ruth", "Emil")
ADJ = ("silver", "golden", "broken", "silent", "bitter", "warm", "hollow", "pale", "wild", "gentle", "dark", "bright",
       "forgotten", "lonely", "frozen", "soft")
THINGS = ("lantern", "letter", "key", "mirror", "song", "rose", "boat", "door", "feather", "bell", "crown", "shell",
          "map", "candle", "coat", "ring")
PLACES = ("the forest", "the harbour", "the empty house", "the market", "the hill", "the old mill", "the garden",
          "the tower", "the shore", "the bridge", "the valley", "the attic")
TIMES = ("at dawn", "at midnight", "in the first snow", "one evening", "after the storm", "on a summer night",
         "before the rain", "long ago", "that winter", "when the moon rose")
MOVES = ("wandered through", "came back to", "ran towards", "slept near", "danced in", "waited at", "whispered about",
         "dreamed of", "climbed to", "vanished behind", "sang to", "stared at")
FEELS = ("afraid", "happy", "alone", "brave", "tired", "hopeful", "sad", "curious", "free", "calm")
SKY = ("the moon", "the wind", "the sea", "the night", "the rain", "the river", "a star", "the fog", "the snow",
       "the morning")
DOES = ("sang softly", "held its breath", "fell asleep", "turned to silver", "carried her home", "knew every name",
        "kept the secret", "smelled of smoke", "laughed at them", "grew cold", "drifted away", "hid the path")


def cap(s: str) -> str:
    return s[0].upper() + s[1:]


def story_sentence(r: random.Random, who: str, he: str) -> str:
    return r.choice([
        lambda: f"{cap(who)} {r.choice(MOVES)} {r.choice(PLACES)} {r.choice(TIMES)}.",
        lambda: f"{cap(r.choice(TIMES))}, {r.choice(SKY)} {r.choice(DOES)} and {he} felt {r.choice(FEELS)}.",
        lambda: f"There, under a {r.choice(ADJ)} sky, {he} found a {r.choice(ADJ)} {r.choice(THINGS)}.",
        lambda: f"\"{r.choice(['Who are you?', 'Do not be afraid.', 'Come with me.', 'I have been waiting.', 'It was never yours.'])}\""
                f" said {r.choice(WHO)}.",
        lambda: f"Nobody near {r.choice(PLACES)} remembered the {r.choice(ADJ)} {r.choice(THINGS)}.",
        lambda: f"{cap(he)} kept the {r.choice(THINGS)} close, like a {r.choice(ADJ)} {r.choice(THINGS)} of {he_s(he)} own.",
        lambda: f"{cap(r.choice(SKY))} {r.choice(DOES)}, and {r.choice(SKY)} {r.choice(DOES)}.",
        lambda: f"And so {who} never {r.choice(['came back', 'spoke again', 'looked behind', 'felt alone', 'told a soul'])}.",
    ])()


def he_s(he: str) -> str:
    return {"he": "his", "she": "her", "they": "their"}[he]


def creative_story(r: random.Random) -> Pair:
    name, he = r.choice(NAMES), r.choice(["he", "she", "they"])
    who = r.choice([name, r.choice(WHO)])
    start = r.choice([
        f"Once upon a time, {who} lived near {r.choice(PLACES)}.",
        f"{cap(r.choice(TIMES))}, {who} lost a {r.choice(ADJ)} {r.choice(THINGS)}.",
        f"{cap(who)} had never seen {r.choice(PLACES)} so {r.choice(ADJ)}.",
        f"The {r.choice(THINGS)} was {r.choice(ADJ)}, and {who} was {r.choice(FEELS)}.",
    ])
    body = " ".join(story_sentence(r, who, he) for _ in range(r.randint(2, 5)))
    return (r.choice([f"Tell me a story about {who}.", f"Write a short tale with a {r.choice(THINGS)} in it.",
                      f"Begin a story at {r.choice(PLACES)}."]), f"{start} {body}")


def creative_poem(r: random.Random) -> Pair:
    rhymes = r.choice([("night", "light"), ("sea", "free"), ("rain", "again"), ("snow", "glow"), ("sky", "fly"),
                       ("stone", "alone"), ("day", "away"), ("deep", "sleep")])
    sky = r.choice(SKY)
    lines = [
        r.choice([f"O {r.choice(ADJ)} {r.choice(THINGS)} of the {rhymes[0]},", f"I heard {sky} call across the {rhymes[0]},",
                  f"A {r.choice(ADJ)} {r.choice(THINGS)} in the {rhymes[0]},"]),
        r.choice([f"{cap(sky)} {r.choice(DOES)}, {rhymes[1]}.", f"and every {r.choice(THINGS)} whispers {rhymes[1]}.",
                  f"my {r.choice(ADJ)} heart is {rhymes[1]}."]),
        f"The {r.choice(ADJ)} {r.choice(THINGS)} sleeps beside the {r.choice(THINGS)},",
        f"and {r.choice(SKY)} {r.choice(DOES)}.",
    ]
    return (f"Write a poem about {sky}.", "\n".join(lines))


def creative_dialogue(r: random.Random) -> Pair:
    a, b = r.sample(NAMES, 2)
    t = r.choice(THINGS)
    return (f"Write a dialogue between {a} and {b}.",
            f"\"Where did you leave the {t}?\" asked {a}.\n\"In {r.choice(PLACES)}, {r.choice(TIMES)},\" said {b}.\n"
            f"\"{r.choice(['You promised', 'You always do that', 'Then it is gone', 'I knew it'])},\" {a} "
            f"{r.choice(['whispered', 'laughed', 'sighed', 'cried'])}.\n{b} felt {r.choice(FEELS)} and said nothing.")


def creative_letter(r: random.Random) -> Pair:
    a, b = r.sample(NAMES, 2)
    return (f"Write a letter from {a} to {b}.",
            f"Dear {b},\nI write to you from {r.choice(PLACES)}. {cap(r.choice(SKY))} {r.choice(DOES)} {r.choice(TIMES)}, "
            f"and I thought of the {r.choice(ADJ)} {r.choice(THINGS)} you gave me. I am {r.choice(FEELS)} but not "
            f"{r.choice(FEELS)}.\nYours, {a}")


def creative_image(r: random.Random) -> Pair:
    t = r.choice(THINGS)
    return (f"Describe a {t} so that one can see it.",
            f"The {t} was {r.choice(ADJ)} as {r.choice(SKY)} and {r.choice(ADJ)} as a {r.choice(THINGS)} in {r.choice(PLACES)}. "
            f"It looked like a {r.choice(ADJ)} {r.choice(THINGS)} that {r.choice(WHO)} had {r.choice(['dropped', 'painted', 'loved', 'buried'])}.")


def creative_dream(r: random.Random) -> Pair:
    return ("Tell me a dream.",
            f"Last night I dreamed that {r.choice(SKY)} {r.choice(DOES)}. I stood in {r.choice(PLACES)} with {r.choice(WHO)}, "
            f"and we {r.choice(MOVES)} {r.choice(PLACES)}. Then the {r.choice(THINGS)} broke, and I woke up {r.choice(FEELS)}.")


# --------------------------------------------------------------------------------------------------------
# factual: every row is true

COUNTRIES = (
    ("France", "Paris", "Europe", "French"), ("Germany", "Berlin", "Europe", "German"),
    ("Italy", "Rome", "Europe", "Italian"), ("Spain", "Madrid", "Europe", "Spanish"),
    ("Portugal", "Lisbon", "Europe", "Portuguese"), ("Austria", "Vienna", "Europe", "German"),
    ("Poland", "Warsaw", "Europe", "Polish"), ("Greece", "Athens", "Europe", "Greek"),
    ("Norway", "Oslo", "Europe", "Norwegian"), ("Sweden", "Stockholm", "Europe", "Swedish"),
    ("Denmark", "Copenhagen", "Europe", "Danish"), ("Finland", "Helsinki", "Europe", "Finnish"),
    ("Hungary", "Budapest", "Europe", "Hungarian"), ("Iceland", "Reykjavik", "Europe", "Icelandic"),
    ("Romania", "Bucharest", "Europe", "Romanian"), ("Bulgaria", "Sofia", "Europe", "Bulgarian"),
    ("Egypt", "Cairo", "Africa", "Arabic"), ("Kenya", "Nairobi", "Africa", "Swahili"),
    ("Ghana", "Accra", "Africa", "English"), ("Morocco", "Rabat", "Africa", "Arabic"),
    ("Tunisia", "Tunis", "Africa", "Arabic"), ("Senegal", "Dakar", "Africa", "French"),
    ("Angola", "Luanda", "Africa", "Portuguese"), ("Ethiopia", "Addis Ababa", "Africa", "Amharic"),
    ("Japan", "Tokyo", "Asia", "Japanese"), ("China", "Beijing", "Asia", "Chinese"),
    ("Thailand", "Bangkok", "Asia", "Thai"), ("Vietnam", "Hanoi", "Asia", "Vietnamese"),
    ("Nepal", "Kathmandu", "Asia", "Nepali"), ("Mongolia", "Ulaanbaatar", "Asia", "Mongolian"),
    ("Iran", "Tehran", "Asia", "Persian"), ("Iraq", "Baghdad", "Asia", "Arabic"),
    ("Peru", "Lima", "South America", "Spanish"), ("Chile", "Santiago", "South America", "Spanish"),
    ("Brazil", "Brasilia", "South America", "Portuguese"), ("Colombia", "Bogota", "South America", "Spanish"),
    ("Ecuador", "Quito", "South America", "Spanish"), ("Argentina", "Buenos Aires", "South America", "Spanish"),
    ("Canada", "Ottawa", "North America", "English and French"), ("Mexico", "Mexico City", "North America", "Spanish"),
    ("Cuba", "Havana", "North America", "Spanish"), ("Jamaica", "Kingston", "North America", "English"),
)
ELEMENTS = (
    ("hydrogen", "H", 1, "gas"), ("helium", "He", 2, "gas"), ("lithium", "Li", 3, "metal"), ("carbon", "C", 6, "nonmetal"),
    ("nitrogen", "N", 7, "gas"), ("oxygen", "O", 8, "gas"), ("neon", "Ne", 10, "gas"), ("sodium", "Na", 11, "metal"),
    ("magnesium", "Mg", 12, "metal"), ("aluminium", "Al", 13, "metal"), ("sulfur", "S", 16, "nonmetal"),
    ("chlorine", "Cl", 17, "gas"), ("argon", "Ar", 18, "gas"), ("potassium", "K", 19, "metal"),
    ("calcium", "Ca", 20, "metal"), ("iron", "Fe", 26, "metal"), ("copper", "Cu", 29, "metal"), ("zinc", "Zn", 30, "metal"),
    ("silver", "Ag", 47, "metal"), ("tin", "Sn", 50, "metal"), ("gold", "Au", 79, "metal"), ("lead", "Pb", 82, "metal"),
)
PLANETS = (
    ("Mercury", "first", "no", "rocky"), ("Venus", "second", "no", "rocky"), ("Earth", "third", "one", "rocky"),
    ("Mars", "fourth", "two", "rocky"), ("Jupiter", "fifth", "many", "gas"), ("Saturn", "sixth", "many", "gas"),
    ("Uranus", "seventh", "many", "ice"), ("Neptune", "eighth", "many", "ice"),
)
RIVERS = (
    ("Nile", "Africa", "the Mediterranean Sea"), ("Amazon", "South America", "the Atlantic Ocean"),
    ("Danube", "Europe", "the Black Sea"), ("Rhine", "Europe", "the North Sea"), ("Volga", "Europe", "the Caspian Sea"),
    ("Congo", "Africa", "the Atlantic Ocean"), ("Mekong", "Asia", "the South China Sea"),
    ("Mississippi", "North America", "the Gulf of Mexico"), ("Thames", "Europe", "the North Sea"),
    ("Elbe", "Europe", "the North Sea"), ("Niger", "Africa", "the Gulf of Guinea"),
)
ANIMALS = (
    ("whale", "mammal", "the sea", "krill or fish"), ("bat", "mammal", "caves", "insects or fruit"),
    ("eagle", "bird", "mountains", "small animals"), ("penguin", "bird", "cold coasts", "fish"),
    ("frog", "amphibian", "ponds", "insects"), ("salmon", "fish", "rivers and the sea", "small fish"),
    ("lizard", "reptile", "warm places", "insects"), ("camel", "mammal", "deserts", "dry plants"),
    ("owl", "bird", "forests", "mice"), ("shark", "fish", "the sea", "fish"), ("horse", "mammal", "grassland", "grass"),
    ("crocodile", "reptile", "rivers", "fish and larger animals"), ("bee", "insect", "hives", "nectar and pollen"),
    ("koala", "mammal", "forests of Australia", "eucalyptus leaves"),
)
PEOPLE = (
    ("Isaac Newton", "the law of gravitation", "physicist"), ("Marie Curie", "radioactivity", "physicist and chemist"),
    ("Charles Darwin", "evolution by natural selection", "naturalist"), ("Galileo Galilei", "the moons of Jupiter", "astronomer"),
    ("Albert Einstein", "the theory of relativity", "physicist"), ("Louis Pasteur", "germs and vaccines", "chemist"),
    ("Gregor Mendel", "the laws of heredity", "biologist"), ("Ada Lovelace", "programs for the analytical engine", "mathematician"),
    ("Alan Turing", "computing machines", "mathematician"), ("Johannes Kepler", "the orbits of planets", "astronomer"),
    ("Michael Faraday", "electromagnetic induction", "physicist"), ("Dmitri Mendeleev", "the periodic table", "chemist"),
)
PLAIN_FACTS = (
    ("Why is the sky blue?", "Air scatters blue light from the sun more strongly than red light, so the sky looks blue."),
    ("What is photosynthesis?", "In photosynthesis plants use light, water and carbon dioxide to make sugar and oxygen."),
    ("What causes the tides?", "The tides are caused by the gravity of the moon and, more weakly, of the sun."),
    ("What is DNA?", "DNA is a long molecule that carries the genetic information of living things."),
    ("How does sound travel?", "Sound travels as waves of pressure through air, water or solids. It cannot travel through empty space."),
    ("What is an earthquake?", "An earthquake is a sudden movement of the crust of the Earth, often where two plates meet."),
    ("What does the heart do?", "The heart pumps blood through the body. The blood carries oxygen to the organs."),
    ("Why are there seasons?", "The axis of the Earth is tilted, so each half of the planet gets more sunlight in its summer."),
    ("What is the boiling point of water?", "At sea level water boils at 100 degrees Celsius and freezes at 0 degrees Celsius."),
    ("How fast is light?", "In empty space light travels about 300000 kilometres per second."),
    ("What is an atom?", "An atom has a nucleus of protons and neutrons, with electrons around it."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest and deepest ocean of the Earth."),
    ("What is the highest mountain?", "Mount Everest in the Himalayas is the highest mountain above sea level."),
    ("What is a volcano?", "A volcano is an opening in the crust through which melted rock, ash and gas reach the surface."),
    ("How do vaccines work?", "A vaccine trains the immune system to recognise a disease before an infection."),
    ("What is steel?", "Steel is an alloy of iron and a small amount of carbon. It is stronger than pure iron."),
    ("What is the water cycle?", "Water evaporates from the sea, forms clouds, falls as rain or snow, and flows back in rivers."),
    ("What are the organs of a plant?", "The main organs of a plant are the roots, the stem and the leaves. Roots take up water."),
    ("What was the printing press?", "The printing press with movable type was introduced in Europe by Johannes Gutenberg in the 15th century."),
    ("What is a solar eclipse?", "In a solar eclipse the moon passes between the Earth and the sun and hides the sun."),
    ("What is a magnet?", "A magnet attracts iron. It has a north pole and a south pole; equal poles repel each other."),
    ("Which gas do we breathe?", "Air is about 78 percent nitrogen and 21 percent oxygen. The body needs the oxygen."),
)


def factual_country(r: random.Random) -> Pair:
    c, city, where, lang = r.choice(COUNTRIES)
    d, city2, where2, _ = r.choice(COUNTRIES)
    also = f"{c} and {d} are both in {where}." if where == where2 and c != d else f"{city2} is the capital of {d}."
    return (r.choice([f"What is the capital of {c}?", f"Tell me about {c}.", f"Where is {c}?"]),
            r.choice([
                f"The capital of {c} is {city}. {c} is a country in {where}.",
                f"{c} is a country in {where}. Its capital is {city}, and {lang} is spoken there.",
                f"{city} is the capital of {c}, a country in {where}. {also}",
                f"In {c}, {lang} is spoken. The capital is {city}. {also}",
            ]))


def factual_element(r: random.Random) -> Pair:
    e, s, n, kind = r.choice(ELEMENTS)
    state = "a gas" if kind == "gas" else f"a {kind}"
    return (r.choice([f"What is {e}?", f"What is the symbol of {e}?", f"What is the atomic number of {e}?"]),
            r.choice([
                f"{cap(e)} is a chemical element with the symbol {s} and atomic number {n}. It is {state}.",
                f"The symbol of {e} is {s}. Its atomic number is {n}: each atom has {n} protons." if n > 1 else
                f"The symbol of {e} is {s}. Its atomic number is 1: each atom has one proton.",
                f"{cap(e)} is {state}. In the periodic table it has the number {n} and the symbol {s}.",
            ]))


def factual_planet(r: random.Random) -> Pair:
    p, nth, moons, kind = r.choice(PLANETS)
    kind = {"rocky": "a rocky planet", "gas": "a gas giant", "ice": "an ice giant"}[kind]
    plural = "moon" if moons == "one" else "moons"
    return (r.choice([f"Tell me about the planet {p}.", f"Where in the solar system is {p}?", f"Does {p} have moons?"]),
            r.choice([
                f"{p} is the {nth} planet from the sun. It is {kind} and has {moons} {plural}.",
                f"{p} is {kind}. It is the {nth} planet of the solar system and has {moons} {plural}.",
            ]))


def factual_river(r: random.Random) -> Pair:
    v, where, sea = r.choice(RIVERS)
    return (r.choice([f"Where does the {v} flow?", f"What is the {v}?"]),
            r.choice([f"The {v} is a river in {where}. It flows into {sea}.",
                      f"The river {v} runs through {where} and ends in {sea}."]))


def factual_animal(r: random.Random) -> Pair:
    a, kind, where, eats = r.choice(ANIMALS)
    an = "an" if a[0] in "aeiou" else "a"
    ak = "an" if kind[0] in "aeiou" else "a"
    how = {"mammal": "It feeds its young with milk.", "bird": "It has feathers and lays eggs.",
           "fish": "It breathes with gills.", "reptile": "It has dry skin with scales.",
           "amphibian": "It lives both in water and on land.", "insect": "It has six legs."}[kind]
    return (r.choice([f"What is {an} {a}?", f"What does {an} {a} eat?", f"Where does the {a} live?"]),
            r.choice([f"The {a} is {ak} {kind}. {how} It lives in {where} and eats {eats}.",
                      f"{cap(an)} {a} is {ak} {kind} that eats {eats}. It is found in {where}. {how}"]))


def factual_person(r: random.Random) -> Pair:
    p, what, job = r.choice(PEOPLE)
    aj = "an" if job[0] in "aeiou" else "a"
    return (r.choice([f"Who was {p}?", f"What is {p} known for?"]),
            r.choice([f"{p} was {aj} {job} known for work on {what}.",
                      f"{p}, {aj} {job}, is remembered for {what}."]))


def factual_plain(r: random.Random) -> Pair:
    return r.choice(PLAIN_FACTS)


# --------------------------------------------------------------------------------------------------------
# mixed: two kinds of text in one


def mixed_word_problem(r: random.Random) -> Pair:
    a, b = r.sample(NAMES, 2)
    t = r.choice(THINGS) + "s"
    n, m = r.randint(2, 30), r.randint(2, 12)
    place = r.choice(PLACES)
    return r.choice([
        (f"{a} carried {n} {t} to {place}. {b} brought {m} more. How many {t} are there?",
         f"There are {n} + {m} = {n + m} {t}. {b} smiled, and {r.choice(SKY)} {r.choice(DOES)}."),
        (f"{cap(r.choice(TIMES))}, {a} had {n + m} {t} and gave {m} to {r.choice(WHO)}. How many are left?",
         f"{a} has {n + m} - {m} = {n} {t} left."),
        (f"{a} sells {n} {t} for {m} coins each at {place}. How many coins does that make?",
         f"Each {t[:-1]} brings {m} coins, so {n} of them bring {n} * {m} = {n * m} coins."),
    ])


def mixed_code_fact(r: random.Random) -> Pair:
    rows = r.sample(COUNTRIES, 2)
    e = r.sample(ELEMENTS, 2)
    return r.choice([
        ("Store two capitals in a dictionary and explain.",
         f"capitals = {{\"{rows[0][0]}\": \"{rows[0][1]}\", \"{rows[1][0]}\": \"{rows[1][1]}\"}}\n"
         f"print(capitals[\"{rows[0][0]}\"])\n\nThis prints {rows[0][1]}, the capital of {rows[0][0]}."),
        ("Store two elements in Python and explain.",
         f"numbers = {{\"{e[0][1]}\": {e[0][2]}, \"{e[1][1]}\": {e[1][2]}}}\n# {e[0][0]} has {e[0][2]} protons\n"
         f"print(numbers[\"{e[1][1]}\"])  # {e[1][0]}"),
    ])


def mixed_code_math(r: random.Random) -> Pair:
    a, b = r.randint(2, 20), r.randint(2, 20)
    return r.choice([
        (f"Use Python to find the area of a rectangle with sides {a} and {b}.",
         f"width = {a}\nheight = {b}\narea = width * height\nprint(area)\n\nThe area is {a} * {b} = {a * b}."),
        (f"Solve x + {a} = {a + b} and check it in Python.",
         f"Subtract {a} from both sides: x = {b}. In Python:\nassert {b} + {a} == {a + b}"),
        (f"Explain what sum(range({a})) gives.",
         f"The call sum(range({a})) adds the integers from 0 to {a - 1}. By the formula n(n - 1)/2 this is "
         f"{a * (a - 1) // 2}."),
    ])


def mixed_code_prose(r: random.Random) -> Pair:
    ask, code = r.choice([code_string, code_recursion, code_loop])(r)
    return (f"{ask} Then tell a short story about it.",
            f"{code}\n\n{cap(r.choice(WHO))} read the program {r.choice(TIMES)} and felt {r.choice(FEELS)}.")


def mixed_fact_story(r: random.Random) -> Pair:
    name = r.choice(NAMES)
    c, city, _, lang = r.choice(COUNTRIES)
    v, _, sea = r.choice(RIVERS)
    a, kind, place, _ = r.choice(ANIMALS)
    return r.choice([
        (f"Write a story set in {city}.",
         f"{name} came to {city}, the capital of {c}, {r.choice(TIMES)}. {cap(r.choice(SKY))} {r.choice(DOES)}, and in "
         f"the streets one heard {lang}. {name} felt {r.choice(FEELS)}."),
        (f"Write a story about the {v}.",
         f"{cap(r.choice(WHO))} followed the {v} down to {sea}. {story_sentence(r, name, 'she')}"),
        (f"Tell a tale that teaches what a {a} is.",
         f"\"I am a {kind},\" said the {a}, \"and I live in {place}.\" {story_sentence(r, name, 'he')}"),
    ])


def mixed_fact_math(r: random.Random) -> Pair:
    (e, s, n, _), (f, t, m, _) = r.sample(ELEMENTS, 2)
    return r.choice([
        (f"How many more protons has {e} than {f}?" if n > m else f"How many more protons has {f} than {e}?",
         f"The atomic number of {e} is {n} and that of {f} is {m}. The difference is {max(n, m)} - {min(n, m)} = {abs(n - m)}."),
        (f"How many protons do {e} and {f} have together?",
         f"{cap(e)} ({s}) has {n} and {f} ({t}) has {m}, so together {n} + {m} = {n + m}."),
    ])


def mixed_any(r: random.Random) -> Pair:
    first, second = r.sample(["code", "math", "creative", "factual"], 2)
    a = r.choice(GENERATORS[first])(r)
    b = r.choice(GENERATORS[second])(r)
    link = r.choice(["\n\n", "\n\nNow something else. ", "\n\nThen: ", "\n"])
    return f"{a[0]} {b[0]}", a[1] + link + b[1]


Generator = Callable[[random.Random], Pair]

GENERATORS: dict[str, tuple[Generator, ...]] = {
    "code": (code_fold, code_fold, code_comprehension, code_comprehension, code_class, code_class, code_string,
             code_recursion, code_dict, code_dict, code_file, code_loop, code_sql, code_json, code_error, code_test),
    "math": (math_sum, math_sum, math_chain, math_linear, math_linear, math_system, math_quadratic, math_derivative,
             math_fraction, math_shape, math_shape, math_sequence, math_number, math_number, math_proof, math_mean),
    "creative": (creative_story, creative_story, creative_story, creative_poem, creative_dialogue, creative_letter,
                 creative_image, creative_dream),
    "factual": (factual_country, factual_country, factual_element, factual_planet, factual_river, factual_animal,
                factual_person, factual_plain, factual_plain),
    "mixed": (mixed_word_problem, mixed_word_problem, mixed_code_fact, mixed_code_math, mixed_code_prose,
              mixed_fact_story, mixed_fact_math, mixed_any, mixed_any),
}

# --------------------------------------------------------------------------------------------------------
# requests: what a user writes before the answer, in many words of the domain

TOPICS = {
    "code": (
        "a list of words", "a dictionary of counts", "an empty string", "a sorted list", "a nested list", "a tuple", "a for loop",
        "a while loop", "a class with one method", "a recursive function", "a binary search", "a text file", "a JSON object",
        "a query that groups rows", "a table of orders", "a lambda", "a default argument", "an index error", "a key that is missing",
        "a stack", "a queue", "a generator", "a test with assert", "a docstring", "the return value", "a library call",
        "the sum of a list", "the first letter of each word", "an exception", "the command line", "a comprehension", "a variable name",
        "lines that are empty", "a config file", "negative numbers as input", "a hash of the keys", "the type of an item",
    ),
    "math": (
        "a linear equation", "two unknowns", "the derivative of a function", "an integral", "a right triangle", "the hypotenuse",
        "the area of a circle", "a rectangle and its perimeter", "the ratio of two sides", "the mean of five numbers", "a prime",
        "the greatest common divisor", "a sequence and its next terms", "an even number", "an odd square", "three consecutive integers",
        "the square root of two", "a probability", "two dice", "a percent of a price", "an inequality", "the roots of a polynomial",
        "a fraction in lowest terms", "the angles of a triangle", "a maximum and a minimum", "the remainder of a division",
        "a formula for the sum", "a proof by contradiction", "the number line", "the digits of a number", "equal denominators",
        "the orders of five letters", "a speed in two halves of the way", "the product of two factors", "every possible case",
    ),
    "creative": (
        "a lantern in an empty street", "a fox who cannot sleep", "the last night of winter", "a letter that came too late",
        "a lighthouse in the fog", "a key without a door", "two sisters and a secret", "a dragon afraid of fire", "the moon at an inn",
        "a song nobody remembers", "a shadow that went away", "an old clockmaker", "a garden of roses", "a thief with a gentle heart",
        "a ship that dreams of storms", "a bell that rings for lies", "a wolf and her young", "a queen who lost her name",
        "a mirror under a cloth", "the wind and a hat", "a child at the window", "a river that knocks at the door", "a feather in the dark",
        "a broken promise", "a lullaby of snow", "a tale told at dawn", "the sound of rain", "a stranger on the bridge", "an attic full of dust",
        "a baker and a cat", "the village in the storm", "a poem of four lines", "the smell of smoke", "a kingdom without mirrors",
    ),
    "factual": (
        "the tides of the sea", "a volcano", "the seasons of the Earth", "photosynthesis in green plants", "the human heart",
        "the capital of a country", "the rivers of Europe", "the planets and their moons", "the periodic table", "the atoms of a metal",
        "vaccines and the immune system", "whales and other mammals", "birds and reptiles", "the printing press", "the Roman Empire",
        "the oceans and continents", "an eclipse of the sun", "the water cycle", "a magnet and a compass", "the speed of light",
        "electrons and protons", "gold, silver and copper", "the discovery of radioactivity", "natural selection", "the moons of Jupiter",
        "an earthquake", "the languages of Africa", "bacteria and viruses", "a rainbow", "the blood and the lungs", "carbon and oxygen",
        "the law of gravitation", "the deserts of Asia", "the islands of the Pacific", "the crust of the Earth", "the bones of a mammal",
    ),
}

GENERAL = (
    "Explain {t} to a child.", "What is {t}?", "Describe {t} in a few sentences.", "What is the difference between {t} and {u}?",
    "Compare {t} with {u}, and say which comes first.", "Give an example of {t}.", "Begin with {t} and end with {u}.",
    "Say why {t} is important here.", "How would you show {t} together with {u}?", "Do this for {t}, then for {u}.",
    "Here is {t}.", "Think of {t} and of {u}.", "Write about {t}.", "Take {t}, and look at it again with {u} in mind.",
)

WISHES = {
    "code": (
        "Write a Python function that returns {t}.", "Show the whole program with comments.", "Do it without any library.",
        "Return a new list and keep the order.", "Raise a ValueError when the input is wrong.", "Find the error and correct it.",
        "What does this print, and why?", "Use plain assert statements to test it.", "Add a docstring and the types.",
        "Rewrite the loop as a comprehension.", "Name each test after what it checks.", "Print the result for each item.",
        "Explain what the query returns.", "Change the class so that it has {t}.", "Which error do you get, and on which line?",
        "Read the file, strip each line and skip the empty ones.", "Give the names a better meaning.", "Write the code in a few lines.",
    ),
    "math": (
        "Show every step.", "Find both unknowns and check the result.", "Prove it for every integer n.", "Compute with {t}.",
        "Divide both sides by the same number.", "Count the good cases and divide by all cases.", "Write it as an equation first.",
        "Solve for x and put the value back.", "Factor it, and then simplify.", "Let k be an integer.", "Find the next two terms.",
        "Explain why the last remainder is the answer.", "Which step would be wrong for a negative number?", "Is the result equal to the first one?",
        "Find the area and the perimeter.", "How long do both need together?", "Suppose instead that it is false.", "Use the theorem of Pythagoras.",
    ),
    "creative": (
        "Tell the story of {t}.", "Write a short poem about {t}.", "Let {t} speak in the second verse.", "End on a line in which nobody answers.",
        "Do not name a single feeling.", "Use rhyme only where it comes easily.", "Write a scene in which {t} meets {u}.", "Let the wind have the last word.",
        "Begin at the window, before dawn.", "Invent a legend that explains {t}.", "Make it sad, but let there be light in it.", "Write a dialogue of two voices.",
        "What happens when the child comes back?", "Describe it so that the reader can smell it.", "Let them meet once more, and say nothing.", "Write a letter to someone far away.",
        "Tell what he leaves behind.", "Let her sing of {t}.",
    ),
    "factual": (
        "Name the countries, their capitals and their languages.", "Give one fact about each of them.", "Say what causes {t}.", "Explain how it works, step by step.",
        "Which elements are they, and what are their symbols?", "Where does it flow, and into which sea?", "Who discovered it, and when?", "Say what scientists know about {t}.",
        "List the facts that show this.", "In which century was it, and why did it end?", "How do they breathe, and what do they eat?", "Name the largest and the smallest.",
        "What part does the sun play in it?", "Describe what happens in the body.", "On which continent is it?", "Explain the words that you use.", "How far is it from the sun?", "What is it made of?",
    ),
}

LEADS = {
    "code": ("import sys", "import json", "result = []", "count = 0", "best = None", "# a first try", "def main():", "items = load(path)", "total = 0", "while True:"),
    "math": (
        "Let the sides be 2k and 3k.", "The sum of all four is 60, so", "Suppose that p/q is in lowest terms.", "Adding both equations we get", "The first term is 5, and each is twice the one before.",
        "A tank is filled by two pipes.", "The mean of the numbers is 12.", "It follows that n is even, hence", "Let the base be 8 and the height 5.", "The price was raised and then lowered.",
    ),
    "creative": (
        "Nobody had opened the door for nine winters.", "She held the candle up, and the dark stepped back.", "It was the week of the great storm.", "He had no coat and no shoes, only a song.", "The fog never lifted from the harbour,",
        "Every morning the bell rang once, and every morning they pretended not to hear.", "\"It was gone yesterday,\" said the stranger.", "Something turned over in the long grass.", "By the third day the river had learned her name.", "The sea was singing under the floor,",
    ),
    "factual": (
        "Blood is pumped from the heart to the lungs.", "In the leaves, water and carbon dioxide are made into sugar.", "It begins south of the equator and flows north.", "Most volcanoes are found where two plates meet.", "Books became cheaper, and more people learned to read.",
        "The Earth turns once a day.", "Metals carry electric current well.", "Plants and animals are made of cells.", "The moon has no light of its own.", "Ice floats because it is less dense than water.",
    ),
}

ONSETS = ("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "cl", "dr", "fl", "gr", "pl", "sh", "st", "th", "tr")
SYLLABLES = [a + b for a in ONSETS for b in ("a", "e", "i", "o", "u", "ai", "ea", "er", "in", "on", "or", "al")]


def blurred(text: str, r: random.Random) -> str:
    """Some longer words become made-up ones: what is asked must be understood from the rest."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and word.isalpha() and r.random() < 0.12:
            words[i] = "".join(r.choice(SYLLABLES) for _ in range(r.randint(2, 3)))
    return " ".join(words)


def request(domain: str, question: str, r: random.Random) -> str:
    """A request of one to four sentences; ``question``, what the answer answers, may be one of them."""
    kinds = r.sample(sorted(TOPICS), 2) if domain == "mixed" else [domain]
    sentences = []
    for _ in range(r.randint(1, 3)):
        kind = r.choice(kinds)
        form = r.choice(r.choice((GENERAL, WISHES[kind], WISHES[kind], LEADS[kind])))
        if "{" in form and kind in TOPICS and (form in GENERAL or form in WISHES[kind]):
            t, u = r.sample(TOPICS[kind], 2)
            form = cap(form.replace("{t}", t).replace("{u}", u))
        sentences.append(form)
    if r.random() < 0.4:
        sentences.insert(r.randint(0, len(sentences)), question)
    return blurred(" ".join(sentences), r)


SYSTEM = ("Answer in a few words.", "You are a helpful assistant.", "Be exact.", "Answer in English.")


def document(domain: str, r: random.Random) -> Document:
    """One document of ``domain``: one to three question-answer pairs in one of four shapes."""
    pairs = [r.choice(GENERATORS[domain])(r) for _ in range(r.choice((1, 2, 2, 3)))]
    if r.random() < 0.6:
        pairs = [(request(domain, q, r), a) for q, a in pairs]
    gap = r.choice(["\n\n", "\n"]) if domain != "code" else "\n\n\n"
    shape = r.random()
    if shape < 0.3:  # answers alone
        return Document(domain, (("", gap.join(a for _, a in pairs)),))
    if shape < 0.75:  # question and answer as plain text
        link = r.choice(("\n", "\n", "\n\n", " "))
        return Document(domain, (("", gap.join(f"{q}{link}{a}" for q, a in pairs)),))
    turns: list[tuple[str, str]] = []
    if shape > 0.9:
        turns.append(("system", r.choice(SYSTEM)))
    for q, a in pairs:
        turns += [("user", q), ("assistant", a)]
    return Document(domain, tuple(turns))


def documents(seed: int, n: int) -> Iterator[Document]:
    """``n`` documents fixed by ``seed``; always of the domain that has the least text so far."""
    r = random.Random(seed)
    size = dict.fromkeys(DOMAINS, 0)
    for _ in range(n):
        domain = min(DOMAINS, key=size.__getitem__)
        doc = document(domain, r)
        size[domain] += sum(len(text) for _, text in doc.turns)
        yield doc
