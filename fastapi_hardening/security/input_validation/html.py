"""Cross-site scripting: a value that, shown in a page, would be code.

The text is read as a browser reads it, by the states of the HTML tokeniser (WHATWG HTML, section 13.2.5): what is a tag
and what are its attributes, also without quotes, with slashes between them and cut off at the end. Markup alone is
nothing; what runs is. That is an element that loads or holds code, an attribute that handles an event, an address or
a style that is a program. Two more ways need no tag: to break out of the attribute that the value is put into, and out
of a string of a script.

It is *not* a sanitiser: for HTML that is to be shown there is ``CleanHtml``.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading, words

CLASS = "xss"
CERTAIN = 5
SUSPICIOUS = 3

_NAME_END = Pattern(r"[\s/<>]")
_ATTRIBUTE = Pattern(
    r"""[\s/"'`]*+([^\s/>=][^\s/>=]*+)?+(?:\s*+=\s*+("[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z)|`[^`>]*+`?|[^\s>]*+))?+""",
    re.DOTALL,
)
_IGNORED_IN_ADDRESS = Pattern(r"[\x00-\x20\x7f-\xa0]+")
_COMMENT_IN_STYLE = Pattern(r"/\*.*?(?:\*/|\Z)", re.DOTALL)

# Elements that hold or load a program, or change where others load from, by what they need to have.
_RUNS = frozenset({"script"})
_LOADS = words(
    "iframe object embed applet frame frameset base bgsound layer ilayer import isindex link "
    "meta xml portal fencedframe "
    "animate set animatetransform animatemotion handler listener event-source xss"
)
_HOLDS = frozenset({"style"})
_BREAKS_OUT = frozenset({"script", "style", "title", "textarea", "noscript", "xmp", "noembed", "noframes", "iframe"})

_EVENTS = words(
    "abort activate afterprint afterscriptexecute afterupdate animationcancel animationend "
    "animationiteration "
    "animationstart auxclick beforeactivate beforecopy beforecut beforedeactivate beforeeditfocus "
    "beforeinput beforematch "
    "beforepaste beforeprint beforescriptexecute beforetoggle beforeunload begin blur bounce cancel "
    "canplay canplaythrough "
    "cellchange change click close command contentvisibilityautostatechange contextmenu controlselect copy "
    "cuechange cut "
    "dataavailable datasetchanged datasetcomplete dblclick deactivate drag dragend dragenter dragexit "
    "dragleave dragover "
    "dragdrop dragstart drop durationchange emptied end ended error errorupdate filterchange finish focus "
    "focusin focusout "
    "formchange forminput formdata fullscreenchange gotpointercapture hashchange help input invalid "
    "keydown keypress keyup "
    "layoutcomplete load loadeddata loadedmetadata loadend loadstart losecapture lostpointercapture "
    "message mousedown "
    "mouseenter mouseleave mousemove mouseout mouseover mouseup mousewheel move moveend movestart offline "
    "online pagehide "
    "pageshow paste pause play playing pointercancel pointerdown pointerenter pointerleave pointermove pointerout "
    "pointerover pointerrawupdate pointerup popstate progress propertychange ratechange readystatechange "
    "repeat reset "
    "resize resizeend resizestart rowenter rowexit rowsdelete rowsinserted scroll scrollend scrollsnapchange "
    "scrollsnapchanging search securitypolicyviolation seeked seeking select selectionchange selectstart "
    "show slotchange "
    "stalled start stop storage submit suspend syncrestored timeerror timeout timeupdate toggle touchcancel touchend "
    "touchmove touchstart transitioncancel transitionend transitionrun transitionstart unhandledrejection "
    "unload urlflip "
    "validationstatuschange volumechange waiting webkitanimationend webkitanimationiteration webkitanimationstart "
    "webkitfullscreenchange webkitmouseforcechanged webkittransitionend webkitwillrevealbottom wheel zoom "
    "qt_error message location"
)

_PROGRAM = Pattern(
    r"(?:javascript|vbscript|livescript|mocha|jscript|ecmascript|script):|(?:feed|"
    r"view-source|firefoxurl):.{0,20}javascript:"
)
_DATA = Pattern(
    r"data:(?:text/(?:html|xml|javascript|ecmascript|x-)|application/(?:x-?javascript|"
    r"javascript|xhtml|xml|ecmascript|x-)|image/svg|[;,])"
)
_STYLE = Pattern(
    r"expression\s{0,9}\(|behaviou?r\s{0,9}:|-moz-binding|javascript\s{0,9}:|vbscript:|"
    r"@import|-o-link|url\s{0,9}\(\s{0,9}['\"]?\s{0,9}(?:data:|javascript|//|https?:)"
)

_SINK = (
    r"(?:alert|prompt|confirm|eval|execscript|msgbox|setinterval|settimeout|setimmediate|function|fetch|"
    r"importscripts|"
    r"document\s?\.\s?(?:cookie|write(?:ln)?|location|domain|documentelement|body|forms|getelementbyid|createelement|"
    r"getelementsbytagname|vulnerable)|window\s?\.\s?(?:open|location|name|onerror)|string\s?\.\s?fromcharcode|"
    r"location\s?\.\s?(?:href|replace|assign|hash)|location\s?=|(?:parent|self|top|window|this|frames)\s?\[|"
    r"\.\s?(?:innerhtml|outerhtml|constructor|appendchild|insertadjacenthtml|srcdoc)\s?[(=]|xmlhttprequest|"
    r"new\s{1,4}image|navigator\s?\.\s?sendbeacon|localstorage\s?\.|sessionstorage\s?\.|unescape|decodeuricomponent|atob)"
)
_CALLED = r"\s{0,9}(?:/\*[^*]{0,40}\*/)?(?:\)\s?)?(?:[(=`\[.]|\?\.|&lpar;)"
_OUT_OF_STRING = Pattern(
    r"(?:^|[^\\])['\"`]\s{0,9}[)\]}]{0,4}\s{0,9}(?:[;,+*|&^?:/%-]|\|\||&&|\bin\b|\binstanceof\b|"
    r"}){1,3}[\s({\[!+~-]{0,9}" + _SINK + _CALLED
)
_LITERAL_CALL = Pattern(
    r"\b(?:alert|prompt|confirm)\s{0,9}(?:\(|`)\s{0,9}(?:['\"/`]?[^'\"()\s]{1,24}['\"/`]?\s{0,9}(?:[)`]|$)|"
    r"['\"/`&]|string|document|window|\d)"
)
_ONLY_A_CALL = Pattern(
    r"\W{0,16}(?:alert|prompt|confirm|eval|"
    r"document\.write)\s{0,3}[(`][^()`]{0,200}(?:\([^()]{0,80}\)[^()`]{0,80})?[)`][\s;/\w'\"]{0,8}$"
)
_ONLY_COOKIES = Pattern(
    r"\W{0,16}\(?\s?document\s?(?:/\*[^*]{0,40}\*/\s?)?\)?\s?(?:\.|\[)\W{0,40}(?:cookie|domain|"
    r"location)\W{0,16}$"
)
_COMPUTED_CALL = Pattern(
    r"\b(?:self|top|window|parent|this|frames|document|"
    r"globalthis)\s{0,9}\)?(?:/\*[^*]{0,40}\*/)?\s{0,9}\[[^\]\n]{1,80}\]\s{0,9}[(`\[]"
)
_OUT_OF_ATTRIBUTE = Pattern(r"[^<>]{0,60}[\"'][^<>\"']{0,20}/?>\s{0,9}<\s{0,3}[/!]?[a-z]", re.IGNORECASE)
_SINKS = Pattern(_SINK + _CALLED)
_SCRIPT_WORDS = (
    "alert", "prompt", "confirm", "eval", "execscript", "msgbox", "setinterval", "settimeout", "setimmediate",
    "function", "fetch", "importscripts", "document", "window", "fromcharcode", "location", "parent", "self", "top",
    "this", "frames", "html", "constructor", "append", "insertadj", "srcdoc", "xmlhttp", "image", "sendbeacon",
    "storage", "unescape", "decodeuri", "atob",
)  # fmt: skip
# A page that goes elsewhere with the cookies, or brings code from elsewhere.
_GIVEN_AWAY = Pattern(
    r"location(?:\.href)?\s{0,3}=\s{0,3}['\"`][^\n]{0,120}\bcookie\b|^\W{0,8}import\s?\(\s?['\"`](?:https?:)?//"
)
# A function that is called with a template and no brackets: sort.call`${alert}1`.
_TAGGED_CALL = Pattern(
    r"\.\s{0,9}(?:call|apply|bind|from|map|sort|foreach|replace)\s{0,9}`[^`]{0,80}\$\{\s{0,9}(?:alert|prompt|confirm|eval|print|fetch)\b"
)
_TEMPLATE_CALL = Pattern(r"\$\{\s{0,9}" + _SINK + _CALLED)
_EVENT = Pattern(r"(?:^|[\s\"'`/;?&*)>\x00]|\*/)on([a-z_]{3,30})\s{0,9}(?:/\*[^*]{0,40}\*/)?=\s{0,9}(\S?)")
_ADDRESS = Pattern(
    r"(?:^|[\"'`(=:;,\s>])(?:java|vb|live|j)script\s{0,3}:(?=[^\s:]|\s{0,9}(?:alert|eval|"
    r"prompt|confirm|document|window|location))"
)
_ADDRESS_START = Pattern(r"\s{0,9}(?:javascript|vbscript|livescript|jscript|mocha):")
_CODE = Pattern(r"[(=`\[%\\&/\"'+*]")
_PROSE = Pattern(r"[`'\")]{0,3}\s{1,4}[a-z]{1,30}(?:[\s,.:)]|$)(?!\s{0,9}[=(.\[])")


