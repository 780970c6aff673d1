"""SQL injection: a value that ends the literal it is put into and goes on as SQL.

The text is cut into the tokens of SQL as MySQL, PostgreSQL, SQL Server, Oracle and SQLite have them, once as it stands
(it is put in unquoted) and once for each quote that could end the literal around it. Each token becomes one letter, so
that a clause is a short word and a grammar a pattern of such words: ``1 or 1=1`` is ``1&1o1``. A quote alone is
nothing, and a keyword alone is nothing. It takes a break-out and a clause that only an attack has after it: a
comparison after ``or``, a second ``select``, another statement, a comment that cuts off, a function that waits.

The letters:

    1 number    s string    u, w string without an end, of one word or several    v variable    t true, false, null
    n name    M system table    f function with (    x dangerous function with (    & and, or, xor, ||    a arithmetic
    o comparison    q ==    l like, in, between, is    U union    S select    F from    I into    H where    h having
    r order, group    y by    L limit    E statement    T table, database    W waitfor    K case    e exists
    k all, distinct, top, as ...    P procedure    c comment    z comment with text    ( ) , ; . { } as they are
    ? anything else
"""

import re
from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading, words

CLASS = "sql"

_TOKEN = Pattern(
    r"""
      (?P<space> \s++ | /\*!\d{0,6} | \*/ | ::\w++(?:\[\])?+ )
    | (?P<inline> /\*.*?(?:\*/|\Z) )
    | (?P<json> ->>? | \#>>? (?=\s*+['"(]) | \#- (?=\s*+['"(]) | @> | <@ | \?[|&] | !?~\*? (?=\s*+') | \?(?=\s*+') )
    | (?P<rest> (?:--|\#)[^\n]*+(?:\n|\Z) )
    | (?P<text> (?:\b[nxbe]|\bu&)?'(?:[^'\\]|\\.|'')*+(?:'|\\?\Z) | "(?:[^"\\]|\\.|"")*+(?:"|\\?\Z) )
    | (?P<number> \d++\.\d*+(?:e[-+]?\d++)?+ | \.\d++ )
    | (?P<word> [\w$]++ | `[^`]{0,64}` | \[\w{1,64}\] )
    | (?P<variable> @@?[\w$`'"]{0,64} )
    | (?P<logic> \|\| | && )
    | (?P<comparison> <=> | <> | != | \^= | >= | <= | := | !< | !> | [=<>] )
    | (?P<arithmetic> [-+*/%^~|&!] )
    | (?P<mark> [(),;.{}] )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)

_KEYWORDS: dict[str, str] = {}
for _letter, _words in {
    "&": "or and xor",
    "a": "div mod",
    "l": "like rlike regexp ilike between in is isnull notnull similar glob sounds",
    "U": "union intersect except",
    "S": "select",
    "F": "from",
    "I": "into",
    "H": "where",
    "h": "having",
    "r": "order group",
    "y": "by",
    "L": "limit offset",
    "E": "drop insert delete update truncate alter create exec execute declare grant merge replace "
    "shutdown handler load "
    "set show describe backup bulk rename revoke kill reconfigure call begin commit rollback prepare print",
    "T": "table database schema view index trigger function column user login role tables databases",
    "W": "waitfor",
    "K": "case",
    "k": "all distinct distinctrow top as on using values when then else end if any some collate binary escape",
    "e": "exists",
    "P": "procedure",
    "t": "true false null unknown",
}.items():
    _KEYWORDS |= dict.fromkeys(_words.split(), _letter)
_SKIPPED = frozenset({"not"})
KEYWORDS = frozenset(_KEYWORDS)
"""The words that clauses are made of."""

_DANGEROUS = words(
    "sleep benchmark pg_sleep load_file extractvalue updatexml xp_cmdshell xp_regread "
    "xp_dirtree sp_executesql randomblob "
    "get_host_address get_host_name receive_message dblink pg_read_file pg_ls_dir lo_import lo_export "
    "sys_exec sys_eval "
    "openrowset opendatasource make_set elt geometrycollection multipoint polygon multipolygon linestring "
    "gtid_subset "
    "name_const st_latfromgeohash ctxsys load_extension fn_trace_gettable xmltype httpuritype sql_variant_property"
)
_FUNCTIONS = words(
    "version database user current_user session_user system_user schema char chr ascii "
    "concat concat_ws group_concat "
    "string_agg substring substr mid ord hex unhex cast convert count length char_length bin_length if ifnull nullif "
    "coalesce iif md5 sha1 password encode decode ceil conv row_count found_rows last_insert_id current_setting "
    "db_name host_name user_name is_srvrolemember object_id xmlelement request utl_inaddr rand bin oct ord "
    "left right "
    "lower upper trim reverse replace json_keys json_extract to_char to_number nvl sys_context ltrim rtrim row floor "
    "aes_encrypt aes_decrypt des_encrypt is_member instr locate position strcmp exp pow now sysdate getdate dump "
    "unicode quotename nchar datalength len isnull min max sum avg column_name sqlite_version printf typeof"
)
_SYSTEM = words(
    "information_schema pg_catalog pg_shadow pg_user pg_class pg_database sysobjects "
    "syscolumns sysdatabases syslogins "
    "sysusers sqlite_master sqlite_schema sqlite_temp_master all_tables all_tab_columns user_tables "
    "dba_users all_users "
    "v$version msysobjects msysaces schemata master mysql dual sys user_tab_columns dba_role_privs "
    "table_schema table_name "
    "column_name syscat sysibm"
)
_SURELY_SYSTEM = _SYSTEM - {"master", "mysql", "dual", "sys", "table_name", "column_name", "table_schema"}

# Functions that a text about something else does not call.
_TELLING = _DANGEROUS | frozenset(
    ("ascii", "substring", "substr", "length", "concat", "concat_ws", "group_concat", "version", "convert", "cast",
     "count", "iif", "isnull", "char", "chr", "if", "database", "current_setting", "host_name", "db_name"),
)  # fmt: skip
_LONGEST_NAME = 32
_CALLED = Pattern(r"\s{0,9}([\w.]{1,32})([\s(]{1,9}(?:ro|dna|rox)(?!\w))?")


def is_function(word: str) -> bool:
    """Whether a word, in lower case, is a function of SQL that a text about something else does not call."""
    return word in _FUNCTIONS or word in _TELLING


# A number that runs into a keyword, which several databases read as two tokens.
_GLUED = Pattern(
    r"(0x[0-9a-f]{1,64}?|\d{1,32}(?:e\d{1,3})?)(or|and|union|xor|order|group|having|like|in|is|limit)", re.IGNORECASE
)
_NUMBER = Pattern(r"\d++(?:e\d++)?|0x[0-9a-f]++|0b[01]++", re.IGNORECASE)

# What may follow the quote that ends a literal, so that the rest is SQL.
_BREAK_OUT = Pattern(
    r"(?:\s{0,32}(?:[);]|/\*[^*]{0,64}\*/)){0,16}\s{0,32}"
    r"(?:(?:or|and|xor|union|select|order|group|having|limit|like|rlike|regexp|ilike|between|in|is|not|div|"
    r"mod|procedure|into|"
    r"exec|execute|drop|insert|delete|update|truncate|alter|create|declare|shutdown|waitfor|if|where|from|"
    r"begin|set|case|"
    r"collate|notnull|isnull|glob|escape|as|except|intersect|show|handler|load|call|sounds|offset|end|then|values|print)\b"
    r"|[-+*/%^~|&!=<>,#@`({]|/\*|;|\)\s{0,9}$|$)",
    re.IGNORECASE,
)
# A first look at a text as it stands: does it open like the rest of a condition, or have a clause? All that the
# grammars can find passes it, but for what has comments or lines between its words; most prose does not.
_OPENING = Pattern(
    r"[-+(\s]{0,9}(?:[\w.,@`-]{0,40}|\w{1,30}(?:['\"]\w{0,20}['\"])?)[)\s'\"%]{0,12}(?:or|and|xor|\|\||&&|"
    r"union|order|group|having|where|procedure|limit|rlike|regexp|like|in|between|"
    r"waitfor|as|is|exec|execute|select|print|case|if|[;=<>|&^])(?![a-z])|"
    r"\s{0,9}[-+]?\d{1,20}[.\de]{0,9}[)\s]{0,9}(?:or|and|union|order|having|[-+*/%^&|,])|[\s)]{0,9},",
    re.IGNORECASE,
)
_OPENING_LENGTH = 200

# Words that a text in lower case is asked for first, which is quick, and what has to be there besides.
_COMPARED = (
    r"(?:^|[\s)'\"\d])(?:or|and)(?:[\s(]{1,9}(?:not\s{1,9})?|(?=['\"]))(?:['\"][^'\"]{0,40}['\"]|"
    r"['\"\w.@-]{1,40})[\s)]{0,9}(?:[-+*/%]\s{0,3}[\w.]{1,20}\s{0,3})?(?:::\w{1,12}\s{0,3})?"
    r"(?:[=<>!^?]|->|@>|#>|like\b|in\s{0,3}\()"
)
_COMPARING = ("=", "<", ">", "!", "^", "?", "like", " in(", " in (")
_CLAUSES: tuple[tuple[str, Pattern | None], ...] = tuple(
    (word, None if pattern is None else Pattern(pattern))
    for word, pattern in {
        "union": r"union(?:\W|all|$)",
        "select": r"select(?:\W{1,9}(?:all|distinct|top|sql_\w{1,20})\b)?\W{0,12}(?:[(*@\d'\"`]|null|case|"
        r"[\w.`]{1,64}\W{0,6}(?:,|from\b|\()|[\w.]{1,40}\s{0,3}[;)])|select\W{0,9}$",
        "exec": r"exec(?:ute)?\W{0,9}(?:@|\(|['\"]|(?:master|xp|sp|immediate)\b|[xs]p_)",
        "xp_": None,
        "declare": r"declare\W{1,9}@",
        "wai": r"wait?for\W{0,9}(?:delay|time)\b|waifor",
        "drop": r"drop\s{1,9}\w{1,40}\s?;\s?--|"
        r"drop\W{1,9}(?:table|database|schema|view|user|login|index|function|procedure|trigger|role)\b",
        "truncate": r"truncate\W{1,9}table",
        "alter": r"alter\W{1,9}(?:table|database|schema|view|user|login|index|function|procedure|trigger|role)\b",
        "create": r"create\W{1,9}(?:table|database|schema|view|user|login|index|function|procedure|trigger|role)\b",
        "into": r"(?:insert|replace)\W{1,9}into\b|into\W{1,9}(?:out|dump)file\b",
        "delete": r"delete\W{1,9}from\b",
        "update": r"update\W{1,9}[\w.`]{1,64}\W{1,9}set\b",
        "analyse": r"procedure\W{1,9}analyse",
        "utl_": None,
        "dbms_": None,
        "information_schema": None,
        "pg_": None,
        "sys": r"sys(?:objects|columns|databases|users|logins)|msys|syscat|sysibm",
        "sqlite_": None,
        "_tables": None,
        "dba_": None,
        "v$version": None,
        "schemata": None,
        "case": r"case\W{1,9}(?:when|\w{1,20}\W{1,9}when)\b",
        "null": r",\s{0,3}null\b",
        "||": None,
        "&&": None,
        "grant": r"grant\W{1,3}(?:all|select|insert|update|delete|execute|dba|connect)\b",
        ";": r";\W{0,9}(?:drop|insert|delete|update|truncate|show|set|shutdown|handler|load|bulk|call|"
        r"prepare|rename|grant|reconfigure|copy|if|begin|declare)\b",
        "shutdown": None,
        "copy": r"copy\W{1,3}[\w(]{1,40}\W{1,3}(?:from|to)\b",
        "or": _COMPARED,
        "and": _COMPARED,
    }.items()
)


# What a database takes for a blank: comments, and what is on a line behind one.
_BLANKS = Pattern(r"/\*(?:!\d{0,6})?|\*/|(?:--|#)[^\n]{0,200}\n|[\r\n\t\v\f]")
_COMMENT = Pattern(r"/\*(?!!)(?:[^*]|\*(?!/))*+(?:\*/|\Z)")


def _has_clause(reading: Reading) -> bool:
    lower = reading.lower
    reading.steps += len(lower)
    if "/*" in lower:
        # Once without what is in comments, once with it, for where a comment begins depends on what is a string.
        reading.steps += 2 * len(lower)
        lower = f"{_BLANKS.sub(' ', _COMMENT.sub(' ', lower))} {_BLANKS.sub(' ', lower)}"
    elif "\n" in lower:
        reading.steps += len(lower)
        lower = f"{_BLANKS.sub(' ', lower)} {lower}" if "--" in lower or "#" in lower else lower.replace("\n", " ")
    compares = any(sign in lower for sign in _COMPARING)
    for word, pattern in _CLAUSES:
        if word not in lower or (word in ("or", "and") and not compares):
            continue
        reading.steps += len(lower)
        if pattern is None or pattern.search(lower):
            return True
    position = lower.find("(")
    while position >= 0:
        # Backwards from the bracket: the name of what is called, and whether "and" or "or" is before it.
        before = lower[max(0, position - _LONGEST_NAME) : position][::-1]
        found = _CALLED.match(before)
        if found is not None and (found[2] or found[1][::-1] in _TELLING):
            return True
        position = lower.find("(", position + 1)
    return False


class _Tokens:
    """A text in letters, with the words that some rules look at."""

    __slots__ = ("count", "letters", "text")

    def __init__(self, text: str, inside: str) -> None:
        self.count = 0
        letters = ["s"] if inside else []
        words: list[str] = [inside] if inside else []
        last = len(text)
        for match in _TOKEN.finditer(text):
            self.count += 1
            kind, found = match.lastgroup, match[0]
            if kind == "space":
                continue
            if kind == "word":
                self._word(found, text, match.end(), letters, words)
                continue
            if kind == "inline":
                if match.end() < last:
                    continue
                letters.append("c")
                words.append("--")
                continue
            letters.append(_letter_of(kind, found))
            words.append("--" if kind == "rest" else found.lower())
        self.letters = "".join(letters)
        # One blank between tokens, whatever stood there; with the statement rules, which look at words.
        self.text = " ".join(words)

    @staticmethod
    def _word(found: str, text: str, end: int, letters: list[str], words: list[str]) -> None:
        word = found.lower()
        if word[0].isdigit():
            glued = None if _NUMBER.fullmatch(word) else _GLUED.fullmatch(word)
            if glued is not None:
                letters += ["1", _KEYWORDS[glued[2]]]
                words += [glued[1], glued[2]]
                return
            letters.append("1" if _NUMBER.fullmatch(word) else "n")
            words.append(word)
            return
        if word in _SKIPPED:
            return
        letter = _KEYWORDS.get(word)
        calls = letter is None or letter in "ktTE"
        if calls and text[end : end + 33].lstrip()[:1] == "(":
            if word in _DANGEROUS:
                letter = "x"
            elif word in _FUNCTIONS:
                letter = "f"
        if letter is None:
            letter = "M" if word.strip("`[]") in _SYSTEM else "n"
        letters.append(letter)
        words.append(word)


def _letter_of(kind: str | None, found: str) -> str:
    if kind == "mark":
        return found
    if kind == "text":
        found = found.lstrip("nNxXbBeEuU&")
        if len(found) > 1 and found[-1] == found[0]:
            return "s"
        # Without an end it is what the query around it goes on with; words are what a quotation goes on with.
        return "w" if " " in found[1:] and found[1:].strip() else "u"
    if kind == "rest":
        body = found.lstrip("-# +\t")
        return "c" if len(body.rstrip("'\"-; +*/\n")) <= 3 else "z"  # noqa: PLR2004 - what is left of a cut-off query
    if kind == "comparison":
        return "o"
    return {"json": "o", "logic": "&", "arithmetic": "a", "variable": "v", "number": "1"}.get(kind or "", "?")


# --- clauses ----------------------------------------------------------------------------------------------------------

_UP = r"[a(]{0,4}"
_OPERAND = r"(?:[1stvMuT]|n(?:\.n){0,3}|n\.[nM]|M\.[nM]|[fxn]\([^;]{0,60}?\))"
_LITERAL = r"(?:[1tsvu]|f\([^;]{0,40}?\))"
_UNION = Pattern(r"U[k(]{0,6}S(?:k1[n1],|[k(]{0,6}(?:[1stvu](?!n)|[fxMaKSeT]|n(?:[,(.)coFI;&]|$))|$)")
_LONG_COMMENT = Pattern(r"^s[)]{0,9};?z")
_ALL = Pattern(r"s&[1t]")
_UNION_ALONE = Pattern(r"^[1sn]?[)]{0,9}U[k(]{0,6}S?$")

# After the quote that ended the literal.
_QUOTED: tuple[tuple[str, Pattern], ...] = tuple(
    (name, Pattern(pattern))
    for name, pattern in {
        "tautology": rf"^s[)]{{0,9}}&{_UP}(?:1(?:,1){{1,9}}[)]o|"
        rf"{_OPERAND}[)]{{0,9}}(?:a{_OPERAND}){{0,4}}[)]{{0,9}}(?:o|q|l[(]{{0,3}}[1stvuS])|[(]?[eSK]\b|"
        rf"[(]{{0,4}}[xf][(]|[(]{{1,4}}S)",
        "logic": rf"^s[)]{{0,9}}&{_UP}(?:[1stvu]|n)[)]{{0,9}}(?:c|[;]c?$|a?z)",
        "odbc": r"^s[)]{0,9}&[(]{0,3}\{[kfn]",
        "cut-off": r"^s[)]{0,9}[&aolqk][&aolqkt(n1?.)]{0,14}c$",
        "union": r"^s[)]{0,9}(?:c?)U[k(]{0,6}S?$",
        "comment": r"^s[)]{0,9};{0,2}c",
        "where": rf"^s[)]{{0,9}}(?:kn|n)?H{_UP}{_OPERAND}[)]{{0,4}}(?:o|l[(1stvu])",
        "expression": r"^s(?:[a&olq]{1,4}[(]{0,3}(?:[1stvu]|n|"
        r"[fx]\([^;]{0,40}?\))[)]{0,3}){0,12}[&olq][a]{0,3}(?:u|s|1s?c)$",
        "stacked": r"^s[)]{0,9};{1,3}(?:[SEWUK]|k[(x]|P)",
        "clause": r"^s[)]{0,9}(?:(?:&[1t])?ry(?:(?:1|n(?:[.]n)?)[)]{0,9}(?:[,;czhL&]|$)|[fx][(])|[(]{1,4}S|"
        r"h[(1ns]{1,4}o|I[nsTE]|P[n(]|W|L1|xE)",
        "function": r"^s[)]{0,9}(?:[a&o]{1,3}[(]{0,4}(?:[xSK]|f[(]))",
        "comparison": r"^s(?:o|l|ao)(?:[(]{0,3}(?:[su]|1|t)(?:[cz;&)]|$)|[(]{1,3}S|[xf][(])",
        "values": r"^s[)]{0,3}(?:,[(]{0,3}(?:[Sxf][(]|S|t,t)|(?:,t){1,12}[)])",
        "concatenation": r"^s(?:&|a)(?:u$|sa|[(]{0,3}[xfS])",
        "call": r"^s[a&][a&]?(?:n\.){0,3}n[(]",
        "declaration": r"^s[)]{0,9};?E[v]",
    }.items()
)

# As it stands, where a number or nothing is before the clause.
_UNQUOTED: tuple[tuple[str, Pattern], ...] = tuple(
    (name, Pattern(pattern))
    for name, pattern in {
        "odbc": r"^[^;]{0,6}&[(]{0,3}\{[kfn]",
        "tautology": rf"^;?a?[1tvM]?[)]{{0,9}}&{_UP}(?:[1tvs]|(?<=1&)n(?:\.n){{0,2}}|(?<=1&)M\.[nM]|"
        rf"(?<=&)f\([^;]{{0,40}}?\)|"
        rf"(?<=\()f\([^;]{{0,40}}?\))[)]{{0,9}}(?:a{_LITERAL}){{0,4}}[)]{{0,9}}(?:o[(]{{0,4}}(?:[1tvsuSfx"
        rf"Ma]|n|$)|l(?:[(]{{1,3}}[1stvuS]|[stvuS]))",
        "equality": rf"^(?:no)?[^o;]{{0,12}}&{_UP}(?:1[)]{{0,3}}o[(a]{{0,3}}(?:[1v]|[fx][(]|[(]?S)|so[su])|"
        r"[)1s]&[(]{1,3}(?:1o[fn][(]|[fn][(][)]o1)|^[^;]{0,9}[n1]&[(]?v[)]{0,3}o|^n[(][)]&{1,2}[fn][(][^;]{0,9}[)]o",
        "logic": r"^[)]{0,9}&[a(]{0,4}[fx][(]|^a?1[)]{0,9}&[a(]{0,4}(?:t(?:$|[cz;&)])|1[)]{0,3}c|"
        r"[(]{0,3}(?:S|x[(]|e[(]))",
        "subquery": r"^[(]S1[)]$|^[(]Sk{0,2}1?[nv](?:,[nv]){0,9}F[nM](?:[.]n)?(?:[H)]|$)|"
        r"[1)&oa,(][(]S[k]{0,2}(?:[1svtfxMaK(]|n[),F.(]|S)",
        "function": r"(?:^|[&oaS(,1kl;)]|^E)[(]{0,3}x[(][(]{0,3}[1sufvSnM]",
        "stacked": r"^a?[1n]?[)]{0,3};{1,2}(?:S[(]?(?:[1svtfxMa]|n[(,.F])|W|E[v])",
        "clause": r"^[Hh]1o1|^hf[(]|^ry1(?:,1){0,20}c|^a?[1)][)]{0,9}(?:(?:&[1t])?ry(?:1(?:[,;cz&]|$)|[fx][(])|"
        r"ry[nf1][^a-z]{0,2}h|h[(1ns]{1,4}o1?|P[n(]|W|Lf|L1,1)|^L1,1c",
        "where": rf"^a?1[)]{{0,9}}(?:kn)?H{_UP}{_OPERAND}[)]{{0,4}}[ol]",
        "wait": r"Wn?[suv1]",
        "nested": r"[fx][(][fx][(][fx][(]",
        "comment": r"^;c$|^[(]{1,9}[^;?]{0,60}[1sv][)]{1,9}c$",
        "union": r"^a?[1n]?[)]{0,9}U[k(]{0,6}(?:[cz]|1(?:,1){1,60};?[cz]?$)|USn?1(?:,1){1,60}|^a?1?SU1,1",
        "values": r"^a?1?[)]{0,3}(?:,t){1,12}[)]",
        "arithmetic": r"^a?1[a&]{1,2}[(]{0,3}(?:x[(]|f[(]|[(]S|S)",
        "variable": r"S[(]{0,3}v(?:$|[,;cz)FU&])",
        "query": r"^[(]?Sk?[nT];$|S[nT]FM|^[(]?S(?=[^;F]{0,60}[1sxv,(])[^;F]{1,80}FnH$|"
        r"^[(]?Sk{0,2}[fxn][(][)];$|"
        r"(?:^|[;(])[(]{0,3}S(?:k1|k{0,2})(?:[fx]\([^;]{0,60}\)(?:$|[;c)])|a(?:F[nM(`]|,)|"
        r"(?:[1stvM]|n\.n|[fx]\([^;]{0,60}?\))(?:,(?:[1stvMna]|n\.n|"
        r"[fx]\([^;]{0,40}?\))){0,20}(?:F[(nM]|F)|n(?:,n){1,20}F[nM(])",
        "conditional": r"^a?[1s]?[)]{0,3}[;&a,]?(?:kf?|f)[(][xSf][^;]{0,40}",
        "comparison": r"^a?[1tv][)]{0,3}o[(]{0,4}(?:S|x[(])",
    }.items()
)

_NAME = r"[\w.\[\]`$\"]{1,64}(?: \. [\w\[\]`$\"]{1,64}){0,3}"
_START = r"(?:^|; |[)'\"] |\d |-- )"
# ruff: noqa: S608 - patterns that find queries, and no queries
_STATEMENTS: tuple[tuple[str, Pattern], ...] = tuple(
    (name, Pattern(pattern))
    for name, pattern in {
        "drop": rf"(?:; |^)(?:drop|truncate|alter|create) (?:table|database|schema|view|user|login|index|"
        rf"function|procedure|trigger|role)(?: if exists)? {_NAME}(?:$| [;(-]| set | add | cascade| as )|"
        rf"; drop \w{{1,40}} (?:;|--|$)|^(?:drop|truncate) \w{{1,40}} ; --",
        "insert": rf"{_START}(?:insert|replace) into {_NAME} (?:\(|values|select|set)",
        "delete": rf"; delete from {_NAME}(?:$| [;-]| where )|{_START}delete from {_NAME} (?:where {_NAME} "
        rf"(?:[=<>]|like|in)|;|--)",
        "update": rf"{_START}update {_NAME} set {_NAME} = ",
        "exec": r"(?:; |['\"] |^\d{1,9} )(?:exec|execute) \( ?['\"]|(?:^|\W)(?:exec|execute) (?:\( ?@|"
        r"(?:master )?(?:\. ){0,2}(?:dbo \. )?(?:xp|sp)_|immediate |master \.|@\w|xp$|sp$)|"
        r"\bxp_(?:cmdshell|regread|dirtree|servicecontrol)\b",
        "declare": r"(?:^|\W)declare @\w{1,40} (?:as )?(?:n?varchar|int|char|nchar|table|cursor|sysname|varbinary)",
        "set": r"; set @\w{1,40} :?= |; show (?:tables|databases|warnings|columns|variables|grants)|; "
        r"(?:shutdown|handler \w{1,40} open|load data|bulk insert|call \w{1,40} \(|prepare \w{1,40} from|rename table|"
        r"grant \w{1,40} on|reconfigure)",
        "shutdown": r"['\"\d] ;? ?shutdown(?: with nowait)?(?:$| ;| --)",
        "grant": rf"^\W{{0,4}}(?:create user {_NAME} identified by|grant (?:all|select|insert|update|delete|"
        rf"execute|dba|connect)\b.{{0,60}} (?:on .{{1,60}} )?to )",
        "outfile": r" into (?:out|dump)file ['\"(]|\bprocedure analyse \(|\bload data (?:local )?infile "
        r"['\"]|\bload_file \(",
        "wait": r"\bwai?t?for delay ['\"@]|\bwait ?for time ['\"]",
        "copy": r"(?:; |^)copy (?:\w{1,40}|\( select .{1,60}\)) (?:from|to) (?:program )?['\"]",
        "if": r"(?:^|; |['\"] )if ?\(? ?(?:\( ?)?(?:not )?"
        r"(?:select|exists|substring|ascii|benchmark|\d{1,12} ?[=<>] ?\d)",
        "when": r"\bcase (?:when .{1,80} then .{1,60} (?:else|end)|\w{1,20} when \w{1,20} then)",
        "full-text": r"['\"] in (?:boolean|natural language) mode \)",
        "sequence": r"\b(?:utl_http|utl_inaddr|dbms_pipe|dbms_lock|dbms_ldap|dbms_utility|ctxsys) \. "
        r"\w{1,40}(?: \. \w{1,40})? (?:\(|$)",
    }.items()
)
_SAME = Pattern(
    r"(?:^|[ )'\"])(?:or|and|xor|\|\||&&) (?:\( ){0,4}([a-z_]{1,32}) = (?:\( ){0,2}\1(?: "
    r"\)){0,4}(?:$| --| ;| (?:or|and) )"
)
_SPLIT_WORD = Pattern(r"\b(?:un?i?o?/\*\*/i?o?n?\b|se?l?e?/\*\*/l?e?ct)", re.IGNORECASE)
# A number that ends in an exponent without digits, which MySQL reads as nothing, before a bracket or a full stop.
_EXPONENT = Pattern(r"(?<![\w.])\d{1,9}\.e(?=[\s(.,)])")
_SAME_NUMBER = Pattern(r"\s{0,9}(\d{1,9})\s{0,3}=\s{0,3}\1\s{0,9}")
_NOTHING = Pattern(r"\s{0,9}'\s{0,3}[-^*=<>&|+/%]{1,3}\s{0,3}'\s{0,9}")
_PROSE_BEFORE = Pattern(r"[a-z]{1,40},?\s{1,9}[a-z]")
_FEET_BEFORE = Pattern(r"\d\s{0,3}$")

CERTAIN = 5
SUSPICIOUS = 3


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The clauses of SQL in a text, each with its score."""
    text = reading.text
    yield from _find(text, reading)
    if text[:1] == '"' == text[-1:] and '""' in text:
        # A quoted field of a CSV file.
        yield from _find(text[1:-1].replace('""', '"'), reading)


def _find(text: str, reading: Reading) -> Iterator[tuple[str, int]]:
    reading.steps += 3 * len(text)
    if ".e" in text:
        text = _EXPONENT.sub(" ", text)
    if "/**/" in text and _SPLIT_WORD.search(text):
        text = text.replace("/**/", "")
    if _NOTHING.fullmatch(text) or _SAME_NUMBER.fullmatch(text):
        yield "quotes", CERTAIN
        return
    for quote in "'\"`":
        for position in _ways_out(text, quote):
            tokens = _Tokens(text[position + 1 :], quote)
            reading.steps += len(text) + tokens.count
            before = text[:position].lower()
            for name, score in _after_break_out(tokens, before, quote):
                yield f"quoted-{name}", score
    cut_off = text[-9:].rstrip().endswith(("--", "#"))
    if cut_off or _OPENING.match(text[:_OPENING_LENGTH]) or _has_clause(reading):
        tokens = _Tokens(text, "")
        reading.steps += len(text) + tokens.count
        yield from _as_it_stands(tokens, reading)


_DOUBLED = {quote: Pattern(rf"[^{quote}]*+(?:{quote}{quote}[^{quote}]*+)++{quote}") for quote in "'\""}


def _ways_out(text: str, quote: str) -> Iterator[int]:
    """Where a quote may end the literal that the text is put into: the first one, and the first that is not doubled."""
    first = text.find(quote)
    if first >= 0 and _BREAK_OUT.match(text, first + 1):
        yield first
    if first >= 0 and quote in _DOUBLED and text[first + 1 : first + 2] == quote:
        found = _DOUBLED[quote].match(text)
        if found is not None and _BREAK_OUT.match(text, found.end()):
            yield found.end() - 1


def _after_break_out(  # noqa: C901 - a list of questions
    tokens: _Tokens, before: str, quote: str
) -> Iterator[tuple[str, int]]:
    letters = tokens.letters
    prose = _PROSE_BEFORE.search(before[-80:]) is not None
    feet = _FEET_BEFORE.search(before[-4:]) is not None
    for name, pattern in _QUOTED:
        if pattern.search(letters) is None:
            continue
        if name in ("comment", "cut-off", "logic", "comparison", "concatenation", "expression", "call"):
            # A quote that ends a quotation or means feet and inches is followed by these, too.
            if name == "expression" and quote == '"' and "&" not in letters:
                continue
            if name in ("expression", "concatenation") and not _says_something(letters, tokens.text):
                continue
            if prose or (feet and name != "logic") or (quote != "'" and name in ("concatenation", "comparison")):
                continue
            yield name, CERTAIN
        else:
            yield name, CERTAIN
    if quote == "'" and not before.strip() and (_LONG_COMMENT.search(letters) or _ALL.fullmatch(letters)):
        yield "comment", CERTAIN
    if _UNION.search(letters):
        yield "union-select", CERTAIN
    if _SAME.search(tokens.text):
        yield "tautology", CERTAIN
    for name, pattern in _STATEMENTS:
        if pattern.search(tokens.text):
            yield name, CERTAIN


def _says_something(letters: str, text: str) -> bool:
    """Whether a rest is more than two strings with a word between them: it compares, calls or has a number."""
    return any(letter in letters for letter in "olqfx1vt") or any(sign.isdigit() for sign in text[-12:])


def _as_it_stands(tokens: _Tokens, reading: Reading) -> Iterator[tuple[str, int]]:
    letters = tokens.letters
    reading.steps += len(letters) * len(_UNQUOTED) + len(tokens.text) * len(_STATEMENTS)
    if _UNION.search(letters):
        yield "union-select", CERTAIN
    elif _UNION_ALONE.search(letters):
        yield "union", SUSPICIOUS
    for name, pattern in _UNQUOTED:
        if pattern.search(letters):
            yield name, CERTAIN
    for name, pattern in _STATEMENTS:
        if pattern.search(tokens.text):
            yield name, CERTAIN
    if _SAME.search(tokens.text):
        yield "tautology", CERTAIN
    if any(word in reading.lower for word in _SURELY_SYSTEM):
        yield "system-table", SUSPICIOUS
