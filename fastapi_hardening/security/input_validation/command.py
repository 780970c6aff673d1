"""Command injection: a value that ends the command it is put into and begins another one.

It takes a separator or a substitution, a command, and what makes it one: an argument that only a shell would
understand, or nothing at all behind a command that is no word of any language. Where the separator comes after a
sentence it takes more. Disguises are undone first: quotes and backslashes within words, ``${IFS}``, carets, braces.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "command"
CERTAIN = 5
SUSPICIOUS = 3

# Commands that are no words.
_STRONG = (
    "whoami|uname|ifconfig|ipconfig|netstat|nslookup|wget|lynx|bash|zsh|ksh|csh|tcsh|powershell(?:\\.exe)?|"
    "pwsh|cmd(?:\\.exe)?|"
    "chmod|chown|chgrp|nc|ncat|netcat|telnet|ls|pwd|awk|gawk|mawk|sed|egrep|fgrep|grep|tftp|ssh|scp|sftp|"
    "rsync|python[23]?(?:\\.\\d{1,3})?|"
    "php[578]?|nodejs|base64|base32|xxd|hexdump|certutil|bitsadmin|systeminfo|tasklist|taskkill|printenv|"
    "lsof|crontab|useradd|adduser|"
    "usermod|groupadd|userdel|gcc|traceroute|tracert|phpinfo|wmic|mshta|rundll32|regsvr32|cscript|wscript|"
    "xterm|busybox|mkfifo|"
    "mknod|nohup|socat|openssl|lsb_release|hostname|getent|dmesg|lscpu|lsblk|arp|msiexec|schtasks|netsh|"
    "whois|tcpdump|nmap|"
    "sudo|passwd|unlink|rmdir|mkdir|setfacl|iptables|mysql|psql|sqlite3|zcat|tac|od|xargs|sysctl|sh|fping|"
    "hping3|ping6?|"
    "iwr|irm|getcap|rbash|setsid|stdbuf|unzip|gzip|gunzip|bzip2|mysqldump|iconv|nsenter|chroot|docker|kubectl|"
    "pkill|killall|dir\\s{1,3}[a-z]:|echo|expr|set\\s/a|net\\s{1,3}(?:user|localgroup|group|view|use|"
    "start|share|stat)|(?:ba|z|k|da)?sh\\s{1,3}-c|usleep|lastlog|dpkg|nltest|ipcs|strace|gdb|calc\\.exe|notepad\\.exe|"
    "get-(?:childitem|process|content|wmiobject|service)|invoke-(?:webrequest|command|expression|restmethod)|"
    "start-(?:process|sleep)"
)
# Commands that are words, too.
_WEAK = (
    "cat|id|ps|perl|curl|dash|dig|ruby|rev|nl|paste|ver|type|dir|sleep|time|date|find|sort|more|less|head|"
    "tail|cut|kill|who|last|test|touch|set|export|mail|exec|eval|print|printf|"
    "copy|move|del|erase|rm|mv|cp|ln|du|df|man|top|at|tee|vi|vim|ed|ex|halt|reboot|shutdown|poweroff|net|"
    "reg|start|call|nano|split|strings|ftp|"
    "finger|mount|which|env|node|system|passthru|shell_exec|popen|tar|zip|diff|watch|service|systemctl|"
    "host|route|read|wait|uptime|"
    "groups|users|w|uniq|comm|file|stat|locate|source|alias|history|logger|timeout|nice|sysinfo|attrib|"
    "break|true|false|cd|fdisk|free|screen|dd|ip|ss|tr|calc|visudo|su|pip3?|trap|powercfg"
)
_PATHS = r"(?:\./|(?:/[\w.*?-]{1,32}){0,6}/|[a-z]:\\(?:[\w ]{1,32}\\){0,6}|%\w{1,20}%\\|~/)?"
_SEPARATOR = r"(?:;|\|{1,2}|&{1,2}|\n|\r|\$\(|<\(|>\(|\\[nr]|\$\{IFS\}|=\(|!\s?`)"
_OPTION = r"(?:-{1,2}[a-z0-9]|/[a-z?]{1,3}(?:\s|$)|\+%)"
_SHELL_ARGUMENT = (
    r"(?:" + _OPTION + r"|[~.]{0,2}/|\\\\|[a-z]:[\\/]|\$|`|[\"'][^\"']{0,80}[\"']|[\"']|>|<|\*|\?\?|\{|"
    r"%\w{1,30}%|https?:|ftp:|\d{1,3}\.\d|0x|\d{1,12}\s{0,3}(?:[;|&`)#]|$)|"
    r"\.{1,2}(?:\s|$)|\w{1,8}=[/~$]|localhost|[\w-]{1,40}\.(?:com|net|org|ru|io|txt|php|sh|py|exe|ini|log|conf|html?|js|bat|ps1|me|site|"
    r"xyz|example)\b|\S{1,80}\s{0,3}[;|&`)]|"
    r"[\w.+-]{1,40}@|&\d|/dev/|@|passwd|etc\b)"
)
_END = r"(?=\s{0,9}(?:$|[;|&`)\n\r#<>\"'}]|\\[nr]))"

# A separator, what may stand before a command, and the word that may be one; which words are, sets say faster.
_AFTER_SEPARATOR = Pattern(
    rf"{_SEPARATOR}[\s;|&@({{\"'$!+]{{0,8}}(?:(?:sudo|nohup|exec|time|env|busybox|command|then|do|start|call|"
    rf"timeout\s\d{{1,5}})\s{{1,4}}){{0,2}}"
    rf"{_PATHS}(?!base64,)(?P<word>[a-z_][\w.-]{{0,24}})"
)
_TAIL = Pattern(
    rf"(?P<ended>{_END})|(?P<glued>[<>,({{$%+]|/(?=[a-z?]\b))|"
    rf"(?P<argued>\s{{1,9}}{_SHELL_ARGUMENT})|(?P<spaced>\s{{1,9}})"
)
_FIRST_WORD = Pattern(rf"[\s\"'({{;|&<^]{{0,6}}{_PATHS}(?P<word>[a-z_][\w.-]{{0,24}})")
_STRONG_WORD = Pattern(rf"(?:{_STRONG})$")
_WEAK_WORD = Pattern(rf"(?:{_WEAK})$")
_TWO_WORDS = Pattern(
    r"(?:net\s{1,3}(?:user|localgroup|group|view|use|start|share|stat)|(?:ba|z|k|"
    r"da)?sh\s{1,3}-c|dir\s{1,3}[a-z]:|set\s/a|ps\s{1,3}(?:aux|-?ef?)|ip\s{1,3}(?:a|addr|route)|"
    r"reg\s{1,3}(?:query|add|save)|format\s{1,3}[a-z]:|su\s{1,3}-|start\s{1,3}[\w-]{1,30}\.exe)(?![\w-])"
)


@lru_cache(maxsize=4096)
def _kind_of(word: str) -> str:
    """Whether a word is a command: ``strong`` if it is nothing else, ``weak`` if it is a word of a language, too."""
    word = word.rstrip(".-")
    if _STRONG_WORD.match(word):
        return "strong"
    word = word.removesuffix(".exe")
    if _STRONG_WORD.match(word):
        return "strong"
    return "weak" if _WEAK_WORD.match(word) else ""


def is_command(word: str) -> bool:
    """Whether a word, in lower case, is a command, be it that it is a word of a language, too."""
    return bool(word and _kind_of(word))


_WITH_PATH = Pattern(
    rf"{_SEPARATOR}[\s\"'(]{{0,6}}(?:/(?:usr/)?(?:local/)?s?bin/|usr/bin/|/etc/|"
    rf"c:\\(?:windows|winnt|inetpub)\\)[\w?*]"
)
_TICKS = Pattern(
    rf"(?:(?:cat|echo|ls|wget|curl|nslookup|ping|host|dig)\s{{1,4}})?\S{{0,80}}(?<!`)`(?!`)\s{{0,4}}{_PATHS}(?:{_STRONG}|"
    rf"{_WEAK})(?![\w-])[^`\n]{{0,200}}(?:`[^`\s]{{0,20}}(?:\s{{0,4}}[#;|&]\s{{0,4}})?\s{{0,4}}|$)$"
)
_SUBSTITUTION = Pattern(rf"(?:\$\(|<\()\s{{0,4}}{_PATHS}(?:{_STRONG}|{_WEAK})(?:{_END}|\s{{1,9}}{_SHELL_ARGUMENT})")
_WHOLE = Pattern(
    rf"[\s\"'({{]{{0,4}}{_PATHS}(?:(?:{_STRONG})|(?:cat|id|echo|type|dir|sleep|del|rm|cp|mv|net|reg|more|"
    rf"less|head|tail|find|touch|copy|cd|expr|tar|kill|system|host|ftp))(?:\.exe)?"
    rf"(?:\s{{1,4}}(?:{_OPTION}[\w=.:/-]{{0,40}}|"
    rf"\d{{1,6}})){{0,6}}\s{{0,4}}(?:(?:[<>]{{1,2}}\s{{0,3}})?(?:[~.]{{0,2}}/[\w./*?-]{{1,120}}|"
    rf"[a-z]:[\\/][\w.\\/ ]{{0,120}}|\d{{1,3}}(?:\.\d{{1,3}}){{3}}|localhost|https?://\S{{1,200}}))"
    r"[\s\"')};&|#]{0,6}$"
)
# What nobody would write but to have it run, from the first word on.
_UNMISTAKABLE = Pattern(
    r"[\s\"'({;|&@]{0,6}(?:%(?:comspec|systemroot)%\S{0,60}\s{1,4}/|"
    r"rm\s{1,4}-\w{0,4}[rf]\w{0,4}\s{1,4}(?:[/~*.$-]|\S{1,60}\s{0,4}$)|"
    r"(?:wget|curl)\s{1,4}(?:-\S{1,30}\s{1,4}(?:[\w./]{1,60}\s{1,4})?){0,6}[\"']?(?:https?|ftp)://\S{1,300}"
    r"(?:\s{1,4}(?:-\S|[|>;&])|\s{0,4}$)|"
    r"(?:nc|ncat|netcat)(?:\.exe)?\s{1,4}(?:-[a-z]{1,6}\s{1,4})?(?:-[a-z]|/bin/|\d{1,3}(?:\.\d{1,3}){3}|\d{2,5}\s{0,3}$)|"
    r"(?:powershell|pwsh)(?:\.exe)?\s{1,4}(?:-[a-z]|iex|invoke-|\$|\(|\"|&)|cmd(?:\.exe)?\s{1,4}/[ckq]\b|"
    r"(?:certutil|bitsadmin|schtasks|wmic|netsh|sc|reg)(?:\.exe)?\s{1,4}(?:[-/][a-z]|process\s|query\s|add\s|"
    r"firewall\s|advfirewall\s)|"
    r"(?:mshta|regsvr32|rundll32|cscript|wscript)(?:\.exe)?\s{1,4}(?:/|https?:|[\w.\\:-]{1,80}[.,])|"
    r"net\s{1,4}(?:user|localgroup|group|use|view|share)\s{1,4}[^\n]{0,80}(?:/[a-z]{2}|\\\\)|"
    r"(?:python[\d.]{0,4}|perl|ruby|php[\d.]{0,4}|node|lua)\s{1,4}-(?:[a-z]{1,4}\s{1,4})?[cemrn]\s{0,3}[\"']|"
    r"[gmn]?awk\s{1,4}'\s{0,4}begin|perl\s{1,4}-mio|"
    r"find\s{1,4}[/.~][^\s|;]{0,60}\s{1,4}(?:-\w{1,10}\s{1,4}[^\s|;]{1,40}\s{1,4}){0,3}-(?:exec|perm|delete)|"
    r"(?:ping|nslookup|telnet|traceroute|tracert)\s{1,4}(?:-[a-z]\s{0,2}\d{0,6}\s{1,4}){0,3}"
    r"(?:\d{1,3}(?:\.\d{1,3}){3}|localhost|(?:[\w-]{1,63}\.){1,6}[a-z]{2,12})(?:\s{1,4}\d{1,5})?\s{0,4}$|"
    r"chmod\s{1,4}(?:-r\s{1,4})?(?:[0-7]{3,4}|[augo]{0,3}\+[rwxst]{1,4})\s{1,4}[/.\w]\S{0,80}\s{0,4}$|"
    r"(?:ba|z|k|da|c)?sh\s{1,4}-i\b|echo\s{1,4}(?:\$\{?[a-z_]{2,20}\}?|%[a-z_]{2,30}%)\s{0,4}$|"
    r"cat\s{1,4}(?:`|<|[\w./-]{0,60}\*[\w.]{0,20}\s{0,4}$)|"
    r"(?:\$0|[a-z][\w.]{1,11})\s{0,2}(?<!<)<<<(?!<)\s{0,3}\S)"
)
_ASSIGNMENTS = Pattern(r"(?:[a-z_]\w{0,15}=[^\s;&|]{0,60};\s{0,3}){2,40}\$\{?[a-z_]\w{0,15}\}?\s{0,3}[$/;|]?")
_SHELL = Pattern(
    r"\s{0,4}(?:(?:time|strace|nohup|env|exec|busybox|sudo|xargs)\s{1,4})?(?:\$\{?shell\}?|(?:/(?:usr/)?bin/)?(?:ba|z|k|da)?sh)"
    r"\s{1,4}-[a-z]{0,3}c\s{1,4}\S"
)
_OPTIONS_ONLY = Pattern(
    rf"\s{{0,4}}{_PATHS}(?:{_STRONG})(?:\s{{1,4}}-[\w]{{1,8}}){{1,4}}\s{{0,4}}$|"
    rf"\s{{0,4}}/(?:usr/)?(?:local/)?s?bin/(?:(?:id|ls|ps|cat|whoami|uname|netstat|ifconfig|hostname|"
    rf"env)\s{{0,4}}$|\w{{1,20}}(?:\s{{1,4}}\S{{1,80}}){{1,6}}\s{{0,4}}$)"
)
_ONLY = Pattern(
    rf"[\s\"'({{<^]{{0,4}}(?:{_STRONG}|id|ps|dir)\s{{0,3}}[;|&]{{1,2}}\s{{0,3}}$|"
    rf"[\s\"'(]{{0,4}}[<^]{{1,2}}\s{{0,3}}(?:whoami|id|ls|uname|ifconfig|ipconfig|netstat)\s{{0,3}}(?:[;|&]{{1,2}}|\\n)?\s{{0,3}}$|"
    rf"\s{{0,4}}(?:which|type|man|sudo|doas|time|strace|ltrace|nohup|env|nice|exec|busybox|setsid|xargs)\s{{1,3}}"
    rf"(?:{_STRONG})\s{{0,4}}(?:-{{1,2}}\w[^\n]{{0,80}})?$"
)
_ALONE = Pattern(rf"[\s;|&]{{0,4}}(?:{_STRONG}|id)\W{{0,4}}$")
# What only a shell has, wherever it stands: what has to be in the text for a look to be worth it (of each set one), and
# the pattern.
_ANYWHERE: tuple[tuple[str, tuple[tuple[str, ...], ...], Pattern], ...] = tuple(
    (name, needed, Pattern(pattern))
    for name, needed, pattern in (
        ("device", (("dev/",),), r"/dev/(?:tcp|udp)/[\w.-]{1,80}/\d"),
        (
            "glob",
            (("?", "["), ("/",)),
            (
                r"(?:^|[\s;|&<])/(?:[\w*-]{0,20}(?:\?|\[[\w/?^-]{1,6}\])[\w?*\[\]/-]{0,20}/[\w?*\[\]-]{1,20}|"
                r"[\w?*-]{1,20}/[\w*-]{0,20}\?[\w?*]{1,20})(?=$|[\s;|&/])"
            ),
        ),
        (
            "glob",
            (("[",), ("]",), ("/",)),
            (
                r"(?:^|[\s;|&])(?:cat|ls|ll|nl|tac|head|tail|more|less|cp|mv|rm|find|grep|curl|php|python3?)\s{1,3}"
                r"(?:-\w{1,8}\s{1,3})?/[\w/.*-]{0,30}\[[\w/^-]{1,16}\][\w/.*-]"
            ),
        ),
        # Batch files.
        (
            "script",
            (("for",), ("%",), (" in", ")in")),
            (
                r"\bfor\s{1,20}(?:/[a-z]\s{1,9}){0,3}(?:(?:\"[^\"]{0,40}\"|[a-z]:\S{1,60})\s{1,9})?"
                r"%{1,2}[^\s%]{1,12}\s{1,9}in\s{0,9}\("
            ),
        ),
        (
            "script",
            (("if",), ("%", ":\\")),
            (
                r"\bif\s{1,20}(?:/i\s{1,4})?(?:not\s{1,4})?(?:[\[\"({x]?%[\w~]{1,20}%?[\]\"})]?\s{0,4}(?:==|"
                r"(?:equ|neq|lss|leq|gtr|geq)\b)|exist\s{1,4}[\"(]?[a-z]:\\|%\w{1,30}%\s|\"%\w{1,30}%\")"
            ),
        ),
        # Bourne shells.
        (
            "script",
            (("; do", ";do", "; then", ";then", ";  "),),
            (
                r"(?:^|[;&|\n])\s{0,4}(?:while|until|for|if)\s[^;\n]{1,120};\s{0,4}(?:do|then)\s[^\n]{1,200};\s{0,4}"
                r"(?:done|fi)\b|[;&|]\s{0,4}(?:if|while|until|for)\s[^;\n]{1,120};\s{0,4}(?:then|do)\b"
            ),
        ),
        (
            "script",
            (("(){", "() {", "()  {"), ("|", "&")),
            (
                r"(?:^|\W)(\w{1,12}|:)\s?\(\)\s{0,2}\{\s{0,3}(?:\1(?:\(\))?\s{0,3}[|&](?![|&])|"
                r"[^}\n]{0,30}\|[^}\n]{0,30}&\s{0,4};?\s{0,4}\})"
            ),
        ),
        (
            "redirection",
            (("|",), ("sh",)),
            r"\|\s{0,4}(?:sudo\s{1,4})?(?:/[\w/]{1,20}/)?(?:ba|z|k|da)?sh(?:\s{1,4}-\w{0,4})?[\s\"'`;)]{0,6}$",
        ),
        ("redirection", (("$(", "`"), ("<",)), r"(?:\$\(|`)\s{0,3}<\s{0,3}(?:[/~]|\.{1,2}/)"),
        ("redirection", ((". /", ".  /"),), r"(?:^|[;|&`\n])\s{0,4}\.\s{1,4}/(?:etc|home|root|tmp|proc)/"),
        ("variable", (("${",),), r"\$\{[a-z_]\w{0,20}(?::\d{1,3}:\d{1,3}|%%?[^}\s]{1,20}|//[^}\s]{1,30}/)\}"),
        (
            "shellshock",
            (("(",), ("};", "} ;", "}  ;", ">_")),
            r"(?:^\s{0,4}|[\s\"'=:])\(\s{0,4}\)\s{0,4}\{\s{0,4}[:_x]?\s{0,4};[^}]{0,40}\}\s{0,4}(?:;|>_)",
        ),
        # The shell of SQLite takes lines that begin with a full stop.
        (
            "line",
            ((".",), (";", "\n")),
            r"[;\n]\s{0,4}\.\s{0,2}\\?[\"']?(?:shell|system|sh|databases|load|import|once|output|read|restore)\b",
        ),
    )
)
# The same at the start of a value, where one of these is within its first characters.
_START_LENGTH = 12
_AT_START: tuple[tuple[str, tuple[str, ...], Pattern], ...] = tuple(
    (name, signs, Pattern(pattern))
    for name, signs, pattern in (
        (
            "script",
            ("if",),
            (
                r"\W{0,3}if(?:\s{1,9}|(?=/))(?:/i\s{1,9})?(?:not\s{1,9})?(?:(?:defined\s{1,9}\S{1,40}|"
                r"errorlevel\s{1,9}\d{1,3}|cmdextversion\s{1,9}\d|exist\s{1,9}\S{1,80}|\S{1,60}={2,3}\S{1,60}|"
                r"\S{1,40}\s{1,9}(?:equ|neq|lss|leq|gtr|geq)\s{1,9}\S{1,40})"
                r"\s{1,9}(?:\(|(?:cmd|echo|set|call|goto|del|start|type|copy|exit)\b))"
            ),
        ),
        ("script", ("{",), r"\s{0,4}\{(?:,[\w./-]{1,40}(?:,[\w./:-]{0,40}){0,6}|[a-z]{1,20},)\}\s{0,4}$"),
        ("script", ("{",), r"\s{0,4}\{[\w/?*.]{1,40}(?:,-\w{1,10}[^{}\s]{0,60}|,)\}\w{0,4}\s{0,4}$"),
        ("script", ("{",), r"\s{0,4}\{[\w/*.]{0,20}\?[\w/?*.]{0,40},\}?\w{0,4}\s{0,4}"),
        ("shellshock", ("(",), r"\s{0,4}\(\)\s{0,4}\{[^}]{0,60}\}\s{0,4};"),
        (
            "redirection",
            ("<", ">"),
            r"\s{0,4}[;|&]?\s{0,3}[012&]?(?:>{1,2}|<)\s{0,3}/(?:tmp|etc|var|dev|home|root|proc)/",
        ),
        (
            "line",
            (";", "|", "&"),
            (
                r"\s{0,4}[;|&]{1,2}\s{0,3}[\"']?[a-z][\w.-]{1,20}[\"']?"
                r"(?:\s{1,3}-{1,2}[a-z][\w-]{0,20}(?:\s|=|$)|\s{1,3}\(\s?(?:iwr|irm|new-object))"
            ),
        ),
        ("line", ("alias",), r"\W{0,3}alias\s{1,3}(?:[+-]\w{1,2}\s{1,3})?[\"']?[\w.]{1,30}[\"']?=\S"),
    )
)


_SENSITIVE = Pattern(
    r"/etc/(?:passwd|shadow|hosts|group|issue)|c:[\\/]{1,2}(?:windows|winnt|boot\.ini|"
    r"inetpub)|win\.ini|boot\.ini|/dev/(?:tcp|udp)/|/proc/self|\|\s{0,3}(?:ba|z|k|da)?sh\b|-e\s{1,3}/bin/|"
    r"rm\s{1,3}-\w{0,3}[rf]"
)
_VARIABLE = Pattern(
    r"(?:^|[\s;|&`])([a-z_]\w{0,15})=(?:\$?\\?['\"][^'\"\n]{0,60}['\"]|[^\s;&|"
    r"]{1,60})[;&|]{1,2}\s{0,4}\$\{?\1\b"
)
_CODE = Pattern(
    r"(?:\b(?:system|passthru|shell_exec|popen|proc_open|pcntl_exec|assert|create_function|call_user_func|"
    r"backticks?)\s{0,3}\(\s{0,3}"
    r"(?:['\"`$]|base64_decode|chr\(|getenv|/|(?:cat|ls|id|dir|whoami|sleep|ping|echo|wget|curl|nc|uname)\b)"
    r"|(?<![.\w])exec\s{0,3}\(\s{0,3}['\"]|\b(?:os\.(?:system|popen|exec\w{0,3}|spawn\w{0,4})|subprocess\.\w{2,12}|commands\.getoutput|"
    r"pty\.spawn)\s{0,3}\("
    r"|\bkernel\.(?:exec|system|spawn)\s{0,3}\(|%x\(\s{0,3}['\"]"
    r"|__import__\s{0,3}\(|require\s{0,3}\(?\s{0,3}['\"]child_process|process\.mainmodule|"
    r"\.getruntime\s{0,3}\(\s{0,3}\)\s{0,3}\.\s{0,3}exec|"
    r"processbuilder\s{0,3}\(|\beval\s{0,3}\(\s{0,3}(?:base64_decode|gzinflate|\$_|str_rot13|compile|__|"
    r"chr)|\$_(?:get|post|request|cookie|server)\s{0,3}\[|"
    r"\bphpinfo\s{0,3}\(\s{0,3}\)|\bprint\s{0,3}\(?\s{0,3}md5\s{0,3}\(|invoke-expression|\biex\s{0,3}\(|"
    r"new-object\s{1,3}(?:system\.)?net\.|frombase64string)"
)
_OPEN_TAG = Pattern(
    r"<\?(?:php\b|=|\s{0,4}(?:system|exec|passthru|echo|print|eval|include)\b)|"
    r"<%\s{0,4}(?:execute|eval|response\.|runtime|=\s{0,3}(?:system|`))"
)

_QUOTES_IN_WORD = Pattern(
    r"(?<=[\w/])(?:''|\"\"|\\(?=[a-z/])|\$[-_@*!?#]|\$\{[@*]\}|\$[a-z](?![a-z{(\d])|\$[a-z](?=\\)|\^)(?=[\w/+\\,-])|\$\(\)|"
    r"(?<=[\w/;|&\s])\\\n(?=\w)"
)
_QUOTED_WORD = Pattern(
    r"[\s;|&]{0,4}(?:(?:\w{0,6}['\"]){3,12}\w{0,6}(?:\s|$)|\w{1,8}(?:(['\"])\w{1,8}\1\w{0,8}){1,4}(?:[\s;|&]|$)|"
    r"(['\"])\w{1,4}\2\w{1,8}(?:\s{1,4}[-/.]|\s{0,4}[;|&]))"
)
_BLANKS = Pattern(r"\$\{ifs[^}]{0,20}\}|\$ifs(?:\$\d)?|%09|\{ifs\}|\t")
_BRACES = Pattern(r"\{([\w./-]{1,40}(?:,[\w./:-]{1,80}){1,8})\}")
_PROSE = Pattern(r"[a-z']{2,40},?\s{1,9}[a-z']{2,40}")
_SEPARATING = (";", "|", "&", "\n", "\r", "$", "<(", ">(", "=(", "!", "\\n", "\\r")
_CODE_WORDS = (
    "system", "exec", "passthru", "popen", "eval", "assert", "subprocess", "__import__", "child_process", "mainmodule",
    "phpinfo", "$_", "md5", "invoke-", "iex", "new-object", "frombase64", "call_user", "create_function", "getoutput",
    "pty.", "backtick", "kernel.", "%x(", "processbuilder", "proc_open",
)  # fmt: skip
_SIGNS = (
    ";", "|", "&", "\n", "`", "$", "\\", "<(", "\r", "/", "-", "(", "<?", "<%", ":", "\\n", "{,", ",}", "^", "''", '""',
    "<", "%",
)  # fmt: skip


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The commands in a text, each with its score."""
    lower = reading.lower
    reading.steps += 2 * len(lower)
    if not any(sign in lower for sign in _SIGNS):
        if not reading.signs and _UNMISTAKABLE.match(lower):
            yield "whole", CERTAIN
        return
    found: set[str] = set()
    for name, score in _in_text(lower, reading):
        found.add(name)
        yield name, score
    plain = _undisguised(lower)
    if plain != lower:
        if _ALONE.match(plain):
            yield "disguised", CERTAIN
        for name, score in _in_text(plain, reading):
            if name not in found:
                yield f"disguised-{name}", score