class Tag(NamedTuple):
    """A tag as a browser would see it.

    Attributes:
        name: The element's name, in lower case.
        closing: It is an end tag.
        attributes: Names, in lower case, and values.
        end: Where the text goes on behind it.
    """

    name: str
    closing: bool
    attributes: list[tuple[str, str]]
    end: int


def tags(text: str) -> Iterator[Tag]:
    """The tags in a text, also one that is cut off at the end of the text.

    Example:
        >>> [tag[:3] for tag in tags("1 < 2 <svg/onload=alert(1)")]
        [('svg', False, [('onload', 'alert(1)')])]
    """
    position = text.find("<")
    while position >= 0:
        start = position + 1
        closing = text.startswith("/", start)
        start += closing
        # After "<" a browser starts a tag only at a letter; "<?" and "<!" are taken along for what follows them.
        if text[start : start + 1].isalpha() or text[start : start + 1] in ("?", "!", "/", "%"):
            ended = _NAME_END.search(text, start)
            end = ended.start() if ended else len(text)
            name = text[start:end].lower()
            attributes, end = _attributes(text, end)
            yield Tag(name, closing, attributes, end)
            start = max(start, end)
        position = text.find("<", start)


def _attributes(text: str, position: int) -> tuple[list[tuple[str, str]], int]:
    found: list[tuple[str, str]] = []
    last = len(text)
    while position < last and text[position] not in "<>":
        match = _ATTRIBUTE.match(text, position)
        if match is None or match.end() == position:
            position += 1
            continue
        if match[1]:
            found.append((match[1].lower(), (match[2] or "").strip("\"'`")))
        position = match.end()
    return found, position + (text[position : position + 1] == ">")


