"""Chat templates for checkpoints that come without one: text per family, and the markers by which one is
chosen.

Called by `models.prompt`. Written for this project after the formats that the families were trained on; each
gives what the family's published template gives for system, user, assistant and tool messages.
"""

from __future__ import annotations

from collections.abc import Callable

DEEPSEEK_V2 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + '\\n\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- 'User: ' + message.content + '\\n\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant: ' + message.content + eos_token -}}
    {%- else -%}
        {{- raise_exception('this model knows no ' + message.role + ' messages') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

# V3, R1 and V3.1 share turns and differ in how a tool call is written and in what opens an answer. @CALL@
# writes one call, @OPENING@ what stands between the assistant's marker and its answer, @TOOLS_...@ what
# surrounds tool results.
_DEEPSEEK_V3 = """\
{%- set ns = namespace(system='', open_tools=false) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message.content -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if ns.open_tools -%}{{- '@TOOLS_END@' -}}{%- set ns.open_tools = false -%}{%- endif -%}
        {{- '<｜User｜>' + message.content -}}
    {%- elif message.role == 'assistant' -%}
        {%- set content = (message.content or '').split('</think>')[-1] -%}
        {%- if ns.open_tools -%}
            {{- '@TOOLS_END@' -}}
            {%- set ns.open_tools = false -%}
        {%- else -%}
            {{- '<｜Assistant｜>@HISTORY_OPENING@' -}}
        {%- endif -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set arguments = call.function.arguments -%}
            {%- set arguments = arguments if arguments is string else arguments | tojson -%}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '@BETWEEN_CALLS@' -}}
            {{- '<｜tool▁call▁begin｜>' + @CALL@ + '<｜tool▁call▁end｜>' -}}
            {%- if loop.last -%}{{- '<｜tool▁calls▁end｜>' -}}{%- endif -%}
        {%- endfor -%}
        {{- eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '@BETWEEN_RESULTS@' if ns.open_tools else '@TOOLS_BEGIN@' -}}
        {%- set ns.open_tools = true -%}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if ns.open_tools -%}
    {{- '@TOOLS_END@' -}}
{%- elif add_generation_prompt and @PROMPTED@ -%}
    {{- '<｜Assistant｜>' -}}@OPENING@
{%- endif -%}
"""


def _deepseek(opening: str, *, v31: bool = False) -> str:
    fenced_call = r"call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' + arguments + '\n```'"
    parts = {
        "CALL": "call.function.name + '<｜tool▁sep｜>' + arguments" if v31 else fenced_call,
        "PROMPTED": "messages[-1].role == 'user'" if v31 else "true",
        "OPENING": opening,
        "HISTORY_OPENING": "</think>" if v31 else "",
        "BETWEEN_CALLS": "" if v31 else "\\n",
        "BETWEEN_RESULTS": "" if v31 else "\\n",
        "TOOLS_BEGIN": "" if v31 else "<｜tool▁outputs▁begin｜>",
        "TOOLS_END": "" if v31 else "<｜tool▁outputs▁end｜>",
    }
    text = _DEEPSEEK_V3
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


DEEPSEEK_V3 = _deepseek("")
DEEPSEEK_R1 = _deepseek("{{- '<think>\\n' -}}")
DEEPSEEK_V31 = _deepseek("{{- '<think>' if thinking is defined and thinking else '</think>' -}}", v31=True)

_QWEN_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- elif default_system %}
        {{- default_system + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": ' }}
    {{- '<args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif default_system %}
    {{- '<|im_start|>system\\n' + default_system + '<|im_end|>\\n' }}
{%- endif %}
"""

_QWEN_CALLS = """\
        {%- for call in message.tool_calls or [] %}
            {%- set arguments = call.function.arguments %}
            {{- '\\n' if content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- arguments if arguments is string else arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
"""

QWEN2 = (
    "{%- set default_system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}\n"
    + _QWEN_TOOLS
    + """\
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {{- '<|im_start|>assistant\\n' + content }}
"""
    + _QWEN_CALLS
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)

# Reasoning is kept only for answers behind the last real question, that is inside a running tool loop.
QWEN3 = (
    "{%- set default_system = '' %}\n"
    + _QWEN_TOOLS
    + """\
{%- set ns = namespace(last_query=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
"""
    + _QWEN_CALLS
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
)

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('this model makes one tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}' }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""


def choose_template(model_type: str, has_token: Callable[[str], bool]) -> tuple[str, str] | None:
    """Return (name, Jinja source) of the format that the tokenizer's markers show; None when they show none.

    DeepSeek's markers decide before the architecture, because the distills are Qwen or Llama networks that
    speak R1's format. Among them: no `<think>` is V3; with `<think>`, the search markers that came with V3.1
    tell it from R1.

    Args:
        model_type: `model_type` of config.json.
        has_token: whether a text is one token of the vocabulary.
    """
    families = ("deepseek_v2", "deepseek_v3", "qwen2", "qwen3", "llama")
    if model_type not in families:
        return None
    if has_token("<｜User｜>") and has_token("<｜Assistant｜>"):
        if not has_token("<think>"):
            return "deepseek_v3", DEEPSEEK_V3
        if has_token("<｜search▁begin｜>"):
            return "deepseek_v31", DEEPSEEK_V31
        return "deepseek_r1", DEEPSEEK_R1
    if model_type == "deepseek_v2" and has_token("<｜begin▁of▁sentence｜>"):
        return "deepseek_v2", DEEPSEEK_V2
    if model_type in ("qwen2", "qwen3") and has_token("<|im_start|>") and has_token("<|im_end|>"):
        return ("qwen3", QWEN3) if model_type == "qwen3" else ("qwen2", QWEN2)
    if model_type == "llama" and has_token("<|start_header_id|>") and has_token("<|eot_id|>"):
        return "llama3", LLAMA3
    return None
