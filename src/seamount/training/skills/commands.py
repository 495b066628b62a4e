"""Skill `commands`: questions about Seamount's own commands and facts, and about the model itself.

A closed set of topics; what is new in an item is the pair of a question's wording and the phrase round it.
An answer that becomes untrue when Seamount changes is corrected in `commands_facts`. Called by
`training.skills`.
"""

from __future__ import annotations

from random import Random

from seamount.training.skills.commands_facts import SOCIAL_TOPICS, TOPICS
from seamount.training.skills.item import Item, question
from seamount.training.skills.pools import casual

NAME = "commands"

# Phrases round the question, index by index the same kind of phrase in both languages.
_WRAPS = {
    "en": (
        "{}", "{}", "Hello. {}", "Hi, {}", "{} Thanks.", "Please tell me: {}", "A question: {}", "{} Please be short.",
        "I am new here. {}", "Quick question: {}", "Sorry, {}", "{} I use Linux.", "Good morning. {}", "Hey! {}",
        "{} Thank you!", "One more thing: {}", "OK. {}", "{} I need it now.",
    ),
    "zh": (
        "{}", "{}", "你好。{}", "嗨，{}", "{}谢谢。", "请告诉我：{}", "有个问题：{}", "{}请简短回答。", "我是新手。{}",
        "快速问一下：{}", "不好意思，{}", "{}我用的是Linux。", "早上好。{}", "嘿！{}", "{}多谢！", "还有一个问题：{}",
        "好的。{}", "{}我现在就要用。",
    ),
}  # fmt: skip
# What one says round a greeting, thanks or a farewell.
_SOCIAL_WRAPS = {
    "en": ("{}", "{}", "OK. {}", "Ah, {}", "{} :)", "{} seamount-tiny", "Well, {}"),
    "zh": ("{}", "{}", "好的。{}", "啊，{}", "{}：）", "{}seamount-tiny", "嗯，{}"),
}


def make(rng: Random, language: str) -> Item:
    """One of the topics in one of its wordings."""
    zh = language == "zh"
    topic = int(rng.random() * len(TOPICS))
    answers, english, chinese = TOPICS[topic]
    wordings = (chinese if zh else english).split("|")
    wording = int(rng.random() * len(wordings))
    wraps = (_SOCIAL_WRAPS if topic in SOCIAL_TOPICS else _WRAPS)[language]
    wrap = int(rng.random() * len(wraps))
    text = wordings[wording]
    pattern = wraps[wrap]
    if pattern.endswith(", {}"):
        text = text if text.startswith(("I ", "MLA", "MoE", "MTP")) else text[0].lower() + text[1:]
    key = f"{topic}|{wording}|{max(wrap, 1)}"
    return question(NAME, language, key, casual(rng, language, pattern.format(text)), answers[zh])