def find(reading: Reading) -> Iterator[tuple[str, int]]:  # noqa: C901 - a list of questions
    """What would be code in a text, each with its score."""
    text = reading.text
    reading.steps += 2 * len(text)
    if "<" in text:
        if _OUT_OF_ATTRIBUTE.match(text):
            yield "out-of-attribute", CERTAIN
        if text[:40].lstrip().lower().startswith(("</script", "</style", "</title", "</textarea")):
            yield "closing-tag", CERTAIN
        yield from _in_tags(text)
    lower = reading.lower
    if "script" in lower or "data:" in lower or "mocha" in lower:
        yield from _addresses(lower)
    if "on" in lower and "=" in lower:
        for match in _EVENT.finditer(lower):
            if match[1] in _EVENTS and match[2] not in ("", "=", ">"):
                yield "event-handler", CERTAIN
                break
    if "document" in lower and _ONLY_COOKIES.match(_COMMENT_IN_STYLE.sub("", lower)):
        yield "cookie", CERTAIN
    if "(" in lower or "`" in lower or "=" in lower or "[" in lower:
        yield from _in_scripts(reading)
    if "+adw-" in lower:
        yield "utf-7", CERTAIN
    if (
        ":" in lower
        and "expression" in lower
        and re.search(
            r":[^;:]{0,40}expression\s{0,9}\(|"
            r"[{;*/]\s{0,9}x?:?expression\(",
            lower,
        )
    ):
        yield "style", CERTAIN