def _undisguised(text: str) -> str:
    if "ifs" in text or "%09" in text or "\t" in text:
        text = _BLANKS.sub(" ", text)
    if "{" in text and "," in text:
        text = _BRACES.sub(lambda match: match[1].replace(",", " "), text)
    if any(sign in text for sign in ("''", '""', "\\", "$", "^")):
        text = _QUOTES_IN_WORD.sub("", text)
    if ("'" in text or '"' in text) and _QUOTED_WORD.match(text):
        text = text.replace("'", "").replace('"', "")
    if "+" in text and " " not in text.strip():
        text = text.replace("+", " ")
    return text


def _in_text(text: str, reading: Reading) -> Iterator[tuple[str, int]]:
    reading.steps += 8 * len(text)
    if any(sign in text for sign in _SEPARATING):
        yield from _separated(text)
    yield from _by_themselves(text)
    first = _FIRST_WORD.match(text)
    if first is not None and _kind_of(first["word"]):
        if (
            _UNMISTAKABLE.match(text)
            or _SHELL.match(text)
            or _ONLY.match(text)
            or _WHOLE.match(text)
            or _OPTIONS_ONLY.match(text)
        ):
            yield "whole", CERTAIN
    elif _OPTIONS_ONLY.match(text) or (("%" in text or "<<<" in text) and _UNMISTAKABLE.match(text)):
        yield "whole", CERTAIN
    if any(word in text for word in _CODE_WORDS):
        found = _CODE.search(text)
        if found is not None:
            yield "code", SUSPICIOUS if _PROSE.search(text[:120]) or _is_prose(text, found.start()) else CERTAIN
    if "<?" in text or "<%" in text:
        found = _OPEN_TAG.search(text)
        if found is not None:
            yield "open-tag", CERTAIN


