# ruff: noqa: E501 - tables of wordings are read best with a wording on one line
"""Skill `arithmetic`: sums, differences and products in several steps, each written out.

A two-digit operand is added or taken away tens first and a product is taken apart (`47 + 38 = 77 + 8 = 85`),
so that every written number follows from the one before with at most one carry: a small network can do that
without mistakes. Called by `training.skills`.
"""

from __future__ import annotations

from random import Random

from seamount.training.skills.item import Item, question
from seamount.training.skills.pools import below, person, pick

NAME = "arithmetic"
_LARGEST = 999

# A bare expression is English: no question may have two answers.
_ASK = {
    "en": (
        "What is {}?", "Calculate {}.", "{} = ?", "Compute {}", "Work out {}.", "How much is {}?", "{}",
        "Please calculate {}.", "Solve: {}", "Can you compute {}?",
    ),
    "zh": (
        "{}等于多少？", "计算{}。", "{} = 多少？", "请计算：{}", "算一下{}。", "{}是多少？", "{}得多少？", "帮我算{}。", "求{}的值。",
        "{}的结果是多少？",
    ),
}  # fmt: skip
_FINAL = {"en": "The answer is {}.", "zh": "答案是{}。"}

# Each story: its steps as (operator, low, high) after the first number's range, the text and the answer, with
# {a} {b} {c} {d} for the numbers, {name} for a person and {r} for the result.
_STORIES: tuple[tuple[tuple[int, int], tuple[tuple[str, int, int], ...], dict[str, tuple[str, str]]], ...] = (
    ((20, 99), (("+", 5, 60), ("-", 5, 30)), {
        "en": ("A ward has {a} patients. {b} more arrive and {c} go home. How many patients are there now?",
               "There are {r} patients now."),
        "zh": ("病房有{a}名病人，又来了{b}名，出院{c}名。现在有多少名病人？", "现在有{r}名病人。")}),
    ((3, 12), (("*", 2, 9), ("-", 2, 9)), {
        "en": ("There are {a} boxes with {b} masks each. {c} masks are used. How many masks are left?",
               "{r} masks are left."),
        "zh": ("有{a}盒口罩，每盒{b}个，用掉了{c}个。还剩多少个口罩？", "还剩{r}个口罩。")}),
    ((3, 12), (("*", 2, 9), ("+", 5, 60)), {
        "en": ("A line makes {a} pumps an hour for {b} hours, and {c} pumps were in stock. How many pumps are there?",
               "There are {r} pumps."),
        "zh": ("生产线每小时做{a}台水泵，做了{b}小时，原有库存{c}台。一共有多少台水泵？", "一共有{r}台水泵。")}),
    ((60, 400), (("-", 5, 50), ("-", 3, 9)), {
        "en": ("{name} has {a} dollars, pays {b} dollars and then {c} dollars. How many dollars are left?",
               "{r} dollars are left."),
        "zh": ("{name}有{a}元，先付了{b}元，又付了{c}元。还剩多少元？", "还剩{r}元。")}),
    ((50, 400), (("+", 10, 99), ("-", 10, 50), ("+", 2, 9)), {
        "en": ("An account holds {a} dollars. {b} come in, {c} go out and {d} come in. What is the balance?",
               "The balance is {r} dollars."),
        "zh": ("账户有{a}元，存入{b}元，取出{c}元，又存入{d}元。余额是多少？", "余额是{r}元。")}),
    ((10, 90), (("+", 10, 90), ("+", 2, 60)), {
        "en": ("{name} counted {a} parts on Monday, {b} on Tuesday and {c} on Wednesday. How many parts in all?",
               "{r} parts in all."),
        "zh": ("{name}周一清点了{a}个零件，周二{b}个，周三{c}个。一共多少个零件？", "一共{r}个零件。")}),
    ((5, 30), (("+", 2, 40), ("*", 2, 5)), {
        "en": ("A shelf holds {a} red and {b} blue folders. How many folders are on {c} such shelves?",
               "There are {r} folders."),
        "zh": ("一个架子上有{a}个红色文件夹和{b}个蓝色文件夹。{c}个这样的架子上有多少个文件夹？", "有{r}个文件夹。")}),
    ((2, 9), (("*", 2, 9), ("+", 3, 40), ("-", 2, 7)), {
        "en": ("{a} nurses give {b} doses each, then {c} more doses are given and {d} are returned. "
               "How many doses were used?", "{r} doses were used."),
        "zh": ("{a}名护士每人发{b}剂药，之后又发了{c}剂，退回{d}剂。共用了多少剂？", "共用了{r}剂。")}),
    ((30, 99), (("-", 3, 25), ("+", 4, 50)), {
        "en": ("A bus carries {a} people. {b} get off and {c} get on. How many people are on the bus?",
               "{r} people are on the bus."),
        "zh": ("车上有{a}人，下去{b}人，上来{c}人。车上现在有多少人？", "车上现在有{r}人。")}),
)  # fmt: skip


def make(rng: Random, language: str) -> Item:
    """An expression (two in three) or a short story."""
    return _story(rng, language) if rng.random() < 0.35 else _expression(rng, language)