def _in_tags(text: str) -> Iterator[tuple[str, int]]:
    last_end = text.lower().rfind("</script")
    for tag in tags(text):
        name = tag.name
        if tag.closing:
            if name in _BREAKS_OUT and name != "iframe":
                yield f"closing-{name}", SUSPICIOUS
            yield from _in_attributes(tag)
            continue
        bare = name.rpartition(":")[2]
        if bare.startswith("script") or bare.rstrip("\"'`;") in _RUNS:
            prose = not tag.attributes and _PROSE.match(text, tag.end) and last_end < tag.end
            yield "script", SUSPICIOUS if prose else CERTAIN
        elif bare == "xss" or (bare in _LOADS and any(value for _, value in tag.attributes)):
            yield "loading-element", CERTAIN
        elif bare in _HOLDS:
            inside = text[tag.end : text.find("<", tag.end) if text.find("<", tag.end) >= 0 else None]
            yield (
                "style",
                CERTAIN if tag.attributes or _STYLE.search(_plain_style(inside)) or "{" in inside else SUSPICIOUS,
            )
        elif name in ("?import", "?xml-stylesheet") or name.startswith(("!--[if", "![if")):
            yield "processing-instruction", CERTAIN
        elif name.startswith(("svg", "xsl:", "math")) and tag.attributes:
            yield "drawing", SUSPICIOUS
        elif name == "form" and any(attribute == "action" for attribute, _ in tag.attributes):
            yield "form", CERTAIN
        yield from _in_attributes(tag)


def _in_attributes(tag: Tag) -> Iterator[tuple[str, int]]:
    for name, value in tag.attributes:
        if name.startswith("on") and (name[2:] in _EVENTS or (value and name[2:5].isalpha())):
            yield "event-handler", CERTAIN
        elif name == "style":
            style = _plain_style(value)
            yield "style", CERTAIN if _STYLE.search(style) or "url(" in style or "\\" in value else 2
        elif name in ("srcdoc", "formaction", "datasrc", "dynsrc", "implementation") or (
            name == "xlink:href" and value[:1] != "#"
        ):
            yield "loading-attribute", CERTAIN
        elif (
            name.startswith("xmlns")
            and "html" not in name
            and value.lower().strip() in ("xss", "urn:schemas-microsoft-com:time")
        ):
            yield "namespace", CERTAIN
        if value:
            address = _IGNORED_IN_ADDRESS.sub("", value).lower().lstrip("\"'`")
            if (
                _PROGRAM.match(address)
                or _DATA.match(address)
                or ";url=javascript:" in address
                or "url=data:" in address
            ):
                yield "program-address", CERTAIN


def _plain_style(style: str) -> str:
    return _COMMENT_IN_STYLE.sub("", style).replace("\\", "").lower()


def _addresses(lower: str) -> Iterator[tuple[str, int]]:
    squeezed = _IGNORED_IN_ADDRESS.sub("", lower)
    for text in (lower, squeezed) if lower != squeezed else (lower,):
        started = _ADDRESS_START.match(text)
        if (
            started is not None
            and text[started.end() : started.end() + 1].strip()
            and _CODE.search(text, started.end())
        ):
            yield "program-address", CERTAIN
            return
        found = _ADDRESS.search(text)
        if found is not None and text is lower and _CODE.search(text[found.end() : found.end() + 200]):
            yield "program-address", CERTAIN
            return
    if squeezed.startswith(("data:text/html", "data:image/svg", "data:text/javascript", "data:application/x")):
        yield "data-address", CERTAIN


def _in_scripts(reading: Reading) -> Iterator[tuple[str, int]]:  # noqa: C901 - a list of questions
    lower = reading.lower
    if "/*" in lower:
        lower = _COMMENT_IN_STYLE.sub("", lower)
    if "`" in lower and _TAGGED_CALL.search(lower):
        yield "template-call", CERTAIN
    if ("cookie" in lower or "import" in lower) and _GIVEN_AWAY.search(lower):
        yield "given-away", CERTAIN
    if "[" in lower and _COMPUTED_CALL.search(lower):
        yield "computed-call", CERTAIN
    if _ONLY_A_CALL.match(lower):
        yield "only-a-call", CERTAIN
    if not any(word in lower for word in _SCRIPT_WORDS):
        return
    if reading.search(_OUT_OF_STRING):
        yield "out-of-string", CERTAIN
    if "${" in lower and reading.search(_TEMPLATE_CALL):
        yield "template-call", 1 if reading.is_long_prose else CERTAIN
    if reading.search(_LITERAL_CALL):
        yield "literal-call", 1 if reading.is_long_prose else SUSPICIOUS
    reading.steps += len(lower)
    sinks = {match[0][:8] for match in _SINKS.finditer(lower)}
    if sinks:
        # Three leave no doubt, unless somebody writes about them.
        yield "script-calls", 1 if reading.is_long_prose else (2, SUSPICIOUS, CERTAIN)[min(len(sinks), 3) - 1]