def _separated(text: str) -> Iterator[tuple[str, int]]:
    for match in _AFTER_SEPARATOR.finditer(text):
        two = _TWO_WORDS.match(text, match.start("word"))
        kind = "phrase" if two else _kind_of(match["word"])
        score = _score_of(match, two.end() if two else match.end(), kind, text) if kind else 0
        if score:
            yield "separated", score
            if score >= CERTAIN:
                break
    if any(path in text for path in ("bin/", "/etc/", ":\\")):
        found = _WITH_PATH.search(text)
        if found is not None and not _is_prose(text, found.start()):
            yield "separated-path", CERTAIN
    if "$(" in text or "<(" in text:
        found = _SUBSTITUTION.search(text)
        if found is not None:
            sure = not _is_prose(text, found.start()) or _SENSITIVE.search(found[0])
            yield "substitution", CERTAIN if sure else 2
    if "=" in text and "$" in text and (_VARIABLE.search(text) or _ASSIGNMENTS.search(text)):
        yield "variable", CERTAIN


def _by_themselves(text: str) -> Iterator[tuple[str, int]]:
    """What only a shell has."""
    if "`" in text and _TICKS.match(text):
        yield "substitution", CERTAIN
    for name, needed, pattern in _ANYWHERE:
        if all(any(sign in text for sign in signs) for signs in needed) and pattern.search(text):
            yield name, CERTAIN
    start = text[:_START_LENGTH]
    for name, signs, pattern in _AT_START:
        if any(sign in start for sign in signs) and pattern.match(text):
            yield name, CERTAIN


