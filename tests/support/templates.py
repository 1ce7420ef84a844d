"""Chat templates of the shape of public ones, written for tests: what they do with tools, calls and thoughts."""

# As Qwen3.5's: tools and their format in the system's message, thoughts that are left open, calls as XML, answers of
# tools in a user's message.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Functions\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\nCall them like this:\\n<tool_call>\\n<function=name>\\n<parameter=p>\\nv\\n</parameter>\\n' }}
    {{- '</function>\\n</tool_call>' }}
    {%- if messages[0].role == 'system' %}{{ '\\n\\n' + messages[0].content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = (message.content or '') | trim %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content | trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function %}
            {{- ('\\n\\n' if loop.first and content else '\\n' if not loop.first else '') }}
            {{- '<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for key, value in call.arguments | items %}
                {%- set text = value | tojson if value is mapping or (value is sequence and value is not string)
                   else value | string %}
                {{- '<parameter=' + key + '>\\n' + text + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- elif message.role != 'system' %}{{ raise_exception('Unexpected message role.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}
{%- endif %}"""

# As Qwen3's: calls as JSON, and the model itself begins its thoughts.
QWEN3 = """{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{{ '\\n</tools>\\n<tool_call>\\n{"name": ...}' }}
    {{- '\\n</tool_call><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# As Olmo 3's: calls in the manner of Python, answers of tools from the environment.
OLMO = """{{- '<|im_start|>system\\nYou may call functions. ' }}
{%- if tools %}{{ '<functions>' ~ (tools | tojson) ~ '</functions>' }}{% endif %}{{ '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>environment\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- if message.tool_calls %}
            {{- '<function_calls>' }}
            {%- for call in message.tool_calls %}
                {{- call.function.name + '(' }}
                {%- for key, value in call.function.arguments | items %}
                    {{- key + '=' + value | tojson }}{{ '' if loop.last else ', ' }}
                {%- endfor %}
                {{- ')' }}{{ '' if loop.last else '\\n' }}
            {%- endfor %}
            {{- '</function_calls>' }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"qwen3_coder": QWEN, "hermes": QWEN3, "olmo3": OLMO}
"""By the format of calls."""
