"""Chat templates render in their sandbox, and cannot get out of it or hold it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from seamount.core.errors import CapacityError, CheckpointError, InvalidRequestError, SeamountError
from seamount.models import builtin_templates
from seamount.models.template import MAX_TEMPLATE_CHARS, ChatTemplate


@pytest.fixture
def template() -> Iterator[Any]:
    made: list[ChatTemplate] = []

    def make(source: str, **limits: Any) -> ChatTemplate:
        made.append(ChatTemplate(source, "chat_template.jinja", **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def sandboxes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if any("_template_sandbox" in part for part in child.cmdline())]


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ x.__class__.__base__ }}",
    "{{ x['__class__']['__mro__'] }}",
    "{{ (x | attr('__class__')) | attr('__mro__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__['os'] }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.sys }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(x) }}",
    "{{ '%(a)s' | format(a=x.__class__.__mro__) }}",
    "{% set n = namespace(__class__=1) %}{{ n.__class__.__mro__ }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ dict.__class__.__base__.__subclasses__() }}",
    "{{ (messages | map(attribute='__class__.__mro__') | list)[0] }}",
    "{{ (messages | groupby('__class__.__mro__')) }}",
    "{% for k in messages.append({}) or messages %}{{ k.__class__.__mro__ }}{% endfor %}",
    "{{ [].append.__self__.__class__.__base__ }}",
    "{{ ''.join.__call__.__objclass__.__subclasses__ }}",
    "{{ messages.append(1) }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
]
TELLTALES = ("<class", "<module", "object at 0x", "uid=", "root:", "<function", "<built-in", "subclasses")


@pytest.mark.parametrize("source", ESCAPES)
def test_known_escapes_reach_nothing(template: Any, source: str) -> None:
    try:
        text = template(source).render({"x": "text", "messages": [{"role": "user", "content": "hi"}]})
    except SeamountError:
        return
    assert not any(telltale in text for telltale in TELLTALES), text


HELD_UP = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "huge constant, while compiling": "{{ 'a' * 10 ** 11 }}",
    "huge string": "{{ 'a' * size }}",
    "huge list": "{{ [0] * size }}",
    "huge power": "{{ (base ** size) % 10 }}",
    "padding": "{{ '%99999999999d' % 1 }}",
    "long output": "{% for i in range(5000) %}{{ 'abcdefgh' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("case", HELD_UP)
def test_a_template_without_end_is_stopped_and_leaves_nothing_behind(template: Any, case: str) -> None:
    before = {child.pid for child in sandboxes()}
    hostile = template(HELD_UP[case], cpu_limit_s=0.3, memory_limit_bytes=256 << 20)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja broke its limits"):
        hostile.render({"size": 10**11, "base": 7})
    hostile.close()
    assert {child.pid for child in sandboxes()} == before


def test_endless_recursion_is_a_typed_error(template: Any) -> None:
    with pytest.raises(InvalidRequestError, match="RecursionError"):
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render({})


def test_after_a_stopped_render_the_next_one_works(template: Any) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    both = template("{% if loop_forever %}" + loops + "{% endif %}ok", cpu_limit_s=0.2)
    with pytest.raises(CheckpointError, match="did not finish"):
        both.render({"loop_forever": True})
    assert both.render({"loop_forever": False}) == "ok"


def test_a_killed_sandbox_is_started_again(template: Any) -> None:
    one = template("{{ x }}")
    known = {child.pid for child in sandboxes()}
    assert one.render({"x": 1}) == "1"
    (child,) = [child for child in sandboxes() if child.pid not in known]
    child.kill()
    child.wait()
    assert one.render({"x": 2}) == "2"


def test_the_sandbox_process_ends_with_its_template(template: Any) -> None:
    before = {child.pid for child in sandboxes()}
    one = ChatTemplate("{{ x }}", "x")
    one.render({"x": 1})
    assert {child.pid for child in sandboxes()} != before
    del one
    assert {child.pid for child in sandboxes()} == before


@pytest.mark.skipif(os.name != "posix", reason="sessions of processes are POSIX's")
def test_a_terminals_interrupt_does_not_reach_the_sandbox(template: Any) -> None:
    known = {child.pid for child in sandboxes()}
    one = template("{{ x }}")
    one.render({"x": 1})
    (child,) = [child for child in sandboxes() if child.pid not in known]
    assert os.getpgid(child.pid) != os.getpgid(0)  # a terminal signals its foreground process group


def test_the_sandbox_process_ends_with_its_parent() -> None:
    code = (
        "import os, psutil; from seamount.models.template import ChatTemplate\n"
        "one = ChatTemplate('{{ x }}', 'x'); one.render({'x': 1})\n"
        "print(psutil.Process().children()[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    try:
        psutil.Process(int(done.stdout)).wait(timeout=20)
    except psutil.NoSuchProcess:
        return  # ended already


def test_a_render_does_not_wait_for_its_turn_for_ever(template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = template("{{ x }}")
    monkeypatch.setattr("seamount.models.template.WALL_LIMIT_S", 0.01)
    with one._lock, pytest.raises(CapacityError):
        one.render({"x": 1})


def test_the_sandbox_cannot_open_files_or_start_processes() -> None:
    # What an escape would find: the same limits, with Python at hand instead of a template.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _template_sandbox as s, os; s._limit(1 << 28)\n"
        "try: open('/etc/hostname'); print('opened')\n"
        "except OSError as e: print(e.errno)"
    )
    folder = Path(__file__).parents[3] / "src" / "seamount" / "models"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "24"  # EMFILE


def test_many_threads_render_through_one_sandbox(template: Any) -> None:
    one = template("{{ x }}")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: one.render({"x": i}), range(100))) == [str(i) for i in range(100)]


def test_large_inputs_pass(template: Any) -> None:
    text = "长文本 <|x|>\n" * 200_000
    assert template("{{ messages[0].content }}").render({"messages": [{"content": text}]}) == text


def test_what_the_template_raises_reaches_the_caller(template: Any) -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template("{{ raise_exception('roles must alternate, see docs.') }}").render({})
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% endfor %}", "{{ x | nofilter }}", "(" * 10 + "{{" + "(" * 50000]
)
def test_broken_templates_name_their_file(template: Any, source: str) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        template(source).check()


def test_a_template_too_long_to_be_one_is_refused(template: Any) -> None:
    with pytest.raises(CheckpointError, match="characters"):
        template("x" * (MAX_TEMPLATE_CHARS + 1))


def test_values_that_are_not_json_are_refused(template: Any) -> None:
    with pytest.raises(InvalidRequestError, match="JSON"):
        template("{{ x }}").render({"x": object()})


B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TURNS = [
    {"role": "system", "content": "Sys"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "<think>\nhm\n</think>A1"},
    {"role": "user", "content": "Q2"},
]
ARGUMENTS = '{"a": 1}'
CALL = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
LOOP = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "R1"},
    {"role": "tool", "content": "R2"},
]
OLD_CALL = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>"
NEW_CALL = f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
EXPECTED = [
    ("DEEPSEEK_V2", TURNS, {}, f"{B}Sys\n\nUser: Q1\n\nAssistant: <think>\nhm\n</think>A1{E}User: Q2\n\nAssistant:"),
    ("DEEPSEEK_V3", TURNS, {}, f"{B}Sys{U}Q1{A}A1{E}{U}Q2{A}"),
    ("DEEPSEEK_R1", TURNS, {}, f"{B}Sys{U}Q1{A}A1{E}{U}Q2{A}<think>\n"),
    ("DEEPSEEK_V31", TURNS, {}, f"{B}Sys{U}Q1{A}</think>A1{E}{U}Q2{A}</think>"),
    ("DEEPSEEK_V31", TURNS, {"thinking": True}, f"{B}Sys{U}Q1{A}</think>A1{E}{U}Q2{A}<think>"),
    (
        "DEEPSEEK_R1",
        LOOP,
        {},
        f"{B}{U}Q{A}<｜tool▁calls▁begin｜>{OLD_CALL}\n{OLD_CALL}<｜tool▁calls▁end｜>{E}<｜tool▁outputs▁begin｜>"
        "<｜tool▁output▁begin｜>R1<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>R2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
    (
        "DEEPSEEK_V31",
        LOOP,
        {},
        f"{B}{U}Q{A}</think><｜tool▁calls▁begin｜>{NEW_CALL}{NEW_CALL}<｜tool▁calls▁end｜>{E}"
        "<｜tool▁output▁begin｜>R1<｜tool▁output▁end｜><｜tool▁output▁begin｜>R2<｜tool▁output▁end｜>",
    ),
    (
        "QWEN3",
        TURNS,
        {"enable_thinking": False},
        "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    (
        "QWEN2",
        TURNS[1:2],
        {},
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "QWEN2",
        LOOP[1:],
        {},
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>assistant\n"
        + "\n".join(['<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'] * 2)
        + "<|im_end|>\n<|im_start|>user\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "LLAMA3",
        TURNS[:2],
        {},
        f"{B}<|start_header_id|>system<|end_header_id|>\n\nSys<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ1"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
]


@pytest.mark.parametrize(("name", "messages", "extra", "expected"), EXPECTED)
def test_built_in_formats(template: Any, name: str, messages: list[Any], extra: dict[str, Any], expected: str) -> None:
    variables = {"messages": messages, "bos_token": B, "eos_token": E, "add_generation_prompt": True, **extra}
    assert template(getattr(builtin_templates, name)).render(json.loads(json.dumps(variables))) == expected


def test_the_format_is_chosen_by_the_tokenizers_markers() -> None:
    def choose(model_type: str, *tokens: str) -> str | None:
        chosen = builtin_templates.choose_template(model_type, tokens.__contains__)
        return chosen[0] if chosen else None

    assert choose("deepseek_v3", U, A) == "deepseek_v3"
    assert choose("deepseek_v3", U, A, "<think>") == "deepseek_r1"
    assert choose("deepseek_v3", U, A, "<think>", "<｜search▁begin｜>") == "deepseek_v31"
    assert choose("qwen2", U, A, "<think>", "<|im_start|>", "<|im_end|>") == "deepseek_r1"
    assert choose("qwen2", "<|im_start|>", "<|im_end|>") == "qwen2"
    assert choose("qwen3", "<|im_start|>", "<|im_end|>") == "qwen3"
    assert choose("llama", "<|start_header_id|>", "<|eot_id|>") == "llama3"
    assert choose("deepseek_v2", B) == "deepseek_v2"
    assert choose("llama", "[INST]") is None
    assert choose("mamba", U, A) is None


def test_many_renders_are_what_each_gives_by_itself() -> None:
    source = (
        "{% if x == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
        "{% if x == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        "<{{ x }}>"
    )
    template = ChatTemplate(source, "test", cpu_limit_s=0.2)
    batch: list[dict[str, Any]] = [{"x": str(number)} for number in range(150)]
    batch[3] = {"x": "refuse"}
    batch[70] = {"x": "loop"}
    batch[90] = {"x": object()}
    found = template.render_many(batch)
    assert [text for text in found if isinstance(text, str)] == [
        f"<{number}>" for number in range(150) if number not in (3, 70, 90)
    ]
    assert isinstance(found[3], InvalidRequestError)
    assert isinstance(found[70], CheckpointError)
    assert isinstance(found[90], InvalidRequestError)
    assert template.render_many([]) == []
    template.close()
    broken = ChatTemplate("{% if %}", "test")
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        broken.render_many([{}, {}])
    broken.close()
