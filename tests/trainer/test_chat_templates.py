"""Chat templates that loop forever or build endless text: stopped, and one error that names the row."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import resource
import threading

import pytest
from torch.utils.data import DataLoader
from transformers.utils import chat_template_utils

from cwdpo_trainer import chat_templates
from cwdpo_trainer.chat_templates import BoundedEnvironment
from cwdpo_trainer.cli import main
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.errors import InputError

STEPS = 20_000  # that most of these tests allow
SECONDS = 10.0  # a loop without a limit runs for hours
GIGABYTE = 1 << 20  # in kB, as `getrusage` counts
END = "{% endfor %}"
LOOP = "{% for a in range(99999) %}"
GROW = "{%% set n = namespace(x=%s) %%}{%% for a in range(99999) %%}{%% set n.x = %s %%}{%% endfor %%}"
TOO_LONG = "steps: does it loop forever?"
TOO_LARGE, TOO_WIDE, TOO_MANY_BITS = (
    "makes a text or list of more",
    "with a width of more than 5",
    "a number of more than",
)
HOSTILE = {
    "nested loops": (LOOP * 4 + END * 4, TOO_LONG),
    "nested loops with a test": ((LOOP[:-3] + " if a >= 0 %}") * 3 + END * 3, TOO_LONG),
    "nested loops with loop.length": (LOOP * 3 + "{% if loop.length and loop.last %}{% endif %}" + END * 3, TOO_LONG),
    "loops over a text": ("{% set x = 'x' * 5000 %}" + "{% for a in x %}" * 3 + END * 3, TOO_LONG),
    "loops over what filters make": ("{% for a in range(99999)|map('string')|list %}" * 3 + END * 3, TOO_LONG),
    "a recursive loop": ("{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", "RecursionError"),
    "a broad recursive loop": (
        "{% for a in range(60) recursive %}{% if loop.depth < 9 %}{{ loop(range(60)) }}{% endif %}{% endfor %}",
        TOO_LONG,
    ),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        TOO_LONG,
    ),
    "call blocks": (
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 18 + "{% endcall %}" * 18,
        TOO_LONG,
    ),
    "blocks in loops": (LOOP + "{% block b scoped %}" + LOOP + END + "{% endblock %}" + END, TOO_LONG),
    "a text that doubles with ~": (GROW % ("'x'", "n.x ~ n.x"), TOO_LONG),
    "a text that doubles with +": (GROW % ("'x'", "n.x + n.x"), TOO_LONG),
    "a list that doubles": (GROW % ("[1]", "n.x + n.x"), TOO_LONG),
    "a text that doubles by join": (GROW % ("'x'", "[n.x, n.x]|join"), TOO_LONG),
    "a number that doubles its digits": (GROW % ("9", "n.x * n.x"), TOO_MANY_BITS),
    "a product": ("{{ 'x' * 99999999999 }}", TOO_LARGE),
    "a product of a list": ("{{ 99999999999 * [1] }}", TOO_LARGE),
    "a power": ("{{ 10 ** (10 ** 10) }}", TOO_MANY_BITS),
    "a power of a negative number": ("{{ (-10) ** 99999999999 }}", TOO_MANY_BITS),
    "a filter with a width": ("{{ 'x'|center(99999999999) }}", TOO_LARGE),
    "an indent": ("{{ 'x\\ny'|indent(99999999999) }}", TOO_LARGE),
    "JSON with an indent": ("{{ [1]|tojson(indent=99999999999) }}", TOO_LARGE),
    "batches": ("{{ [1]|batch(99999999999, 'x')|list }}", TOO_LARGE),
    "slices": ("{{ [1]|slice(99999999999)|list }}", TOO_LARGE),
    "a filter by name": ("{{ ['x']|map('center', 99999999999)|list }}", TOO_LARGE),
    "a method with a width": ("{{ 'x'.ljust(99999999999) }}", TOO_LARGE),
    "zeros": ("{{ 'x'.zfill(99999999999) }}", TOO_LARGE),
    "tabs": ("{{ '\\t'.expandtabs(99999999999) }}", TOO_LARGE),
    "a replacement": ("{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}", TOO_LARGE),
    "a replacement by a filter": ("{% set x = 'x' * 99999 %}{{ x|replace('x', x) }}", TOO_LARGE),
    "a separator": ("{% set x = 'x' * 99999 %}{{ x.join(x) }}", TOO_LARGE),
    "a format of %": ("{{ '%99999999999d' % 1 }}", TOO_WIDE),
    "a format of % by an argument": ("{{ '%*d' % (99999999, 1) }}", ""),
    "a format by a filter": ("{{ '%99999999999d'|format(1) }}", TOO_WIDE),
    "a format of {}": ("{{ '{:99999999999}'.format(1) }}", TOO_WIDE),
    "a format by an argument": ("{{ '{:{w}}'.format(1, w=99999999999) }}", TOO_LARGE),
    "much text": ("{% set x = 'x' * 99999 %}" + LOOP + "{{ x ~ x }}" + END, TOO_LONG),
    "invented words": ("{{ lipsum(n=99999999) }}", "UndefinedError: 'lipsum' is undefined"),
    "an error of its own": ("{{ raise_exception('no images') }}", "TemplateError: no images"),
    "a wrong template": ("{% for %}", "TemplateSyntaxError"),
    "an undefined name": ("{{ messages[0].nothing.more }}", "UndefinedError"),
}  # fmt: skip


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(chat_templates, "STEPS", STEPS)


def chat(collator, template):
    processor = copy.deepcopy(collator.processor)
    processor.chat_template = template
    return PairCollator(processor)


@pytest.fixture
def row(chat_rows):
    return chat_rows[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_error(collator, row, name, few_steps, fails_after_a_minute):
    template, problem = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as error:
        chat(collator, template).prompt_text(row)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE
    assert str(error.value).startswith(f"{row.where}: chat template: expected a template that renders the messages of ")
    assert problem in str(error.value)


FOREVER = LOOP * 4 + END * 4


def test_it_is_stopped_in_threads(collator, row):
    errors = []

    def work():
        try:
            chat(collator, FOREVER).prompt_text(row)
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [TOO_LONG in str(error) for error in errors] == [True, True]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_it_is_stopped_in_workers(collator, row, few_steps, context):
    loader = DataLoader([row], collate_fn=chat(collator, FOREVER), num_workers=1, multiprocessing_context=context)
    with pytest.raises(InputError, match=r"does it loop forever\?"):
        list(loader)


def test_a_loop_that_only_some_rows_start_is_stopped_there(collator, row, few_steps):
    template = f"{{% if 'loop' in messages[0].content[1].text %}}{FOREVER}{{% endif %}}text"
    looping = chat(collator, template)
    assert looping.prompt_text(row) == "text"
    content = [{"type": "image"}, {"type": "text", "text": "loop"}]
    with pytest.raises(InputError, match="does it loop forever"):
        looping.prompt_text(dataclasses.replace(row, prompt=[{"role": "user", "content": content}]))
    assert looping.prompt_text(row) == "text"  # each text has steps of its own


@pytest.mark.parametrize("command", ["check", "run"])
def test_it_is_one_error_of_a_command(settings, write_config, task, tmp_path, collator, capsys, few_steps, command):
    chat(collator, FOREVER).processor.save_pretrained(tmp_path / "model")
    rows = '{"prompt": [{"role": "user", "content": "a"}], "chosen": "red", "rejected": "%s"}\n'
    (tmp_path / "rows.jsonl").write_text("".join(rows % color for color in ("blue", "green")))
    (tmp_path / "held.jsonl").write_text(rows % "left")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).symlink_to(task / "model" / name)
    settings["model"] = {"path": "model"}
    settings["data"] = {"train": "rows.jsonl", "heldout": "held.jsonl", "max_length": 64}
    assert main([command, str(write_config(settings)), *(["--no-model"] if command == "check" else [])]) > 0
    printed = capsys.readouterr()
    assert TOO_LONG in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err


REAL = (
    "{%- set ns = namespace(seen=0, text='') -%}"
    "{%- macro part(p) -%}{%- if p.type == 'image' -%}<image>{%- else -%}{{ p.text | trim }}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages if message.role != 'system' recursive %}"
    "{{- '<|' + message['role'] + '|>' }}{{ loop.index }}/{{ loop.length }}{{ ' first' if loop.first }}"
    "{%- for p in message.content %}{{ part(p) }}{% if not loop.last %}, {% else %}.{% endif %}"
    "{%- set ns.seen = ns.seen + 1 %}{%- endfor %}{%- endfor %}"
    "{%- for key, value in {'b': 1, 'a': [1, 2]} | dictsort %} {{ key ~ '=' ~ value | tojson }}{% endfor %}"
    "{{ 'x' * 3 }}{{ 7 % 4 }}{{ '%s-%d' % ('a', 4) }}{{ '{}'.format(5) }}{{ 2 ** 5 }}"
    "{{ ['a', 'b'] | join(',') }}{{ ns.seen }}{% generation %}!{% endgeneration %}"
    "{{ 'a,b'.split(',')[-1].replace('b', 'c') }}"
    "{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    "{{ strftime_now('%Y')|length }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ [3,1]|sort }}"
)


def test_templates_render_as_before(collator, row, monkeypatch):
    """The same text as in the sandbox that transformers uses."""
    ours = chat(collator, REAL).prompt_text(row)
    assert chat_template_utils.ImmutableSandboxedEnvironment is BoundedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", BoundedEnvironment.__mro__[1])
    theirs = chat(collator, REAL).prompt_text(row)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert ours == theirs
    assert ours.startswith("<|user|>1/1 first<image>, describe. a=[1, 2] b=1xxx3a-4532a,b2!c041")


def test_a_long_conversation_is_within_the_limits(collator, row):
    """200 messages of 10,000 characters, through a template that goes through all of them for each."""
    template = (
        "{% for m in messages %}{% set n = namespace(last=0) %}{% for o in messages %}{% if o.role == 'user' %}"
        "{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
        "{{ '<s> ' + m.content.split('</think>')[-1].replace('<s>', '').strip() + ' </s>' }}{% endfor %}"
    )
    messages = [{"role": role, "content": "word " * 2000} for _ in range(100) for role in ("user", "assistant")]
    text = chat(collator, template).prompt_text(dataclasses.replace(row, prompt=messages))
    assert len(text) > 1_900_000


def test_an_error_of_a_template_can_be_sent_between_processes(collator, row):
    with pytest.raises(InputError) as error:
        chat(collator, "{{ raise_exception('no') }}").prompt_text(row)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
