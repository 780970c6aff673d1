"""NoSQL operators and prototypes: a value or key that becomes an operator of a query, or the prototype of all objects.

``{"password": {"$ne": ""}}`` matches every password where the driver takes the object as it comes. The keys of a
document are looked at by :func:`find_in_key`, JSON within a text and JavaScript that breaks out of a string by
:func:`find`.
"""

from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading, words

CLASS = "nosql"
PROTOTYPE = "prototype"
CERTAIN = 5
SUSPICIOUS = 3

OPERATORS = words(
    "$where $ne $nin $in $gt $gte $lt $lte $eq $not $or $and $nor $regex $exists $type $expr "
    "$jsonschema $mod $text $all "
    "$elemmatch $size $function $accumulator $lookup $out $merge $options $comment $set $unset $inc $push "
    "$pull $rename"
)

_OPERATOR = (
    r"\$(?:where|ne|nin|in|gte?|lte?|eq|not|or|and|nor|regex|exists|type|expr|mod|text|all|"
    r"elemmatch|size|function|options|comment)"
)
_IN_JSON = Pattern(rf"(?:[{{,\[]|^)\s{{0,9}}['\"]?{_OPERATOR}['\"]?\s{{0,9}}:")
_IN_BRACKETS = Pattern(rf"\[\s{{0,3}}['\"]?{_OPERATOR}['\"]?\s{{0,3}}\]")
_SCRIPT = Pattern(
    r"['\"]\s{0,4}(?:;|&&|\|\||\}|\))\s{0,4}(?:return\b|var\s|this\.|while\s{0,3}\(|db\.|sleep\s{0,3}\(|"
    r"function\s{0,3}\(|(?:\d{1,9}|[\"']\w{0,20}[\"']?)\s{0,3}={2,3}\s{0,3})|"
    r"\|\|\s{0,3}(?:\d{1,9}\s{0,3}={2,3}\s{0,3}\d|['\"][^'\"]{0,20}['\"]\s{0,3}={2,3})|"
    r";\s{0,3}return\s{1,4}(?:true|1|this\.\w{1,20})\s{0,3}(?:[;}]|$|//)|"
    r"\bthis\.\w{1,40}\s{0,3}(?:\.match\s{0,3}\(|={2,3}|!=)|"
    r"\bdb\.\w{1,40}\.(?:insert|drop|remove|find|update|delete|mapreduce|aggregate|count)\w{0,12}\s{0,3}\(|"
    r"\bdb\.(?:getcollectionnames|dropdatabase|version|injection)\b"
)
_SCRIPT_WORDS = ("return", "this.", "db.", "==", "var ", "while", "function", "sleep")
_PROTOTYPE = Pattern(
    r"__proto__\s{0,4}(?:['\"]?\s{0,4}(?:\]?\s{0,3}[\[.:=]|\]))|constructor\s{0,3}(?:\.|"
    r"\[\s{0,3}['\"]?|\]\[)\s{0,3}prototype|\[\s{0,3}['\"]?(?:__proto__|prototype)['\"]?\s{0,3}\]"
)


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The operators and the script in a text, each with its score."""
    lower = reading.lower
    reading.steps += len(lower)
    if "$" in lower and (reading.search(_IN_JSON) or reading.search(_IN_BRACKETS)):
        yield "operator", CERTAIN
    if any(word in lower for word in _SCRIPT_WORDS) and reading.search(_SCRIPT):
        yield "script", CERTAIN


def find_prototype(reading: Reading) -> Iterator[tuple[str, int]]:
    """A text that would change a prototype, if it were merged into an object, with its score."""
    if ("proto" in reading.lower) and reading.search(_PROTOTYPE):
        yield "text", CERTAIN


def find_in_key(key: str, child: object) -> Iterator[tuple[str, str]]:
    """What a key of a document would be: its class, and the name of the finding.

    Args:
        key: The key, or the name of a field of a form or a query.
        child: What it has, to see ``constructor`` with a ``prototype``.
    """
    lower = key.lower()
    if ("proto" in lower and ("__proto__" in lower or _PROTOTYPE.search(lower))) or (
        lower == "constructor" and isinstance(child, dict) and "prototype" in child
    ):
        yield PROTOTYPE, "key"
    if "$" in lower and (lower in OPERATORS or _IN_BRACKETS.search(lower)):
        yield CLASS, "key"
