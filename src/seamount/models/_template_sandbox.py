"""The child process that renders chat templates, started by `models.template`.

A template is a stranger's program. Here it runs in Jinja's immutable sandbox, in a process without
environment, which can open no file, start no process, take no more than `memory` bytes, and is ended by the
kernel after `cpu_s` seconds of processor time per message: no loop, large string or escape reaches the
server. Must not import Seamount; knows only the standard library and Jinja.

Messages both ways: 4 bytes of length (big endian), then JSON. In, once:
{"template", "cpu_s", "memory", "max_chars"}; then {"batch": [variables, ...], "now"}. Out: {"text"} or
{"error": kind, "message"}; for a batch {"answers": [one of these for each]}.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.debug  # loaded now: no file can be opened later
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

# Run before the limits are set, so that codecs and modules that Python loads on first use are there.
_REHEARSALS = (
    """{% set n = namespace(a='\\n\\u00e9') %}{% macro m(x) %}{{ x | tojson }}{% endmacro %}
    {{- m({'a': 1.5}) | trim }}
    {%- for i in range(2) %}{{ strftime_now('%d %b %Y') }}{{ lipsum(n=1) }}{% continue %}{% endfor %}""",
    "{{ raise_exception('x') }}",
    "{{ missing.field }}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "{{ ''.__class__.x }}",
)


class _Raised(jinja2.TemplateError):
    """The template called raise_exception: the caller's messages are wrong."""


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, a mark for training: renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body's nodes in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body).set_lineno(line)]


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscore names, which the sandbox could not guard once they are set."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """Return a dict with these keys."""
        return dict.fromkeys(keys, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise _Raised(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Clock:
    """The parent's local time: this process has no time zone of its own."""

    now = datetime.min

    def strftime(self, pattern: str) -> str:
        return self.now.strftime(pattern)


def _environment(clock: _Clock) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=clock.strftime, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _limit(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's wall clock is the only limit there
        return
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for kind, value in limits.items():
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a kernel that does not know this limit; the others still hold
            continue


def _arm(cpu_s: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF's default action ends the process


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(4)
    if len(header) < 4:
        sys.exit(0)
    return json.loads(stream.read(struct.unpack(">I", header)[0]))


def _send(stream: BinaryIO, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def _attempt(action: Any, *, is_render: bool) -> dict[str, Any]:
    try:
        return {"value": action()}
    except _Raised as error:
        return {"error": "raised", "message": str(error)}
    except jinja2.exceptions.SecurityError as error:
        return {"error": "security", "message": str(error)}
    except MemoryError:
        return {"error": "limit", "message": "it needs too much memory"}
    except Exception as error:  # noqa: BLE001 - a process edge: a stranger's program may raise anything
        return {"error": "render" if is_render else "compile", "message": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Serve renders until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows, where a console's Ctrl-C reaches children too
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    order = _receive(source)
    clock = _Clock()
    environment = _environment(clock)
    for rehearsal in _REHEARSALS:
        _attempt(lambda: environment.from_string(rehearsal).render(), is_render=True)  # noqa: B023
    _limit(order["memory"])
    _arm(order["cpu_s"])
    compiled = _attempt(lambda: environment.from_string(order["template"]), is_render=False)
    _arm(0)
    if "error" in compiled:
        _send(sink, {"error": compiled["error"], "message": compiled["message"][:2000]})
        return
    _send(sink, {"text": ""})
    template: jinja2.Template = compiled["value"]
    while True:
        job = _receive(source)
        clock.now = datetime.fromisoformat(job["now"])
        _send(sink, {"answers": [_rendered(template, variables, order) for variables in job["batch"]]})


def _rendered(template: jinja2.Template, variables: dict[str, Any], order: dict[str, Any]) -> dict[str, str]:
    _arm(order["cpu_s"])
    result = _attempt(lambda: template.render(**variables), is_render=True)
    _arm(0)
    if "error" in result:
        return {"error": result["error"], "message": result["message"][:2000]}
    text: str = result["value"]
    if len(text) > order["max_chars"]:
        return {"error": "limit", "message": f"it wrote more than {order['max_chars']} characters"}
    return {"text": text}


if __name__ == "__main__":
    main()
