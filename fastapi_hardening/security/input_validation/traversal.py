"""Path traversal: a value that, joined to a folder, names a file outside of it.

What counts is where the path goes, not how it looks: its segments are walked, whatever separates them, and it is an
attack when it leaves the folder that it starts in. ``docs/../images/a.png`` does not. An absolute path is one where it
names a file that holds secrets, and only as the whole value: a sentence may speak of ``/etc/passwd``.
"""

from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "traversal"
CERTAIN = 5
SUSPICIOUS = 3

_SEPARATORS = Pattern("[/\\\\\ue000-\uf8ff\ufffd]+")
_RUN = Pattern(r"[^\s\"'<>|(){},=&?]++")
_UP = Pattern(r"\.\.|\.[/\\]{1,3}\.")
_SPELT = (("0x2e", "."), ("0x2f", "/"), ("0x5c", "\\"), ("%2e", "."), ("%2f", "/"), ("%5c", "\\"), ("%25", "%"))
# The percent sign was taken away, or stands for itself.
_DOTS_AND_HEX = Pattern(
    r"(?<=\.\.)%{0,9}(?:25){0,9}(?:2f|5c|c0%?af|c1%?9c|u2215|u2216|uefc8)|"
    r"(?<=\.\.)[\x00;%\uf025]{1,3}(?=[/\\]|\.\.)|"
    # What a lax decoder takes for a separator, and a strict one for nothing.
    r"(?<=\.\.)(?:%[0-9a-z]{2}){1,3}(?=\.\.|[/\\a-z]|$)"
)

