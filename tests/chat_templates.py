"""Chat templates of the shapes that models ship, written for these tests."""

# ruff: noqa: E501

from __future__ import annotations

from typing import Any

LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

#: A macro that writes JSON schemas as types of a programming language, calling itself.
TYPES = """{%- macro type_of(spec, depth=0) -%}
    {%- if spec.type == "array" -%}
        {{- type_of(spec['items'], depth + 1) if spec['items'] else "any" }}[]
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.enum -%}
        {{- '"' ~ spec.enum | map('string') | map('upper') | join('" | "') ~ '"' }}
    {%- elif spec.type == "object" -%}
        {{- "{\\n" }}
        {%- for name, inner in (spec.properties or {}) | dictsort -%}
            {%- set note %}{% if inner.description %}// {{ inner.description | replace('\\n', ' ') | truncate(40) }}{% endif %}{% endset -%}
            {{- ("%s%s%s: " | format("  " * (depth + 1), name, "" if name in (spec.required or []) else "?")) }}
            {{- type_of(inner, depth + 1) ~ "," ~ (" " ~ note if note) ~ "\\n" }}
        {%- endfor -%}
        {{- "  " * depth ~ "}" }}
    {%- else -%}
        {{- {"integer": "number", "string": "string"}.get(spec.type, "any") }}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token if bos_token }}{{ "system: "|indent(2, first=true) }}
{%- for tool in tools or [] %}
{{ loop.cycle('*', '-') }} {{ tool.function.name | title }}({{ type_of(tool.function.parameters) }})
{%- endfor %}
{%- for role, group in messages | groupby('role') %}
{{ role }}: {{ group | length }} {{ group | map(attribute='content') | select('string') | map('length') | sum }}
{%- endfor %}
{%- for message in messages | sort(attribute='role') | rejectattr('role', 'in', ['tool']) if message.content %}
    {%- generation %}{{ "[{0:>9}|{1!r}]".format(message.role, message.content[:5]) }}{% endgeneration %}
    {%- if loop.changed(message.role) %}<{{ loop.previtem.role if loop.previtem }}>{% endif %}
{%- else %}nothing{% endfor %}
{%- call(x) wrapped() %}{{ x }}!{% endcall %}
{%- macro wrapped() %}{{ caller("hi") | center(9) }}{% endmacro %}
{%- filter upper %}done {{ (messages | first).role | default("x") }} {{ [3, 1, 2] | sort | reverse | list }}{% endfilter %}
{{- " " ~ messages | map(attribute='role') | unique | join(",") ~ (7 // 2) ~ 2 ** 5 ~ (7 / 2) | round(1) }}"""

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where\nto look, with a description that is longer than most <&>"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "unit": {"enum": ["c", "f"]},
        "more": {"type": "object", "properties": {"x": {"type": ["null", "string"]}, "y": {"type": "array"}}},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "get weather", "description": "Ça", "parameters": PARAMETERS, "return": 1},
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}},
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "stop", "arguments": {"now": True, "why": "é"}}}
PLAIN = [{"role": "user", "content": " Hi <there> & you "}, {"role": "assistant", "content": "Hello!\n"}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": PLAIN[:1],
    "plain": [*PLAIN, {"role": "user", "content": "日本語 😀"}],
    "system": [{"role": "system", "content": "Be brief."}, *PLAIN, {"role": "user", "content": "Why?"}],
    "tools": [
        PLAIN[0],
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 42."},
        {"role": "user", "content": "Thanks"},
    ],
}
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA, "mistral": MISTRAL, "types": TYPES}

