"""Chat templates: found and rendered as transformers does; what is broken or reaches further is an error."""

import importlib.util
import json
from pathlib import Path

import pytest
from trained_tokenizers import (
    byte_level_as_gguf,
    byte_level_json,
)

from tpjax.errors import CheckpointError, RequestError
from tpjax.text.chat_template import ChatTemplates
from tpjax.text.loading import load_tokenizer, tokenizer_from_gguf
from tpjax.text.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hi 你好"}]


def _with_template(byte_level_dir: Path, template: str, **more: str) -> Tokenizer:
    named = {f"tokenizer.chat_template.{name}": source for name, source in more.items()}
    return tokenizer_from_gguf(
        byte_level_as_gguf(byte_level_dir, **{"tokenizer.chat_template": template}, **named)
    )


def test_chat_template_renders(byte_level):
    system = "<|im_start|>system\nBe <brief> & kind.<|im_end|>\n"
    user = "<|im_start|>user\nHi 你好<|im_end|>\n"
    bare = byte_level.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert bare.replace("    ", "") == system + user
    assert byte_level.apply_chat_template(MESSAGES) == bare + "<|im_start|>assistant\n"


TOOLS = [{"type": "function", "function": {"name": "f<>", "parameters": {}}}]
# Template -> what transformers 5.23 renders from MESSAGES, TOOLS, extra="!" and no generation prompt.
TEMPLATES = {
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "  {%- if loop.first %}{{ raise_exception('no system') }}{% endif %}\n{{ m | tojson }}\n{% endfor %}": (
        '<|bos|>{"role": "user", "content": "Hi 你好"}\n'
    ),
    "{{ messages[:1] | tojson(indent=1) }}{{ tools | tojson }}{{ undefined_name }}{{ eos_token }}": (
        '[\n {\n  "role": "system",\n  "content": "Be <brief> & kind."\n }\n]'
        '[{"type": "function", "function": {"name": "f<>", "parameters": {}}}]<|eos|>'
    ),
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% generation %}\n"
    "{{ m.content | trim }}{% endgeneration %}{% if ns.n == 1 %}{% break %}{% endif %}{% endfor %}"
    "{{ extra }}": "Be <brief> & kind.!",
    "  {% if not add_generation_prompt %}\nyear {{ strftime_now('%Y') | length }}\n  {% endif %}\nend": (
        "year 4\nend"
    ),
}


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.items())
def test_chat_templates_run_as_in_transformers(byte_level_dir, template, expected):
    options = {"tools": TOOLS, "add_generation_prompt": False, "extra": "!"}
    tokenizer = _with_template(byte_level_dir, template)
    assert tokenizer.apply_chat_template(MESSAGES, **options) == expected
    if importlib.util.find_spec("transformers"):
        from transformers import AutoTokenizer

        reference = AutoTokenizer.from_pretrained(byte_level_dir)
        options["chat_template"] = template
        assert reference.apply_chat_template(MESSAGES, tokenize=False, **options) == expected


@pytest.mark.parametrize("content", ("so, the", "so, the  ", "\n so", "a{{ b }}"))
@pytest.mark.parametrize(
    "template",
    (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}",
        "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}{{ '|' + messages[0].content }}",
        "{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}",
    ),
)
def test_a_final_message_is_continued_as_in_transformers(template, content):
    utilities = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="pip install -e '.[parity]'"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    (expected,), _ = utilities.render_jinja_template(
        conversations=[messages], chat_template=template, continue_final_message=True
    )
    templates = ChatTemplates({"default": "unused"}, {})
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert templates.render(messages, chat_template=template, **options) == expected


def test_a_final_message_that_cannot_be_continued():
    templates = ChatTemplates({"default": "{{ messages[0].content }}", "empty": "x"}, {})
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match="does not show the final message"):
        templates.render(messages, **options)
    with pytest.raises(RequestError, match="cannot both be true"):
        templates.render(messages, continue_final_message=True)
    with pytest.raises(RequestError, match="needs a final message with text"):
        templates.render([{"role": "assistant", "content": None}], **options)
    with pytest.raises(RequestError, match="chat_template, line 2"):
        templates.render(messages, chat_template="\n{% for %}")


def test_template_file_wins_and_named_templates_are_chosen(tmp_path, byte_level_dir):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    byte_level_json(tmp_path, chat_template=listed)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "plain"
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "from the file"
    named = _with_template(byte_level_dir, "plain", tool_use="with tools")
    assert named.apply_chat_template(MESSAGES, tools=[{}]) == "with tools"


LAYOUTS: dict[str, tuple[object, dict[str, str]]] = {
    "a list": ([{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}], {}),
    "an object": ({"default": "A", "tool_use": "B", "rag": "C"}, {}),
    "one file": ("old", {"chat_template.jinja": "A"}),
    "files": ("old", {"chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "B"}),
    "a file beside a list": (
        [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old"}],
        {"chat_template.jinja": "A"},
    ),
    "files of other names": (
        None,
        {"chat_template.jinja": "A{{ 1 + 1 }}", "additional_chat_templates/my-rag.v2.jinja": "C é"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_named_templates_are_found_as_transformers_finds_them(tmp_path, layout):
    inside, files = LAYOUTS[layout]
    byte_level_json(tmp_path, **({} if inside is None else {"chat_template": inside}))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    found = load_tokenizer(tmp_path)
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'tpjax[parity]'")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.chat_template
    assert found.chat_templates.sources == (expected if isinstance(expected, dict) else {"default": expected})
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        assert found.apply_chat_template(MESSAGES, tools=tools) == reference.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False
        )


def test_a_processors_template_counts_where_there_is_no_other(tmp_path):
    byte_level_json(tmp_path, chat_template=None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "of the processor"
    (tmp_path / "chat_template.jinja").write_text("of the tokenizer")
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "of the tokenizer"


def test_templates_without_a_default_are_named(tmp_path):
    byte_level_json(tmp_path, chat_template={"tool_use": "B", "rag": "C"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "B"
    with pytest.raises(RequestError, match="no chat template named 'default': it has rag, tool_use"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("value", (5, ["A"], [{"name": "default"}], {"default": 5}, [[]], True))
def test_what_is_no_template_is_refused(tmp_path, value):
    byte_level_json(tmp_path, chat_template=value)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is not a template"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("messages", [[], "hi", None, [{}], ["hi"], [{"role": 1, "content": "x"}]])
def test_malformed_messages_are_request_errors(byte_level, messages):
    with pytest.raises(RequestError, match="messages"):
        byte_level.apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content.x }}", "{{ messages + 1 }}"],
)
def test_template_refusal_is_a_request_error(byte_level_dir, template):
    with pytest.raises(RequestError, match="the chat template refused the messages: "):
        _with_template(byte_level_dir, template).apply_chat_template(MESSAGES)


def test_template_cannot_reach_python(byte_level_dir):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="unsafe"):
        _with_template(byte_level_dir, escape).apply_chat_template(MESSAGES)
    with pytest.raises(RequestError, match="unsafe"):
        _with_template(byte_level_dir, "{{ messages.append(1) }}").apply_chat_template(MESSAGES)


def test_absent_and_broken_templates(byte_level_dir, spm):
    with pytest.raises(RequestError, match="no chat template"):
        spm.apply_chat_template(MESSAGES)
    with pytest.raises(CheckpointError, match="chat template 'default', line 1"):
        _with_template(byte_level_dir, "{% for %}").apply_chat_template(MESSAGES)