_SENSITIVE = Pattern(
    r"(?:^|[/\\])(?:etc[/\\]{1,4}(?:passwd|shadow|group|hosts|issue|motd|sudoers|fstab|crontab|profile|ssh|"
    r"apache|httpd|nginx|mysql|my\.cnf|"
    r"php|resolv|hostname|gshadow|security|exports|inetd|vsftpd|samba|init|master\.passwd|os-release|"
    r"redhat-release|debian_version)"
    r"|proc[/\\]{1,4}(?:self|version|cmdline|net|mounts|cpuinfo|\d)|boot\.ini|win\.ini|system\.ini|"
    r"winnt[/\\]|windows[/\\]{1,4}(?:system32|win\.ini|"
    r"system\.ini|repair|panther|php\.ini|my\.ini)|inetpub[/\\]|global\.asa|web-inf[/\\]|meta-inf[/\\]|"
    r"\.ssh[/\\]|id_rsa\b|\.htpasswd|"
    r"\.aws[/\\]|\.git[/\\](?:config|head|index)|web\.config\b|wp-config\.php|\.bash_history|"
    r"authorized_keys|var[/\\]{1,4}log[/\\])"
)
_ABSOLUTE = Pattern(
    r"(?:[/\\]{1,4}(?:private[/\\])?(?:etc|proc|root|boot|var[/\\]{1,3}(?:log|logs|adm|spool|run|mail|lib|www|"
    r"lp|backups?|apache2?|nm2|cpanel|saf)|"
    r"usr[/\\]{1,3}(?:local[/\\]{1,3})?(?:etc|lib|zend|apache\d?|php\d?|cpanel|httpd|mysql|nginx|pgsql|psa|"
    r"lsws|zeus|samba|spool|pure-?ftpd|proftpd|vsftpd|tomcat\d?)|"
    r"(?:opt|volumes)[/\\]{1,3}(?:lampp|xampp|apache\d?|tomcat\d?|nginx|jboss|macintosh_hd1)|"
    r"dev[/\\](?:random|urandom|zero|tcp|udp|fd|mem|[hs]d[a-z]\d?)|"
    r"sys[/\\](?:class|kernel|block|devices|firmware|module)|winnt|windows|inetpub)(?:[/\\]|$)"
    r"|[/\\]tmp[/\\]{1,3}sess_|%?(?:systemroot|windir|systemdrive)%[/\\]|/[a-z]:\\|\\\\[?.]\\[a-z]:|"
    r"\\\\[\w.-]{1,80}\\(?:[a-z]|admin|ipc)\$|\\\\\d{1,3}(?:\.\d{1,3}){3}\\|"
    r"[a-z][:|][/\\]{1,4}(?:boot\.ini|windows|winnt|inetpub|winxp|"
    r"xampp|wamp|apache|appserv|php\d?[/\\]|mysql|autoexec\.bat|config\.sys|system volume|system32[/\\]|"
    r"pagefile\.sys|ntldr|documents and settings[/\\]{1,4}(?:administrator|all users)|"
    r"users[/\\]{1,4}(?:administrator|all users|default)[/\\]|"
    r"program files[^/\\]{0,8}[/\\]{1,4}(?:apache|mysql|php|xampp|filezilla|postgres|microsoft iis))"
    # Without its backslashes, as a careless reader leaves it.
    r"|/?[c-f]:(?:windows|winnt|inetpub|boot\.ini|winxp|xampp|wamp|apache|appserv|php\d|mysql|autoexec\.bat|system32|"
    r"program files(?: \(x86\))?(?:apache|mysql|php|xampp|filezilla|postgres|microsoft iis))"
    r"|/?[a-z]:[/\\]?(?:windows|winnt|inetpub|boot\.ini)|[/\\]program files(?: \(x86\))?[/\\]{0,4}(?:apache|"
    r"mysql|php|xampp|filezilla|postgres)"
    r"|[/\\](?:[\w.-]{1,40}[/\\]{1,3}){0,8}(?:[\w-]{0,40}php\.ini|httpd\.conf|nginx\.conf|my\.(?:cnf|ini)|"
    r"\.ht(?:access|passwd)|(?:access|error)[._]\s?log|"
    r"\.(?:bash_profile|bashrc|profile|netrc|rhosts|forward|cshrc|viminfo|mysql_history|xauthority|sh_history))$"
    r"|[/\\]?(?:etc[/\\]{1,3}(?:passwd|shadow|hosts|group)|boot\.ini|win\.ini|web-inf[/\\]|\.htpasswd|"
    r"\.htaccess|\.ssh[/\\]|\.git[/\\]|\.env$|\.bash_history|\.xauthority))"
    r"[^\s\"'<>|(){}]{0,400}(?:[a-z0-9 ]{0,40}[/\\.][^\s]{0,200})?$"
)
# A file that holds secrets, at the end of whatever path; and what a program of the system is configured by or writes.
_NAMED = Pattern(
    r"(?:~\w{0,20})?[;./\\]{0,4}(?:[\w.@-]{1,60}[/\\]{1,3}){0,10}(?:\.ht(?:access|passwd|group)|"
    r"\.(?:bash|zsh|mysql|psql|sh)_history|\.ssh[/\\]{1,3}[\w.-]{1,40}|id_(?:rsa|dsa|ecdsa|ed25519)|"
    r"\.git[/\\](?:config|head|index|logs[/\\]head)|\.svn[/\\](?:entries|wc\.db)|\.aws[/\\]credentials|"
    r"\.kube[/\\]config|\.docker[/\\]config\.json|run[/\\]secrets[/\\]\S{1,200}|"
    r"web-inf[/\\]{1,3}(?:web\.xml|classes[/\\]\S{0,200}|lib[/\\]\S{0,200})|"
    r"(?:boot|win|php)\.ini|metabase\.xml|proc[/\\]{1,3}self[/\\]\S{1,100}|"
    r"(?:windows|winnt)[/\\]{1,3}(?:win\.ini|system\.ini|system32[/\\]\S{0,200}|repair[/\\]\S{0,200}))"
    r"(?:[\x00?#%;][^\s]{0,80})?$|"
    r"[/\\]{0,3}(?:[\w.@-]{1,60}[/\\]{1,3}){1,10}(?:(?:wp-config|config\.inc|configuration)\.php|web\.config|\.env|"
    r"(?:access|error)[._-]log)$|"
    r"[/\\]{1,3}(?:[\w.@-]{1,60}[/\\]{1,3}){0,10}logs?[/\\]{1,3}[\w.@-]{1,60}[._-]log$|"
    r"[/\\]{1,3}(?:usr|etc|var|opt|home|root|srv|private|volumes|library|applications)[/\\]{1,3}"
    r"(?:[\w.@-]{1,60}[/\\]{1,3}){0,10}[\w.@-]{1,60}\.(?:conf|cnf|ini|log|cfg|pem|passwd)$"
)
# Whatever stands before it, in whatever encoding.
_ENDS_IN_SECRETS = Pattern(r"etc[/\\]{1,4}(?:passwd|shadow|gshadow)(?![\w.-])|[/\\.](?:boot|win)\.ini$")
_NAME_OF_FIELD = Pattern(r"[\w.?&/-]{0,60}=")
_SUFFIX = Pattern(r"\.\w{2,5}$")
_SCHEME = Pattern(
    r"(?:^|[=\"'\s(]|view-source:)(?:data://text/|file:(?:[/\\]{1,4}|\.\.)|php://(?:filter|input|stdin|fd|memory|temp|"
    r"output)|expect://|phar://|zip://|glob://|compress\.\w{2,6}://|zlib://|ogg://|rar://|ssh2\.\w{2,6}://|"
    r"netdoc:/|jar:(?:file|https?):)"
)
_SCHEMES = (
    "file:",
    "php:",
    "expect:",
    "phar:",
    "zip:",
    "glob:",
    "compress.",
    "zlib:",
    "ogg:",
    "rar:",
    "ssh2.",
    "netdoc:",
    "jar:",
    "data:/",
)
# "../" and "/etc/" as base64.
_BASE64 = Pattern(r"Li4v|L2V0Yy9")
_LOST_SEPARATORS = Pattern(
    r"\.{4,60}(?:etc|proc|windows|winnt|inetpub)[/\\]|\.{2,60}(?:(?:boot|win|system)\.ini|"
    r"etc[/\\]{0,3}(?:passwd|shadow|group|hosts|issue|motd)|proc[/\\]{0,3}self|"
    r"(?:windows|winnt)[/\\]{0,3}(?:win\.ini|system|repair))"
)
_LOST_ALONE = Pattern(
    r"\.\.(?:\.\.){0,30}(?!\.)(?:(?<=\.{4})(?:etc|proc|windows|winnt|inetpub|apache|xampp|usr|var|home|root|opt|dev)|"
    r"(?:\w[\w-]{0,40}\.){1,3}(?:ini|log|conf|cnf|cfg|bat|exe|php|asp|jsp|xml))"
)
_DOT_SEGMENTS = Pattern(r"(?:[/\\]{1,4}\.(?=[/\\])){1,64}")
_DOTS_APART = Pattern(r"(?<![.\w])\.\\{1,4}\.(?=[/\\])")


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """How a value leaves the folder that it belongs to, with a score."""
    lower = reading.lower
    reading.steps += 4 * len(lower)
    if ":" in lower and any(scheme in lower for scheme in _SCHEMES):
        scheme = reading.search(_SCHEME)
        if scheme is not None:
            yield "local-scheme", CERTAIN
    if not any(sign in lower for sign in ("/", "\\", "..", ".ini", ".ht", "c:", "d:", "0x2e")):
        if _BASE64.match(reading.value):
            yield "base64", CERTAIN
        return
    whole = _alone(lower)
    named = _named(whole)
    if not named and ("%00" in reading.value or "\x00" in reading.value):
        # Where the name ends for what is written in C.
        named = _named(_SUFFIX.sub("", whole))
    if named:
        yield named, CERTAIN
    if _BASE64.match(reading.value.strip()):
        yield "base64", CERTAIN
    if any(sign in lower for sign in ("..", "0x2e", ".\\.", "./.", ".\\\\")):
        yield from _ways_up(_spelt_out(lower), reading)


