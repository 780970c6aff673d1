"""Server-side templates and includes: a value that a template engine would run instead of show.

It takes the delimiters of an engine and within them an expression that only a probe or a program has: arithmetic on
numbers, a way into the objects of the language, a call. ``{{ name }}`` and ``${name}`` are texts that somebody writes.
"""

from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "template"
CERTAIN = 5
SUSPICIOUS = 3

_EXPRESSION = Pattern(
    r"(?:\{\{|\{%|\$\{|#\{|<%[=-]?|\*\{|@\{|~\{|\[\[|@\(|\$\(\(|#set\s?\(|<#|\{php\}|"
    r"\{\$)([^\n]{0,300})"
)
_ARITHMETIC = Pattern(
    r"[\s('\"=${\[#]{0,8}\d{1,9}['\"]?\s{0,4}[*+%/-]{1,2}\s{0,4}['\"]?\d{1,9}['\"]?[\s)]{0,8"
    r"}(?:\}|%|\]|\)|$)|[\s('\"]{0,8}['\"]\d{1,9}['\"]\s{0,3}\*|[\s('\"]{0,8}\d{1,9}\s{0,3}\*\s{0,3}['\"]"
)
_INSIDE = Pattern(
    r"__\w{3,20}__|\bconfig(?:\.items|\s{0,3}[}|\[])|\b(?:lipsum|cycler|joiner|self|namespace|request|"
    r"url_for|get_flashed_messages|dump|app|settings)"
    r"(?:\.|\[|\s{0,3}\|)\s{0,3}['\"]?(?:_|application|environ|request\.server|secret|settings|mro|class|"
    r"init|args\b|attr)|\|\s{0,3}attr\s{0,3}\(|"
    r"\bt\s{0,3}\(\s{0,3}java\.|java\.lang|\.getclass\s{0,3}\(|\.forname\s{0,3}\(|getruntime|"
    r"freemarker\.template|\?new\s{0,3}\(|"
    r"\.constructor\b|\$class\.inspect|_self\.env|registerundefinedfiltercallback|\|\s{0,3}(?:filter|map|"
    r"sort|reduce)\s{0,3}\(\s{0,3}['\"](?:system|exec|passthru)|"
    r"\bimport\s{1,3}(?:os|subprocess)|os\.(?:popen|system)|popen\s{0,3}\(|(?:system|exec|passthru|"
    r"shell_exec|phpinfo|file_get_contents|file\.open|file\.read|dir\.entries|io\.popen|include|fetch|"
    r"get_user_file)\s{0,3}\(|"
    r"\bsystem\s{1,3}['\"]|global\.process|process\.(?:main|env)|require\s{0,3}\(|root\.process|range\.constructor|"
    r"\bdebug\s{0,3}%|\{%\s{0,3}(?:debug|include|import)|self\b\s{0,3}\}|@java|ognl|#(?:context|"
    r"_memberaccess|request|session|cmd|rt)\b|system\.(?:getenv|getproperty|io|diagnostics)|"
    r"class\.forname"
)
_OBJECTS = Pattern(
    r"__(?:class|mro|subclasses|globals|builtins|base|bases|init)__[\w.()\[\]'\",+|"
    r"-]{1,80}__\w{3,20}__|__(?:subclasses|import|globals|builtins)__\s?[(\[]|_memberaccess|ognlcontext|"
    r"@java\.lang\.|new\s{1,3}java\.lang\.process"
)
_INCLUDE = Pattern(r"<!--\s{0,3}#\s{0,3}(?:exec|include|echo|config|printenv|set|fsize|flastmod|if|elif)\b")
_CALL = Pattern(r"[\s=]{0,4}['\"\[(]?[\w.'\"\[\]]{1,60}\([^)]{0,80}\)")


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The expressions in a text that an engine would run, each with its score."""
    lower = reading.lower
    reading.steps += 2 * len(lower)
    if "<!--" in lower and reading.search(_INCLUDE):
        yield "server-side-include", CERTAIN
    if any(word in lower for word in ("__", "java", "ognl", "_member")) and reading.search(_OBJECTS):
        yield "objects", CERTAIN
    if not any(sign in lower for sign in ("{", "<%", "<#", "@(", "[[", "#set", "$((")):
        return
    for match in _EXPRESSION.finditer(lower):
        inside = match[1]
        reading.steps += 3 * len(inside)
        if inside.lstrip(" =")[:1] == "`" and match[0].startswith(("${", "#{", "<%")):
            yield "shell", CERTAIN
        elif _ARITHMETIC.match(inside):
            yield "arithmetic", CERTAIN
        elif _INSIDE.search(match[0]):
            # A template literal of JavaScript, which an article on it quotes.
            quoted = match[0].startswith("${") and reading.is_long_prose and "java." not in inside
            yield "program", SUSPICIOUS if quoted else CERTAIN
        elif match[0].startswith(("{{", "<%", "#{")) and _CALL.match(inside):
            yield "call", SUSPICIOUS
