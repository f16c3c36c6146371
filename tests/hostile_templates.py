"""Chat templates that would take minutes or gigabytes, and what stops each."""

# ruff: noqa: E501

from __future__ import annotations

BIG = "{% set ns = namespace(x='0123456789abcdef') %}{% for i in range(17) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
LIST = "{% set ns = namespace(l=[1, 2, 3]) %}{% for i in range(17) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"
#: Tuples in tuples: 2^60 of them if each counts as often as it is seen.
SHARED = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"


def forever(body: str) -> str:
    return "{% for i in range(99999) %}{% for j in range(99999) %}" + body + "{% endfor %}{% endfor %}"


STEPS, MEMORY, TEXT, WRITES = (
    " steps; pass a plain prompt",
    "more than 128 MB",
    "text of more than",
    "it writes more than",
)
#: Templates that would take minutes or gigabytes, and what stops each.
HOSTILE: dict[str, tuple[str, str]] = {
    "loops": (forever(""), STEPS),
    "loops that write": (forever("x"), STEPS),
    "loops over names": (
        forever("{% if false %}" + "".join(f"{{{{ a{k} }}}}" for k in range(3000)) + "{% endif %}"),
        STEPS,
    ),
    "loop conditions": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        STEPS,
    ),
    "a recursive loop": ("{% for i in [range(300)] recursive %}{{ loop([i, i]) }}{% endfor %}", "refuses"),
    "generators": ("{% for i in range(99999) %}{{ range(99999) | reject('integer') | list }}{% endfor %}", STEPS),
    "a generator that gives nothing": (
        "{% for i in range(999) %}{{ range(99999) | select('string') | first }}{% endfor %}",
        STEPS,
    ),
    "macro recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it recurses too deeply"),
    "macro doubling": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        STEPS,
    ),
    "call blocks": (
        "{% macro f(n) %}{% if n %}{% set c = caller %}{% call f(n-1) %}{{ c() }}{{ c() }}{% endcall %}{% else %}{{ caller() }}"
        "{% endif %}{% endmacro %}{% call f(40) %}x{% endcall %}",
        STEPS,
    ),
    "lipsum": ("{{ lipsum(100000) }}", "'lipsum' is undefined"),
    "repeated text": ("{{ 'x' * 10**9 }}", TEXT),
    "repeated text, reversed": ("{{ 10**9 * 'x' }}", TEXT),
    "repeated list": ("{{ [0] * 10**9 }}", STEPS),
    "repeated lists": ("{% for i in range(9999) %}{% set x = [0] * 1000000 %}{% endfor %}", MEMORY),
    "a power": ("{{ 9 ** (9 ** 9) }}", "number of more than 4,096 bits"),
    "squares": (
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "4,096 bits",
    ),
    "a long number": ("{{ " + "9" * 900_000 + " }}", "a number of 2,000 digits"),
    "a long hexadecimal number": ("{{ 0x" + "f" * 1500 + " * 2 }}", "4,096 bits"),
    "a number from text": ("{{ ('f' * 4000000) | int(0, 16) }}", "4,096 bits"),
    "printf width": ("{{ '%1000000000d' % 1 }}", "field of more than 10,000"),
    "printf precision": ("{{ '%.1000000000f' % 1 }}", "field of more than 10,000"),
    "printf width by argument": ("{{ '%*d' % (1000000000, 1) }}", "width is a variable"),
    "printf many": (BIG + "{{ ('%(a)s' * 100) % {'a': ns.x} }}", TEXT),
    "printf keys": ("{{ ('%(' * 2000000) % {'a': 1} }}", "text of more than"),
    "printf filter": ("{{ '%1000000000d' | format(1) }}", "field of more than 10,000"),
    "format width": ("{{ '{:1000000000}'.format(1) }}", "field of more than 10,000"),
    "format width by argument": ("{{ '{:{w}}'.format(1, w=1000000000) }}", "field of more than 10,000"),
    "format many": (BIG + "{{ ('{0}' * 100).format(ns.x) }}", TEXT),
    "format map": (BIG + "{{ ('{a}' * 100).format_map({'a': ns.x}) }}", TEXT),
    "format braces": ("{{ ('{{' * 2000000).format() }}", STEPS),
    "format by filter": ("{{ '{:1000000000}'['format'](1) }}", "field of"),
    "replace nothing": (BIG + "{{ ns.x.replace('', ns.x) }}", TEXT),
    "replace filter": (BIG + "{{ ns.x | replace('0', ns.x) }}", TEXT),
    "doubling ~": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        TEXT,
    ),
    "doubling +": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        TEXT,
    ),
    "doubling lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        MEMORY,
    ),
    "doubling blocks": (
        "{% set ns = namespace(x='abc') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        WRITES,
    ),
    "doubling join": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ([ns.x] * 2) | join %}{% endfor %}",
        TEXT,
    ),
    "printed": (SHARED + "{{ ns.x }}", STEPS),
    "joined": (SHARED + "{{ ns.x ~ 'a' }}", STEPS),
    "compared": (SHARED.replace("ns.x", "ns.y").replace("(x=", "(y=") + SHARED + "{{ ns.x == ns.x }}", STEPS),
    "hashed": (SHARED + "{{ {ns.x: 1} }}", STEPS),
    "looked up": (SHARED + "{{ {}[ns.x] }}", STEPS),
    "got": (SHARED + "{{ {}.get(ns.x) }}", STEPS),
    "searched": (SHARED + "{{ ns.x in {} }}", STEPS),
    "as JSON": (SHARED + "{{ ns.x | tojson }}", STEPS),
    "raised": (SHARED + "{{ raise_exception(ns.x) }}", STEPS),
    "made unique": (SHARED + "{{ [ns.x] | unique | list }}", STEPS),
    "tested": (SHARED + "{{ ns.x is eq(ns.x) }}", STEPS),
    "sorted": (SHARED + "{{ [ns.x, ns.x] | sort }}", STEPS),
    "a dict of it": (SHARED + "{{ dict([(ns.x, 1)]) }}", STEPS),
    "changed": (SHARED + "{% for i in [1] %}{{ loop.changed(ns.x) }}{% endfor %}", STEPS),
    "upper case": (SHARED + "{{ ns.x | upper }}", STEPS),
    "shared arguments": (
        "{% macro f(n) %}{{ f(n-1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(60, 1) }}",
        STEPS,
    ),
    "deep": (
        "{% set ns = namespace(x=1) %}{% for i in range(90000) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
        "200 levels",
    ),
    "itself": ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "200 levels"),
    "center": ("{{ 'a' | center(10**9) }}", TEXT),
    "center by name": ("{{ 'a' | center(width=10**9) }}", TEXT),
    "mapped center": ("{{ ['a'] | map('center', 10**9) | list }}", TEXT),
    "center method": ("{{ 'a'.center(10**9) }}{{ 'a'.ljust(10**9) }}", TEXT),
    "rjust": ("{{ 'a'.rjust(10**9) }}", TEXT),
    "zfill": ("{{ 'a'.zfill(10**9) }}", TEXT),
    "expandtabs": ("{{ '\\t'.expandtabs(10**9) }}", TEXT),
    "indent": ("{{ 'a\\nb' | indent(10**9) }}", TEXT),
    "indent many lines": ("{{ ('\\n' * 100000) | indent(1000) }}", TEXT),
    "join": (BIG + "{{ ([1] * 1000) | join(ns.x) }}", TEXT),
    "join an attribute": (BIG + "{{ ([{'a': ns.x}] * 1000) | join(attribute='a') }}", TEXT),
    "join method": (BIG + "{{ ns.x.join(['a'] * 1000) }}", TEXT),
    "batch": ("{{ [1] | batch(10**9, 0) | list }}", "stopped"),
    "slice": ("{{ [] | slice(10**9) | list }}", STEPS),
    "round": ("{{ 1 | round(-1000000000) }}", "more than 400 digits"),
    "round up": ("{{ 1 | round(1000000000, 'ceil') }}", "more than 400 digits"),
    "JSON indent": ("{{ [[1]] | tojson(indent=10**9) }}", TEXT),
    "JSON escapes": (BIG + "{{ ns.x | tojson(ensure_ascii=true) }}", TEXT),
    "sorted texts": (
        BIG + "{% for i in range(999) %}{{ [ns.x ~ 'b', ns.x ~ 'a', ns.x] | sort | length }}{% endfor %}",
        "stopped",
    ),
    "groupby": (LIST + "{{ ns.l | groupby('x') }}", "stopped"),
    "sums of lists": ("{{ ([[1, 2]] * 100000) | sum(start=[]) | length }}", "stopped"),
    "split": ("{% for i in range(999) %}{{ ('a ' * 2000000).split() | length }}{% endfor %}", MEMORY),
    "letters": (BIG + "{{ (ns.x | list) | length }}{{ (ns.x | list) | length }}", MEMORY),
    "words": ("{% for i in range(99) %}{{ ('a ' * 2000000) | wordcount }}{% endfor %}", "stopped"),
    "escape": ("{{ ('<' * 1000000) | e }}", TEXT),
    "escaped again": ("{{ ('<' | safe).join(['&' * 100000] * 30) }}", TEXT),
    "search from the right": ("{{ ('a' * 2000000).rfind('b' ~ 'a' * 1000000) }}", STEPS),
    "strip": ("{{ ('a' * 2000000).strip('b' * 1000000 ~ 'a') }}", STEPS),
    "searches": (
        "{% set a = 'a' * 2000000 %}{% set b = 'b' ~ a %}{% for i in range(99999) %}{{ b in a ~ a }}{% endfor %}",
        "stopped",
    ),
    "comparisons": (
        "{% set a = 'a' * 4000000 %}{% set b = 'a' * 4000000 %}{% for i in range(99999) %}{{ a == b }}{% endfor %}",
        "stopped",
    ),
    "slices": ("{% set a = 'a' * 4000000 %}{% for i in range(99999) %}{% set x = a[1:] %}{% endfor %}", MEMORY),
    "reversed": ("{% set a = 'a' * 4000000 %}{% for i in range(99999) %}{% set x = a | reverse %}{% endfor %}", STEPS),
    "star arguments": (
        "{% macro f() %}{{ varargs | length }}{% endmacro %}{% for i in range(99999) %}{{ f(*range(99999)) }}{% endfor %}",
        STEPS,
    ),
    "attributes of attributes": ("{{ range(9999) | map(attribute='a.' * 100000) | list }}", "100 characters"),
    "dates": ("{{ strftime_now('%1000000000d') }}", "formats the date"),
    "many dates": ("{{ strftime_now('%c' * 100000) }}", "formats the date"),
    "a joiner": ("{% set j = joiner('x' * 4000000) %}{% for i in range(99999) %}{{ j() }}{% endfor %}", WRITES),
    "kept texts": (
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, '😀' * 1000000] %}{% endfor %}",
        MEMORY,
    ),
    "kept dicts": (
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, dict.fromkeys(range(9999))] %}{% endfor %}",
        MEMORY,
    ),
    "kept items": (
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, range(9999) | list] %}{% endfor %}",
        MEMORY,
    ),
    "too long": ("a" * 1_000_001, "more than 1,000,000 characters"),
    "too many tokens": ("{{ a }}" * 20_000, "more than 30,000 tokens"),
    "parentheses": ("{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}", "it recurses too deeply"),
    "nested ifs": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "does not compile"),
}