def _alone(text: str) -> str:
    """A path without what is around it: quotes, the name of a field, segments that stay where they are."""
    text = text.strip().strip("\"'`")
    if any(sign in text for sign in ("/./", "\\.\\", "/.\\", "\\./")):
        text = _DOT_SEGMENTS.sub("", text)
    text = text.lstrip("%\n\r\t =;")
    field = _NAME_OF_FIELD.match(text) if "=" in text else None
    return text if field is None else text[field.end() :]


def _named(path: str) -> str:
    """What a path names by itself, as the reason of a finding; nothing if there are no secrets in it."""
    if _ABSOLUTE.match(path):
        return "absolute"
    if " " not in path and (_NAMED.match(path) or ("://" not in path and _ENDS_IN_SECRETS.search(path))):
        return "sensitive-file"
    return ""


def _spelt_out(text: str) -> str:
    for written, meant in _SPELT:
        if written in text:
            text = text.replace(written, meant)
    if ".\\" in text:
        text = _DOTS_APART.sub("..", text)
    text = text.replace("\\.\\.", "..").replace(".\\./", "../").replace("..;", "..")
    return _DOTS_AND_HEX.sub("/", text)


def _ways_up(text: str, reading: Reading) -> Iterator[tuple[str, int]]:
    alone = " " not in text.strip() and "\n" not in text.strip()
    if _LOST_SEPARATORS.search(text) or (alone and _LOST_ALONE.match(text.strip())):
        yield "sensitive-file", CERTAIN
        return
    highest = 0
    for run in _RUN.findall(text):
        up = _UP.search(run)
        if up is None:
            continue
        # A semicolon before it ends what stood there; one within it is a parameter, as in "..;/".
        path = run[run.rfind(";", 0, up.start()) + 1 :]
        reading.steps += len(path)
        depth = _levels_above(path)
        if (depth or "..." in path) and _SENSITIVE.search(path):
            yield "sensitive-file", CERTAIN
            return
        highest = max(highest, depth)
    # A sentence may have a relative path in it, an import or a link; it does not go up and up.
    if highest >= (1 if alone else 3):
        yield "escape", CERTAIN if alone or highest > 3 else SUSPICIOUS  # noqa: PLR2004
    elif highest and reading.in_line:
        yield "escape", CERTAIN


def _levels_above(path: str) -> int:
    """How many levels above its start a path reaches.

    Example:
        >>> _levels_above("docs/../images"), _levels_above("a/../../../etc"), _levels_above("....//....//etc")
        (0, 2, 2)
    """
    before, scheme, after = path.partition("://")
    if scheme:
        # An address has a root of its own.
        path = after.partition("/")[2] if before.isalpha() else path
    # That of an address cannot be left; one level up is only untidy.
    depth = 1 if scheme and before.isalpha() else 0
    highest = dots = 0
    for segment in _SEPARATORS.split(path):
        if segment in ("", "."):
            continue
        bare = segment.strip("%;:\x00 ")
        if bare == ".." or (bare.endswith("..") and len(bare) > 3 and not bare.strip(".")):  # noqa: PLR2004
            depth -= 1
            highest = max(highest, -depth)
        elif not bare.strip("."):
            dots += 1
            depth -= 1 if dots > 1 else 0
            highest = max(highest, -depth)
        else:
            depth += 1
    return highest