_ONE_VALUE = Pattern(
    r"\s{0,3}[\"']?(?:\d[\d.]{0,40}|[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}|\w{0,40}[\"'](?:\)){0,3})[\"']?\s{0,3}$"
)
_ONE_WORD = Pattern(r"(?:\w{1,20}=)?\w{1,40}$")
_FEW = frozenset({"id", "dir", "ps", "ver", "cat", "w", "set", "env"})


def _is_put_behind(match: re.Match[str], text: str) -> bool:
    """Whether nothing but a number, an address or another command stands before, and nothing comes after."""
    before = text[: match.start()]
    if len(before) > 80 or text[match.end() :].strip("\"'`;|&#) \n\r"):  # noqa: PLR2004
        return False
    if match["word"] not in _FEW and _kind_of(match["word"]) != "strong":
        return False
    if _ONE_VALUE.match(before) is not None or _kind_of(before.strip()) == "strong":
        return True
    # "name&id" is a part of a query.
    return match[0][:2] == "&&" and _ONE_WORD.match(before) is not None


def _score_of(match: re.Match[str], end: int, kind: str, text: str) -> int:  # noqa: PLR0911 - a table of cases
    tail = _TAIL.match(text, end)
    if tail is None:
        return CERTAIN if kind == "phrase" and not _is_prose(text, match.start()) else 0
    separator = match[0][:2]
    first = separator[0]
    if tail["ended"] is not None and first in "&\n|" and match.start() and _is_put_behind(match, text):
        return CERTAIN
    prose = _is_prose(text, match.start())
    if tail["argued"] or tail["glued"]:
        if _SENSITIVE.search(text, match.start(), match.start() + 200):
            return CERTAIN
        if prose or (first == "\n" and match.start() > 0):
            return 2
        return CERTAIN if kind != "weak" or tail["argued"] or first != "&" else 2
    if prose or (first == "\n" and match.start() > 0 and "\n" in text.strip()):
        return 0
    if tail["ended"] is None:
        return CERTAIN if kind != "weak" and (first not in "&\n" or separator == "&&") else 0
    if kind != "weak":
        return CERTAIN
    # "AT&T; date" is a list; ";date" is none.
    before = text[max(0, match.start() - 40) : match.start()].strip()
    if separator[0] == "&" and separator[1:].isalpha() and "=" in before:
        return 2
    glued = not match[0][1:2].isspace() or not any(map(str.isalpha, before))
    return CERTAIN if glued and (first != "&" or match.start() == 0 or text[end : end + 40].strip()) else 2


def _is_prose(text: str, position: int) -> bool:
    """Whether a sentence comes before this position: words, not the value that the command is put behind."""
    return _PROSE.search(text[max(0, position - 160) : position]) is not None