def step(left: int, operator: str, right: int) -> tuple[str, int]:
    """One written step and its result. `*` is the sign for times, in the step written as ×."""
    if operator == "*":
        result = left * right
        if left < 10 or left % 10 == 0:
            return f"{left} × {right} = {result}", result
        tens, units = left - left % 10, left % 10
        return f"{left} × {right} = {tens * right} + {units * right} = {result}", result
    sign = 1 if operator == "+" else -1
    result = left + sign * right
    tens, units = right - right % 10, right % 10
    if right < 10 or units == 0:
        return f"{left} {operator} {right} = {result}", result
    return f"{left} {operator} {right} = {left + sign * tens} {operator} {units} = {result}", result


def _chain(start: int, steps: list[tuple[str, int]]) -> tuple[str, int] | None:
    """The written steps and the result, or None where a number leaves 0..999."""
    lines, value = [], start
    for operator, right in steps:
        line, value = step(value, operator, right)
        if not 0 <= value <= _LARGEST:
            return None
        lines.append(line)
    return "\n".join(lines), value


def _expression(rng: Random, language: str) -> Item:
    while True:
        kind = rng.random()
        if kind < 0.55:
            made = _plain(rng)
        elif kind < 0.85:
            made = _product(rng)
        else:
            made = _brackets(rng)
        if made is not None:
            break
    text, lines, value = made
    key = text
    sign = ("×", "*", "x")[int(rng.random() * 3)]
    text = text.replace("*", sign)
    if rng.random() < 0.2:
        text = text.replace(" ", "")
    ask = _ASK[language][int(rng.random() * len(_ASK[language]))]
    return question(NAME, language, key, ask.format(text), _FINAL[language].format(value), lines)


def _plain(rng: Random) -> tuple[str, str, int] | None:
    """`17 + 25 - 8`: two to four steps (one in ten has a single step)."""
    count = 1 if rng.random() < 0.15 else (2, 2, 3, 3, 4)[int(rng.random() * 5)]
    start = below(rng, 2, 99) if rng.random() < 0.8 else below(rng, 100, 400)
    steps: list[tuple[str, int]] = []
    value = start
    for _ in range(count):
        right = below(rng, 1, 9) if rng.random() < 0.3 else below(rng, 10, 99)
        operator = "-" if value >= right and rng.random() < 0.5 else "+"
        steps.append((operator, right))
        value += right if operator == "+" else -right
    chain = _chain(start, steps)
    if chain is None:
        return None
    return f"{start} " + " ".join(f"{o} {n}" for o, n in steps), *chain


def _product(rng: Random) -> tuple[str, str, int] | None:
    """`7 * 8 + 15 - 6` or `90 - 4 * 6`, the product first."""
    left, right = below(rng, 2, 9), below(rng, 2, 9)
    if rng.random() < 0.35:
        left = below(rng, 11, 60)
    product_line, product = step(left, "*", right)
    other = below(rng, 2, 99)
    extra = below(rng, 2, 40) if rng.random() < 0.4 else 0
    if rng.random() < 0.6:
        operator = "-" if product >= other and rng.random() < 0.5 else "+"
        steps = [(operator, other)]
        text = f"{left} * {right} {operator} {other}"
        start = product
    else:
        operator = "-" if other >= product and rng.random() < 0.6 else "+"
        steps = [(operator, product)]
        text = f"{other} {operator} {left} * {right}"
        start = other
        if product >= 100:
            return None
    if extra:
        steps.append(("+", extra))
        text += f" + {extra}"
    chain = _chain(start, steps)
    if chain is None:
        return None
    return text, product_line + "\n" + chain[0], chain[1]


def _brackets(rng: Random) -> tuple[str, str, int] | None:
    """`(12 + 7) * 3 - 5`."""
    a, b, times = below(rng, 2, 40), below(rng, 2, 30), below(rng, 2, 9)
    operator = "-" if a > b and rng.random() < 0.5 else "+"
    inner = a + b if operator == "+" else a - b
    if inner > 99:
        return None
    steps = [(operator, b), ("*", times)]
    text = f"({a} {operator} {b}) * {times}"
    if rng.random() < 0.5:
        extra = below(rng, 2, 50)
        steps.append(("+", extra))
        text += f" + {extra}"
    chain = _chain(a, steps)
    return None if chain is None else (text, *chain)


def _story(rng: Random, language: str) -> Item:
    while True:
        index, story = pick(rng, _STORIES)
        (low, high), ranges, texts = story
        start = below(rng, low, high)
        steps = [(operator, below(rng, first, last)) for operator, first, last in ranges]
        chain = _chain(start, steps)
        if chain is not None:
            break
    lines, value = chain
    numbers = dict(zip("abcd", [start, *(n for _, n in steps)], strict=False))
    text, answer = texts[language]
    name = person(rng, language) if "{name}" in text else ""
    key = f"story{index}:" + ",".join(map(str, numbers.values()))
    text = text.format(name=name, **numbers)
    return question(NAME, language, key, text, answer.format(r=value), lines)
