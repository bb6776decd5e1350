"""The template sandbox: what transformers' renders, and S8 (code, bombs and sizes that it must stop)."""

import pickle
import threading
import time

import pytest

from torchft.errors import UserError
from torchft.tokenizers import jinja
from torchft.tokenizers.jinja import END, START, Template


def render(source, **variables):
    return Template(source, "x.jinja").render(**variables)


def test_s8_no_code():
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ dict.__subclasses__() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ''|attr('__class__')|attr('mro') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    ):
        with pytest.raises(UserError, match=r"x\.jinja: the chat template"):
            render(source, messages=[{"role": "user"}])


LOOP_BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "{% for a in [[1]] recursive %}{{ loop(a) if a is iterable }}{{ loop([a, a]) }}{% endfor %}",
)


@pytest.mark.parametrize("source", LOOP_BOMBS)
def test_s8_loops_end(source, monkeypatch):
    monkeypatch.setattr(jinja, "MAX_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"runs for more than|recursion"):
        render(source)
    assert time.monotonic() - start < 3


def test_s8_loops_end_in_a_thread(monkeypatch):
    """Worker threads render too, so the clock must not need the main thread (signals do)."""
    monkeypatch.setattr(jinja, "MAX_SECONDS", 0.2)
    template, caught = Template(LOOP_BOMBS[0], "x.jinja"), []

    def work():
        try:
            template.render()
        except UserError as e:
            caught.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(caught) == 2


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 9999999999 }}",
        "{{ [0] * 9999999999 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ strftime_now('%9999999999Y') }}",
        "{{ 'x'|indent(9999999999, true) }}",
        "{{ [1]|tojson(indent=9999999999) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s|replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(s=['x', 'x']) %}{% for i in range(99) %}{% set ns.s = [ns.s|join] * 2 %}{% endfor %}",
        "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
        "{{ lipsum(9999999) }}",
        "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
)
def test_s8_texts_end(source):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"x\.jinja: the chat template"):
        render(source)
    assert time.monotonic() - start < 3


def test_s8_a_huge_template_is_refused():
    with pytest.raises(UserError, match="has 2,000,000 characters; the limit is 1,048,576"):
        Template("x" * 2_000_000, "x.jinja")


def test_a_broken_template_is_named():
    with pytest.raises(UserError, match=r"x\.jinja: the chat template does not compile: .*line 2"):
        Template("a\n{% for %}", "x.jinja")
    with pytest.raises(UserError, match="cannot render this conversation: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_white_space_json_and_controls():
    """Values by hand, of the options that transformers sets."""
    assert render("  {% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"
    assert render("{{ x | tojson }}", x={"b": "ü<", "a": [1, None]}) == '{"b": "ü<", "a": [1, null]}'
    assert render("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ a ~ 1 ~ 'b' }}{{ ['x', 'y'] | join('-') }}{{ 'aXa'.replace('a', 'b', 1) }}", a="q") == "q1bx-ybXa"
    assert render("{{ ', '.join(['a', 'b']) }}{{ [{'n': 1}, {'n': 2}] | join('+', attribute='n') }}") == "a, b1+2"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') + m('b') }}") == "<a><b>"


def test_generation_marks_and_their_scope():
    assert render("a{% generation %}b{% endgeneration %}c") == f"a{START}b{END}c"
    template = Template("{% for m in x %}{%- generation -%} {{ m }} {%- endgeneration -%}{% endfor %}", "x.jinja")
    assert template.has_marks
    assert template.render(x=["1", "2"]) == f"{START}1{END}{START}2{END}"
    assert not Template("{{ x }}", "x.jinja").has_marks


def test_pickles():
    assert pickle.loads(pickle.dumps(Template("{{ x }}!", "x.jinja"))).render(x="hi") == "hi!"
