"""Chat templates in the manner of those that agents are served with, in small."""

_SAID = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_NEXT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    + _SAID
    + "{% endif %}{% endfor %}"
    + _NEXT
)
"""Passes over what other roles say, and knows neither tools nor their calls."""

AGENT = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% set last = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.asked = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content and loop.index0 > last.asked %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content | tojson }}\n"
    "</tool_response><|im_end|>\n{% endif %}{% endfor %}" + _NEXT
)
"""Writes tools and calls, escapes what tools answer, and keeps thoughts of the last turn alone."""

JSON_ARGUMENTS = AGENT.replace(
    "{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}"
)
"""Takes the arguments of a call as a text of JSON."""

CALLS_ALONE = AGENT.replace(
    "{{ m.content }}{% for", "{% if not m.tool_calls %}{{ m.content }}{% endif %}{% for"
)
"""Leaves out what an assistant says beside its calls."""