#: One construct a line.
SNIPPETS = """
{{ messages }}|{{ messages[0] }}|{{ none }}|{{ undefined_name }}|{{ true }}|{{ 1.5 }}|{{ {'a': [1, (2, 3)]} }}
{{ 'a' * 3 }}{{ 'x%s-%05.1f' % ('y', 2.25) }}{{ '%(a)s' % {'a': 1} }}{{ [1] + [2] }}{{ 7 % 3 }}{{ -3 // 2 }}{{ 2 ** 0.5 }}
{{ ['b', 'A', 'c'] | sort }}{{ ['b', 'A', 'b'] | unique | list }}{{ [3, 1] | min }}{{ {'b': 1, 'a': 2} | dictsort(by='value') }}
{{ 'a,b'.split(',') | join(';') }}{{ 'x'.join(['1', '2']) }}{{ 'abc'.replace('b', '') }}{{ 'abc' | replace('b', 'xx') }}
{{ [1, 2, 3, 4, 5] | batch(2, '-') | list }}{{ [1, 2, 3] | slice(2) | map('list') | list }}{{ 'abc' | list }}{{ 'abc' | reverse }}
{{ 'a\\nb\\n\\nc' | indent }}{{ 'a\\nb' | indent('>>', true) }}{{ 'ab cd' | title }}{{ 'abc' | center(8) }}{{ 'ab' | wordcount }}
{{ {'a': '<é>'} | tojson }}{{ [1, {'b': none}] | tojson(indent=2) }}{{ 'é' | tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ '<b>' | e }}{{ ('<b>' | safe) + '<i>' }}{{ '<b>' | escape | replace('&', '+') }}{{ ['<'] | join('<' | safe) }}{{ 'a b/é' | urlencode }}
{{ '{:>5}|{:.2f}|{x}'.format('a', 1.239, x=3) }}{{ '{0[a]}'.format({'a': 1}) }}{{ '{a}'.format_map({'a': 5}) }}{{ '%s and %s' | format('a', 'b') }}
{% set ns = namespace(a=1) %}{% set ns.b = [1] %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ dict(a=1) }}
{% for i in range(5) if i is odd %}{{ loop.index }}{{ loop.length }}{{ i }}{% if loop.last %}.{% endif %}{% else %}none{% endfor %}
{% for i in [] %}x{% else %}none{% endfor %}{% for i in 'ab' %}{% if loop.first %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}
{% for n in [{'c': [{'c': []}]}] recursive %}<{{ loop(n.c) }}{{ loop.depth }}>{% endfor %}
{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 3, 4, x=5) }}{{ f.name }}
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}{% with y = 3 %}{{ y }}{% endwith %}{{ y }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}x{{ j() }}y
{{ 'b' in 'abc' }}{{ 'role' in messages[0] }}{{ 3 not in [1, 2] }}{{ 1 < 2 < 3 }}{{ 'a' ~ 1 ~ none }}{{ 1 if false }}{{ messages[-1:] }}
{{ 3.7 | int }}{{ '12' | int + 1 }}{{ 'x' | int(-1) }}{{ '2.5' | float }}{{ 2.567 | round(1) }}{{ 2.5 | round(method='floor') }}{{ -2 | abs }}
{{ messages | map(attribute='role') | list }}{{ messages | selectattr('content', 'defined') | list | length }}{{ [[1], [2]] | sum(start=[]) }}
{{ 'x' is string }}{{ {} is mapping }}{{ [] is iterable }}{{ 1 is number }}{{ messages is sequence }}{{ 4 is divisibleby 2 }}{{ 'A' is upper }}{{ 1 is eq 1 }}
{{ ' a ' | trim }}{{ 'xax' | trim('x') }}{{ 'abcdefgh' | truncate(5, true, '~') }}{{ 1234567 | filesizeformat }}{{ 'x' | default('y') }}{{ '' | d('y', true) }}
{{ (messages | first).role }}{{ (messages | last).role }}{{ 'aXb' | lower }}{{ 'aXb' | upper }}{{ 'aXb' | capitalize }}{{ messages | length }}
{{ 'a' if messages[0].tool_calls is defined else 'b' }}{{ messages[0].get('x', 'z') }}{{ messages[0].items() | list }}{{ messages[0] | items | list }}
{{ 'ab'.startswith(('x', 'a')) }}{{ 'a\\tb'.expandtabs(4) }}{{ '7'.zfill(3) }}{{ 'ab'.rjust(4, '.') }}{{ 'a-b-c'.rsplit('-', 1) }}{{ 'aba'.rfind('a') }}{{ [1, 2].index(2) }}
{{ '%s' % [1] }}{{ '100%%' % () }}{{ '%c%r' % (65, 'x') }}{{ '%-4s|' % 'a' }}{{ '%+d %x %e' % (3, 255, 1.5) }}
""".strip().splitlines()
